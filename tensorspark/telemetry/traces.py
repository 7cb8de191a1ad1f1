"""A run as one Chrome trace: driver, server and workers, on the driver's clock. Perfetto (https://ui.perfetto.dev) and
``chrome://tracing`` show it.

The format is the "JSON Object Format" of Google's "Trace Event Format": complete events (``ph: X``) with times in
microseconds since the run began, in a process of their own for the driver, the server and each partition.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem, write_then_rename
from tensorspark.telemetry.records import Activity, EpochEnded, Record, RunBegan, Span, Spans, WorkerEvent

DRIVER, SERVER = -2, -1
"""Partitions that spans of the driver and of the server's arithmetic have."""

_SETTING = "spark.tensorspark.trace.dir"
_MAX_SPANS = 1_000_000  # some 120 MB of JSON, which viewers still take
_DRIVERS_SPANS = 1000  # of them the driver's, whose most telling one ends last
_FIRST_PID = 10
_ITSELF, _AS_SERVER_SEES, _STANDBY = 1, 2, 3  # threads of a worker


class TraceFile:
    """Gathers spans, and writes them as one file at the end.

    Args:
        url: of the file.
        user: who to connect to HDFS as.

    Raises:
        StagingError: (`check`, `close`) the filesystem did not take it.
    """

    def __init__(self, url: str, *, user: str = "") -> None:
        self.url = url
        self._filesystem, self._path = open_filesystem(url, user, _SETTING)
        self._began: RunBegan | None = None
        self._spans: list[tuple[Span, int]] = []
        self._marks: list[dict[str, Any]] = []
        self._hosts: dict[int, str] = {}
        self._num_dropped = 0

    def check(self) -> None:
        """Makes the file's directory, and looks whether files can be written there."""
        parent = self._path.rpartition("/")[0]

        def probe() -> None:
            self._filesystem.makedirs(parent, exist_ok=True)
            write_then_rename(self._filesystem, self._path, [b"[]"])
            self._filesystem.rm(self._path)

        attempt("write to", self.url, probe, setting=_SETTING)

    def record(self, record: Record) -> None:
        if isinstance(record, RunBegan):
            self._began = record
        elif isinstance(record, Spans):
            for span in record.spans:  # a standby waits while another is at work: a thread's spans are not to overlap
                self._add((span,), _STANDBY if span.activity == Activity.STANDBY else _AS_SERVER_SEES)
        elif isinstance(record, WorkerEvent):
            self._hosts[record.partition] = record.host
            self._mark(record.seconds, _pid(record.partition), f"{record.what}, attempt {record.attempt}")
        elif isinstance(record, EpochEnded):
            self._mark(record.seconds, _pid(DRIVER), f"epoch {record.epoch} has ended")

    def add(self, spans: tuple[Span, ...]) -> None:
        """Spans that workers, the server or the driver have timed themselves."""
        self._add(spans, _ITSELF)

    def flush(self, *, at_once: bool = False) -> None:
        """Does nothing: there is one file, at the end."""

    def close(self) -> None:
        """Writes the file."""
        attempt(
            "write to",
            self.url,
            lambda: write_then_rename(self._filesystem, self._path, self._content()),
            TRANSFER_DEADLINE_S,
            _SETTING,
        )
        self._spans.clear()
        self._marks.clear()

    def _add(self, spans: tuple[Span, ...], thread: int) -> None:
        reserved = 0 if spans and spans[0].partition == DRIVER else _DRIVERS_SPANS
        room = max(0, _MAX_SPANS - reserved - len(self._spans))
        self._spans += [(span, thread) for span in spans[:room]]
        self._num_dropped += max(0, len(spans) - room)

    def _mark(self, seconds: float, pid: int, name: str) -> None:
        self._marks.append({"ph": "i", "s": "p", "name": name, "ts": _us(seconds), "pid": pid, "tid": _ITSELF})

    def _content(self) -> Iterator[bytes]:
        """The file in pieces of some thousand events."""
        yield b'{"displayTimeUnit":"ms","traceEvents":['
        separator = b""
        for events in _batches(self._events()):
            yield separator + b",\n".join(json.dumps(event, separators=(",", ":")).encode() for event in events)
            separator = b",\n"
        yield b'],"otherData":' + json.dumps(self._about()).encode() + b"}\n"

    def _events(self) -> Iterator[dict[str, Any]]:
        partitions = sorted({span.partition for span, _ in self._spans} | self._hosts.keys() | {DRIVER, SERVER})
        for partition in partitions:
            yield from self._names(partition)
        yield from self._marks
        for span, thread in self._spans:
            event = {
                "ph": "X",
                "name": span.activity,
                "ts": _us(span.seconds),
                "dur": _us(span.duration_s),
                "pid": _pid(span.partition),
                "tid": thread,
            }
            yield {**event, "args": {"is_sum": True}} if span.is_sum else event

    def _names(self, partition: int) -> Iterator[dict[str, Any]]:
        names = {DRIVER: "driver", SERVER: "parameter server"}
        host = self._hosts.get(partition)
        name = names.get(partition, f"partition {partition}" + (f" on {host}" if host else ""))
        pid = _pid(partition)
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": _ITSELF, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": _ITSELF, "args": {"sort_index": pid}}
        threads = {_ITSELF: "weights" if partition == SERVER else "run"}
        if partition >= 0:
            threads = {
                _ITSELF: "the worker's own times",
                _AS_SERVER_SEES: "as the server sees it",
                _STANDBY: "attempts that stand by",
            }
        for thread, thread_name in threads.items():
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": thread, "args": {"name": thread_name}}

    def _about(self) -> dict[str, Any]:
        began = self._began
        about: dict[str, Any] = {"num_dropped_spans": self._num_dropped}
        if began is not None:
            about |= {"run": began.name, "mode": began.mode, "started_at": began.started_at}
        return about


def _pid(partition: int) -> int:
    return {DRIVER: 1, SERVER: 2}.get(partition, _FIRST_PID + partition)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _batches(events: Iterator[dict[str, Any]], size: int = 4096) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for event in events:
        batch.append(event)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
