"""A run as its records tell it: what pages, metrics and a replay show."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    TrainingPoint,
    WeightStats,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.series import Series

_MAX_POINTS = 2000
_MAX_SPANS = 20_000
_MAX_LINES = 500
_MIN_PACE_S = 0.2  # pushes come in rounds: between two samples that are closer, all or nothing would be one


@dataclass(frozen=True)
class Pace:
    """How fast the run goes, between two samples.

    Attributes:
        seconds: at the end of it.
        samples_per_s, steps_per_s: of all workers.
        pushed_bytes_per_s, pulled_bytes_per_s: of weights, on the wire.
        num_live, num_waiting: at its end.
    """

    seconds: float
    duration_s: float
    samples_per_s: float
    steps_per_s: float
    pushed_bytes_per_s: float
    pulled_bytes_per_s: float
    num_live: int
    num_waiting: int


@dataclass(frozen=True)
class Norms:
    """Of all variables at a moment, in the order of `WeightStats.tensors`; NaN where there is none."""

    seconds: float
    num_steps: int
    weights: tuple[float, ...]
    updates: tuple[float, ...]


class RunView:
    """What is known of a run, in bounded memory. Hold `lock` while reading more than one attribute: one thread applies
    records, others read.

    Attributes:
        began: None before the first record.
        ended: None while the run goes on.
        sample: the newest; its `workers` are those that changed, `workers` has all.
        workers: by partition.
        points: of training; merged where there are more than 2,000.
        paces: between samples; of those that come within 0.2 s of the one before, the next one takes account.
        norms: of weights and updates.
        spans: of workers, the newest 20,000; a span is in the order in which it was told.
        num_spans: told so far, with those that are not kept.
        num_checkpoints, num_log_lines: so far; lines by level.
        revision: how many records were applied.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.lock = threading.RLock()
        self.began: RunBegan | None = None
        self.ended: RunEnded | None = None
        self.sample: Sample | None = None
        self._paced: Sample | None = None
        self.workers: dict[int, WorkerSample] = {}
        self.points: Series[TrainingPoint] = Series(_MAX_POINTS, merged_points)
        self.paces: Series[Pace] = Series(_MAX_POINTS, _merged_paces)
        self.norms: Series[Norms] = Series(_MAX_POINTS // 2, lambda older, newer: newer)
        self.weights: WeightStats | None = None
        self.spans: deque[Span] = deque(maxlen=_MAX_SPANS)
        self.num_spans = 0
        self.events: deque[WorkerEvent] = deque(maxlen=_MAX_LINES)
        self.logs: deque[LogLine] = deque(maxlen=_MAX_LINES)
        self.epochs: list[EpochEnded] = []
        self.checkpoints: deque[CheckpointWritten] = deque(maxlen=_MAX_LINES)
        self.num_checkpoints = 0
        self.num_log_lines: Counter[int] = Counter()
        self.revision = 0
        for record in records:
            self.apply(record)

    def apply(self, record: Record) -> None:
        """Takes note of the next record."""
        with self.lock:
            self._apply(record)
            self.revision += 1

    def _apply(self, record: Record) -> None:
        if isinstance(record, TrainingPoint):
            self.points.append(record)
        elif isinstance(record, Sample):
            self._apply_sample(record)
        elif isinstance(record, Spans):
            self.spans.extend(record.spans)
            self.num_spans += len(record.spans)
        elif isinstance(record, WorkerEvent):
            self.events.append(record)
        elif isinstance(record, WeightStats):
            self.weights = record
            self.norms.append(_norms(record))
        elif isinstance(record, EpochEnded):
            self.epochs.append(record)
        elif isinstance(record, CheckpointWritten):
            self.checkpoints.append(record)
            self.num_checkpoints += 1
        elif isinstance(record, LogLine):
            self.logs.append(record)
            self.num_log_lines[record.level] += 1
        elif isinstance(record, RunBegan):
            self.began = record
        else:
            self.ended = record

    def _apply_sample(self, sample: Sample) -> None:
        self.sample = sample
        self.workers.update({worker.partition: worker for worker in sample.workers})
        before = self._paced
        if before is None:
            self._paced = sample
        elif sample.seconds - before.seconds >= _MIN_PACE_S:
            self.paces.append(_pace(before, sample))
            self._paced = sample

    @property
    def compression(self) -> float:
        """How many bytes of weights one byte on the wire stood for, both ways; 1 where nothing has travelled."""
        sample = self.sample
        if sample is None or not (num_bytes := sample.num_bytes_pushed + sample.num_bytes_pulled):
            return 1.0
        return (sample.num_raw_bytes_pushed + sample.num_raw_bytes_pulled) / num_bytes

    @property
    def samples_per_s(self) -> float:
        """Of about the last ten seconds."""
        recent = [pace for pace in self.paces if self.sample and pace.seconds > self.sample.seconds - 10]
        duration_s = sum(pace.duration_s for pace in recent)
        return sum(pace.samples_per_s * pace.duration_s for pace in recent) / duration_s if duration_s else 0.0


def _pace(before: Sample, now: Sample) -> Pace:
    duration_s = now.seconds - before.seconds
    return Pace(
        seconds=now.seconds,
        duration_s=duration_s,
        samples_per_s=(now.num_samples - before.num_samples) / duration_s,
        steps_per_s=(now.num_steps - before.num_steps) / duration_s,
        pushed_bytes_per_s=(now.num_bytes_pushed - before.num_bytes_pushed) / duration_s,
        pulled_bytes_per_s=(now.num_bytes_pulled - before.num_bytes_pulled) / duration_s,
        num_live=now.num_live,
        num_waiting=now.num_waiting,
    )


def _merged_paces(older: Pace, newer: Pace) -> Pace:
    duration_s = older.duration_s + newer.duration_s
    rates = {
        name: (getattr(older, name) * older.duration_s + getattr(newer, name) * newer.duration_s) / duration_s
        for name in ("samples_per_s", "steps_per_s", "pushed_bytes_per_s", "pulled_bytes_per_s")
    }
    return replace(newer, duration_s=duration_s, **rates)


def merged_points(older: TrainingPoint, newer: TrainingPoint) -> TrainingPoint:
    """Means of the two, each as it is: they stand for about as many samples."""
    scalars: dict[str, float | None] = {}
    for name in {**older.scalars, **newer.scalars}:
        values = [value for value in (older.scalars.get(name), newer.scalars.get(name)) if value is not None]
        scalars[name] = sum(values) / len(values) if values else None
    return replace(newer, scalars=scalars)


def _norms(stats: WeightStats) -> Norms:
    return Norms(
        stats.seconds,
        stats.num_steps,
        tuple(_number(tensor.norm) for tensor in stats.tensors),
        tuple(_number(tensor.update_norm) for tensor in stats.tensors),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
