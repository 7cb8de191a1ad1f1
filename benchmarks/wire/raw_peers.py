"""Raw TCP, as fast as Python's sockets go: what the parameter server is measured against.

The same buffers, calls and positions as in `tensorspark.ps` (`sendall` of a memoryview, `recv_into` a buffer that is
there already), but no frames, no merging, no event loop: a thread a connection.
"""

from __future__ import annotations

import socket
import struct
import threading
import time

import numpy as np

from benchmarks.measuring.processes import DEADLINE_S, Span, wait_until

_COMMAND = struct.Struct("<cQ")
_SEND, _RECEIVE, _ECHO = b"S", b"R", b"E"
_DONE = b"."


class RawServer:
    """In the parameter server's position: sends and receives buffers as clients command."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._outgoing = _warm_buffer(num_bytes)
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        incoming = _warm_buffer(self._num_bytes)
        command = bytearray(_COMMAND.size)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while _await_command(connection, command):
                kind, count = _COMMAND.unpack(command)
                for _ in range(count):
                    if kind != _SEND:
                        _fill(connection, incoming)
                    if kind != _RECEIVE:
                        connection.sendall(incoming if kind == _ECHO else self._outgoing)
                if kind == _RECEIVE:
                    connection.sendall(_DONE)


class RawClient:
    """In a worker's position. Its methods return when the transfers began and ended."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self._buffer = _warm_buffer(num_bytes)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pull(self, start_at: float, count: int) -> Span:
        """Receives `count` buffers that the server sends one after the other."""
        wait_until(start_at)
        began = time.monotonic()
        self._socket.sendall(_COMMAND.pack(_SEND, count))
        for _ in range(count):
            self._receive(self._buffer)
        return began, time.monotonic()

    def push(self, start_at: float, count: int) -> Span:
        """Sends `count` buffers; ends when the server has the last one."""
        wait_until(start_at)
        began = time.monotonic()
        self._socket.sendall(_COMMAND.pack(_RECEIVE, count))
        for _ in range(count):
            self._socket.sendall(self._buffer)
        self._receive(memoryview(bytearray(1)))
        return began, time.monotonic()

    def echo(self, start_at: float, count: int) -> Span:
        """Sends a buffer and gets it back, `count` times."""
        wait_until(start_at)
        began = time.monotonic()
        self._socket.sendall(_COMMAND.pack(_ECHO, count))
        for _ in range(count):
            self._socket.sendall(self._buffer)
            self._receive(self._buffer)
        return began, time.monotonic()

    def close(self) -> None:
        self._socket.close()

    def _receive(self, view: memoryview) -> None:
        if not _fill(self._socket, view):
            raise ConnectionError("the raw server closed the connection")


def _await_command(connection: socket.socket, command: bytearray) -> bool:
    """Waits, however long it takes, for the next command; returns False where the client has gone."""
    connection.settimeout(None)
    try:
        return _fill(connection, memoryview(command))
    finally:
        connection.settimeout(DEADLINE_S)  # not only a deadline: a blocking send of 100 MB at once is a third slower


def _warm_buffer(num_bytes: int) -> memoryview:
    """A buffer whose pages are in memory already."""
    return memoryview(np.full(num_bytes, 7, np.uint8).data)


def _fill(connection: socket.socket, view: memoryview) -> bool:
    """Receives until `view` is full; returns False where the peer closes instead."""
    while view:
        received = connection.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True
