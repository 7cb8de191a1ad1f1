"""What the driver and a shard's process say to each other: calls, answered in any order, over one connection.

A message is a msgpack map and, as messages of their own behind it, the raw buffers that it counts. The connection is
`multiprocessing.connection`'s, whose two sides prove to each other that they know a key (HMAC); nothing that comes over
it is unpickled.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import msgpack
import numpy as np

from tensorspark.errors import ShardLostError
from tensorspark.weights.layout import Buffer

logger = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT_S = 10.0
_NUM_THREADS = 8  # calls that are answered at once

Reply = tuple[Mapping[str, Any], Sequence[Buffer]]
Handler = Callable[[Mapping[str, Any], Sequence[Buffer]], Reply]


class Channel:
    """One side of the conversation. Its methods may be called from any thread.

    Args:
        plain: connected, its other side identified; the channel's from now on.
        who: names the other side in errors.
        handlers: what the other side may call, by name. An exception of theirs is an answer, too.
        on_lost: called once, when the other side is gone.
    """

    def __init__(
        self,
        plain: socket.socket,
        who: str,
        handlers: Mapping[str, Handler] | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._plain = plain
        self._connection = Connection(os.dup(plain.fileno()))
        self._who = who
        self._handlers = handlers or {}
        self._on_lost = on_lost
        self._writing = threading.Lock()
        self._losing = threading.Lock()
        self._calls: dict[int, Future[Reply]] = {}
        self._numbers = itertools.count(1)
        self._is_lost = False
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tensorspark-shard-call")
        self._reader = threading.Thread(target=self._read, name="tensorspark-shard-channel", daemon=True)
        self._reader.start()

    def call(self, name: str, arguments: Mapping[str, Any] | None = None, raw: Sequence[Buffer] = ()) -> Future[Reply]:
        """Has the other side do something.

        Returns:
            Its answer, or `ShardLostError`, which says what it raised or that it is gone.
        """
        future: Future[Reply] = Future()
        number = next(self._numbers)
        self._calls[number] = future
        try:
            self._send({"number": number, "call": name, "values": dict(arguments or {}), "raw": len(raw)}, raw)
        except OSError:
            self._lose()
        if self._is_lost:
            self._fail(number)
        return future

    def close(self) -> None:
        """Ends the conversation; calls that are not answered fail."""
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)  # the reader, which closes the connection, wakes up
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _send(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        packed: bytes = msgpack.packb(message)
        with self._writing:
            self._connection.send_bytes(packed)
            for buffer in raw:
                self._connection.send_bytes(buffer.data)

    def _read(self) -> None:
        try:
            while True:
                message = msgpack.unpackb(self._connection.recv_bytes())
                raw = [np.frombuffer(self._connection.recv_bytes(), np.uint8) for _ in range(message["raw"])]
                if "call" in message:
                    self._threads.submit(self._answer, message, raw)
                else:
                    self._settle(message, raw)
        except (OSError, EOFError, RuntimeError):  # the last: no more threads, as it is closed
            pass
        except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
            logger.warning("%s said what is no message: %s: %s", self._who, type(error).__name__, error)
        finally:
            self._connection.close()
            self._plain.close()
            self._lose()

    def _answer(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        try:
            values, buffers = self._handlers[message["call"]](message["values"], raw)
            answer: dict[str, Any] = {"values": dict(values)}
        except Exception as error:
            answer, buffers = {"error": f"{type(error).__name__}: {error}"}, []
        try:
            self._send({"number": message["number"], "raw": len(buffers), **answer}, buffers)
        except OSError:
            self._lose()

    def _settle(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        future = self._calls.pop(message["number"], None)
        if future is None:
            return
        if "error" in message:
            future.set_exception(ShardLostError(f"{self._who}: {message['error']}"))
        else:
            future.set_result((message["values"], raw))

    def _lose(self) -> None:
        with self._losing:
            was_lost, self._is_lost = self._is_lost, True
        for number in list(self._calls):
            self._fail(number)
        if not was_lost:
            self._on_lost()

    def _fail(self, number: int) -> None:
        future = self._calls.pop(number, None)
        if future is not None:
            future.set_exception(ShardLostError(f"{self._who} is gone"))


def dial(host: str, port: int, key: bytes) -> socket.socket:
    """Connects to a `Listener`; raises OSError where nobody answers, AuthenticationError where it has another key."""
    plain = socket.create_connection((host, port), timeout=_HANDSHAKE_TIMEOUT_S)
    plain.settimeout(None)
    _identify(plain, key, answer_challenge, deliver_challenge)
    return plain


class Listener:
    """Takes connections of those who know the key.

    Args:
        on_connected: called with each, on a thread of its own.
    """

    def __init__(self, host: str, key: bytes, on_connected: Callable[[socket.socket], None]) -> None:
        self._key = key
        self._on_connected = on_connected
        self._socket = socket.create_server((host, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="tensorspark-shard-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._thread.join(_HANDSHAKE_TIMEOUT_S)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(plain,), daemon=True).start()

    def _welcome(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError, AuthenticationError):
            _identify(plain, self._key, deliver_challenge, answer_challenge)
            self._on_connected(plain)


def _identify(plain: socket.socket, key: bytes, *steps: Callable[[Connection, bytes], None]) -> None:
    """Has both sides prove that they know the key; closes the connection where one does not, or takes too long."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    timer = threading.Timer(_HANDSHAKE_TIMEOUT_S, plain.shutdown, [socket.SHUT_RDWR])
    timer.daemon = True
    timer.start()
    try:
        with Connection(os.dup(plain.fileno())) as connection:
            for step in steps:
                step(connection, key)
    except EOFError as error:
        plain.close()
        raise ConnectionResetError("the other side hung up before it was known") from error
    except BaseException:
        plain.close()
        raise
    finally:
        timer.cancel()
