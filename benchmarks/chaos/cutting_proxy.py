"""A TCP proxy that cuts a connection in the middle of a frame when it is told to."""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
import time
from typing import Self

_HOST = "127.0.0.1"
_CHUNK_BYTES = 2**16
# Weights are the only frames as long as this, and a chunk of so many bytes holds little else.
_MIN_CUT_BYTES = 2**12
_ACCEPT_POLL_S = 0.1
_END_DEADLINE_S = 10.0


class Direction(enum.Enum):
    """Who sends what is cut."""

    FROM_WORKER = enum.auto()
    FROM_SERVER = enum.auto()


class CuttingProxy:
    """Forwards connections to a port of this machine until the ``with`` block ends.

    Args:
        target_port: where the server listens, by the time that somebody connects.

    Attributes:
        port: where the proxy listens.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server((_HOST, 0))
        self._listener.settimeout(_ACCEPT_POLL_S)
        self.port: int = self._listener.getsockname()[1]
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._armed: Direction | None = None
        self._cut_at: float | None = None
        self._was_cut = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy")]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._threads[0].join(_END_DEADLINE_S)
        for connection in self._sockets:
            _shut(connection)
        for thread in self._threads:
            thread.join(_END_DEADLINE_S)
        for connection in (self._listener, *self._sockets):
            connection.close()

    def cut(self, direction: Direction, deadline_s: float) -> float:
        """Cuts the connection whose weights are next to come, halfway through them; returns when it was done.

        Raises:
            TimeoutError: none came.
        """
        with self._lock:
            self._was_cut.clear()
            self._armed = direction
        if not self._was_cut.wait(deadline_s):
            raise TimeoutError(f"no weights came through the proxy within {deadline_s:g} s")
        assert self._cut_at is not None
        return self._cut_at

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                worker, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                server = socket.create_connection((_HOST, self._target_port), timeout=_END_DEADLINE_S)
            except OSError:
                worker.close()
                continue
            for connection in (worker, server):
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(connection)
            self._start(worker, server, Direction.FROM_WORKER)
            self._start(server, worker, Direction.FROM_SERVER)

    def _start(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        thread = threading.Thread(target=self._forward, args=(source, target, direction), name="proxy")
        self._threads.append(thread)
        thread.start()

    def _forward(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                is_cut = self._take_cut(direction, len(data))
                target.sendall(data[: len(data) // 2] if is_cut else data)
                if is_cut:
                    break
        _shut(source)
        _shut(target)

    def _take_cut(self, direction: Direction, num_bytes: int) -> bool:
        with self._lock:
            if self._armed is not direction or num_bytes < _MIN_CUT_BYTES:
                return False
            self._armed = None
            self._cut_at = time.monotonic()
            self._was_cut.set()
            return True


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
