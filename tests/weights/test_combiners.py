"""All combiners against one contract, and each against numbers worked out by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorspark.errors import CombinerError
from tensorspark.weights.combiners import (
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

Array = NDArray[Any]


class HalfWay(WeightCombiner):
    """A user's own: half of the way to the worker's weights."""

    def compute(
        self, origin_weight: Array, new_weight: Array, worker_id: int | str = -1, name: str | None = None
    ) -> Array:
        return origin_weight + (new_weight - origin_weight) // origin_weight.dtype.type(2)


class HalfDelta(DeltaWeightCombiner):
    """A user's own on top of ours: half of what the worker changed."""

    def compute(
        self, origin_weight: Array, new_weight: Array, worker_id: int | str = -1, name: str | None = None
    ) -> Array:
        added = super().compute(origin_weight, new_weight, worker_id=worker_id, name=name)
        return origin_weight + (added - origin_weight) // origin_weight.dtype.type(2)


@dataclass(frozen=True)
class Case:
    """`merged` is the rule in exact arithmetic, for pushes after the first: (server's, worker's) to the server's."""

    make: Callable[[], WeightCombiner]
    pushes: str
    merged: Callable[[Fraction, Fraction], Fraction]
    first: Callable[[Fraction, Fraction], Fraction]


def _mean_of_3(w: Fraction, new: Fraction) -> Fraction:
    return (2 * w + new) / 3


def _half_way(w: Fraction, new: Fraction) -> Fraction:
    return w + math.floor((new - w) / 2)


def _worker_wins(w: Fraction, new: Fraction) -> Fraction:
    return new


def _mean_of_two(w: Fraction, new: Fraction) -> Fraction:
    return (w + new) / 2


# Where the worker pulled the server's weights as they are, w + (new - pulled) is the worker's weights.
CASES = {
    "delta": Case(DeltaWeightCombiner, "delta", _worker_wins, _worker_wins),
    "mean": Case(lambda: MeanWeightCombiner(3), "weights", _mean_of_3, _mean_of_3),
    "update_mean": Case(UpdateMeanWeightCombiner, "weights", _mean_of_two, _worker_wins),
    "own": Case(HalfWay, "weights", _half_way, _half_way),
    "own_delta": Case(HalfDelta, "delta", _half_way, _half_way),
}
every_combiner = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))

LAYOUT = WeightLayout(
    [
        TensorSpec("W", (5, 3), "float32"),
        TensorSpec("step", (), "int64"),
        TensorSpec("d", (4,), "float64"),
        TensorSpec("half", (9,), "bfloat16"),
        TensorSpec("none", (0, 2), "float32"),
        TensorSpec("b", (3,), "float32"),
    ]
)
FLOATS = ("W", "d", "half", "b")


def _weights(seed: int, low: int = 1, high: int = 40) -> dict[str, Array]:
    """Small whole numbers other than zero: every dtype here holds them, their differences and sums exactly."""
    generator = np.random.default_rng(seed)
    return {s.name: np.asarray(generator.integers(low, high, s.shape)).astype(s.dtype) for s in LAYOUT.specs}


def _push(case: Case, layout: WeightLayout, pulled: Buffer, local: Buffer) -> Buffer:
    """What the worker sends, worked out tensor by tensor."""
    if case.pushes == "weights":
        return local
    before, after = layout.views(pulled), layout.views(local)
    return layout.pack({name: np.asarray(after[name] - before[name]) for name in after})


def _merge(combiner: WeightCombiner, layout: WeightLayout, current: Buffer, pushed: Buffer) -> tuple[Buffer, bool]:
    """Merges into a copy of `pushed`; returns it, and whether it is finite."""
    merged = layout.allocate()
    merged[:] = pushed
    return merged, combiner.merge(layout, current, merged, worker_id=2)


def _exact(rule: Callable[[Fraction, Fraction], Fraction], w: Array, new: Array) -> list[Fraction]:
    return [rule(Fraction(float(a)), Fraction(float(b))) for a, b in zip(w.flat, new.flat, strict=True)]


def _check(name: str, got: Array, expected: list[Fraction]) -> None:
    if got.dtype.kind == "i":
        assert [int(value) for value in got.flat] == [math.trunc(value) for value in expected], name
        return
    # Three roundings: of the sum, of the quotient, and to be compared.
    relative = 3 * float(ml_dtypes.finfo(got.dtype).eps)
    for value, exact in zip(got.flat, expected, strict=True):
        assert float(value) == pytest.approx(float(exact), rel=relative), name


@every_combiner
def test_a_combiner_says_what_it_wants_pushed(case: Case) -> None:
    assert case.make().pushes == case.pushes


@every_combiner
def test_merges_agree_with_exact_arithmetic_from_weights_that_are_not_zero(case: Case) -> None:
    combiner = case.make()
    server = _weights(seed=1)
    for turn in range(4):
        local = _weights(seed=10 + turn)
        current = LAYOUT.pack(server)
        out, finite = _merge(combiner, LAYOUT, current, _push(case, LAYOUT, current, LAYOUT.pack(local)))
        assert finite is True
        merged = {name: view.copy() for name, view in LAYOUT.views(out).items()}
        rule = case.merged if turn else case.first
        for name, got in merged.items():
            _check(name, got, _exact(rule, server[name], local[name]))
        server = {name: np.asarray(np.round(value.astype("f8"))).astype(value.dtype) for name, value in merged.items()}


@every_combiner
def test_a_merge_keeps_its_inputs_and_every_shape_and_dtype(case: Case) -> None:
    combiner = case.make()
    current, pushed = LAYOUT.pack(_weights(1)), LAYOUT.pack(_weights(2))
    before = current.tobytes(), pushed.tobytes()
    for _ in range(2):
        current.flags.writeable = False
        _merge(combiner, LAYOUT, current, pushed)
        assert (current.tobytes(), pushed.tobytes()) == before


@every_combiner
def test_reset_value_makes_a_combiner_as_new(case: Case) -> None:
    combiner, current = case.make(), LAYOUT.pack(_weights(1))
    pushed = _push(case, LAYOUT, current, LAYOUT.pack(_weights(2)))
    first, _ = _merge(combiner, LAYOUT, current, pushed)
    _merge(combiner, LAYOUT, first, pushed)
    combiner.reset_value()
    again, _ = _merge(combiner, LAYOUT, current, pushed)
    assert again.tobytes() == first.tobytes()


@every_combiner
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("position", [0, -1])
def test_nan_and_infinity_in_any_tensor_are_noticed(case: Case, value: float, name: str, position: int) -> None:
    current, pushed = LAYOUT.pack(_weights(1)), LAYOUT.pack(_weights(2))
    LAYOUT.views(pushed)[name].reshape(-1)[position] = value
    with np.errstate(invalid="ignore"):
        _, finite = _merge(case.make(), LAYOUT, current, pushed)
        assert finite is False


LARGE = WeightLayout([TensorSpec("a", (200_001,), "float32"), TensorSpec("b", (40_000,), "float64")])


@every_combiner
@pytest.mark.parametrize(
    ("name", "position"),
    [("a", 0), ("a", 65_535), ("a", 65_536), ("a", 131_072), ("a", 200_000), ("b", 0), ("b", 32_768), ("b", 39_999)],
)
def test_one_nan_among_many_blocks_is_noticed(case: Case, name: str, position: int) -> None:
    ones = LARGE.pack({s.name: np.ones(s.shape, s.dtype) for s in LARGE.specs})
    pushed = ones.copy()
    assert _merge(case.make(), LARGE, ones, pushed)[1] is True
    LARGE.views(pushed)[name][position] = math.nan
    assert _merge(case.make(), LARGE, ones, pushed)[1] is False


@every_combiner
def test_infinities_that_cancel_are_noticed(case: Case) -> None:
    current, pushed = LAYOUT.pack(_weights(1)), LAYOUT.pack(_weights(2))
    LAYOUT.views(pushed)["d"][:2] = math.inf, -math.inf
    with np.errstate(invalid="ignore"):
        assert _merge(case.make(), LAYOUT, current, pushed)[1] is False


@every_combiner
def test_numbers_whose_sum_overflows_are_finite(case: Case) -> None:
    layout = WeightLayout([TensorSpec("a", (70_000,), "float32"), TensorSpec("h", (10,), "bfloat16")])
    huge = layout.pack({"a": np.full(70_000, 1e38, np.float32), "h": np.full(10, 1e38).astype("bfloat16")})
    out, finite = _merge(case.make(), layout, huge, _push(case, layout, huge, huge))
    assert finite is True
    assert layout.find_non_finite(out) is None
    for view in layout.views(out).values():
        np.testing.assert_allclose(view.astype("f8"), 1e38, rtol=0.01)


@every_combiner
def test_several_blocks_are_merged_as_one(case: Case) -> None:
    generator = np.random.default_rng(3)
    server, local = (
        {s.name: generator.integers(1, 1000, s.shape).astype(s.dtype) for s in LARGE.specs} for _ in range(2)
    )
    current = LARGE.pack(server)
    out, _ = _merge(case.make(), LARGE, current, _push(case, LARGE, current, LARGE.pack(local)))
    for name, got in LARGE.views(out).items():
        expected = [float(value) for value in _exact(case.first, server[name], local[name])]
        np.testing.assert_allclose(got, expected, rtol=3e-7)


floats = st.floats(-1000, 1000, width=32)


@given(rows=st.lists(st.tuples(floats, floats), min_size=1, max_size=40))
@every_combiner
def test_merging_flat_buffers_says_what_compute_says(case: Case, rows: list[tuple[float, float]]) -> None:
    """With the worker's weights for `new_weight`, as in the original."""
    server, local = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    layout = WeightLayout([TensorSpec("W", server.shape, "float32")])
    current = layout.pack({"W": server})
    pushed = _push(case, layout, current, layout.pack({"W": local}))
    arrived = server + layout.views(pushed)["W"] if case.pushes == "delta" else local
    out, _ = _merge(case.make(), layout, current, pushed)
    by_hand = case.make()
    if isinstance(by_hand, DeltaWeightCombiner):
        by_hand.last_weight = {2: {"W": server.copy()}}
    expected = by_hand.compute(server.copy(), arrived.copy(), worker_id=2, name="W")
    np.testing.assert_allclose(layout.views(out)["W"], expected, rtol=1e-6, atol=1e-3)


# Deltas


def test_deltas_of_two_workers_from_one_snapshot_add_up() -> None:
    layout = WeightLayout([TensorSpec("W", (3,), "float64")])
    snapshot = np.array([10.0, 20.0, 30.0])
    combiner, current = DeltaWeightCombiner(), layout.pack({"W": snapshot})
    for worker, local in enumerate(([12.0, 20.0, 29.0], [11.0, 15.0, 30.0])):
        merged = layout.pack({"W": np.array(local) - snapshot})
        combiner.merge(layout, current, merged, worker)
        current = merged
    assert layout.views(current)["W"].tolist() == [13.0, 15.0, 29.0]


def test_a_subclass_that_calls_ours_gets_the_delta_since_the_last_pull_not_since_the_last_push() -> None:
    layout = WeightLayout([TensorSpec("W", (2,), "float64")])
    combiner, current = HalfDelta(), layout.pack({"W": np.array([100.0, 200.0])})
    for worker, delta in ((0, [8.0, -2.0]), (1, [4.0, 4.0]), (0, [2.0, 6.0])):
        merged = layout.pack({"W": np.array(delta)})
        combiner.merge(layout, current, merged, worker)
        current = merged
    assert layout.views(current)["W"].tolist() == [100.0 + 4 + 2 + 1, 200.0 - 1 + 2 + 3]


def test_compute_called_directly_keeps_the_originals_contract() -> None:
    combiner = DeltaWeightCombiner()
    assert combiner.compute(np.array([0, 0, 0]), np.array([2, 2, 2]), worker_id="1").tolist() == [2, 2, 2]
    assert combiner.compute(np.array([2, 2, 2]), np.array([3, 3, 2]), worker_id="2").tolist() == [5, 5, 4]
    assert combiner.compute(np.array([5, 5, 4]), np.array([2, 4, 3]), worker_id="2").tolist() == [2, 4, 3]


def test_compute_keeps_a_base_per_worker_and_tensor_and_its_arguments_as_they_are() -> None:
    combiner = DeltaWeightCombiner()
    origin, new = np.array([1.0]), np.array([5.0])
    assert combiner.compute(origin, new, worker_id=0, name="W").tolist() == [6.0]
    assert combiner.compute(origin, new, worker_id=0, name="b").tolist() == [6.0]
    assert combiner.compute(origin, new, worker_id=1, name="W").tolist() == [6.0]
    assert combiner.compute(origin, new, worker_id=0, name="W").tolist() == [0.0]
    assert (origin.tolist(), new.tolist()) == ([1.0], [5.0])


def test_changing_what_compute_returned_does_not_change_the_base() -> None:
    combiner = DeltaWeightCombiner()
    combiner.compute(np.array([0.0]), np.array([2.0]), worker_id=0)[...] = 50.0
    assert combiner.compute(np.array([10.0]), np.array([3.0]), worker_id=0).tolist() == [11.0]


def test_reset_value_forgets_the_bases_of_compute() -> None:
    combiner = DeltaWeightCombiner()
    combiner.compute(np.array([1.0]), np.array([2.0]), worker_id=0)
    combiner.reset_value()
    assert combiner.compute(np.array([1.0]), np.array([2.0]), worker_id=0).tolist() == [3.0]


def test_a_delta_without_its_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="worker_id"):
        DeltaWeightCombiner().compute(np.array([0.0]), np.array([2.0]))


# Means


@pytest.mark.parametrize("num", [0, -1, 1.5, "2", None, True, np.float64(2)])
def test_a_mean_over_no_number_of_workers_is_refused(num: Any) -> None:
    with pytest.raises(ValueError, match="num must be an integer of at least 1"):
        MeanWeightCombiner(num)


@pytest.mark.parametrize("num", [1, 2, 10, np.int64(4)])
def test_a_mean_moves_one_part_in_num_of_the_way(num: int) -> None:
    origin, new = np.array([8.0, -3.0]), np.array([16.0, 5.0])
    expected = [8.0 + 8 / int(num), -3.0 + 8 / int(num)]
    assert MeanWeightCombiner(num).compute(origin, new) == pytest.approx(expected)


@pytest.mark.parametrize("combiner", [MeanWeightCombiner(3), UpdateMeanWeightCombiner()], ids=["mean", "update_mean"])
@pytest.mark.parametrize(("dtype", "value"), [("int8", 100), ("int32", 2**30), ("uint16", 40_000)])
def test_the_mean_of_equal_integers_is_that_integer(combiner: WeightCombiner, dtype: str, value: int) -> None:
    layout = WeightLayout([TensorSpec("count", (2,), dtype)])
    combiner.reset_value()
    current = layout.pack({"count": np.array([value, value - 1], dtype)})
    for _ in range(3):
        out, _ = _merge(combiner, layout, current, current)
        assert layout.views(out)["count"].tolist() == [value, value - 1]


def test_an_update_mean_takes_the_first_push_of_every_tensor_as_it_is() -> None:
    combiner = UpdateMeanWeightCombiner(object())
    assert combiner.compute(np.array([4.0]), np.array([8.0]), worker_id=0, name="W").tolist() == [8.0]
    assert combiner.compute(np.array([1.0]), np.array([3.0]), worker_id=0, name="b").tolist() == [3.0]
    assert combiner.compute(np.array([8.0]), np.array([2.0]), worker_id=1, name="W").tolist() == [5.0]
    combiner.reset_value()
    assert combiner.compute(np.array([5.0]), np.array([1.0]), worker_id=1, name="W").tolist() == [1.0]


def test_a_first_push_that_is_refused_is_not_the_first() -> None:
    layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    combiner, current = UpdateMeanWeightCombiner(), layout.pack({"W": np.array([4.0, 4.0], np.float32)})
    bad = layout.pack({"W": np.array([1.0, math.nan], np.float32)})
    assert _merge(combiner, layout, current, bad)[1] is False
    out, _ = _merge(combiner, layout, current, layout.pack({"W": np.array([8.0, 6.0], np.float32)}))
    assert layout.views(out)["W"].tolist() == [8.0, 6.0]


# A user's own


def _own(compute: Callable[..., Any], base: type[WeightCombiner] = WeightCombiner) -> WeightCombiner:
    return type("Own", (base,), {"compute": compute, "__module__": __name__})()


SMALL = WeightLayout([TensorSpec("W", (2, 3), "float32"), TensorSpec("step", (), "int64")])


def _small(value: float) -> Buffer:
    return SMALL.pack({"W": np.full((2, 3), value, np.float32), "step": np.array(int(value), np.int64)})


@pytest.mark.parametrize("base", [WeightCombiner, DeltaWeightCombiner, MeanWeightCombiner, UpdateMeanWeightCombiner])
def test_a_combiner_that_raises_is_named_with_the_tensor_and_the_reason(base: type[WeightCombiner]) -> None:
    def compute(self: Any, origin_weight: Array, new_weight: Array, worker_id: int = -1, name: str = "") -> Array:
        raise KeyError("lost")

    own = type("Own", (base,), {"compute": compute, "__init__": lambda self: None, "last_weight": {}})()
    with pytest.raises(CombinerError, match=r"Own.*W.*KeyError.*lost") as caught:
        own.merge(SMALL, _small(1), _small(2), 0)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros((3, 2), np.float32), r"shape \[3, 2\].*\[2, 3\]"),
        (np.zeros(6, np.float32), r"shape \[6\]"),
        (np.float32(1), r"shape \[\]"),
        (None, r"shape \[\]"),
        ([[1.0, 2.0], [3.0]], "raised ValueError"),
        (np.zeros((2, 3), complex), "dtype complex128.*float32"),
        (np.full((2, 3), "a"), "dtype <U1.*float32"),
        (np.full((2, 3), None), "dtype object.*float32"),
    ],
    ids=["transposed", "flat", "number", "none", "ragged", "complex", "strings", "objects"],
)
def test_a_combiner_that_returns_something_else_is_named_with_what_was_expected(returned: Any, message: str) -> None:
    own = _own(lambda self, origin_weight, new_weight, worker_id=-1, name=None: returned)
    with pytest.raises(CombinerError, match=f"Own.*W.*{message}"):
        own.merge(SMALL, _small(1), _small(2), 0)


def test_fractions_for_an_integer_tensor_are_refused_not_cut_off() -> None:
    own = _own(lambda self, origin_weight, new_weight, worker_id=-1, name=None: (origin_weight + new_weight) / 2)
    with pytest.raises(CombinerError, match=r"step.*float64.*int64"):
        own.merge(SMALL, _small(1), _small(2), 0)


def test_a_wider_float_is_taken() -> None:
    def compute(self: Any, origin_weight: Array, new_weight: Array, worker_id: int = -1, name: str = "") -> Any:
        return (origin_weight.astype("f8") + new_weight).tolist() if name == "W" else new_weight

    out = _small(2)
    assert _own(compute).merge(SMALL, _small(1), out, 0) is True
    assert SMALL.views(out)["W"].tolist() == [[3.0] * 3] * 2


def test_a_result_too_large_for_the_tensor_is_the_combiners_fault() -> None:
    own = _own(lambda self, origin_weight, new_weight, worker_id=-1, name=None: (
        np.full(origin_weight.shape, 1e300) if name == "W" else new_weight))  # fmt: skip
    with pytest.raises(CombinerError, match="Own made NaN or infinity in W from finite weights"):
        own.merge(SMALL, _small(1), _small(2), 0)


@pytest.mark.parametrize("base", [WeightCombiner, DeltaWeightCombiner])
def test_a_combiner_may_change_the_arrays_it_gets(base: type[WeightCombiner]) -> None:
    def compute(self: Any, origin_weight: Array, new_weight: Array, worker_id: int = -1, name: str = "") -> Array:
        origin_weight[...] = -50
        new_weight[...] += 1
        return new_weight

    current, out = _small(10), _small(3)
    before = current.tobytes()
    _own(compute, base).merge(SMALL, current, out, 0)
    assert current.tobytes() == before
    expected = 14 if base is DeltaWeightCombiner else 4
    assert SMALL.views(out)["W"].tolist() == [[float(expected)] * 3] * 2
    assert SMALL.views(out)["step"] == expected


def test_a_combiner_is_told_worker_and_tensor() -> None:
    told = []

    def compute(self: Any, origin_weight: Array, new_weight: Array, worker_id: int = -1, name: str = "") -> Array:
        told.append((worker_id, name, new_weight.shape))
        return new_weight

    _own(compute).merge(SMALL, _small(1), _small(2), 7)
    assert told == [(7, "W", (2, 3)), (7, "step", ())]


def test_a_combiner_without_compute_says_so() -> None:
    class Unfinished(WeightCombiner):
        pass

    with pytest.raises(CombinerError, match="Unfinished must define compute"):
        Unfinished().merge(SMALL, _small(1), _small(2), 0)
