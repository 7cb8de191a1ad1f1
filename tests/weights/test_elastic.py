"""Elastic averaging: the worker's half and the server's."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.weights.combiners import Contribution
from tensorspark.weights.elastic import ElasticAveragingCombiner, elastic_difference
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

FLOAT_DTYPES = ["float32", "float64", "float16", "bfloat16", "complex64", "complex128"]


def _exchange(
    dtype: str, local: NDArray[Any], center: NDArray[Any], rate: float, *, in_place: bool = False
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Local weights, difference and center after `elastic_difference`."""
    layout = WeightLayout([TensorSpec("W", local.shape, dtype)])
    mine, theirs = (layout.pack({"W": array.astype(dtype)}) for array in (local, center))
    out = theirs if in_place else layout.allocate()
    elastic_difference(layout, mine, theirs, rate, out)
    a, e, c = (layout.views(buffer)["W"] for buffer in (mine, out, theirs))
    return a, e, c


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num", [5, 200_003])
def test_the_difference_is_alpha_of_the_way_and_leaves_the_worker(dtype: str, num: int) -> None:
    generator = np.random.default_rng(3)
    local, center = generator.integers(-30, 30, num), generator.integers(-30, 30, num)
    mine, difference, theirs = _exchange(dtype, local, center, 0.3)
    eps = float(ml_dtypes.finfo(np.dtype(dtype)).eps)
    wide = "c16" if dtype.startswith("complex") else "f8"
    np.testing.assert_allclose(difference.astype(wide), 0.3 * (local - center), rtol=0, atol=60 * eps)
    np.testing.assert_allclose(mine.astype(wide), local - 0.3 * (local - center), rtol=0, atol=60 * eps)
    assert theirs.astype(wide).tolist() == center.tolist()


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, "int32", "uint8"])
def test_the_difference_may_be_written_over_the_center(dtype: str) -> None:
    local, center = np.array([40, 3, 20, 7]), np.array([10, 9, 20, 16])
    apart = _exchange(dtype, local, center, 0.3)
    over = _exchange(dtype, local, center, 0.3, in_place=True)
    assert [array.tobytes() for array in over[:2]] == [array.tobytes() for array in apart[:2]]


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint16", "uint64"])
def test_integers_lose_nothing_to_rounding(dtype: str) -> None:
    local, center = np.array([40, 30, 21, 20, 19]), np.array([10, 41, 20, 20, 20])
    mine, difference, _ = _exchange(dtype, local, center, 0.3)
    exact = [math.trunc(0.3 * d) for d in (30, -11, 1, 0, -1)]
    assert mine.tolist() == (local - exact).tolist()
    moved = (center.astype(dtype) + difference).tolist()
    assert moved == (center + exact).tolist()


def test_a_counter_reaches_the_center_in_the_end() -> None:
    """What is too small to be exchanged stays with the worker, and counts at a later exchange."""
    layout = WeightLayout([TensorSpec("step", (), "int64")])
    combiner, local = ElasticAveragingCombiner(0.25), layout.pack({"step": np.array(100)})
    center = layout.pack({"step": np.array(100)})
    for _ in range(40):
        layout.views(local)["step"][...] += 1
        center = _push(combiner, layout, local, center)
    assert layout.views(local)["step"] + layout.views(center)["step"] == 240
    assert layout.views(local)["step"] - layout.views(center)["step"] < 8


def _push(combiner: ElasticAveragingCombiner, layout: WeightLayout, local: Buffer, center: Buffer) -> Buffer:
    difference = layout.allocate()
    elastic_difference(layout, local, center, combiner.moving_rate, difference)
    assert combiner.fold(layout, center, None, difference, Contribution(0)) is True
    assert combiner.finish(layout, center, difference, 1, 2) is True
    return difference


def test_a_synchronous_round_is_equation_4_of_the_paper() -> None:
    alpha, layout = 0.3, WeightLayout([TensorSpec("W", (2,), "float64")])
    workers = [np.array([9.0, -4.0]), np.array([1.0, 6.0]), np.array([5.0, 5.0])]
    center = np.array([2.0, 3.0])
    current, partial = layout.pack({"W": center}), None
    combiner, locals_ = ElasticAveragingCombiner(alpha), [layout.pack({"W": x}) for x in workers]
    for number, local in enumerate(locals_):
        pushed = layout.allocate()
        elastic_difference(layout, local, current, alpha, pushed)
        assert combiner.fold(layout, current, partial, pushed, Contribution(number)) is True
        partial = pushed
    assert partial is not None
    assert combiner.finish(layout, current, partial, 3, 3) is True
    # x̃ ← (1 - n α) x̃ + n α mean(x), and each x ← (1 - α) x + α x̃
    mean = np.mean(workers, axis=0)
    np.testing.assert_allclose(layout.views(partial)["W"], (1 - 3 * alpha) * center + 3 * alpha * mean, rtol=1e-14)
    for local, x in zip(locals_, workers, strict=True):
        np.testing.assert_allclose(layout.views(local)["W"], (1 - alpha) * x + alpha * center, rtol=1e-14)


def test_what_is_not_finite_reaches_the_server_and_is_refused_there() -> None:
    layout = WeightLayout([TensorSpec("W", (3,), "float32")])
    center = layout.pack({"W": np.ones(3, np.float32)})
    for value in (math.nan, math.inf):
        local = layout.pack({"W": np.array([1.0, value, 2.0], np.float32)})
        difference = layout.allocate()
        elastic_difference(layout, local, center, 0.5, difference)
        assert ElasticAveragingCombiner(0.5).fold(layout, center, None, difference, Contribution(0)) is False


@pytest.mark.parametrize("rate", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, None, "0.5", True])
def test_a_moving_rate_outside_0_and_1_is_refused(rate: Any) -> None:
    message = r"ElasticAveragingCombiner: moving_rate must be a finite number over 0 and under 1, got"
    with pytest.raises(ValueError, match=message):
        ElasticAveragingCombiner(rate)


def test_the_moving_rate_is_told_to_workers_and_checkpoints_as_a_float() -> None:
    combiner = ElasticAveragingCombiner(np.float32(0.5))
    assert (combiner.moving_rate, combiner.settings) == (0.5, {"moving_rate": 0.5})
    assert type(combiner.moving_rate) is float
