"""Norms and histograms of weights, against numpy over the whole arrays."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tensorspark.telemetry.records import TensorStats
from tensorspark.telemetry.tensors import tensor_stats

RNG = np.random.default_rng(11)


def stats(values: Any, before: Any = None) -> TensorStats:
    (found,) = tensor_stats({"W": values}, None if before is None else {"W": before})
    return found


def test_norms_are_of_all_values_and_of_their_change() -> None:
    before = RNG.normal(3.0, 1.0, (700, 900)).astype(np.float32)  # more than two blocks
    now = before + RNG.normal(0.0, 0.25, before.shape).astype(np.float32)
    found = stats(now, before)
    assert found.name == "W"
    assert found.norm == pytest.approx(np.linalg.norm(now.astype(np.float64)), rel=1e-12)
    change = now.astype(np.float64) - before.astype(np.float64)
    assert found.update_norm == pytest.approx(np.linalg.norm(change), rel=1e-12)


def test_a_first_look_knows_of_no_change() -> None:
    found = stats(np.full((2, 3), 2.0, np.float32))
    assert found.norm == pytest.approx(math.sqrt(24.0))
    assert found.update_norm is None
    assert (found.update_edges, found.update_counts) == ((), ())


def test_a_histogram_counts_every_value_between_its_edges() -> None:
    values = RNG.normal(1.0, 2.0, 5000)
    found = stats(values, values - 0.5)
    assert sum(found.histogram_counts) == 5000
    assert len(found.histogram_edges) == len(found.histogram_counts) + 1
    assert found.histogram_edges[0] == values.min()
    assert found.histogram_edges[-1] == values.max()
    for low, high, count in zip(
        found.histogram_edges[:-2], found.histogram_edges[1:-1], found.histogram_counts[:-1], strict=True
    ):
        assert count == np.count_nonzero((values >= low) & (values < high))
    assert sum(found.update_counts) == 5000
    assert found.update_edges[0] <= 0.5 <= found.update_edges[-1]


def test_a_large_tensors_histogram_is_of_a_part_that_is_spread_over_all_of_it() -> None:
    values = np.concatenate([np.full(300_000, -1.0), np.full(100_000, 3.0)]).astype(np.float32)
    found = stats(values)
    assert 50_000 < sum(found.histogram_counts) <= 100_000
    assert found.histogram_counts[0] / sum(found.histogram_counts) == pytest.approx(0.75, abs=1e-3)
    assert found.norm == pytest.approx(math.sqrt(300_000 + 900_000))


def test_equal_values_share_one_bin_about_them() -> None:
    for value in (0.0, 7.5, -1e-40, 1e30):
        found = stats(np.full(12, value))
        assert max(found.histogram_counts) == sum(found.histogram_counts) == 12
        assert found.histogram_edges[0] < value < found.histogram_edges[-1]


def test_what_is_not_finite_is_left_out_of_histograms_and_leaves_no_norm() -> None:
    before = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    found = stats(np.array([1.5, np.nan, np.inf, 3.5], np.float32), before)
    assert found.norm is None
    assert found.update_norm is None
    assert sum(found.histogram_counts) == 2
    assert sum(found.update_counts) == 2
    nothing = stats(np.full(3, np.nan, np.float32))
    assert (nothing.histogram_edges, nothing.histogram_counts) == ((), ())


def test_half_precision_is_added_up_in_full() -> None:
    values = np.full(100_000, 60_000.0, np.float16)  # its square is not one of float16's
    assert stats(values, values / 2).norm == pytest.approx(60_000 * math.sqrt(100_000), rel=1e-3)
    few = np.array([1.0, -2.0, 0.5], ml_dtypes.bfloat16)
    found = stats(few, np.array([1.0, -1.0, 0.5], ml_dtypes.bfloat16))
    assert found.norm == pytest.approx(math.sqrt(5.25))
    assert found.update_norm == 1.0


def test_a_complex_number_counts_as_two_and_an_integer_as_itself() -> None:
    assert stats(np.array([[3 + 4j], [0 + 12j]])).norm == pytest.approx(13.0)
    assert stats(np.array(-9, np.int64), np.array(-7, np.int64)).update_norm == 2.0
    assert stats(np.array([True, True, False]), np.array([False, True, True])).update_norm == pytest.approx(2**0.5)


def test_an_empty_tensor_has_a_norm_of_zero_and_no_bins() -> None:
    found = stats(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32))
    assert (found.norm, found.update_norm, found.histogram_counts) == (0.0, 0.0, ())


@given(
    arrays(np.float64, 6, elements=st.floats(width=64)),
    arrays(np.float64, 6, elements=st.floats(width=64)),
)
def test_no_values_whatever_end_the_look_at_them(now: Any, before: Any) -> None:
    found = stats(now, before)
    for edges, counts in (
        (found.histogram_edges, found.histogram_counts),
        (found.update_edges, found.update_counts),
    ):
        assert all(map(math.isfinite, edges))
        assert list(edges) == sorted(edges)
        assert len(edges) == (len(counts) + 1 if counts else 0)
    finite = now[np.isfinite(now)]
    if found.histogram_counts:
        assert sum(found.histogram_counts) == finite.size
    assert found.norm is None or math.isfinite(found.norm)
    assert found.update_norm is None or math.isfinite(found.update_norm)


@given(st.floats(1e-320, 1e299), st.integers(1, 40))
def test_values_that_can_hardly_be_told_apart_have_a_histogram_still(value: float, num_steps: int) -> None:
    values = [value]
    for _ in range(num_steps):
        values.append(float(np.nextafter(values[-1], np.inf)))
    assert sum(stats(np.array(values)).histogram_counts) == len(values)
