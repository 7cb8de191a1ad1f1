"""What the server gathers of a run as it happens, in bounded memory, until somebody asks for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from tensorspark.history.recorder import Sums
from tensorspark.history.reports import Point
from tensorspark.telemetry.clocks import ClockBounds
from tensorspark.telemetry.notes import Note
from tensorspark.telemetry.records import Activity, LogLine, Span, TrainingPoint, WorkerEvent

MAX_STALENESS = 64
"""Pushes that are staler share a bin."""

_POINT_S = 0.05
_MAX_POINTS = 2000
_MAX_SPANS = 4000  # between two observations, of all partitions together
_MIN_SPANS, _MAX_SPANS_A_PARTITION = 4, 60
_MAX_EVENTS = 2000
_MAX_LOGS = 500
_MAX_WITH_SPANS = 2000  # of more partitions there is nothing to see, and much to do
_MAX_TRACED = 100_000
_MAX_UNSETTLED = 10_000
_FEW = 32  # of which a loop is quicker than numpy
_Kind = TypeVar("_Kind", bound=str)
_ACTIVITIES = tuple(Activity)
_CODES = {activity: code for code, activity in enumerate(_ACTIVITIES)}


class Collector:
    """Takes note of what workers are at. For one thread: the server's loop.

    Spans that are too many to be kept one by one are added up, so that their shares stay right.

    Args:
        began_at: when the run began, on the monotonic clock whose times all methods are given.
        keeps_spans: whether anybody will ask for spans; what workers have spent is added up in any case.
        traces: whether anybody wants to know what the server itself is at.

    Attributes:
        staleness: pushes by the number of versions that were published since they were pulled, `MAX_STALENESS` and more
            in the last bin.
        num_raw_bytes_pushed, num_raw_bytes_pulled: of weights, without codecs and patches.
        dirty: partitions of which something has changed since `take_dirty`.
    """

    def __init__(
        self, began_at: float, num_partitions: int, *, keeps_spans: bool = False, traces: bool = False
    ) -> None:
        self.began_at = began_at
        self.keeps_spans = keeps_spans and num_partitions <= _MAX_WITH_SPANS
        self._traces = traces
        self.staleness = [0] * (MAX_STALENESS + 1)
        self._total_staleness = 0
        self.num_raw_bytes_pushed = 0
        self.num_raw_bytes_pulled = 0
        self.dirty: set[int] = set()
        self._busy = [_Busy() for _ in range(num_partitions)]
        self._max_spans = min(max(_MAX_SPANS // max(1, num_partitions), _MIN_SPANS), _MAX_SPANS_A_PARTITION)
        self._points: list[Sums] = []
        self._point_began = 0.0
        self._events: list[WorkerEvent] = []
        self._logs: list[LogLine] = []
        self._num_dropped_logs = 0
        self._traced: list[Span] = []

    @property
    def mean_staleness(self) -> float | None:
        """Of all pushes; None before the first."""
        num_pushes = sum(self.staleness)
        return self._total_staleness / num_pushes if num_pushes else None

    def since_began(self, now: float) -> float:
        return now - self.began_at

    # What workers are at

    def spent(self, partition: int, activity: Activity, began_at: float, ended_at: float) -> None:
        """A worker was at something."""
        busy = self._busy[partition]
        duration_s = ended_at - began_at
        busy.seconds[activity] = busy.seconds.get(activity, 0.0) + duration_s
        if not self.keeps_spans or duration_s <= 0:
            return
        if len(busy.spans) < self._max_spans:
            busy.spans.append(Span(began_at - self.began_at, partition, activity, duration_s))
        else:
            busy.sums_began_at = min(busy.sums_began_at, began_at - self.began_at)
            busy.sums[activity] = busy.sums.get(activity, 0.0) + duration_s

    def spent_all(self, partition: int, codes: bytes, moments: list[float]) -> None:
        """A worker was at one thing after the other: as many calls of `spent`, of very many most in bulk.

        Args:
            codes: of activities, by their place among all of them.
            moments: when each began, and when the last ended: one more than codes, none before the one ahead of it.
        """
        num_single = max(0, self._max_spans - len(self._busy[partition].spans)) if self.keeps_spans else 0
        if len(codes) < num_single + _FEW:
            num_single = len(codes)
        for code, began_at, ended_at in zip(codes[:num_single], moments, moments[1:], strict=False):
            self.spent(partition, _ACTIVITIES[code], began_at, ended_at)
        if len(codes) == num_single:
            return
        rest = np.frombuffer(codes, np.uint8)[num_single:]
        sums = np.bincount(rest, np.diff(moments[num_single:]), len(_ACTIVITIES)).tolist()
        for code in np.unique(rest).tolist():
            self.spent(partition, _ACTIVITIES[code], began_at := moments[num_single], began_at + sums[code])

    def busy_s(self, partition: int) -> dict[str, float]:
        """What the partition's workers have spent so far, by activity."""
        return {activity.value: seconds for activity, seconds in self._busy[partition].seconds.items()}

    def event(self, now: float, partition: int, what: str, host: str, attempt: int, text: str = "") -> None:
        """A worker has come or gone."""
        self.dirty.add(partition)
        if len(self._events) < _MAX_EVENTS:
            self._events.append(WorkerEvent(now - self.began_at, partition, what, host, attempt, text))

    # What they have trained

    def folded(
        self, now: float, num_steps: int, num_samples: int, weight: int, sums: Mapping[str, float], staleness: int
    ) -> None:
        """A push is in the weights.

        Args:
            num_steps, num_samples: of all workers so far.
            weight: its rows.
            sums: over them, by fetch name.
            staleness: versions published since what it is based on was pulled.
        """
        self.staleness[min(max(staleness, 0), MAX_STALENESS)] += 1
        self._total_staleness += max(staleness, 0)
        points = self._points
        seconds = now - self.began_at
        if not points or (seconds - self._point_began >= _POINT_S and len(points) < _MAX_POINTS):
            points.append(Sums())
            self._point_began = seconds
        points[-1].add(seconds, num_steps, num_samples, weight, sums)

    # What they say

    def noted(self, now: float, partition: int, host: str, note: Note, clock: ClockBounds) -> None:
        """A worker's log lines and timings have come."""
        seconds = now - self.began_at  # the worker's own clock says little about when lines matter here
        for line in note.lines:
            if len(self._logs) < _MAX_LOGS:
                self._logs.append(LogLine(seconds, partition, host, line.level, line.logger, line.message))
            else:
                self._num_dropped_logs += 1
        offset = clock.offset
        if len(self._traced) < _MAX_TRACED:
            self._traced += [
                Span(timing.began + offset - self.began_at, partition, timing.name, timing.duration_s)
                for timing in note.timings
            ]

    def timed(self, name: str, began_at: float, ended_at: float) -> None:
        """The server itself was at something, for traces; as of partition -1."""
        if self._traces and len(self._traced) < _MAX_TRACED:
            self._traced.append(Span(began_at - self.began_at, -1, name, ended_at - began_at))

    # For who asks

    def take_dirty(self) -> set[int]:
        dirty, self.dirty = self.dirty, set()
        return dirty

    def take_points(self) -> tuple[TrainingPoint, ...]:
        """The points since they were taken last."""
        points, self._points = self._points, []
        return tuple(_finished(sums.point()) for sums in points)

    def take_spans(self) -> tuple[Span, ...]:
        """The spans since they were taken last."""
        return tuple(span for index, busy in enumerate(self._busy) for span in busy.take_spans(index))

    def take_events(self) -> tuple[WorkerEvent, ...]:
        events, self._events = self._events, []
        return tuple(events)

    def take_logs(self) -> tuple[LogLine, ...]:
        logs, self._logs = self._logs, []
        if self._num_dropped_logs:
            last = logs[-1]
            message = f"{self._num_dropped_logs} more lines of all workers were dropped"
            logs.append(LogLine(last.seconds, last.partition, last.host, logging.WARNING, __name__, message))
            self._num_dropped_logs = 0
        return tuple(logs)

    def take_traced(self) -> tuple[Span, ...]:
        traced, self._traced = self._traced, []
        return tuple(traced)


class Timeline:
    """What one connection's worker is at: one thing after the other.

    Attributes:
        activity: None before it has registered.
        since: when it began, on the monotonic clock.
        clock: how the worker's clock and ours agree.
    """

    def __init__(self, collector: Collector) -> None:
        self.activity: Activity | None = None
        self.since = 0.0
        self.partition = -1
        self.host = ""
        self.attempt = 0
        self.clock = ClockBounds()
        self._collector = collector
        self._codes = bytearray()  # what it was at since it was settled last, and when each began
        self._moments: list[float] = []

    def begin(self, partition: int, host: str, attempt: int, now: float) -> None:
        """The worker has registered, and waits for its partition."""
        self.partition, self.host, self.attempt = partition, host, attempt
        self.activity, self.since = Activity.STANDBY, now

    def switch(self, activity: Activity | None, now: float) -> None:
        """The worker is at something else from now on; None: it is gone."""
        if self.activity is None:
            return
        # At thousands a second this is all that there is time for; `settle` adds it up.
        if now > self.since:
            self._codes.append(_CODES[self.activity])
            self._moments.append(self.since)
            self.since = now
        self.activity = activity
        if activity is None or len(self._codes) >= _MAX_UNSETTLED:
            self.settle(now)

    def settle(self, now: float) -> None:
        """Counts what it is at up to now, for who asks meanwhile."""
        if self.activity is not None and now > self.since:
            self._codes.append(_CODES[self.activity])
            self._moments.append(self.since)
            self.since = now
        if self._codes:
            self._collector.dirty.add(self.partition)
            self._collector.spent_all(self.partition, bytes(self._codes), [*self._moments, self.since])
            self._codes.clear()
            self._moments.clear()


@dataclass
class _Busy:
    """A partition's time. Spans that are over the limit are in `sums`, by activity."""

    seconds: dict[Activity, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    sums: dict[Activity, float] = field(default_factory=dict)
    sums_began_at: float = math.inf

    def take_spans(self, partition: int) -> list[Span]:
        spans, self.spans = self.spans, []
        spans += summed(partition, self.sums_began_at, self.sums)
        self.sums, self.sums_began_at = {}, math.inf
        return spans


def summed(partition: int, began: float, sums: Mapping[_Kind, float]) -> Iterator[Span]:
    """A span for each activity, one behind the other: as long as all of its kind, which were too many.

    Args:
        began: when the first of them began.
        sums: seconds, by activity.
    """
    for activity, duration_s in sums.items():
        yield Span(began, partition, activity, duration_s, is_sum=True)
        began += duration_s


def _finished(point: Point) -> TrainingPoint:
    scalars = {name: finite(mean) for name, mean in point.scalars.items()}
    return TrainingPoint(point.seconds, point.num_steps, point.num_samples, scalars)


def finite(value: float) -> float | None:
    """None for NaN and infinities, which JSON has none of."""
    return value if math.isfinite(value) else None
