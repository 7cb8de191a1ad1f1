"""Fewer samples and spans, the longer a run's file has grown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tensorspark.telemetry.collector import summed
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
from tensorspark.telemetry.view import merged_points

_SECONDS_A_STEP = 2.0
_MAX_SINGLE = 8  # spans of a partition in one record


class Thinning:
    """Passes records on. Once the file is longer than `full_bytes`, samples and spans come only every two seconds, and
    at twice the length every four; points ten times as often, looks at the weights a tenth as often. So the file grows
    as the root of the time, about, and stays readable.

    Nothing is lost that adds up: a sample has all workers that have changed since the one before, and spans that are
    too many are added up by activity, as the server does it. Points that are left out are in the means of the next.

    Args:
        full_bytes: up to which length everything is written as it comes.
    """

    def __init__(self, full_bytes: int = 2**24) -> None:
        self._full_bytes = full_bytes
        self._sample: Sample | None = None  # that has not been passed on
        self._workers: dict[int, WorkerSample] = {}
        self._spans: list[Span] = []
        self._point: TrainingPoint | None = None
        self._weights: WeightStats | None = None
        self._passed_at = self._point_at = self._weights_at = 0.0

    def passed(self, record: Record, num_bytes: int) -> Iterator[Record]:
        """What is to be written now that `record` has come.

        Args:
            num_bytes: the file's length.
        """
        interval_s = _SECONDS_A_STEP * (num_bytes // self._full_bytes)
        if not interval_s:
            self._passed_at = self._point_at = self._weights_at = record.seconds
            yield record
            return
        if isinstance(record, TrainingPoint | WeightStats):
            yield from self._passed_value(record, interval_s)
            return
        if isinstance(record, Sample):
            self._sample = record
            self._workers.update({worker.partition: worker for worker in record.workers})
        elif isinstance(record, Spans):
            self._spans += record.spans
        else:
            if isinstance(record, RunEnded):
                yield from (value for value in (self._point, self._weights) if value is not None)
                yield from self._pass()
            yield record
            return
        if record.seconds - self._passed_at >= interval_s:
            self._passed_at = record.seconds
            yield from self._pass()

    def _passed_value(self, record: TrainingPoint | WeightStats, interval_s: float) -> Iterator[Record]:
        if isinstance(record, WeightStats):
            self._weights = record
            if record.seconds - self._weights_at >= 10 * interval_s:
                self._weights, self._weights_at = None, record.seconds
                yield record
            return
        self._point = record if self._point is None else merged_points(self._point, record)
        if record.seconds - self._point_at >= interval_s / 10:
            point, self._point, self._point_at = self._point, None, record.seconds
            yield point

    def _pass(self) -> Iterator[Record]:
        sample, workers, spans = self._sample, self._workers, self._spans
        self._sample, self._workers, self._spans = None, {}, []
        if sample is not None:
            yield replace(sample, workers=tuple(workers[partition] for partition in sorted(workers)))
        if spans:
            yield Spans(self._passed_at, tuple(_thinned(spans)))


def _thinned(spans: list[Span]) -> Iterator[Span]:
    by_partition: dict[int, list[Span]] = {}
    for span in spans:
        by_partition.setdefault(span.partition, []).append(span)
    for partition, of_one in by_partition.items():
        yield from of_one[:_MAX_SINGLE]
        sums: dict[str, float] = {}
        for span in of_one[_MAX_SINGLE:]:
            sums[span.activity] = sums.get(span.activity, 0.0) + span.duration_s
        began = min((span.seconds for span in of_one[_MAX_SINGLE:]), default=0.0)
        yield from summed(partition, began, sums)
