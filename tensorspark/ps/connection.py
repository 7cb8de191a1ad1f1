"""The server's side of one worker's connection: frames in, frames out, each with a deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tornado.iostream import IOStream, StreamClosedError

from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.protocol import Kind, Prefix
from tensorspark.weights.layout import Buffer, WeightLayout

logger = logging.getLogger(__name__)

# Up to here a copy costs less than a second system call.
_JOINED_PAYLOAD_BYTES = 2**15
# Of a push: long enough that asking for the next costs nothing, short enough to show that the worker is alive.
_PART_BYTES = 2**22


@dataclass(frozen=True)
class Frame:
    """A frame from a worker.

    Attributes:
        payload: a pooled buffer that the receiver gives back. Of weights that are encoded, its end holds the bytes.
        totals: came behind it.
        num_bytes: of the payload and the totals, on the wire.
        began_at: when its first bytes were there, on the monotonic clock.
    """

    kind: Kind
    header: dict[str, Any]
    payload: Buffer | None
    totals: bytes = b""
    num_bytes: int = 0
    began_at: float = 0.0


class Connection:
    """Reads and writes frames on a detached stream. The server's loop owns it.

    Args:
        number: never used twice on one server.
        deadline_s: for the rest of a frame once it has begun, and for each write.
        may_take_last: whether a push of this worker may take the pool's last buffer, see `BufferPool`.
        totals_bytes: of an evaluation, and behind the weights of a push that has any.
        is_encoded: whether pushes may be encoded.
        on_push: told when a push has begun to arrive, on the monotonic clock.

    Attributes:
        heard_at: when a frame of the worker's began or ended last, or a part of a push came, on the monotonic clock.
        is_held_up: whether a push waits for a buffer, so that nothing of the worker is read.
        held: the version of the weights that the worker says it has.
    """

    def __init__(
        self,
        number: int,
        stream: IOStream,
        layout: WeightLayout,
        pool: BufferPool,
        deadline_s: float,
        may_take_last: Callable[[], bool] = lambda: True,
        totals_bytes: int = 0,
        is_encoded: bool = False,
        on_push: Callable[[float], None] = lambda began_at: None,
    ) -> None:
        self.number = number
        self.heard_at = time.monotonic()
        self.is_held_up = False
        self.held: int | None = None
        self._may_take_last = may_take_last
        self._stream = stream
        self._layout = layout
        self._pool = pool
        self._deadline_s = deadline_s
        self._totals_bytes = totals_bytes
        self._is_encoded = is_encoded
        self._on_push = on_push
        self._unwritten: asyncio.Future[None] | None = None

    async def read(self) -> Frame:
        """The next frame, however long the worker computes before it sends one.

        None is read while an answer is not written: who asks and does not listen has no more answers kept for it.

        Raises:
            ProtocolError: what came is not a frame of a worker.
            StreamClosedError: the worker is gone.
            TimeoutError: a frame began and did not end within the deadline.
        """
        if self._unwritten is not None and not self._unwritten.done():
            await asyncio.wait([self._unwritten])
        self._unwritten = None
        data = await self._stream.read_bytes(protocol.PREFIX_BYTES)
        self.heard_at = began_at = time.monotonic()
        prefix = protocol.decode_prefix(data, protocol.FROM_WORKER, self._layout.num_bytes + self._totals_bytes)
        if prefix.kind is Kind.PUSH:
            self._on_push(began_at)
        async with asyncio.timeout(self._deadline_s):
            header = protocol.decode_header(await self._stream.read_bytes(prefix.header_bytes))
        weights_bytes = self._weights_bytes(prefix, header)
        payload = await self._read_payload(weights_bytes) if weights_bytes else None
        totals = await self._read_totals(prefix.payload_bytes - weights_bytes, payload)
        self.heard_at = time.monotonic()
        return Frame(prefix.kind, header, payload, totals, prefix.payload_bytes, began_at)

    def _weights_bytes(self, prefix: Prefix, header: Mapping[str, Any]) -> int:
        """How much of the payload is weights; the rest of it is totals, or too long or short."""
        weights_bytes = self._layout.num_bytes if prefix.kind is Kind.PUSH else 0
        if weights_bytes and "encoded" in header:
            weights_bytes = protocol.count(header, "encoded")
            if not (self._is_encoded and 0 < weights_bytes < self._layout.num_bytes):
                raise ProtocolError(f"expected no push of {weights_bytes} encoded bytes")
        totals_bytes = self._totals_bytes if prefix.kind in (Kind.PUSH, Kind.EVALUATION) else 0
        expected = {weights_bytes + totals_bytes} | ({weights_bytes} if weights_bytes else set())
        if prefix.payload_bytes not in expected:
            sizes = " or ".join(map(str, sorted(expected)))
            raise ProtocolError(f"expected {prefix.kind.name} to carry {sizes} bytes, got {prefix.payload_bytes}")
        return weights_bytes

    async def _read_totals(self, num_bytes: int, payload: Buffer | None) -> bytes:
        """What is behind the weights; where it does not come, `payload` goes back to the pool."""
        if not num_bytes:
            return b""
        totals = bytearray(num_bytes)
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._stream.read_into(totals)
        except BaseException:
            self.close()
            if payload is not None:
                self._pool.put_back(payload)
            raise
        return bytes(totals)

    async def _read_payload(self, num_bytes: int) -> Buffer:
        self.is_held_up = True
        try:
            buffer = await self._pool.take(self._may_take_last)
        finally:
            self.is_held_up = False
        try:
            async with asyncio.timeout(self._deadline_s):
                for part in _parts(buffer.data[buffer.nbytes - num_bytes :]):
                    await self._stream.read_into(part)  # type: ignore[arg-type]
                    self.heard_at = time.monotonic()
        except BaseException:
            self.close()
            self._pool.put_back(buffer)
            raise
        return buffer

    @property
    def is_busy(self) -> bool:
        """Whether the worker cannot say anything, as it waits for a buffer or takes an answer in."""
        is_writing = self._unwritten is not None and not self._unwritten.done()
        return self.is_held_up or is_writing

    def write(
        self,
        kind: Kind,
        header: dict[str, Any],
        payload: Buffer | None = None,
        on_written: Callable[[], None] | None = None,
    ) -> None:
        """Sends a frame without waiting; a write that outlasts the deadline closes the connection.

        Args:
            payload: stays as it is until `on_written` is called, which happens also when the connection breaks.
        """
        try:
            written = self._send(protocol.encode(kind, header, 0 if payload is None else payload.nbytes), payload)
        except StreamClosedError:
            if on_written:
                on_written()
            return
        if written.done():
            self._after_write(written, on_written, None)
            return
        self._unwritten = written
        timer = asyncio.get_running_loop().call_later(self._deadline_s, self._write_is_late)
        written.add_done_callback(lambda future: self._after_write(future, on_written, timer))

    def _send(self, frame: bytes, payload: Buffer | None) -> asyncio.Future[None]:
        if payload is None:
            return self._stream.write(frame)
        if payload.nbytes <= _JOINED_PAYLOAD_BYTES:
            return self._stream.write(frame + payload.tobytes())
        num_sent = self._send_at_once(frame, payload.data)
        if num_sent < len(frame):
            self._stream.write(frame[num_sent:]).add_done_callback(_retrieve)
            return self._stream.write(payload.data)
        return self._stream.write(payload.data[num_sent - len(frame) :])

    def _send_at_once(self, frame: bytes, payload: memoryview) -> int:
        """Hands the kernel what it takes of both at once, in one call; what breaks is for the stream to find out.

        Returns:
            How many bytes it took; 0 where earlier ones wait, or are to be encrypted.
        """
        if type(self._stream) is not IOStream or self._stream.writing() or self._stream.closed():
            return 0
        try:
            return self._stream.socket.sendmsg([frame, payload])
        except OSError:
            return 0

    def _after_write(
        self, written: asyncio.Future[None], on_written: Callable[[], None] | None, timer: asyncio.TimerHandle | None
    ) -> None:
        if timer:
            timer.cancel()
        _retrieve(written)
        if on_written:
            on_written()

    def _write_is_late(self) -> None:
        logger.warning("connection %d: the worker did not read within %g s; closing", self.number, self._deadline_s)
        self.close()

    def close(self) -> None:
        self._stream.close()


def _parts(payload: memoryview) -> Iterator[memoryview]:
    for start in range(0, payload.nbytes, _PART_BYTES):
        yield payload[start : start + _PART_BYTES]


def _retrieve(future: asyncio.Future[None]) -> None:
    """Takes note of a broken write, which the connection's reader reports anyway."""
    if not future.cancelled():
        future.exception()
