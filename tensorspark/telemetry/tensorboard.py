"""A run's records as TensorBoard's event files.

A run is one directory, and so one run in TensorBoard. Its tags, by TensorBoard's page:

- Scalars, by the local steps of all workers: each fetch of training under its own name (``loss``);
  ``performance/samples_per_s``, ``steps_per_s``, ``pushed_bytes_per_s`` and ``pulled_bytes_per_s``; ``staleness/mean``;
  ``workers/live``, ``waiting`` and ``lost``; ``norms/<variable>`` and ``update_norms/<variable>``.
- Scalars, by epoch: each metric of `fit` (``epoch/loss``, ``epoch/val_loss``). Keras's own callback calls the same
  ``epoch_loss`` in two runs, ``train`` and ``validation``; here ``epoch/`` makes a group of them, and the
  files of such a callback stay apart from these.
- Histograms: ``weights/<variable>``, ``updates/<variable>`` and ``staleness/distribution``, of the pushes since the one
  before.
- Text: ``configuration``, and ``events``: checkpoints, workers lost or failed, and executors' warnings, the newest 50.
- HParams: see `telemetry.hyperparameters`. Graphs: the graph that is trained, where there is one.

A tag that two of these would share is given to the first; the other's ends in `` (2)``.
"""

from __future__ import annotations

import html
import itertools
import logging
import math
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tensorspark.errors import ConfigError
from tensorspark.telemetry.growing import GrowingFile
from tensorspark.telemetry.hyperparameters import session_end, session_start
from tensorspark.telemetry.performance import Performance, PerformancePoint
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    Record,
    RunBegan,
    RunEnded,
    Sample,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
)

logger = logging.getLogger(__name__)

_EVENTS_S = 10.0  # between two tables of events
_MAX_EVENTS = 50
_MAX_CELL = 500  # characters
_MAX_TAG = 250
# TensorBoard's checksums are plain Python: a mebibyte takes an eighth of a second.
_MAX_GRAPH_BYTES = 2**24
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_TOLD = ("lost", "failed")  # of `WorkerEvent.what`

_numbers = itertools.count()


class EventFiles:
    """Writes a run's records to its directory as TensorBoard's event files. For one thread.

    Another one may write to the same directory later: TensorBoard then shows of the earlier ones what is not above its
    `RunBegan.resumed_steps`. The HParams page alone goes on to show the first one's settings and outcome.

    Args:
        directory: URL; made where there is none.
        user: who to connect to HDFS as.
        setting: what the user would change, for errors.
        graph: a serialized GraphDef; one of more than 16 MiB is left out, with a warning.

    Raises:
        ConfigError: the package tensorboard is not installed.
        StagingError: (any method) the filesystem did not take it.

    Example:
        files = EventFiles("hdfs://namenode:8020/logs/run-1")
        for record in records:
            files.record(record)
            files.flush()
        files.close()
    """

    def __init__(
        self,
        directory: str,
        *,
        user: str = "",
        setting: str = "spark.tensorspark.log.dir",
        graph: bytes | None = None,
    ) -> None:
        self._encoder = _Encoder()
        self._file = GrowingFile(directory, _namer(), user=user, setting=setting)
        self._writer = self._encoder.writer(self._file)
        self._graph = graph
        self._started_at = time.time()
        self._num_steps = 0
        self._performance = Performance()
        self._events: deque[tuple[str, ...]] = deque(maxlen=_MAX_EVENTS)
        self._untold_since: float | None = None
        self._write(0.0, 0, file_version="brain.Event:2")

    def record(self, record: Record) -> None:
        """Adds what a record tells; records of other kinds are passed over."""
        if isinstance(record, TrainingPoint):
            self._num_steps = record.num_steps
            self._write_scalars(record.seconds, record.num_steps, "", record.scalars)
        elif isinstance(record, Sample):
            self._write_performance(self._performance.add(record))
        elif isinstance(record, WeightStats):
            for tensor in record.tensors:
                self._write_values(record.seconds, record.num_steps, self._tensor(tensor))
        elif isinstance(record, EpochEnded):
            self._write_scalars(record.seconds, record.epoch, "epoch/", record.logs)
        elif isinstance(record, RunBegan):
            self._begin(record)
        elif isinstance(record, RunEnded):
            self._end(record)
        elif row := _event(record):
            self._add_event(record.seconds, row)
        if self._untold_since is not None and record.seconds - self._untold_since >= _EVENTS_S:
            self._write_events(record.seconds)

    def flush(self, *, at_once: bool = False) -> None:
        self._file.flush(at_once=at_once)

    def close(self) -> None:
        """Writes what is left, also of a run that has not ended."""
        if self._untold_since is not None:
            self._write_events(self._untold_since)
        self._file.close()

    def _begin(self, began: RunBegan) -> None:
        self._started_at, self._num_steps = began.started_at, began.resumed_steps
        self._performance = Performance()
        # What an earlier writer to this directory has told of steps that are made again is void. (For TensorBoard's
        # Python loader. The one in Rust sees it by the steps of each tag.)
        first = began.resumed_steps + 1 if began.resumed_steps else 0
        self._write(began.seconds, first, session_log=self._encoder.session_start())
        configuration = _table(("setting", "value"), _configuration(began))
        values = [self._encoder.text("configuration", configuration), session_start(began)]
        self._write_values(began.seconds, began.resumed_steps, values)
        graph, self._graph = self._graph, None
        if graph is not None and len(graph) > _MAX_GRAPH_BYTES:
            logger.warning("the graph of %d MiB is not written for TensorBoard: 16 are the most", len(graph) // 2**20)
        elif graph is not None:
            self._write(began.seconds, began.resumed_steps, graph_def=graph)

    def _end(self, ended: RunEnded) -> None:
        self._write_performance(self._performance.rest())
        if ended.outcome == "failed":
            self._add_event(ended.seconds, ("run", f"failed: {ended.message}"))
        if self._untold_since is not None:
            self._write_events(ended.seconds)
        self._write_values(ended.seconds, self._num_steps, [session_end(ended, self._started_at + ended.seconds)])

    def _write_performance(self, point: PerformancePoint | None) -> None:
        if point is None:
            return
        self._num_steps = max(self._num_steps, point.num_steps)
        self._write_scalars(point.seconds, point.num_steps, "", point.scalars)
        if point.staleness:
            # One bar a version: -0.5 to 0.5 are the pushes that were based on the newest weights.
            edges = np.arange(len(point.staleness) + 1) - 0.5
            histogram = self._encoder.histogram("staleness/distribution", edges, point.staleness)
            self._write_values(point.seconds, point.num_steps, [histogram])

    def _tensor(self, stats: TensorStats) -> list[Any]:
        values = [
            self._encoder.scalar(f"{group}/{stats.name}", value)
            for group, value in (("norms", stats.norm), ("update_norms", stats.update_norm))
            if value is not None and math.isfinite(value)
        ]
        if stats.histogram_counts:
            tag = f"weights/{stats.name}"
            values.append(self._encoder.histogram(tag, stats.histogram_edges, stats.histogram_counts))
        if stats.update_counts:
            values.append(self._encoder.histogram(f"updates/{stats.name}", stats.update_edges, stats.update_counts))
        return values

    def _add_event(self, seconds: float, row: tuple[str, str]) -> None:
        self._events.append((f"{seconds:,.1f} s", f"{self._num_steps:,}", *row))
        if self._untold_since is None:
            self._untold_since = seconds

    def _write_events(self, seconds: float) -> None:
        # All of them again: of several texts at one step TensorBoard keeps the last, and of many texts ten.
        self._untold_since = None
        text = _table(("time", "step", "where", "what"), reversed(self._events))
        self._write_values(seconds, self._num_steps, [self._encoder.text("events", text)])

    def _write_scalars(self, seconds: float, step: int, prefix: str, scalars: Mapping[str, float | None]) -> None:
        values = [
            self._encoder.scalar(prefix + name, value)
            for name, value in scalars.items()
            if value is not None and math.isfinite(value)
        ]
        self._write_values(seconds, step, values)

    def _write_values(self, seconds: float, step: int, values: Sequence[Any]) -> None:
        if values:
            self._write(seconds, step, summary=self._encoder.summary(values))

    def _write(self, seconds: float, step: int, **content: Any) -> None:
        self._writer.write(self._encoder.event(self._started_at + seconds, step, content))


class _Encoder:
    """Makes TensorBoard's messages. What it imports is TensorBoard's own, and loads no TensorFlow."""

    def __init__(self) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
            from tensorboard.plugins.histogram import metadata as histogram_metadata
            from tensorboard.plugins.scalar import metadata as scalar_metadata
            from tensorboard.plugins.text import metadata as text_metadata
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard's event files need the package tensorboard: pip install 'tensorspark[tensorboard]'"
            ) from error
        self._event = event_pb2
        self._summary = summary_pb2.Summary
        self._tensor = tensor_pb2.TensorProto
        self._types = types_pb2
        self._shape = tensor_shape_pb2.TensorShapeProto
        self.writer = RecordWriter
        self._metadata = {
            "scalar": scalar_metadata.create_summary_metadata(display_name="", description=""),
            "histogram": histogram_metadata.create_summary_metadata(display_name="", description=""),
            "text": text_metadata.create_summary_metadata(display_name="", description=""),
        }
        self._tags: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()

    def event(self, wall_time: float, step: int, content: Mapping[str, Any]) -> bytes:
        message: bytes = self._event.Event(wall_time=wall_time, step=step, **content).SerializeToString()
        return message

    def session_start(self) -> Any:
        return self._event.SessionLog(status=self._event.SessionLog.START)

    def summary(self, values: Sequence[Any]) -> Any:
        return self._summary(value=values)

    def scalar(self, name: str, value: float) -> Any:
        clipped = min(max(float(value), -_MAX_FLOAT32), _MAX_FLOAT32)
        return self._value("scalar", name, self._tensor(dtype=self._types.DT_FLOAT, float_val=[clipped]))

    def histogram(self, name: str, edges: Iterable[float], counts: Iterable[int]) -> Any:
        """Of one edge more than counts: a tensor `[len(counts), 3] float64` of left edge, right edge and count."""
        edge_values, count_values = np.array(edges, np.float64), np.array(counts, np.float64)
        rows = np.stack([edge_values[:-1], edge_values[1:], count_values], axis=1)
        dimensions = [self._shape.Dim(size=size) for size in rows.shape]
        tensor = self._tensor(
            dtype=self._types.DT_DOUBLE,
            tensor_shape=self._shape(dim=dimensions),
            tensor_content=rows.astype("<f8").tobytes(),
        )
        return self._value("histogram", name, tensor)

    def text(self, name: str, markdown: str) -> Any:
        tensor = self._tensor(dtype=self._types.DT_STRING, string_val=[markdown.encode()])
        return self._value("text", name, tensor)

    def _value(self, kind: str, name: str, tensor: Any) -> Any:
        tag = self._tags.get((kind, name)) or self._new_tag(kind, name)
        return self._summary.Value(tag=tag, metadata=self._metadata[kind], tensor=tensor)

    def _new_tag(self, kind: str, name: str) -> str:
        """A tag of its own: where two share one, TensorBoard shows the first kind's data alone."""
        stem = _clipped(_utf8(name) or "unnamed", _MAX_TAG)
        tag = next(tag for number in itertools.count(1) if (tag := _numbered(stem, number)) not in self._taken)
        self._taken.add(tag)
        self._tags[kind, name] = tag
        return tag


def _configuration(began: RunBegan) -> Iterable[tuple[str, str]]:
    yield "name", began.name
    yield "began", datetime.fromtimestamp(began.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield "mode", began.mode
    yield "combiner", began.combiner
    yield "partitions", str(began.num_partitions)
    yield "epochs", str(began.num_epochs)
    yield "variables", f"{len(began.tensors)}, of {began.model_bytes:,} bytes"
    if began.resumed_steps:
        yield "steps of the run that it goes on from", f"{began.resumed_steps:,}"
    if began.app_id:
        yield "Spark application", began.app_id
    if began.spark_url:
        yield "Spark's page", began.spark_url
    yield "tensorspark", began.tensorspark_version
    yield from sorted(began.settings.items())


def _event(record: Record) -> tuple[str, str] | None:
    """Where and what, of what is told as text."""
    if isinstance(record, CheckpointWritten):
        what = f"checkpoint {record.version}, {record.num_bytes:,} bytes in {record.duration_s:.1f} s: {record.url}"
        return "driver", what
    if isinstance(record, WorkerEvent) and record.what in _TOLD:
        what = f"{record.what} (attempt {record.attempt})"
        return f"partition {record.partition} on {record.host}", f"{what}: {record.text}" if record.text else what
    if isinstance(record, LogLine):
        level = logging.getLevelName(record.level)
        return f"partition {record.partition} on {record.host}", f"{level} {record.logger}: {record.message}"
    return None


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown whose cells are shown as they are."""
    lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    one_line = " ".join(_utf8(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", html.escape(_clipped(one_line, _MAX_CELL), quote=False))


def _utf8(text: str) -> str:
    """Without what no file can hold: halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def _clipped(text: str, num_characters: int) -> str:
    return text if len(text) <= num_characters else text[: num_characters - 1] + "…"


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem} ({number})"


def _namer() -> Callable[[int], str]:
    """Names of parts. A process may begin several files in a second: they are in order too."""
    host = re.sub(r"[^\w.-]+", "-", socket.gethostname())
    stem = f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.{next(_numbers)}"
    return lambda part: f"{stem}.{part:04d}"
