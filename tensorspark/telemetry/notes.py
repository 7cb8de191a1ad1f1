"""What a worker tells beside its pushes: lines of its log, and how long its steps took. Nothing waits for it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

_SEND_S = 0.5  # between two notes
_CLOSE_S = 2.0
_MAX_LINES, _MAX_TIMINGS = 200, 20_000  # that wait to be sent
_MAX_NOTE_LINES, _MAX_NOTE_TIMINGS = 12, 800  # one or the other, so that a note fits into a frame's header
_MAX_MESSAGE, _MAX_NAME = 900, 100  # characters, of up to four bytes
_UNTIMED = nullcontext()


@dataclass(frozen=True)
class Line:
    """A line of a worker's log; `level` as in `logging`."""

    level: int
    logger: str
    message: str


@dataclass(frozen=True)
class Timing:
    """Something that a worker has timed; `began` on its monotonic clock."""

    name: str
    began: float
    duration_s: float


@dataclass(frozen=True)
class Note:
    """Lines and timings of one worker, in their order.

    Attributes:
        sent_at: by the worker's monotonic clock.
        clock_bound: as `ClockBounds.departed` takes it; None where the worker knows none.
    """

    sent_at: float
    lines: tuple[Line, ...] = ()
    timings: tuple[Timing, ...] = ()
    clock_bound: float | None = None


Timed = Callable[[str], AbstractContextManager[None]]
"""Times what is done within, under a name."""

Send = Callable[[tuple[Line, ...], tuple[Timing, ...]], bool]
"""Sends a note; returns whether it left."""


class Notebook:
    """Gathers a worker's lines and timings, and sends them now and then on a thread of its own. Any thread may write.

    What cannot be sent waits; where too much waits, the newest is dropped, and counted.

    Args:
        send: called on one thread at a time.
        times: whether `timing` times anything.
    """

    def __init__(self, send: Send, *, times: bool = False) -> None:
        self._send = send
        self._times = times
        self._lines: deque[Line] = deque()
        self._timings: deque[Timing] = deque()
        self._num_dropped = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, line: Line) -> None:
        """Adds a line of a log."""
        with self._lock:
            if len(self._lines) >= _MAX_LINES:
                self._num_dropped += 1
                return
            self._lines.append(
                Line(line.level, _sendable(line.logger, _MAX_NAME), _sendable(line.message, _MAX_MESSAGE))
            )
            self._start()

    def timing(self, name: str) -> AbstractContextManager[None]:
        """Times what is done within, if anybody wants to know."""
        return self._timed(name) if self._times else _UNTIMED

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            timing = Timing(name, began, time.monotonic() - began)
            with self._lock:
                if len(self._timings) < _MAX_TIMINGS:
                    self._timings.append(timing)
                self._start()

    def close(self) -> None:
        """Sends what is left, for at most two seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _start(self) -> None:
        self._wake.set()
        if self._thread is None and not self._closing.is_set():
            self._thread = threading.Thread(target=self._run, name="tensorspark-notes", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        deadline: float | None = None
        while True:
            self._wake.wait()
            self._wake.clear()
            has_sent = self._send_all()
            if self._closing.is_set():
                deadline = deadline or time.monotonic() + _CLOSE_S
                if has_sent or time.monotonic() > deadline:
                    return
                self._wake.set()
                time.sleep(_SEND_S / 10)
                continue
            if not has_sent:
                self._wake.set()
            self._closing.wait(_SEND_S)

    def _send_all(self) -> bool:
        """Whether nothing is left."""
        while True:
            with self._lock:
                lines = tuple(itertools.islice(self._lines, _MAX_NOTE_LINES))
                num_dropped = 0 if lines else self._num_dropped
                timings = () if lines or num_dropped else tuple(itertools.islice(self._timings, _MAX_NOTE_TIMINGS))
            told = lines
            if num_dropped:
                told = (Line(logging.WARNING, __name__, f"{num_dropped} more lines of this worker were dropped"),)
            if not told and not timings:
                return True
            if not self._send(told, timings):
                return False
            with self._lock:
                # Others may have written meanwhile: what was sent is what was first.
                self._num_dropped -= num_dropped
                for _ in lines:
                    self._lines.popleft()
                for _ in timings:
                    self._timings.popleft()


class LogHandler(logging.Handler):
    """Writes a process's log lines, from WARNING on, to a notebook."""

    def __init__(self, notebook: Notebook) -> None:
        super().__init__(logging.WARNING)
        self._notebook = notebook

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
            self._notebook.write(Line(record.levelno, record.name, message))
        except Exception:
            self.handleError(record)
        if logging.lastResort is not None and self._is_alone(record.name):
            logging.lastResort.handle(record)  # as it would be without us: the executor's own log has it too

    def _is_alone(self, name: str) -> bool:
        """Whether nobody else takes what this logger says."""
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return False
            logger = logger.parent if logger.propagate else None
        return True


def _sendable(text: str, num_characters: int) -> str:
    """Its beginning; half a character, as a file's name may have, cannot be sent as it is."""
    return text[:num_characters].encode(errors="backslashreplace").decode()[:num_characters]


def untimed(name: str) -> AbstractContextManager[None]:
    """A `Timed` that times nothing."""
    return _UNTIMED


@contextmanager
def logged(notebook: Notebook) -> Iterator[None]:
    """Has the notebook take the root logger's lines meanwhile."""
    handler = LogHandler(notebook)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
