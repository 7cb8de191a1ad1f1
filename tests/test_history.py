"""The course of a run, against sums over the plain list of pushes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.history import History, Point, Recorder


@dataclass(frozen=True)
class Pushed:
    seconds: float
    num_steps: int
    num_samples: int
    loss: float  # mean over the push's samples


def _pushes(sizes: list[tuple[int, int, float]]) -> list[Pushed]:
    return [Pushed(0.5 * (i + 1), steps, samples, loss) for i, (steps, samples, loss) in enumerate(sizes)]


def _record(recorder: Recorder, pushes: list[Pushed]) -> None:
    for push in pushes:
        sums = {"loss": push.loss * push.num_samples, "negative": -2 * push.loss * push.num_samples}
        recorder.record(push.seconds, push.num_steps, push.num_samples, sums)


def _check_against_plain_calculation(points: tuple[Point, ...], pushes: list[Pushed]) -> None:
    """Every point is the weighted mean of the pushes since the point before, and together they are all of them."""
    by_seconds = {push.seconds: index for index, push in enumerate(pushes)}
    begin = 0
    for point in points:
        end = by_seconds[point.seconds] + 1
        assert end > begin
        part = pushes[begin:end]
        samples = sum(push.num_samples for push in part)
        mean = sum(push.loss * push.num_samples for push in part) / samples
        assert point.num_steps == sum(push.num_steps for push in pushes[:end])
        assert point.num_samples == sum(push.num_samples for push in pushes[:end])
        assert point.scalars["loss"] == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert point.scalars["negative"] == pytest.approx(-2 * mean, rel=1e-9, abs=1e-9)
        begin = end
    assert begin == len(pushes)


SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=80)


@given(sizes=SIZES, max_points=st.integers(2, 12))
def test_points_are_weighted_means_of_the_pushes_between_them_however_often_merged(
    sizes: list[tuple[int, int, float]], max_points: int
) -> None:
    pushes = _pushes(sizes)
    recorder = Recorder(max_points)
    for number, push in enumerate(pushes, 1):
        _record(recorder, [push])
        assert len(recorder.points()) <= max_points
        assert recorder.num_samples == sum(earlier.num_samples for earlier in pushes[:number])
    assert recorder.num_steps == sum(push.num_steps for push in pushes)
    _check_against_plain_calculation(recorder.points(), pushes)
    assert recorder.last() == recorder.points()[-1]


@given(sizes=SIZES, max_points=st.integers(2, 12), cut=st.integers(0, 80))
def test_a_recorder_made_from_anothers_export_goes_on_bit_for_bit_as_that_one(
    sizes: list[tuple[int, int, float]], max_points: int, cut: int
) -> None:
    pushes = _pushes(sizes)
    undisturbed, first = Recorder(max_points), Recorder(max_points)
    _record(undisturbed, pushes)
    _record(first, pushes[:cut])
    second = Recorder(max_points, points=first.export())
    _record(second, pushes[cut:])
    assert second.points() == undisturbed.points()
    assert second.export() == undisturbed.export()
    assert (second.num_steps, second.num_samples) == (undisturbed.num_steps, undisturbed.num_samples)


def test_sums_that_no_mean_gives_back_survive_an_export() -> None:
    assert 0.1 / 11 * 11 != 0.1
    first = Recorder()
    first.record(1.0, 1, 11, {"loss": 0.1})
    (sums,) = Recorder(points=first.export()).export().points
    assert sums.sums == {"loss": 0.1}


def test_an_export_stays_as_it_is_while_recording_goes_on() -> None:
    recorder = Recorder()
    recorder.record(1.0, 2, 4, {"loss": 8.0})
    exported = recorder.export()
    resumed = Recorder(points=exported)
    for each in (recorder, resumed):
        each.record(2.0, 1, 4, {"loss": 4.0})
    assert exported == Recorder(points=exported).export()
    assert [dict(sums.sums) for sums in exported.points] == [{"loss": 8.0}]


def test_a_short_run_has_a_point_per_push() -> None:
    recorder = Recorder()
    pushes = _pushes([(100, 10_000, 2.0), (100, 9_950, 1.5), (1, 1, 7.0)])
    _record(recorder, pushes)
    assert [(p.seconds, p.num_steps, p.num_samples) for p in recorder.points()] == [
        (0.5, 100, 10_000),
        (1.0, 200, 19_950),
        (1.5, 201, 19_951),
    ]
    assert [p.scalars["loss"] for p in recorder.points()] == pytest.approx([2.0, 1.5, 7.0])


def test_a_long_run_has_between_half_of_and_2000_points() -> None:
    recorder = Recorder()
    pushes = _pushes([(1, 1 + i % 7, float(i)) for i in range(9_001)])
    _record(recorder, pushes)
    assert 1000 <= len(recorder.points()) <= 2000
    _check_against_plain_calculation(recorder.points(), pushes)


def test_a_nan_stays_at_its_point_and_spoils_no_other() -> None:
    recorder = Recorder()
    _record(recorder, _pushes([(1, 10, 1.0), (1, 10, math.nan), (1, 10, 3.0)]))
    losses = [point.scalars["loss"] for point in recorder.points()]
    assert math.isnan(losses[1])
    assert [losses[0], losses[2]] == [1.0, 3.0]
    assert recorder.num_samples == 30


def test_merging_with_a_nan_keeps_totals_and_the_other_scalars() -> None:
    recorder = Recorder(max_points=2)
    for seconds in (1.0, 2.0, 3.0):
        recorder.record(seconds, 1, 10, {"loss": math.nan if seconds == 1.0 else 20.0, "norm": 5.0 * 10})
    first, last = recorder.points()
    assert math.isnan(first.scalars["loss"])
    assert first.scalars["norm"] == 5.0
    assert last.scalars["loss"] == 2.0
    assert last.num_samples == 30


def test_pushes_without_scalars_or_samples_are_counted() -> None:
    recorder = Recorder()
    assert recorder.last() is None
    assert recorder.points() == ()
    recorder.record(1.0, 3, 30, {})
    recorder.record(2.0, 1, 0, {"loss": 0.0})
    assert [(p.num_steps, p.num_samples, dict(p.scalars)) for p in recorder.points()] == [(3, 30, {}), (4, 30, {})]


def test_the_recorder_keeps_its_own_sums() -> None:
    recorder, sums = Recorder(), {"loss": 8.0}
    recorder.record(1.0, 1, 4, sums)
    sums["loss"] = 100.0
    assert recorder.points()[0].scalars == {"loss": 2.0}


def _history(points: tuple[Point, ...], seconds: float = 4.0) -> History:
    return History("mnist", num_steps=7, num_samples=600, seconds=seconds, seed=1, points=points, workers=())


def test_the_history_gives_columns_with_nan_where_a_point_has_no_value() -> None:
    history = _history((Point(1.0, 2, 10, {"loss": 3.0}), Point(2.0, 7, 20, {"accuracy": 0.5, "loss": 1.0})))
    assert history.steps.tolist() == [2, 7]
    assert history.steps.dtype == np.int64
    assert list(history.scalars) == ["loss", "accuracy"]
    np.testing.assert_array_equal(history.scalars["loss"], [3.0, 1.0])
    np.testing.assert_array_equal(history.scalars["accuracy"], [np.nan, 0.5])


def test_the_rate_is_samples_over_seconds_and_zero_for_no_time() -> None:
    assert _history(()).samples_per_s == 150.0
    assert _history((), seconds=0.0).samples_per_s == 0.0
    assert _history(()).scalars == {}
    assert _history(()).steps.shape == (0,)
