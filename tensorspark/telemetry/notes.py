"""What a worker tells beside its pushes: lines of its log, and how long its steps took. Nothing waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_SEND_S = 0.5  # between two notes
_CLOSE_S = 2.0  # a link that stands takes its frames in far less
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

    What cannot be sent waits; where too much waits, the newest is dropped, and counted. To be entered: that starts the
    thread; at the end it sends what is left, if it can at once.

    Args:
        send: called on one thread at a time.
        times: whether `timing` times anything.
    """

    def __init__(self, send: Send, *, times: bool = False) -> None:
        self._send = send
        self._times = times
        # No lock: a line may be written by a finalizer, which may run on any thread at any point.
        self._lines: deque[Line] = deque()
        self._timings: deque[Timing] = deque()
        self._dropped: deque[None] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorspark-notes", daemon=True)

    def __enter__(self) -> Notebook:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def write(self, line: Line) -> None:
        """Adds a line of a log."""
        if len(self._lines) >= _MAX_LINES:
            self._dropped.append(None)
            return
        self._lines.append(Line(line.level, _sendable(line.logger, _MAX_NAME), _sendable(line.message, _MAX_MESSAGE)))

    def timing(self, name: str) -> AbstractContextManager[None]:
        """Times what is done within, if anybody wants to know."""
        return self._timed(name) if self._times else _UNTIMED

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            if len(self._timings) < _MAX_TIMINGS:
                self._timings.append(Timing(name, began, time.monotonic() - began))

    def _run(self) -> None:
        while not self._closing.wait(_SEND_S):
            self._send_all()
        self._send_all()

    def _send_all(self) -> None:
        """Sends what is there, as far as it can be sent now."""
        try:
            while self._send_some():
                pass
        except Exception as error:  # the worker goes on; what is written next is tried again
            logger.debug("notes could not be sent: %s", error)

    def _send_some(self) -> bool:
        """Sends a note's worth of the oldest; whether there was one, and it left."""
        lines = tuple(self._lines[index] for index in range(min(len(self._lines), _MAX_NOTE_LINES)))
        num_dropped = 0 if lines else len(self._dropped)
        timings: tuple[Timing, ...] = ()
        if num_dropped:
            lines = (Line(logging.WARNING, __name__, f"{num_dropped} more lines of this worker were dropped"),)
        elif not lines:
            num_timings = min(len(self._timings), _MAX_NOTE_TIMINGS)
            timings = tuple(self._timings[index] for index in range(num_timings))
        if not (lines or timings) or not self._send(lines, timings):
            return False
        # Others may have written meanwhile: what was sent is what was first.
        sent = self._dropped if num_dropped else self._lines if lines else self._timings
        for _ in range(num_dropped or len(lines) or len(timings)):
            sent.popleft()
        return True


_RETOLD = "tensorspark.driver.watching"
_notebooks: set[Notebook] = set()  # which take the process's lines now
_taking = threading.Lock()
_factory: list[Callable[..., logging.LogRecord]] = []  # the one that makes records without us, while we are at work


@contextmanager
def logged(notebook: Notebook) -> Iterator[None]:
    """Has the notebook take the process's log lines, from WARNING on, meanwhile.

    Lines are taken where they are made, not by a handler of the root logger's: with one, a `logging.basicConfig` of the
    user's would do nothing, and lines that nobody handles would not get to the executor's own log.
    """
    with _taking:
        if not _notebooks:
            _factory.append(logging.getLogRecordFactory())
            logging.setLogRecordFactory(_make_and_take)
        _notebooks.add(notebook)
    try:
        yield
    finally:
        with _taking:
            _notebooks.discard(notebook)
            if not _notebooks and logging.getLogRecordFactory() is _make_and_take:
                logging.setLogRecordFactory(_factory[-1])


def _make_and_take(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _factory[-1](*args, **kwargs)
    # What the driver says of workers' lines is not theirs, where both are in one process.
    if record.levelno >= logging.WARNING and record.name != _RETOLD:
        for notebook in tuple(_notebooks):
            notebook.write(_line_of(record))
    return record


def _line_of(record: logging.LogRecord) -> Line:
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit: who handles the record complains
        message = str(record.msg)
    if record.exc_info and record.exc_info[1] is not None:
        message += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
    return Line(record.levelno, record.name, message)


def _sendable(text: str, num_characters: int) -> str:
    """Its beginning; half a character, as a file's name may have, cannot be sent as it is."""
    return text[:num_characters].encode(errors="backslashreplace").decode()[:num_characters]


def untimed(name: str) -> AbstractContextManager[None]:
    """A `Timed` that times nothing."""
    return _UNTIMED
