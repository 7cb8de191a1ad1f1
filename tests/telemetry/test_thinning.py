"""What is left out of a long run's file, and what is not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tensorspark.telemetry.files import RunFile, read_run
from tensorspark.telemetry.records import (
    Record,
    RunEnded,
    Sample,
    Span,
    Spans,
    TrainingPoint,
    WeightStats,
    WorkerSample,
)
from tensorspark.telemetry.thinning import Thinning
from tensorspark.telemetry.view import RunView

WORKER = WorkerSample(0, "live", "a", 7, 1, 10, 100, 3, 0, 0, 50, 60, 0.5, 0, {"compute": 1.5})
SAMPLE = Sample(0.0, 10, 100, 2, 0, 0, 0, 0, 0.5, 1, 4, 50, 60, 70, 80, (3, 1), ())


def course(num: int) -> list[Record]:
    """A record of each kind every half second; worker 1 says something once only."""
    records: list[Record] = []
    for index in range(1, num + 1):
        seconds = index / 2
        workers = [replace(WORKER, num_steps=index)]
        if index == 3:
            workers.append(replace(WORKER, partition=1, host="b", num_steps=33))
        spans = [
            Span(seconds - 0.5 + part / 40, part % 2, ("compute", "wait")[part % 3 == 0], 1 / 80) for part in range(20)
        ]
        records.append(TrainingPoint(seconds, index, 10 * index, {"loss": 1 / index}))
        records.append(replace(SAMPLE, seconds=seconds, num_steps=index, workers=tuple(workers)))
        records.append(Spans(seconds, tuple(spans)))
    return [*records, RunEnded(num / 2 + 0.1, "finished", "", num, 10 * num)]


def passed(records: Sequence[Record], num_bytes: int, full_bytes: int = 1000) -> list[Record]:
    thinning = Thinning(full_bytes)
    return [out for record in records for out in thinning.passed(record, num_bytes)]


def seconds_by_activity(records: Sequence[Record]) -> dict[tuple[int, str], float]:
    sums: dict[tuple[int, str], float] = {}
    for record in records:
        for span in record.spans if isinstance(record, Spans) else ():
            key = span.partition, span.activity
            sums[key] = sums.get(key, 0.0) + span.duration_s
    return sums


def test_a_short_file_has_everything_as_it_came() -> None:
    records = course(20)
    assert passed(records, num_bytes=999) == records


@pytest.mark.parametrize(("num_bytes", "interval_s"), [(1000, 2), (2500, 4), (10_000, 20)])
def test_samples_come_the_more_rarely_the_longer_the_file_is(num_bytes: int, interval_s: float) -> None:
    thinned = passed(course(200), num_bytes)
    times = [record.seconds for record in thinned if isinstance(record, Sample)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert set(gaps[:-1]) == {interval_s}
    assert times[-1] == 100.0
    points = [record for record in thinned if isinstance(record, TrainingPoint)]
    assert len(points) == pytest.approx(min(200, 100 / (interval_s / 10)), abs=2)
    assert points[-1].num_steps == 200


def test_points_left_out_are_in_the_mean_of_the_next() -> None:
    records = [TrainingPoint(0.25 * index, index, index, {"loss": float(index)}) for index in range(1, 9)]
    points = [record for record in passed(records, 5000) if isinstance(record, TrainingPoint)]
    assert [point.num_steps for point in points] == [4, 8]
    assert points[0].scalars["loss"] == pytest.approx(((1 + 2) / 2 + 3) / 4 + 4 / 2)


def test_the_newest_look_at_the_weights_is_kept_and_the_last_one_told() -> None:
    looks = [WeightStats(5.0 * index, index, index, ()) for index in range(1, 10)]
    thinned = passed([*looks, RunEnded(46.0, "finished")], 1000)
    assert [record.version for record in thinned if isinstance(record, WeightStats)] == [4, 8, 9]


def test_the_end_and_what_every_worker_said_last_are_there() -> None:
    view, thinned = RunView(course(101)), RunView(passed(course(101), 5000))
    assert thinned.workers == view.workers
    assert thinned.workers[1].num_steps == 33
    assert thinned.ended == view.ended
    assert thinned.sample is not None
    assert view.sample is not None
    assert thinned.sample.num_steps == view.sample.num_steps == 101


def test_what_workers_spent_adds_up_and_fewer_spans_say_so() -> None:
    records = course(80)
    thinned = passed(records, 4000)
    assert seconds_by_activity(thinned) == pytest.approx(seconds_by_activity(records))
    spans = [span for record in thinned if isinstance(record, Spans) for span in record.spans]
    assert len(spans) < 80 * 20 / 5
    assert any(span.is_sum for span in spans)


def test_a_long_run_s_file_is_read_back_to_the_same_end(tmp_path: Path) -> None:
    file = RunFile(str(tmp_path))
    file._thinning = Thinning(full_bytes=20_000)
    records = course(400)
    for record in records:
        file.record(record)
    file.close()
    view = RunView(read_run(str(tmp_path)))
    assert view.workers == RunView(records).workers
    assert sum(part.stat().st_size for part in tmp_path.iterdir()) < 400 * 1000
