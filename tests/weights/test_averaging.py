"""What is particular to the combiners that weigh deltas, and to all that merge rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.errors import CheckpointError
from tensorspark.weights.averaging import MeanDeltaCombiner, StalenessScaledCombiner
from tensorspark.weights.combiners import (
    CombinerState,
    Contribution,
    DeltaWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)
from tensorspark.weights.elastic import ElasticAveragingCombiner
from tensorspark.weights.layout import TensorSpec, WeightLayout
from tensorspark.weights.rounds import RoundCombiner
from tensorspark.weights.server_optimizers import ServerAdagrad, ServerAdam, ServerSGD

ROUND_COMBINERS: list[Callable[[], RoundCombiner]] = [
    MeanDeltaCombiner,
    StalenessScaledCombiner,
    lambda: ElasticAveragingCombiner(0.5),
    ServerSGD,
    lambda: ServerAdagrad(0.1),
    lambda: ServerAdam(0.1),
]
every_round_combiner = pytest.mark.parametrize("make", ROUND_COMBINERS, ids=lambda make: type(make()).__name__)


def _round(
    combiner: WeightCombiner,
    current: list[float],
    pushes: list[tuple[list[float], int]],
    num_workers: int,
    dtype: str = "float64",
) -> list[Any]:
    """Plays a round of (delta, num_samples) and returns the new weights."""
    layout = WeightLayout([TensorSpec("W", (len(current),), dtype)])
    weights, partial = layout.pack({"W": np.array(current).astype(dtype)}), None
    for worker, (delta, num_samples) in enumerate(pushes):
        pushed = layout.pack({"W": np.array(delta).astype(dtype)})
        assert combiner.fold(layout, weights, partial, pushed, Contribution(worker, num_samples)) is True
        partial = pushed
    assert partial is not None
    assert combiner.finish(layout, weights, partial, len(pushes), num_workers) is True
    merged: list[Any] = layout.views(partial)["W"].astype("i8" if dtype[0] in "iu" else "f8").tolist()
    return merged


# Weights by samples


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_run_without_samples_stays_where_it_is_and_goes_on_once_there_are_some(num_workers: int) -> None:
    combiner = MeanDeltaCombiner(weighted=True)
    assert _round(combiner, [3.0, -2.0], [([5.0, 5.0], 0)], num_workers) == [3.0, -2.0]
    moved = _round(combiner, [3.0, -2.0], [([5.0, 10.0], 40)], num_workers)
    # Alone, the delta counts whole; among others, against a mean of (0 + 40) / 2 samples per push.
    share = 1.0 if num_workers == 1 else 2 / num_workers
    assert moved == pytest.approx([3.0 + 5 * share, -2.0 + 10 * share])


@pytest.mark.parametrize("order", [(0, 0, 30), (0, 30, 0), (30, 0, 0)])
@pytest.mark.parametrize("num_workers", [3, 4])
def test_pushes_without_samples_count_nothing_wherever_they_stand_in_a_round(
    order: tuple[int, ...], num_workers: int
) -> None:
    pushes = [([8.0] if num_samples else [99.0], num_samples) for num_samples in order]
    got = _round(MeanDeltaCombiner(weighted=True), [2.0], pushes, num_workers)
    # Incomplete, the push's 30 samples stand against 10 per push in the run so far, for one of four workers.
    assert got == pytest.approx([2.0 + (8.0 if num_workers == 3 else 30 / 10 * 8.0 / 4)])


def test_large_sample_counts_do_not_overflow_half_precision() -> None:
    pushes = [([40.0, -8.0], 60_000), ([40.0, -16.0], 20_000)]
    got = _round(MeanDeltaCombiner(weighted=True), [1.0, 2.0], pushes, 2, "float16")
    assert got == pytest.approx([41.0, -8.0], rel=2e-3)


def test_one_sample_in_a_first_push_does_not_blow_up_those_after_it() -> None:
    combiner = MeanDeltaCombiner(weighted=True)
    _round(combiner, [0.0], [([1.0], 1000)] * 9, 9)
    got = _round(combiner, [1.0], [([100.0], 1), ([100.0], 9999)], 2, "float16")
    assert got == pytest.approx([101.0], rel=2e-3)


def test_equal_samples_give_the_plain_mean_bit_for_bit() -> None:
    plain, weighted = MeanDeltaCombiner(), MeanDeltaCombiner(weighted=True)
    for _ in range(3):
        pushes = [([0.1, 0.7], 37), ([0.3, -0.9], 37), ([0.2, 0.4], 37)]
        assert _round(weighted, [1.0, 2.0], pushes, 3) == _round(plain, [1.0, 2.0], pushes, 3)


def test_a_workers_share_asynchronously_is_its_samples_over_the_runs_mean() -> None:
    combiner = MeanDeltaCombiner(weighted=True)
    weights = [10.0]
    for num_samples, usual in ((30, 30.0), (10, 20.0), (80, 40.0)):
        moved = _round(combiner, weights, [([6.0], num_samples)], 3)
        assert moved == pytest.approx([weights[0] + 6.0 * num_samples / usual / 3])
        weights = moved


# Integers


@pytest.mark.parametrize("num_pushes", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint16", "int64", "uint64"])
@pytest.mark.parametrize("make", [MeanDeltaCombiner, ServerSGD, lambda: ServerAdam(0.1)])
def test_integers_move_by_the_mean_over_the_pushes_towards_zero(
    make: Callable[[], WeightCombiner], dtype: str, num_pushes: int
) -> None:
    deltas = [[5, -7, -1, 0], [6, -4, 0, 1], [9, -9, -1, 0]][:num_pushes]
    current = np.array([50, 60, 70, 80])
    exact = [math.trunc(sum(column) / num_pushes) for column in zip(*deltas, strict=True)]
    layout = WeightLayout([TensorSpec("step", (4,), dtype)])
    weights, partial, combiner = layout.pack({"step": current.astype(dtype)}), None, make()
    for worker, delta in enumerate(deltas):
        pushed = layout.pack({"step": np.array(delta).astype(dtype)})  # unsigned: wraps around, as new - pulled does
        combiner.fold(layout, weights, partial, pushed, Contribution(worker))
        partial = pushed
    assert partial is not None
    combiner.finish(layout, weights, partial, num_pushes, 3)
    assert layout.views(partial)["step"].tolist() == (current + exact).tolist()


def test_a_mean_of_large_integers_is_exact() -> None:
    got = _round(MeanDeltaCombiner(), [7], [([2**61 + 3], 1), ([2**61 + 5], 1)], 2, "int64")
    assert got == [7 + 2**61 + 4]


def test_a_mean_over_more_pushes_than_the_dtype_counts_is_taken() -> None:
    assert _round(MeanDeltaCombiner(), [7, 8], [([0, 1], 1)] * 100 + [([0, -1], 1)] * 100, 200, "int8") == [7, 8]


def test_a_counter_advances_asynchronously_even_by_single_steps() -> None:
    combiner, steps = MeanDeltaCombiner(), [100]
    for _ in range(5):
        steps = _round(combiner, steps, [([1], 10)], 4, "int64")
    assert steps == [105]


# Staleness


def test_staleness_divides_floats_and_leaves_counts_whole() -> None:
    layout = WeightLayout([TensorSpec("W", (2,), "float32"), TensorSpec("step", (), "int64")])
    weights = layout.pack({"W": np.array([1.0, 2.0], np.float32), "step": np.array(10)})
    pushed = layout.pack({"W": np.array([49.0, -98.0], np.float32), "step": np.array(3)})
    assert StalenessScaledCombiner().fold(layout, weights, None, pushed, Contribution(0, 1, staleness=48)) is True
    assert layout.views(pushed)["W"].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    assert layout.views(pushed)["step"] == 13


def test_without_staleness_it_is_the_sum() -> None:
    pushes = [([1.1, -2.3], 1), ([0.7, 1.9], 1)]
    assert _round(StalenessScaledCombiner(), [0.3, 9.1], pushes, 2) == _round(
        DeltaWeightCombiner(), [0.3, 9.1], pushes, 2
    )


# Update-mean in rounds


def test_update_mean_takes_the_first_push_whole_again_if_its_round_was_given_up() -> None:
    layout = WeightLayout([TensorSpec("W", (1,), "float32")])
    combiner, weights = UpdateMeanWeightCombiner(), layout.pack({"W": np.array([4.0], np.float32)})
    combiner.fold(layout, weights, None, layout.pack({"W": np.array([8.0], np.float32)}), Contribution(0))
    assert combiner.state().values == {"has_merged": False}
    assert _round(combiner, [4.0], [([6.0], 1), ([10.0], 1)], 2) == [8.0]
    assert combiner.state().values == {"has_merged": True}
    assert _round(combiner, [8.0], [([4.0], 1)], 2) == [6.0]


def test_a_subclass_that_calls_update_means_compute_sees_rounds_as_update_mean_does() -> None:
    class Own(UpdateMeanWeightCombiner):
        def compute(self, origin_weight: Any, new_weight: Any, worker_id: Any = -1, name: Any = None) -> NDArray[Any]:
            return super().compute(origin_weight, new_weight, worker_id, name)

    layout = WeightLayout([TensorSpec("a", (1,), "float64"), TensorSpec("b", (1,), "float64")])
    current = layout.pack({"a": np.array([4.0]), "b": np.array([4.0])})
    combiner = Own()
    bad = layout.pack({"a": np.array([6.0]), "b": np.array([math.nan])})
    assert combiner.fold(layout, current, None, bad, Contribution(0)) is False
    for expected in (6.0, 5.0):
        pushed = layout.pack({"a": np.array([6.0]), "b": np.array([6.0])})
        assert combiner.fold(layout, current, None, pushed, Contribution(0)) is True
        combiner.finish(layout, current, pushed, 1, 1)
        assert [view.item() for view in layout.views(pushed).values()] == [expected, expected]


# A user's own


@every_round_combiner
def test_a_compute_of_ones_own_is_refused_where_the_class_is_defined(make: Callable[[], RoundCombiner]) -> None:
    with pytest.raises(TypeError, match=r"Own\.compute would never be called.*override fold or finish"):
        type("Own", (type(make()),), {"compute": lambda self, origin_weight, new_weight: new_weight})


@every_round_combiner
def test_compute_called_directly_says_what_to_call(make: Callable[[], RoundCombiner]) -> None:
    with pytest.raises(TypeError, match=f"{type(make()).__name__} merges rounds.*call merge, or fold and finish"):
        make().compute(np.ones(2), np.ones(2), worker_id=0, name="W")


@pytest.mark.parametrize("base", [DeltaWeightCombiner, MeanDeltaCombiner, ServerSGD])
@pytest.mark.parametrize("method", ["fold", "finish", "merge", "helper"])
def test_a_subclass_with_methods_of_its_own_is_not_taken_for_quick(base: type[WeightCombiner], method: str) -> None:
    assert type("Own", (base,), {method: lambda self, *arguments: True})().is_elementwise is False
    assert type("Same", (base,), {})().is_elementwise is True


def test_a_subclass_may_override_finish() -> None:
    class Doubled(MeanDeltaCombiner):
        def finish(self, layout: Any, current: Any, folded: Any, num_pushes: int, num_workers: int) -> bool:
            layout.views(folded)["W"][...] *= 2
            return super().finish(layout, current, folded, num_pushes, num_workers)

    assert _round(Doubled(), [10.0], [([3.0], 1), ([5.0], 1)], 2) == [18.0]


def test_a_rule_without_finish_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Unfinished must define finish"):
        _round(type("Unfinished", (RoundCombiner,), {})(), [1.0], [([1.0], 1)], 1)


@every_round_combiner
def test_merge_is_a_round_of_one_push(make: Callable[[], RoundCombiner]) -> None:
    layout = WeightLayout([TensorSpec("W", (3,), "float64")])
    current = layout.pack({"W": np.array([4.0, 5.0, -6.0])})
    pushed = layout.pack({"W": np.array([1.0, -2.0, 8.0])})
    assert make().merge(layout, current, pushed, worker_id=1) is True
    expected = _round(make(), [4.0, 5.0, -6.0], [([1.0, -2.0, 8.0], 1)], 1)
    assert layout.views(pushed)["W"].tolist() == expected
    bad = layout.pack({"W": np.array([1.0, math.nan, 8.0])})
    assert make().merge(layout, current, bad, worker_id=1) is False


# Bad arguments and states


@pytest.mark.parametrize("weighted", [1, 0, None, "yes"])
def test_weighted_is_a_boolean(weighted: Any) -> None:
    with pytest.raises(ValueError, match=r"MeanDeltaCombiner: weighted must be True or False, got"):
        MeanDeltaCombiner(weighted)


@pytest.mark.parametrize(
    "values", [{}, {"num_samples": 3}, {"num_samples": -1, "num_pushes": 1}, {"num_samples": 2.5, "num_pushes": True}]
)
def test_a_state_without_its_counts_is_refused(values: dict[str, Any]) -> None:
    layout = WeightLayout([TensorSpec("W", (1,), "float32")])
    with pytest.raises(CheckpointError, match=r"MeanDeltaCombiner's state must hold num_(samples|pushes)"):
        MeanDeltaCombiner(weighted=True).restore_state(layout, CombinerState(values=values))
