"""Who watches a session's runs: the dashboard, metrics, files, traces. None of them can harm a run."""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tensorspark.config import Config
from tensorspark.dashboard import site as pages
from tensorspark.dashboard.site import Site
from tensorspark.driver.weight_watching import WeightWatch
from tensorspark.errors import ConfigError, TensorsparkError
from tensorspark.shards.sharded_server import AnyServer
from tensorspark.telemetry.files import RunFile, directory_name
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    Record,
    RunBegan,
    RunEnded,
    Span,
    Spans,
)
from tensorspark.telemetry.traces import DRIVER, TraceFile
from tensorspark.telemetry.view import RunView

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_MANY_PARTITIONS, _LONG_INTERVAL_S = 200, 1.0
_END_S = 30.0


class Sink(Protocol):
    """Takes a run's records, on one thread at a time."""

    def record(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Watchers:
    """A session's: what outlasts its runs.

    Args:
        user: who to write to HDFS as.
        run_id: of the session, for the names of files.

    Attributes:
        site: what the session's servers serve beside their own pages.
        view: of the current run, or the last.

    Raises:
        ConfigError: the dashboard is asked for, and not installed.
    """

    def __init__(self, config: Config, *, user: str, run_id: str) -> None:
        self._config = config
        self._user = user
        self._run_id = run_id
        self._has_told = False
        if config.dashboard and not pages.is_installed():
            raise ConfigError(f"dashboard=True: {_HOW_TO_INSTALL}")
        self.view: RunView | None = None
        self.has_dashboard = pages.is_installed() if config.dashboard is None else config.dashboard
        token = config.dashboard_token or secrets.token_urlsafe(16)
        self.site = Site(lambda: self.view, token, has_dashboard=self.has_dashboard)

    @property
    def keeps_spans(self) -> bool:
        """Whether somebody wants to know when workers were at what."""
        return self.has_dashboard or self._config.log_dir is not None or self._config.trace_dir is not None

    @property
    def traces(self) -> bool:
        """Whether workers are to time what they do."""
        return self._config.trace_dir is not None

    def url(self, server: AnyServer) -> str | None:
        """Where the dashboard is, with its token."""
        return self.site.url(server.host, server.port, is_encrypted=server.certificate is not None)

    def notes(self, server: AnyServer) -> Iterator[str]:
        """Lines for who begins a run."""
        url = self.url(server)
        if url is not None:
            yield f"dashboard at {url}"
        elif self._config.dashboard is None and not self._has_told:
            yield f"no dashboard: {_HOW_TO_INSTALL}"
        self._has_told = True

    def watch(
        self, server: AnyServer, began: RunBegan, *, began_at: float, graph: Callable[[], bytes | None]
    ) -> RunWatch:
        """Watches a run that has just begun.

        Args:
            began_at: when, on the monotonic clock.
            graph: makes the serialized GraphDef of what is trained, if there is one.

        Raises:
            StagingError: `log_dir` or `trace_dir` cannot be written to.
            ConfigError: what is to write them is not installed.
        """
        name = directory_name(began, self._run_id)
        sinks: list[Sink] = []
        log_dir = trace = None
        if self._config.log_dir is not None:
            from tensorspark.telemetry.tensorboard import EventFiles

            log_dir = f"{self._config.log_dir.rstrip('/')}/{name}"
            sinks += [RunFile(log_dir, user=self._user), EventFiles(log_dir, user=self._user, graph=graph())]
        if self._config.trace_dir is not None:
            trace = TraceFile(f"{self._config.trace_dir.rstrip('/')}/{name}.json", user=self._user)
            trace.check()
            sinks.append(trace)
        view = RunView()
        watch = RunWatch(
            server,
            view,
            sinks,
            began,
            began_at=began_at,
            log_dir=log_dir,
            trace=trace,
            wants_weights=lambda: log_dir is not None or self.site.is_watched,
        )
        self.view = view  # only now: of a run that could not be watched, pages would wait for the end
        return watch


_HOW_TO_INSTALL = "it needs Bokeh, pip install 'tensorspark[dashboard]'"


class RunWatch:
    """Asks the server twice a second what has happened, and tells all who watch; on a thread of its own.

    Attributes:
        log_dir: the run's own directory, with its record and TensorBoard's files; None: there is none.
        trace: the file that the trace goes to, with its URL.
    """

    def __init__(
        self,
        server: AnyServer,
        view: RunView,
        sinks: Sequence[Sink],
        began: RunBegan,
        *,
        began_at: float,
        log_dir: str | None,
        trace: TraceFile | None,
        wants_weights: Callable[[], bool],
    ) -> None:
        self.log_dir = log_dir
        self.trace = trace
        self._server = server
        self._view = view
        self._sinks = list(sinks)
        self._began_at = began_at
        self._interval_s = _LONG_INTERVAL_S if began.num_partitions > _MANY_PARTITIONS else _INTERVAL_S
        self._weights = WeightWatch(server, wants_weights)
        self._telling = threading.Lock()
        self._observing = threading.Lock()
        self._ending = threading.Event()
        self._num_steps = self._num_samples = 0
        self._tell(began)
        for sink in self._sinks:  # here, where what is wrong with it may still be said
            sink.flush()
        self._thread = threading.Thread(target=self._run, name="tensorspark-watch", daemon=True)
        self._thread.start()

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Times what the driver does, for the trace."""
        return contextlib.nullcontext() if self.trace is None else self._timed(name, self.trace)

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """An epoch of `fit` has ended, with these metrics."""
        self._observe()  # nobody trains now: what is told next is of all its steps
        metrics = {name: _number(float(value)) for name, value in logs.items() if isinstance(value, numbers.Real)}
        self._tell(EpochEnded(self._now(), epoch, self._num_steps, metrics))

    def checkpoint_written(self, version: int, url: str, num_bytes: int, duration_s: float) -> None:
        """A checkpoint is where it belongs."""
        self._tell(CheckpointWritten(self._now(), version, url, num_bytes, duration_s))

    def end(self, error: BaseException | None, *, was_stopped: bool = False) -> None:
        """The run is over; its server still knows it. Idempotent."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._thread.join(_END_S)
        self._observe()
        self._weights.forget()
        outcome = "failed" if error is not None else "stopped" if was_stopped else "finished"
        first_line = str(error).partition("\n")[0] if error is not None else ""
        message = f"{type(error).__name__}: {first_line}" if error is not None else ""
        self._tell(RunEnded(self._now(), outcome, message, self._num_steps, self._num_samples))
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)

    def _now(self) -> float:
        return time.monotonic() - self._began_at

    def _run(self) -> None:
        while not self._ending.wait(self._interval_s):
            self._observe()
            self._tell(self._weights.stats(self._now(), self._num_steps))
            for sink in list(self._sinks):
                self._guarded(sink, sink.flush)

    def _observe(self) -> None:
        with self._observing:  # so that what was observed first is told first
            try:
                observation = self._server.observe()
            except Exception as error:  # the server is closed, or too busy to answer: who trains finds out
                logger.debug("nothing was observed: %s", error)
                return
            sample = observation.sample
            self._num_steps, self._num_samples = sample.num_steps, sample.num_samples
            spans = [Spans(sample.seconds, observation.spans)] if observation.spans else []
            self._tell(*observation.points, sample, *spans, *observation.events, *observation.logs)
            if self.trace is not None:
                self.trace.add(observation.traced)

    def _tell(self, *records: Record | None) -> None:
        with self._telling:
            for record in records:
                if record is None:
                    continue
                self._view.apply(record)
                for sink in list(self._sinks):
                    self._guarded(sink, lambda sink=sink, record=record: sink.record(record))  # type: ignore[misc]

    def _guarded(self, sink: Sink, action: Callable[[], None]) -> None:
        """A sink that fails is told nothing more; the run goes on."""
        try:
            action()
        except Exception as error:
            if sink in self._sinks:
                self._sinks.remove(sink)
            unexpected = None if isinstance(error, TensorsparkError) else error
            logger.warning(
                "%s writes no more of this run, which goes on: %s", type(sink).__name__, error, exc_info=unexpected
            )

    @contextlib.contextmanager
    def _timed(self, name: str, trace: TraceFile) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            trace.add((Span(began, DRIVER, name, self._now() - began),))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
