"""The other end of `benchmarks.chaos.driver`: starts it, watches what it tells, and kills it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks import REPOSITORY
from benchmarks.chaos.driver import Application, Training
from benchmarks.clusters.standalone import spark_environment

Event = dict[str, Any]
"""What the driver told: ``event`` is its kind, ``at`` its time on `time.monotonic`."""

_END_DEADLINE_S = 30.0
_TAIL_BYTES = 4000


class DriverError(Exception):
    """The driver failed, ended or was silent for too long; the message holds the end of what it wrote."""


class DriverProcess:
    """A driver in a process of its own, until the ``with`` block ends.

    Args:
        log_path: what it writes to stderr is appended here.
    """

    def __init__(self, application: Application, log_path: Path) -> None:
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                application.command(),
                cwd=REPOSITORY,
                env=spark_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._events: list[Event] = []
        self._told = threading.Condition()
        self._is_over = False
        self._has_begun = False
        self._first = 0
        self._reader = threading.Thread(target=self._read, name="driver-events")
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self.is_idle:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):  # its JVM, too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END_DEADLINE_S)
        self._reader.join(_END_DEADLINE_S)
        self._process.stdout.close()

    @property
    def is_idle(self) -> bool:
        """Whether the process lives and has told of the end of what it was to train."""
        is_done = not self._has_begun or any(event["event"] in ("done", "failed") for event in self.events())
        return self._process.poll() is None and is_done

    def begin(self, training: Training) -> None:
        """Has it train. The training before must be over."""
        self._has_begun, self._first = True, len(self._events)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `wait_for` tells it with the log
            self._process.stdin.write(json.dumps(asdict(training)) + "\n")
            self._process.stdin.flush()

    def events(self) -> Sequence[Event]:
        """What it has told of the training so far."""
        with self._told:
            return self._events[self._first :]

    def wait_for(self, what: str, condition: Callable[[Event], bool], deadline_s: float) -> Event:
        """The training's first event that fulfils the condition.

        Raises:
            DriverError: it did not come in time, or the driver has failed.
        """
        deadline = time.monotonic() + deadline_s
        index = self._first
        with self._told:
            while True:
                for event in self._events[index:]:
                    if condition(event):
                        return event
                    if event["event"] == "failed":
                        raise DriverError(f"waiting for {what}, the training failed:\n{event['traceback']}")
                index = len(self._events)
                if self._is_over:
                    raise DriverError(f"waiting for {what}, the driver ended:\n{self.tail()}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    last = self._events[-1] if self._events else None
                    raise DriverError(f"no {what} within {deadline_s:g} s; last event: {last}\n{self.tail()}")
                self._told.wait(left_s)

    def wait_for_end(self, deadline_s: float) -> Event:
        """The event that says what came of the training."""
        return self.wait_for("end of the training", lambda event: event["event"] == "done", deadline_s)

    def kill(self) -> float:
        """Kills the Python process, as kill -9 does; its JVM is left to find out. Returns when it was dead."""
        self._process.kill()
        self._process.wait(_END_DEADLINE_S)
        return time.monotonic()

    def tail(self) -> str:
        """The end of what it wrote to stderr."""
        return self._log_path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line) if line.startswith("{") and line.endswith("}\n") else None
            if event is not None:  # what Spark prints is none
                with self._told:
                    self._events.append(event)
                    self._told.notify_all()
        with self._told:
            self._is_over = True
            self._told.notify_all()
