"""A dashboard on a loop in a thread of its own, as beside a parameter server, and a run that goes on beneath it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from tensorspark.dashboard.app import Dashboard
from tensorspark.telemetry.records import Record
from tensorspark.telemetry.view import RunView

_DEADLINE_S = 30


class Served:
    """Serves `view` until it is left or stopped.

    Attributes:
        url: of the page.
        view: of the current run; assign another and it is another run.
    """

    def __init__(self, view: RunView | None) -> None:
        self.view = view
        self.url = ""
        self.dashboard = Dashboard(lambda: self.view)
        self._is_ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tensorspark-test-dashboard")

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._is_ready.wait(_DEADLINE_S)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Goes away, as a server does when its program ends."""
        if self._thread.is_alive() and self._loop is not None and self._leave is not None:
            self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(_DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._is_ready.set()

    async def _serve(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        await self.dashboard.start()
        sockets = bind_sockets(0, "127.0.0.1")
        server = HTTPServer(self.dashboard.application)
        server.add_sockets(sockets)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/dashboard"
        self._is_ready.set()
        await self._leave.wait()
        server.stop()
        await self.dashboard.stop()
        await server.close_all_connections()


class Feeder:
    """Applies a run's records to a view in a thread, in real time or `speed` times as fast.

    Args:
        rounds: as `SyntheticRun.rounds` gives them.
        until_s: so much of the run is applied at once, before it is entered.
    """

    def __init__(
        self, view: RunView, rounds: Iterable[list[Record]], *, speed: float = 1.0, until_s: float = 0.0
    ) -> None:
        self._view, self._rounds, self._speed = view, iter(rounds), speed
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorspark-test-feeder")
        self._seconds = 0.0
        while self._seconds < until_s and self._apply_next():
            pass

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        self._thread.join(_DEADLINE_S)
        assert not self._thread.is_alive()

    def _apply_next(self) -> bool:
        records = next(self._rounds, None)
        for record in records or ():
            self._view.apply(record)
            self._seconds = max(self._seconds, record.seconds)
        return records is not None

    def _run(self) -> None:
        began, begins_at = time.monotonic(), self._seconds
        while self._apply_next():
            due = began + (self._seconds - begins_at) / self._speed
            if self._leave.wait(max(due - time.monotonic(), 0.0)):
                return
