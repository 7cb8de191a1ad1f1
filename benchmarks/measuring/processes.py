"""Processes that a benchmark measures: each holds one object and answers calls, every call with a deadline."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 60.0
_END_DEADLINE_S = 10.0
_START_MARGIN_S = 0.03

Span = tuple[float, float]
"""When something began and ended, on `time.monotonic`, which all processes of a Linux machine share."""


class PeerError(Exception):
    """A peer raised, died or did not answer in time."""


class Peer:
    """A process that holds the object that `make` returns.

    `begin` and `end` are the halves of a call, so that several peers work at the same time. Leaving the ``with`` block
    ends the process; the object's `close` runs in it where there is one.

    Args:
        make: picklable, called in the process.
        deadline_s: for making the object.
    """

    def __init__(self, name: str, make: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, make, args), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._make_deadline_s: float | None = deadline_s

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pipe.close()
        self._process.join(_END_DEADLINE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_DEADLINE_S)

    def call(self, method: str, *args: Any, deadline_s: float = DEADLINE_S) -> Any:
        """Runs a method of the peer's object and returns its result."""
        self.begin(method, *args)
        return self.end(deadline_s)

    def begin(self, method: str, *args: Any) -> None:
        self._wait_until_made()
        self._pipe.send((method, args))

    def end(self, deadline_s: float = DEADLINE_S) -> Any:
        """The result of the call begun before; raises `PeerError` where there is none."""
        try:
            if not self._pipe.poll(deadline_s):
                raise PeerError(f"{self.name} did not answer within {deadline_s:g} s")
            succeeded, result = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise PeerError(f"{self.name} died, exit code {self._process.exitcode}") from error
        if not succeeded:
            raise PeerError(f"{self.name} raised:\n{result}")
        return result

    def _wait_until_made(self) -> None:
        if self._make_deadline_s is not None:
            deadline_s, self._make_deadline_s = self._make_deadline_s, None
            self.end(deadline_s)


@contextlib.contextmanager
def started(peers: Sequence[Peer]) -> Iterator[Sequence[Peer]]:
    """Peers that were just made, until the end of the block."""
    with contextlib.ExitStack() as stack:
        for peer in peers:
            stack.enter_context(peer)
        yield peers


def together(peers: Sequence[Peer], method: str, *args: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
    """Runs `method(start_at, *args)` on all peers at once; `start_at` is when they are to start, for `wait_until`."""
    start_at = time.monotonic() + _START_MARGIN_S
    for peer in peers:
        peer.begin(method, start_at, *args)
    return [peer.end(deadline_s) for peer in peers]


def wait_until(moment: float) -> None:
    """Sleeps until `moment` on `time.monotonic`."""
    time.sleep(max(0.0, moment - time.monotonic()))


def seconds_of(spans: Sequence[Span]) -> float:
    """From the first begin to the last end."""
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def _answer(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """A peer's process: until the other end of the pipe closes."""
    held: Any = None
    try:
        held = _attempt(pipe, make, args)
        while True:
            method, arguments = pipe.recv()
            _attempt(pipe, getattr(held, method), arguments, reply=True)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass
    finally:
        if hasattr(held, "close"):
            held.close()


def _attempt(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], reply: bool = False) -> Any:
    """Calls, tells the other side how it went, and returns the result."""
    try:
        result = function(*args)
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return None
    pipe.send((True, result if reply else None))
    return result
