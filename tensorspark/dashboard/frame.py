"""What the page is told: plain values for JSON, a full frame for a page that begins, and what is new for the others.

All pages are told the same: a frame is computed and encoded once. What is text is sent as it is, and the page shows it
as text: nothing here is HTML.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from tensorspark.dashboard.timeline import Blame, most_telling, thinned, who_waits
from tensorspark.telemetry.records import (
    Activity,
    CheckpointWritten,
    EpochEnded,
    LogLine,
    RunBegan,
    Span,
    TensorStats,
    TrainingPoint,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.view import Norms, Pace, RunView

ACTIVITIES = tuple(activity.value for activity in Activity)
MAX_ROWS = 40
MAX_TABLE_ROWS = 200
MAX_TENSORS = 100
_MAX_NORMS = 40_000
_MAX_SPANS = 1200
_MAX_SPANS_AT_FIRST = 3000
_MAX_TOLD = 4000
_SPANS_AT_FIRST_S = 120.0
_CHOSEN_FOR_S = 5.0
_ETA_OVER_S = 60.0

Json = dict[str, Any]
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class _Followed(Protocol[_T_co]):
    """A `telemetry.series.Series`, as much of it as following it takes."""

    @property
    def generation(self) -> int: ...
    def __len__(self) -> int: ...
    def since(self, index: int) -> Sequence[_T_co]: ...


def empty() -> str:
    """The frame of a page while no run has begun."""
    return _encoded({"full": True, "run": None})


class Frames:
    """The frames of one run, for all pages that follow it.

    Not thread-safe; takes the view's lock while it reads.

    Args:
        view: of the run.
    """

    def __init__(self, view: RunView) -> None:
        self.view = view
        self._points = _Cursor()
        self._paces = _Cursor()
        self._norms = _Cursor()
        self._num_spans = 0
        self._num_epochs = 0
        self._last: dict[str, Any] = {}
        self._workers: dict[int, WorkerSample] = {}
        self._told: deque[tuple[float, ...]] = deque(maxlen=_MAX_TOLD)
        self._blame = Blame()
        self._rows: list[int] = []
        self._table: list[int] = []
        self._chosen_at = -math.inf
        self._progress: deque[tuple[float, float]] = deque()
        self._revision = -1
        self._all = (-1, "")

    def take(self, *, full: bool = False) -> tuple[str | None, str]:
        """What is new since the call before, as JSON; None where nothing is, and at the first call, when all is new.
        And, if `full`, all that there is to show: to it the next call's news may be added as well.
        """
        news = None
        with self.view.lock:
            is_first = self._revision < 0
            if self._revision != self.view.revision:
                self._revision = self.view.revision
                told = self._news()
                if is_first:
                    self._all = (self._revision, _encoded({"full": True, "run": self._run(), **told}))
                else:
                    news = _encoded(told)
            if full and self._all[0] != self._revision:
                self._all = (self._revision, _encoded(self._everything()))
        return news, self._all[1] if full else ""

    def _run(self) -> Json | None:
        return None if self.view.began is None else _run(self.view.began)

    def _everything(self) -> Json:
        view = self.view
        return {
            "full": True,
            "run": self._run(),
            "state": self._state(),
            "points": _points(True, list(view.points)),
            "paces": _paces(True, list(view.paces)),
            "norms": _norms(True, list(view.norms)),
            "weights": self._weights(),
            "epochs": [_epoch(epoch) for epoch in view.epochs],
            "timeline": {"rows": self._rows, "spans": _columns(self._told, set(self._rows))},
            "table": self._table,
            "workers": [_worker(view.workers[partition]) for partition in self._table],
            "events": [_event(event) for event in view.events],
            "logs": [_log(log) for log in view.logs],
            "checkpoints": [_checkpoint(written) for written in view.checkpoints],
        }

    def _news(self) -> Json:
        view = self.view
        newcomers = self._choose()
        frame: Json = {
            "state": self._state(),
            "points": _points(*self._points.take(view.points)),
            "paces": _paces(*self._paces.take(view.paces)),
            "norms": _norms(*self._norms.take(view.norms)),
            "epochs": [_epoch(epoch) for epoch in view.epochs[self._num_epochs :]],
            "timeline": self._timeline(newcomers),
            "table": self._table,
            "workers": [_worker(worker) for worker in self._changed_workers()],
            "events": [_event(event) for event in self._new("events", view.events)],
            "logs": [_log(log) for log in self._new("logs", view.logs)],
            "checkpoints": [_checkpoint(written) for written in self._new("checkpoints", view.checkpoints)],
        }
        self._num_epochs = len(view.epochs)
        if view.weights is not self._last.get("weights"):
            self._last["weights"] = view.weights
            frame["weights"] = self._weights()
        return {name: part for name, part in frame.items() if part not in (None, [])}

    def _now(self) -> float:
        """Seconds of the newest record that says how things stand."""
        return max([0.0, *(record.seconds for record in (self.view.sample, self.view.ended) if record)])

    def _choose(self) -> set[int]:
        """Chooses the partitions of timeline and table anew, where it is time; returns those that the timeline has not
        had before."""
        workers, now = self.view.workers, self._now()
        is_new = len(workers) != len(self._workers) and len(self._rows) < MAX_ROWS
        if not is_new and now - self._chosen_at < _CHOSEN_FOR_S and self.view.ended is None:
            return set()
        self._chosen_at = now
        before, self._rows = set(self._rows), most_telling(workers, MAX_ROWS)
        self._table = most_telling(workers, MAX_TABLE_ROWS)
        return set(self._rows) - before

    def _timeline(self, newcomers: set[int]) -> Json:
        """The new spans of the partitions that are shown, and older ones of those that are shown from now on."""
        view = self.view
        num_new = min(view.num_spans - self._num_spans, len(view.spans))
        is_first, self._num_spans = self._num_spans == 0, view.num_spans
        since = self._now() - _SPANS_AT_FIRST_S
        new = [span for span in islice(reversed(view.spans), num_new) if span.seconds > since][::-1]
        self._blame.learn(new)
        spans = thinned(new, set(self._rows), _MAX_SPANS_AT_FIRST if is_first else _MAX_SPANS)
        if newcomers and len(view.spans) > num_new:
            earlier = islice(view.spans, len(view.spans) - num_new)
            spans = thinned([span for span in earlier if span.seconds > since], newcomers, _MAX_SPANS) + spans
            self._told = deque((row for row in self._told if row[0] not in newcomers), _MAX_TOLD)
        rows = [_span(span, self._blame.of(span)) for span in spans]
        self._blame.forget()
        self._told.extend(rows)
        return {"rows": self._rows, "newcomers": sorted(newcomers), "spans": _columns(rows, set(self._rows))}

    def _changed_workers(self) -> list[WorkerSample]:
        workers = self.view.workers
        changed = [workers[index] for index in self._table if self._workers.get(index) is not workers[index]]
        self._workers = dict(workers)
        return changed

    def _new(self, name: str, lines: deque[_T]) -> list[_T]:
        """The lines since the call before: up to the one that was the last then."""
        last, new = self._last.get(name), []
        for line in reversed(lines):
            if line is last:
                break
            new.append(line)
        if lines:
            self._last[name] = lines[-1]
        return new[::-1]

    def _weights(self) -> Json | None:
        stats = self.view.weights
        if stats is None:
            return None
        return {
            "seconds": round(stats.seconds, 3),
            "version": stats.version,
            "tensors": [_tensor(tensor) for tensor in stats.tensors[:MAX_TENSORS]],
        }

    def _state(self) -> Json:
        view, sample, ended = self.view, self.view.sample, self.view.ended
        waiting, behind = who_waits(view.workers.values())
        state: Json = {
            "outcome": ended.outcome if ended else "running",
            "message": ended.message if ended else "",
            "seconds": round(self._now(), 3),
            "num_workers": len(view.workers),
            "compression": _number(view.compression),
            "samples_per_s": 0 if ended else _number(view.samples_per_s),
            "eta_s": None if ended else self._eta_s(),
            "waiting": waiting,
            "behind": behind,
        }
        if sample is not None:
            state |= {name: getattr(sample, name) for name in _OF_SAMPLE}
            state["progress"] = _number(sample.progress)
        if ended is not None and ended.num_steps:
            state |= {"num_steps": ended.num_steps, "num_samples": ended.num_samples}
        return state

    def _eta_s(self) -> float | None:
        """Seconds to the run's end at the pace of the last minute; of the whole run, where none was seen yet."""
        sample, began = self.view.sample, self.view.began
        if sample is None or sample.progress is None:
            return None
        if not self._progress or self._progress[-1][0] < sample.seconds:
            self._progress.append((sample.seconds, sample.progress))
        while self._progress[0][0] < sample.seconds - _ETA_OVER_S:
            self._progress.popleft()
        since, before = self._progress[0]
        if sample.seconds - since < 5 and began is not None and not began.resumed_steps:
            since, before = 0.0, 0.0
        gained = sample.progress - before
        return round((1 - sample.progress) * (sample.seconds - since) / gained, 1) if gained > 0 else None


_OF_SAMPLE = (
    *("num_steps", "num_samples", "num_live", "num_lost", "num_standby", "num_waiting", "num_finished", "epoch"),
    *("version", "num_bytes_pushed", "num_bytes_pulled", "num_raw_bytes_pushed", "num_raw_bytes_pulled", "staleness"),
)
_OF_RUN = (
    *("run", "name", "started_at", "mode", "num_partitions", "num_epochs", "combiner", "model_bytes"),
    *("tensorspark_version", "app_id", "spark_url", "job_group", "resumed_steps"),
)


class _Cursor:
    """How far a series has been told."""

    def __init__(self) -> None:
        self._generation = 0
        self._length = 0

    def take(self, series: _Followed[_T]) -> tuple[bool, Sequence[_T]]:
        """Whether the values are all that there are; if not, they are new ones, but for the first: that is the last of
        those told before, which may have grown since."""
        index = max(self._length - 1, 0) if series.generation == self._generation else 0
        self._generation, self._length = series.generation, len(series)
        return index == 0, series.since(index)


def _encoded(frame: Json) -> str:
    return json.dumps(frame, allow_nan=False, separators=(",", ":"))


def _number(value: float | None) -> float | None:
    """To five digits, which is more than one can see; None for what JSON cannot say."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _numbers(values: Iterable[float | None]) -> list[float | None]:
    return [_number(value) for value in values]


def _run(began: RunBegan) -> Json:
    return {
        **{name: getattr(began, name) for name in _OF_RUN},
        "settings": sorted(began.settings.items()),
        "num_tensors": len(began.tensors),
        "tensors": [[tensor.name, list(tensor.shape), tensor.dtype] for tensor in began.tensors[:MAX_TENSORS]],
    }


def _points(is_all: bool, points: Sequence[TrainingPoint]) -> Json:
    names = {name: None for point in points for name in point.scalars}
    return {
        "all": is_all,
        "seconds": [round(point.seconds, 2) for point in points],
        "steps": [point.num_steps for point in points],
        "scalars": {name: _numbers(point.scalars.get(name) for point in points) for name in names},
    }


def _paces(is_all: bool, paces: Sequence[Pace]) -> Json:
    frame: Json = {"all": is_all, "seconds": [round(pace.seconds, 2) for pace in paces]}
    for name in ("samples_per_s", "steps_per_s", "pushed_bytes_per_s", "pulled_bytes_per_s"):
        frame[name] = _numbers(getattr(pace, name) for pace in paces)
    frame["num_live"] = [pace.num_live for pace in paces]
    frame["num_waiting"] = [pace.num_waiting for pace in paces]
    return frame


def _norms(is_all: bool, norms: Sequence[Norms]) -> Json:
    """One list a variable; of many variables, not all moments."""
    num_tensors = min(len(norms[0].weights), MAX_TENSORS) if norms else 0
    stride = max(len(norms) * num_tensors * 2 // _MAX_NORMS, 1) if len(norms) > 2 else 1
    some = norms[::-1][::stride][::-1]
    return {
        "all": is_all,
        "seconds": [round(norm.seconds, 2) for norm in some],
        "steps": [norm.num_steps for norm in some],
        "weights": [_numbers(norm.weights[tensor] for norm in some) for tensor in range(num_tensors)],
        "updates": [_numbers(norm.updates[tensor] for norm in some) for tensor in range(num_tensors)],
    }


def _tensor(tensor: TensorStats) -> Json:
    return {
        "norm": _number(tensor.norm),
        "update_norm": _number(tensor.update_norm),
        "edges": _numbers(tensor.histogram_edges),
        "counts": tensor.histogram_counts,
        "update_edges": _numbers(tensor.update_edges),
        "update_counts": tensor.update_counts,
    }


def _epoch(epoch: EpochEnded) -> Json:
    logs = {name: _number(value) for name, value in epoch.logs.items()}
    return {"epoch": epoch.epoch, "seconds": round(epoch.seconds, 2), "steps": epoch.num_steps, "logs": logs}


def _span(span: Span, waited_for: int) -> tuple[float, ...]:
    """In the order of `_OF_SPAN`."""
    activity = _INDEX.get(span.activity, 0)
    return (
        *(span.partition, activity, round(span.seconds, 3), round(span.duration_s, 4)),
        *(int(span.is_sum), waited_for),
    )


def _columns(rows: Iterable[tuple[float, ...]], partitions: set[int]) -> Json:
    chosen = [row for row in rows if row[0] in partitions]
    columns = zip(*chosen, strict=True) if chosen else [()] * len(_OF_SPAN)
    return dict(zip(_OF_SPAN, columns, strict=True))


_OF_SPAN = ("partition", "activity", "seconds", "duration_s", "is_sum", "waited_for")
_INDEX = {activity: index for index, activity in enumerate(ACTIVITIES)}


def _worker(worker: WorkerSample) -> list[Any]:
    """In the order of the page's columns."""
    return [
        *(worker.partition, worker.state, worker.host, worker.attempt, worker.num_attempts, worker.num_steps),
        *(worker.num_samples, worker.lag, worker.num_bytes_pushed, worker.num_bytes_pulled, _number(worker.progress)),
        *(worker.num_applied, worker.num_refused, worker.num_reconnects),
        [round(worker.busy_s.get(activity, 0.0), 2) for activity in ACTIVITIES],
    ]


def _event(event: WorkerEvent) -> list[Any]:
    return [round(event.seconds, 2), event.partition, event.what, event.host, event.attempt, event.text]


def _log(log: LogLine) -> list[Any]:
    return [round(log.seconds, 2), log.partition, log.host, log.level, log.logger, log.message]


def _checkpoint(written: CheckpointWritten) -> list[Any]:
    return [round(written.seconds, 2), written.version, written.url, written.num_bytes, round(written.duration_s, 3)]
