"""Who watches a session's runs: the dashboard, metrics, files, traces. None of them can harm a run."""

from __future__ import annotations

import contextlib
import functools
import logging
import numbers
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tensorspark.config import Config
from tensorspark.dashboard import site as pages
from tensorspark.dashboard.site import Site
from tensorspark.driver.weight_watching import WeightWatch
from tensorspark.errors import ConfigError, TensorsparkError
from tensorspark.shards.sharded_server import AnyServer
from tensorspark.telemetry.collector import finite
from tensorspark.telemetry.files import RunFile, directory_name
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    Observation,
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

    def flush(self, *, at_once: bool = False) -> None: ...

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

    def watch(self, server: AnyServer, began: RunBegan, graph: Callable[[], bytes | None]) -> RunWatch:
        """Watches a run that has just begun.

        Args:
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

            log_dir = _within(self._config.log_dir, name)
            sinks += [RunFile(log_dir, user=self._user), EventFiles(log_dir, user=self._user, graph=graph())]
        if self._config.trace_dir is not None:
            trace = TraceFile(_within(self._config.trace_dir, f"{name}.json"), user=self._user)
            trace.check()
            sinks.append(trace)
        view = RunView()
        watch = RunWatch(
            server,
            view,
            sinks,
            began,
            log_dir=log_dir,
            trace=trace,
            wants_weights=lambda: log_dir is not None or self.site.is_watched,
        )
        self.view = view  # only now: of a run that could not be watched, pages would wait for the end
        return watch


_HOW_TO_INSTALL = "it needs Bokeh, pip install 'tensorspark[dashboard]'"


class RunWatch:
    """Asks the server twice a second what has happened, and tells all who watch; on a thread of its own.

    The driver's thread only leaves notes for it: whatever a filesystem or a page is at, the training does not wait.

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
        log_dir: str | None,
        trace: TraceFile | None,
        wants_weights: Callable[[], bool],
    ) -> None:
        self.log_dir = log_dir
        self.trace = trace
        self._server = server
        self._view = view
        self._sinks = list(sinks)
        self._began_at = server.began_at
        self._interval_s = _LONG_INTERVAL_S if began.num_partitions > _MANY_PARTITIONS else _INTERVAL_S
        self._weights = WeightWatch(server, wants_weights)
        self._noted: deque[Record | Span] = deque()  # by the driver's thread
        self._ending = threading.Event()
        self._outcome, self._message = "finished", ""
        self._num_steps = self._num_samples = 0
        view.apply(began)
        for sink in self._sinks:  # here, where what is wrong with it may still be said
            sink.record(began)
            sink.flush(at_once=True)
        self._thread = threading.Thread(target=self._run, name="tensorspark-watch", daemon=True)
        self._thread.start()

    # The driver's thread

    @property
    def trace_url(self) -> str | None:
        """Where the trace is, once the run has ended; None where there is none, or it could not be written."""
        return self.trace.url if self.trace is not None and self.trace in self._sinks else None

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Times what the driver does, for the trace."""
        return contextlib.nullcontext() if self.trace is None else self._timed(name)

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """An epoch of `fit` has ended, with these metrics; all workers rest."""
        metrics = {name: finite(float(value)) for name, value in logs.items() if isinstance(value, numbers.Real)}
        try:
            num_steps = self._server.status().num_steps
        except Exception as error:  # who trains finds out
            logger.debug("no steps are known of epoch %d: %s", epoch, error)
            return
        self._noted.append(EpochEnded(self._now(), epoch, num_steps, metrics))

    def checkpoint_written(self, version: int, url: str, num_bytes: int, duration_s: float) -> None:
        """A checkpoint is where it belongs. On any thread."""
        self._noted.append(CheckpointWritten(self._now(), version, url, num_bytes, duration_s))

    def end(self, error: BaseException | None, *, was_stopped: bool = False) -> None:
        """The run is over; its server still knows it. Idempotent.

        Waits until all is told, and written, for at most half a minute; then the rest is left to itself.
        """
        if self._ending.is_set():
            return
        if isinstance(error, KeyboardInterrupt):
            self._outcome, self._message = "stopped", "interrupted"
        elif error is not None:
            first_line = str(error).partition("\n")[0]
            self._outcome, self._message = "failed", f"{type(error).__name__}: {first_line}".rstrip(": ")
        elif was_stopped:
            self._outcome = "stopped"
        self._ending.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            logger.warning("what this run has told is not all written after %g s: the rest is left to itself", _END_S)

    def _now(self) -> float:
        return time.monotonic() - self._began_at

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._noted.append(Span(began, DRIVER, name, self._now() - began))

    # The thread that watches

    def _run(self) -> None:
        try:
            while not self._ending.wait(self._interval_s):
                self._turn()
                stats = self._weights.stats(self._now(), self._num_steps)
                if stats is not None:
                    self._tell(stats)
                for sink in list(self._sinks):
                    self._guarded(sink, sink.flush)
        except Exception:
            logger.exception("the run goes on, but is not watched any more")
        finally:
            self._conclude()

    def _conclude(self) -> None:
        """Tells the end, also where the thread came to one before: who is open is closed."""
        self._ending.wait()
        self._weights.forget()
        try:
            self._turn()
            self._tell(RunEnded(self._now(), self._outcome, self._message, self._num_steps, self._num_samples))
        except Exception:
            logger.exception("the end of the run could not be told")
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)

    def _turn(self) -> None:
        """Tells what the server has gathered, then what the driver has noted."""
        try:
            observation = self._server.observe()
        except Exception as error:  # the server is closed, or too busy to answer: who trains finds out
            logger.debug("nothing was observed: %s", error)
        else:
            self._tell_observed(observation)
        while self._noted:
            noted = self._noted.popleft()
            if not isinstance(noted, Span):
                self._tell(noted)
            elif self.trace is not None:
                self.trace.add((noted,))

    def _tell_observed(self, observation: Observation) -> None:
        sample = observation.sample
        self._num_steps, self._num_samples = sample.num_steps, sample.num_samples
        spans = [Spans(sample.seconds, observation.spans)] if observation.spans else []
        records: tuple[Record, ...] = (*observation.points, sample, *spans, *observation.events, *observation.logs)
        for record in records:
            self._tell(record)
        if self.trace is not None:
            self.trace.add(observation.traced)
        for line in observation.logs:
            logger.log(line.level, "partition %d on %s: %s: %s", line.partition, line.host, line.logger, line.message)

    def _tell(self, record: Record) -> None:
        self._view.apply(record)
        for sink in list(self._sinks):
            self._guarded(sink, functools.partial(sink.record, record))

    def _guarded(self, sink: Sink, action: Callable[[], None]) -> None:
        """A sink that fails is told nothing more; the run goes on."""
        try:
            action()
        except Exception as error:
            self._sinks.remove(sink)
            unexpected = None if isinstance(error, TensorsparkError) else error
            logger.warning(
                "%s writes no more of this run, which goes on: %s", type(sink).__name__, error, exc_info=unexpected
            )


def _within(directory: str, name: str) -> str:
    """The URL of what lies in a directory, whose own URL may be no more than a scheme."""
    return f"{directory}{'' if directory.endswith('/') else '/'}{name}"
