"""What is known of a run from its records: bounded, the same live and replayed, rates by hand."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    Record,
    RunBegan,
    RunEnded,
    Sample,
    Span,
    Spans,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.view import Norms, Pace, RunView

BEGAN = RunBegan(0.0, 3, "digits", 1.7e9, "asynchronous", 2, 5, "DeltaWeightCombiner", {}, (), 52, "2.0.0")


def worker(partition: int, num_steps: int, state: str = "live") -> WorkerSample:
    counts = (num_steps, 10 * num_steps, 0, 0, 0, 500, 400)
    return WorkerSample(partition, state, "node-1", 1, 1, *counts, 0.5, 0, {"compute": 1.5})


def sample(seconds: float, num_steps: int, workers: tuple[WorkerSample, ...] = (), **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "seconds": seconds, "num_steps": num_steps, "num_samples": 10 * num_steps, "num_live": 2, "num_lost": 0,
        "num_standby": 0, "num_waiting": 1, "num_finished": 0, "progress": 0.5, "epoch": 1, "version": num_steps,
        "num_bytes_pushed": 100 * num_steps, "num_bytes_pulled": 300 * num_steps, "num_raw_bytes_pushed": 0,
        "num_raw_bytes_pulled": 0, "staleness": (num_steps,), "workers": workers,
    }  # fmt: skip
    return Sample(**{**values, **changes})


def test_each_record_is_where_who_shows_it_looks_for_it() -> None:
    event, line = WorkerEvent(1.0, 1, "lost", "node-1", 4), LogLine(2.0, 1, "node-1", 40, "a", "b")
    epoch, checkpoint = EpochEnded(3.0, 1, 9, {"loss": 0.5}), CheckpointWritten(4.0, 7, "file:///c", 100, 0.5)
    ended, span = RunEnded(5.0, "failed", "why"), Span(0.5, 1, "compute", 0.25)
    point = TrainingPoint(1.0, 3, 30, {"loss": 0.25})
    records: list[Record] = [BEGAN, event, line, epoch, checkpoint, Spans(1.0, (span,)), point, sample(1.0, 4), ended]
    view = RunView(records)
    assert (view.began, view.ended, view.sample) == (BEGAN, ended, sample(1.0, 4))
    assert (list(view.events), list(view.logs)) == ([event], [line])
    assert (view.epochs, list(view.checkpoints)) == ([epoch], [checkpoint])
    assert (list(view.spans), view.num_spans, list(view.points)) == ([span], 1, [point])
    assert view.revision == len(records)


def test_before_the_first_record_nothing_is_known() -> None:
    view = RunView()
    assert (view.began, view.ended, view.sample, view.weights, view.workers) == (None, None, None, None, {})
    assert (view.compression, view.samples_per_s, view.revision) == (1.0, 0.0, 0)


def test_workers_of_whom_nothing_changed_stay_as_they_were() -> None:
    view = RunView([sample(1.0, 4, (worker(0, 3), worker(1, 1)))])
    view.apply(sample(2.0, 6, (worker(1, 3, "lost"),)))
    assert view.workers == {0: worker(0, 3), 1: worker(1, 3, "lost")}


def test_a_pace_is_of_what_lies_between_two_samples() -> None:
    view = RunView([sample(10.0, 100), sample(12.5, 200, num_live=3)])
    assert list(view.paces) == [Pace(12.5, 2.5, 400.0, 40.0, 4000.0, 12_000.0, 3, 1)]
    view.apply(sample(12.5, 999))  # no time has passed
    assert len(view.paces) == 1
    assert view.samples_per_s == 400.0


def test_the_speed_is_that_of_about_the_last_ten_seconds_each_second_alike() -> None:
    view = RunView([sample(0.0, 0), sample(20.0, 10_000), sample(24.0, 10_040), sample(30.0, 10_100)])
    assert view.samples_per_s == pytest.approx(10 * (10_100 - 10_000) / 10)
    view.apply(sample(100.0, 10_100))
    assert view.samples_per_s == 0.0


def test_compression_is_bytes_of_weights_for_each_on_the_wire_both_ways() -> None:
    view = RunView([sample(1.0, 2, num_raw_bytes_pushed=1000, num_raw_bytes_pulled=600)])
    assert view.compression == 1600 / 800
    assert RunView([sample(1.0, 0)]).compression == 1.0


def test_norms_are_a_series_beside_the_newest_histograms() -> None:
    first = WeightStats(1.0, 1, 10, (TensorStats("W", 2.5, None), TensorStats("b", None, None)))
    second = WeightStats(2.0, 5, 50, (TensorStats("W", 3.5, 0.25), TensorStats("b", 1.5, 0.5)))
    view = RunView([first, second])
    assert view.weights is second
    before, now = view.norms
    assert (before.weights[0], now) == (2.5, Norms(2.0, 50, (3.5, 1.5), (0.25, 0.5)))
    assert math.isnan(before.weights[1])
    assert all(map(math.isnan, before.updates))


def test_points_that_are_merged_have_the_mean_of_each_metric_and_the_newer_counts() -> None:
    view = RunView(TrainingPoint(float(step), step, 10 * step, {"loss": float(step)}) for step in range(1, 2001))
    assert len(view.points) == 2000
    view.apply(TrainingPoint(2001.0, 2001, 20_010, {"loss": 2001.0}))
    points = list(view.points)
    assert len(points) == 1001
    assert points[0] == TrainingPoint(2.0, 2, 20, {"loss": 1.5})
    assert points[-1] == TrainingPoint(2001.0, 2001, 20_010, {"loss": 2001.0})


def test_a_metric_that_is_not_finite_or_missing_does_not_spoil_its_neighbour() -> None:
    scalars: list[dict[str, float | None]] = [
        {"loss": None, "error": None},
        {"loss": 3.0, "error": None, "accuracy": 0.5},
    ]
    view = RunView(TrainingPoint(float(step), step, step, scalars[step % 2]) for step in range(2000))
    view.apply(TrainingPoint(2000.0, 2000, 2000, {}))
    assert next(iter(view.points)).scalars == {"loss": 3.0, "error": None, "accuracy": 0.5}


def test_paces_that_are_merged_weigh_by_their_duration() -> None:
    view, seconds, num_steps = RunView([sample(0.0, 50)]), 0.0, 50
    for index in range(2001):
        seconds += 3.0 if index % 2 else 1.0
        num_steps += 60 if index % 2 else 4
        view.apply(sample(seconds, num_steps, num_live=index))
    first = next(iter(view.paces))
    assert (first.duration_s, first.steps_per_s, first.num_live) == (4.0, 16.0, 1)
    assert sum(pace.duration_s * pace.steps_per_s for pace in view.paces) == pytest.approx(num_steps - 50)
    assert sum(pace.duration_s for pace in view.paces) == pytest.approx(seconds)


def test_memory_is_bounded_however_long_the_run() -> None:
    view = RunView([BEGAN])
    spans = tuple(Span(float(index), 0, "compute", 0.5) for index in range(1000))
    for index in range(30):
        view.apply(Spans(float(index), spans))
    for index in range(5000):
        view.apply(LogLine(float(index), 0, "node-1", 30, "a", str(index)))
        view.apply(WorkerEvent(float(index), 0, "lost", "node-1", index))
        view.apply(CheckpointWritten(float(index), index, "file:///c", 1, 0.5))
        view.apply(WeightStats(float(index), index, index, (TensorStats("W", 1.0, 0.5),)))
    assert (len(view.spans), view.num_spans) == (20_000, 30_000)
    assert len(view.logs) == len(view.events) == len(view.checkpoints) == 500
    assert view.logs[-1].message == "4999"
    assert len(view.norms) <= 1000
    last = view.norms.last()
    assert last is not None
    assert last.num_steps == 4999


def test_who_holds_the_lock_sees_no_half_of_a_record() -> None:
    """A sample changes the workers and the paces: both, or none."""
    view = RunView([sample(0.0, 0, (worker(0, 0),))])
    done = threading.Event()

    def apply() -> None:
        for index in range(1, 4000):
            view.apply(sample(float(index), index, (worker(0, index),)))
        done.set()

    thread = threading.Thread(target=apply)
    thread.start()
    num_looks = 0
    while not done.is_set() or not num_looks:
        with view.lock:
            assert view.sample is not None
            assert view.workers[0].num_steps == view.sample.num_steps == view.revision - 1
        num_looks += 1
    thread.join(30)
    assert view.revision == 4000
