"""What the driver and a shard's process say to each other: calls, answered in any order, over one connection.

A message is a msgpack map and, as messages of their own behind it, the raw buffers that it counts, each behind its
length, as `multiprocessing.connection` writes them. Its handshake begins the conversation: both sides prove to each
other that they know a key (HMAC). Nothing that comes over the connection is unpickled.

Who wants to know of the other side's end at once asks for signs of life: a process that is stopped, or a host that has
lost its network, closes nothing. Whatever arrives is one, so a side that sends or takes a large buffer, or computes,
is not taken for lost; pings make sure that something arrives.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import msgpack
import numpy as np

from tensorspark.errors import ShardLostError
from tensorspark.ps.listen import bind, notice_vanished_peer
from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer

logger = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT_S = 10.0
_NUM_THREADS = 8  # calls that are answered at once

# After so long without a sign of life the other side is lost.
SILENCE_TIMEOUT_S = 10.0
_SIGNS_A_TIMEOUT = 10

# So long the kernel waits for the other host, for a side that asks for no signs of life.
_VANISHED_HOST_TIMEOUT_S = 30.0

# `multiprocessing.connection`'s lengths: the second stands behind a first of -1.
_LENGTH, _LARGE_LENGTH = struct.Struct("!i"), struct.Struct("!Q")
_MAX_LENGTH = 2**31 - 1
_CHUNK_BYTES = 2**20

Reply = tuple[Mapping[str, Any], Sequence[Buffer]]
Handler = Callable[[Mapping[str, Any], Sequence[Buffer]], Reply]


class Channel:
    """One side of the conversation. Its methods may be called from any thread.

    Args:
        plain: connected, its other side identified; the channel's from now on.
        who: names the other side in errors.
        handlers: what the other side may call, by name. An exception of theirs is an answer, too. The buffers that they
            are given are aligned as weights are, and theirs to keep.
        on_lost: called once with the reason, when the other side is gone.
        silence_timeout_s: how long the other side may give no sign of life; None: as long as its host is there.

    Attributes:
        who: may be changed, when more is known.
    """

    def __init__(
        self,
        plain: socket.socket,
        who: str,
        handlers: Mapping[str, Handler] | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
        *,
        silence_timeout_s: float | None = None,
    ) -> None:
        self.who = who
        self._plain = plain
        self._handlers = handlers or {}
        self._on_lost = on_lost
        self._writing = threading.Lock()
        self._losing = threading.Lock()
        self._calls: dict[int, Future[Reply]] = {}
        self._numbers = itertools.count(1)
        self._num_received = 0  # bytes
        self._num_taken = 0  # bytes of large buffers that the other side's kernel has taken
        self._why_lost = ""
        self._is_over = threading.Event()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tensorspark-shard-call")
        self._reader = threading.Thread(target=self._read, name="tensorspark-shard-channel", daemon=True)
        self._reader.start()
        if silence_timeout_s is not None:
            name = "tensorspark-shard-watch"
            threading.Thread(target=self._watch, args=(silence_timeout_s,), name=name, daemon=True).start()

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
            self._lose("is gone")
        if self._why_lost:
            self._fail(number)
        return future

    def close(self) -> None:
        """Ends the conversation; calls that are not answered fail."""
        self._is_over.set()
        self._hang_up()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)  # who reads or writes wakes up; the reader closes

    # Messages out

    def _send(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        packed: bytes = msgpack.packb(message)
        with self._writing:
            self._plain.sendall(_length(len(packed)) + packed)
            for buffer in raw:
                self._plain.sendall(_length(buffer.nbytes))
                self._send_large(buffer.data)

    def _send_large(self, data: memoryview) -> None:
        while data:
            num_sent = self._plain.send(data[:_CHUNK_BYTES])
            self._num_taken += num_sent
            data = data[num_sent:]

    def _say(self, word: str) -> None:
        """Sends a message that nobody waits for, if that is possible at once: else something is on its way anyway."""
        if not self._writing.acquire(blocking=False):
            return
        try:
            poll = select.poll()
            poll.register(self._plain, select.POLLOUT)
            if poll.poll(0):
                packed: bytes = msgpack.packb({"word": word, "raw": 0})
                self._plain.sendall(_length(len(packed)) + packed)
        except (OSError, ValueError):  # the second: the socket is closed; the reader knows
            pass
        finally:
            self._writing.release()

    # Messages in

    def _read(self) -> None:
        try:
            while True:
                message = msgpack.unpackb(self._receive().tobytes())
                raw = [self._receive() for _ in range(message["raw"])]
                if "word" in message:
                    self._hear(message["word"])
                elif "call" in message:
                    self._threads.submit(self._answer, message, raw)
                else:
                    self._settle(message, raw)
        except (OSError, EOFError, RuntimeError):  # the last: no more threads, as it is closed
            pass
        except (ValueError, KeyError, TypeError, msgpack.exceptions.UnpackException) as error:
            logger.warning("%s said what is no message: %s: %s", self.who, type(error).__name__, error)
        finally:
            self._hang_up()
            with self._writing:
                self._plain.close()
            self._lose("is gone")

    def _receive(self) -> Buffer:
        (length,) = _LENGTH.unpack(self._fill(_LENGTH.size).data)
        if length == -1:
            (length,) = _LARGE_LENGTH.unpack(self._fill(_LARGE_LENGTH.size).data)
        return self._fill(length)

    def _fill(self, num_bytes: int) -> Buffer:
        buffer = _allocate(num_bytes)
        left = buffer.data
        while left:
            num_received = self._plain.recv_into(left)
            if not num_received:
                raise EOFError
            self._num_received += num_received
            left = left[num_received:]
        return buffer

    def _hear(self, word: str) -> None:
        if word == "ping":
            self._say("pong")

    def _answer(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        try:
            values, buffers = self._handlers[message["call"]](message["values"], raw)
            answer: dict[str, Any] = {"values": dict(values)}
        except Exception as error:
            answer, buffers = {"error": f"{type(error).__name__}: {error}"}, []
        try:
            self._send({"number": message["number"], "raw": len(buffers), **answer}, buffers)
        except OSError:
            self._lose("is gone")

    def _settle(self, message: Mapping[str, Any], raw: Sequence[Buffer]) -> None:
        future = self._calls.pop(message["number"], None)
        if future is None:
            return
        if "error" in message:
            future.set_exception(ShardLostError(f"{self.who}: {message['error']}"))
        else:
            future.set_result((message["values"], raw))

    # Its end

    def _watch(self, timeout_s: float) -> None:
        """Loses the other side after so long without a sign of life.

        It counts its own turns, not the time: a driver that was stopped for a while has not listened. What the other
        side's kernel takes of a large buffer is a sign; a process that does not read has it take little.
        """
        turn_s = timeout_s / _SIGNS_A_TIMEOUT
        signs, num_silent = 0, 0
        while not self._is_over.wait(turn_s):
            signs, before = self._num_received + self._num_taken, signs
            num_silent = 0 if signs != before else num_silent + 1
            if num_silent >= _SIGNS_A_TIMEOUT:
                self._lose(f"has given no sign of life for {timeout_s:g} s")
                self._hang_up()
                return
            self._say("ping")

    def _lose(self, why: str) -> None:
        with self._losing:
            if not self._why_lost:
                self._why_lost = why
                self._on_lost(why)  # before calls fail: whoever waits for one looks next at what is known of the loss
        self._is_over.set()
        for number in list(self._calls):
            self._fail(number)

    def _fail(self, number: int) -> None:
        future = self._calls.pop(number, None)
        if future is not None:
            future.set_exception(ShardLostError(f"{self.who} {self._why_lost}"))


def _length(num_bytes: int) -> bytes:
    if num_bytes <= _MAX_LENGTH:
        return _LENGTH.pack(num_bytes)
    return _LENGTH.pack(-1) + _LARGE_LENGTH.pack(num_bytes)


def _allocate(num_bytes: int) -> Buffer:
    raw = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + num_bytes]


def dial(host: str, port: int, key: bytes) -> socket.socket:
    """Connects to a `Listener`; raises OSError where nobody answers, AuthenticationError where it has another key."""
    plain = socket.create_connection((host, port), timeout=_HANDSHAKE_TIMEOUT_S)
    plain.settimeout(None)
    _identify(plain, key, answer_challenge, deliver_challenge)
    return plain


class Listener:
    """Takes connections of those who know the key.

    Args:
        host: where it listens, as `ps.listen.bind` has it: on this address, or on all interfaces where the address is
            none of this machine's (a forwarded one, say).
        on_connected: called with each, on a thread of its own.

    Raises:
        ConfigError: the host has no address.
    """

    def __init__(self, host: str, key: bytes, on_connected: Callable[[socket.socket], None]) -> None:
        self._key = key
        self._on_connected = on_connected
        self._sockets = bind(host, 0)
        self.port: int = self._sockets[0].getsockname()[1]
        self._threads: list[threading.Thread] = []
        for listening in self._sockets:
            listening.setblocking(True)
            name = "tensorspark-shard-listener"
            self._threads.append(threading.Thread(target=self._accept, args=(listening,), name=name, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        for listening, thread in zip(self._sockets, self._threads, strict=True):
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            thread.join(_HANDSHAKE_TIMEOUT_S)
            listening.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(plain,), daemon=True).start()

    def _welcome(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError, AuthenticationError):
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # where something was sent, keepalive says nothing
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * _VANISHED_HOST_TIMEOUT_S))
            _identify(plain, self._key, deliver_challenge, answer_challenge)
            self._on_connected(plain)


def _identify(plain: socket.socket, key: bytes, *steps: Callable[[Connection, bytes], None]) -> None:
    """Has both sides prove that they know the key; closes the connection where one does not, or takes too long."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notice_vanished_peer(plain, _VANISHED_HOST_TIMEOUT_S)
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
