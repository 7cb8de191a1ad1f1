"""Frames as a worker really sends them, and what may become of them on the wire: the inputs of `benchmarks.fuzz`."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgpack

from tensorspark.ps import protocol
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, EpochPlan, Push, Registration, TimeSpent
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.telemetry.notes import Line, Timing
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import WeightLayout

_TIMEOUT_S = 10.0
_HEADER_LENGTH_AT, _PAYLOAD_LENGTH_AT = 6, 8
_LENGTHS = (
    0,
    1,
    15,
    16,
    17,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_NUMBERS = (0, -1, 1, 255, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, 1e308)
_OTHERS: tuple[Any, ...] = (
    None, True, False, float("nan"), float("inf"), [], {}, "", b"", "\n\0\u2028", ["1"], {"a": [{}]},
)  # fmt: skip
_LONGEST = 65_420  # of a string that fits into a header beside a registration's other fields
_MAX_DEPTH = 1023  # msgpack itself gives up at 1,024
_NAMES = (
    *("sequence", "message", "traceback", "sums", "epoch_samples", "fingerprint", "host", "run", "attempt", "x"),
    *("epoch", "num_samples", "values", "order"),
)


def record(layout: WeightLayout, epochs: EpochPlan) -> list[bytes]:
    """What two real workers send, frame by frame: one trains, evaluates and finishes, one skips and fails.

    They speak to a server of their own, through a relay that takes notes.

    Args:
        epochs: at least two, with validation.
    """
    weights = layout.allocate()
    totals = struct.pack(f"<{epochs.num_totals}d", *(1.5 + index for index in range(epochs.num_totals)))
    with ParameterServer(layout, "127.0.0.1") as server:
        run = server.begin_run(weights, DeltaWeightCombiner(), 2, epochs=epochs)
        with _Relay(server.port) as relay:
            for partition in range(2):
                address = ServerAddress("127.0.0.1", relay.port, server.token, _TIMEOUT_S, _TIMEOUT_S)
                with ParameterClient(address) as client:
                    client.register(Registration(run, partition, 100 + partition, layout.fingerprint, "worker.example"))
                    client.pull(weights)
                    client.push(weights, Push(1, Cursor(0, 3), 3, 30, sums={"loss": 1.5, "accuracy": 0.25}))
                    client.push(weights, Push(2, Cursor(1), 3, 30, 1, sums={"loss": 1.25}, progress=0.5, totals=totals))
                    client.flush()
                    if partition == 0:
                        client.note((Line(30, "worker", "low on memory"),), (Timing("steps", 1.5, 0.25),))
                        client.pull(weights)
                        client.report_evaluation(0, totals, 20)
                        server.release_epoch(0, {"learning_rate": 0.25})
                        client.finish(TimeSpent((60,), (0.5,), step_s=0.25, sync_s=0.125))
                    else:
                        client.skip_epoch(1)
                        client.report("ValueError: bad row", "Traceback (most recent call last): ...")
        return [*split(bytes(relay.recorded)), protocol.encode(Kind.ALIVE, {})]


def split(stream: bytes) -> list[bytes]:
    """The frames of a stream that holds whole frames only."""
    frames = []
    while stream:
        _, _, _, header_bytes, payload_bytes = struct.unpack_from("<4sBBHQ", stream)
        size = protocol.PREFIX_BYTES + header_bytes + payload_bytes
        frames.append(stream[:size])
        stream = stream[size:]
    return frames


class _Relay:
    """Passes a worker's connections on to a server, one after the other, and keeps the frames that workers send."""

    def __init__(self, server_port: int) -> None:
        self.recorded = bytearray()
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> _Relay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._thread.join(_TIMEOUT_S)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                worker, _ = self._listener.accept()
            except OSError:
                return
            with worker, socket.create_connection(("127.0.0.1", self._server_port)) as server:
                sent = self._pass_on(worker, server)
            self.recorded += sent.partition(b"\r\n\r\n")[2]

    def _pass_on(self, worker: socket.socket, server: socket.socket) -> bytes:
        sent = bytearray()
        while True:
            readable, _, _ = select.select([worker, server], [], [], _TIMEOUT_S)
            data = readable[0].recv(2**16) if readable else b""
            if not data:
                return bytes(sent)
            if readable[0] is worker:
                sent += data
            (server if readable[0] is worker else worker).sendall(data)


@dataclass(frozen=True)
class _Parts:
    """A frame taken apart; `packed` are the header's fields, each packed by itself."""

    kind: int
    packed: Mapping[str, bytes]
    payload: bytes

    @classmethod
    def of(cls, frame: bytes) -> _Parts:
        _, _, kind, header_bytes, _ = struct.unpack_from("<4sBBHQ", frame)
        end = protocol.PREFIX_BYTES + header_bytes
        header = protocol.decode_header(frame[protocol.PREFIX_BYTES : end])
        return cls(kind, {name: msgpack.packb(value) for name, value in header.items()}, frame[end:])

    def joined(self) -> bytes:
        return with_header(
            self.kind,
            _map_head(len(self.packed)) + b"".join(msgpack.packb(name) + value for name, value in self.packed.items()),
            self.payload,
        )


def with_header(kind: int, header: bytes, payload: bytes = b"") -> bytes:
    """A frame whose prefix fits to a header of any bytes; one that is too long for it is cut."""
    header = header[: protocol.MAX_HEADER_BYTES]
    return struct.pack("<4sBBHQ", protocol.MAGIC, protocol.VERSION, kind, len(header), len(payload)) + header + payload


def with_fields(frame: bytes, **fields: Any) -> bytes:
    """The frame with other values in its header."""
    parts = _Parts.of(frame)
    changed = {name: msgpack.packb(value) for name, value in fields.items()}
    return replace(parts, packed={**parts.packed, **changed}).joined()


def _map_head(num_entries: int) -> bytes:
    return struct.pack(">BH", 0xDE, num_entries)


class ByteMutator:
    """Makes inputs of recorded bytes, whatever they mean; the same seed makes the same ones."""

    def __init__(self, recorded: Sequence[bytes], seed: int) -> None:
        self._frames = list(recorded)
        self._random = random.Random(seed)

    def next(self) -> tuple[str, list[bytes]]:
        """A kind of mutation and what it made: one input, or several to be sent one after the other."""
        kind = self._random.choice(self._kinds())
        return kind, self.KINDS[kind](self)

    def _kinds(self) -> Sequence[str]:
        return _BYTE_KINDS

    def _bits(self) -> list[bytes]:
        frame = self._some_frame()
        for _ in range(self._random.randint(1, 4)):
            frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return [bytes(frame)]

    def _overwritten(self) -> list[bytes]:
        frame = self._some_frame()
        start = self._random.randrange(len(frame))
        frame[start : start + self._random.randint(1, 16)] = self._random.randbytes(self._random.randint(0, 16))
        return [bytes(frame)]

    def _truncated(self) -> list[bytes]:
        frame = self._some_frame()
        return [bytes(frame[: self._random.randrange(len(frame))])]

    def _spliced(self) -> list[bytes]:
        head, tail = self._some_frame(), self._some_frame()
        return [bytes(head[: self._random.randrange(len(head))] + tail[self._random.randrange(len(tail)) :])]

    def _some_frame(self) -> bytearray:
        return bytearray(self._random.choice(self._frames))

    KINDS: ClassVar[Mapping[str, Callable[[Any], list[bytes]]]] = {
        "bits flipped": _bits,
        "bytes overwritten, inserted or removed": _overwritten,
        "truncated": _truncated,
        "spliced": _spliced,
    }


_BYTE_KINDS = tuple(ByteMutator.KINDS)


class Mutator(ByteMutator):
    """Makes inputs of recorded frames, with an eye to what their bytes mean.

    >>> frames = [protocol.encode(Kind.PULL, {}), protocol.encode(Kind.PUSH, {"sequence": 1}, 2) + b"ab"]
    >>> kind, inputs = Mutator(frames, seed=1).next()
    >>> kind in Mutator.KINDS and all(isinstance(each, bytes) for each in inputs)
    True
    """

    def __init__(self, frames: Sequence[bytes], seed: int) -> None:
        super().__init__(frames, seed)
        self._parts = [_Parts.of(frame) for frame in frames]

    def _kinds(self) -> Sequence[str]:
        return _KINDS

    def _header_bits(self) -> list[bytes]:
        """Bits behind the prefix, so that more frames come as far as their fields."""
        frame = self._some_frame()
        first = min(protocol.PREFIX_BYTES, len(frame) - 1)
        for _ in range(self._random.randint(1, 2)):
            frame[self._random.randrange(first, len(frame))] ^= 1 << self._random.randrange(8)
        return [bytes(frame)]

    def _lengths(self) -> list[bytes]:
        frame = self._some_frame()
        length = self._random.choice(_LENGTHS) + self._random.randint(-1, 1)
        if self._random.random() < 0.5:
            struct.pack_into("<H", frame, _HEADER_LENGTH_AT, length & 0xFFFF)
        else:
            struct.pack_into("<Q", frame, _PAYLOAD_LENGTH_AT, length & (2**64 - 1))
        return [bytes(frame)]

    def _prefix(self) -> list[bytes]:
        """Another kind or version, or a prefix of noise."""
        frame = self._some_frame()
        where = self._random.choice(((0, 4), (4, 5), (5, 6), (5, 6), (5, 6), (6, 16)))
        frame[slice(*where)] = self._random.randbytes(where[1] - where[0])
        if where == (5, 6) and self._random.random() < 0.7:
            frame[5] = self._random.choice(list(Kind))
        return [bytes(frame)]

    def _reordered(self) -> list[bytes]:
        """Whole frames, repeated and in an order that no worker would choose."""
        return [bytes(self._some_frame()) for _ in range(self._random.randint(2, 6))]

    def _random_header(self) -> list[bytes]:
        parts = self._random.choice(self._parts)
        return [with_header(parts.kind, self._random.randbytes(self._random.randint(0, 64)), parts.payload)]

    def _bomb(self) -> list[bytes]:
        """Headers that promise more than they hold, or hold more than is good."""
        parts = self._random.choice(self._parts)
        header = _map_head(1) + msgpack.packb(self._random.choice(_NAMES)) + self._nonsense()
        return [with_header(parts.kind, header if self._random.random() < 0.7 else self._nonsense(), parts.payload)]

    def _field(self) -> list[bytes]:
        """One field missing, of another type, or extreme; all the others as they were."""
        parts = self._random.choice([parts for parts in self._parts if parts.packed])
        name = self._random.choice(list(parts.packed))
        packed = dict(parts.packed)
        if self._random.random() < 0.1:
            del packed[name]
        else:
            packed[name] = self._value()
        return [replace(parts, packed=packed).joined()]

    def _value(self) -> bytes:
        """A value of any type, packed."""
        pick = self._random.random()
        if pick < 0.45:
            return bytes(msgpack.packb(self._random.choice(_NUMBERS)))
        if pick < 0.6:
            return bytes(msgpack.packb(self._random.choice(_OTHERS)))
        if pick < 0.7:
            letter = self._random.choice(("x", "é", "\N{SNOWMAN}"))
            size = self._random.choice((10, 1000, 65_000, _LONGEST)) // len(letter.encode())
            return bytes(msgpack.packb(letter * size))
        if pick < 0.75:
            return bytes(msgpack.packb({str(index): index for index in range(self._random.choice((3, 3000)))}))
        return self._nonsense()

    def _nonsense(self) -> bytes:
        pick = self._random.randrange(6)
        depth = self._random.choice((3, 100, 500, 900, _MAX_DEPTH, 5000, 60_000))
        if pick == 0:
            return b"\x91" * depth + b"\xc0"
        if pick == 1:
            return b"\x81\xa1a" * min(depth, 20_000) + b"\xc0"
        if pick == 2:  # array, map, string, bytes, extension: of 4 Gi elements each
            return self._random.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")) + b"\xff" * 5
        if pick == 3:  # extensions, timestamps of wrong lengths among them
            size = self._random.choice((0, 1, 4, 8, 12, 200))
            return struct.pack(">BBb", 0xC7, size, self._random.choice((-1, -1, 0, 5))) + self._random.randbytes(size)
        if pick == 4:  # a map with the same key again and again, or with keys of other types
            return _map_head(3) + self._random.choice((b"\xa1a\x01", b"\x01\x01", b"\xc4\x01a\x01", b"\xc0\xc0")) * 3
        return b"\xa4\xff\xfe\xed\xa0"  # no UTF-8

    KINDS: ClassVar[Mapping[str, Callable[[Any], list[bytes]]]] = {
        **ByteMutator.KINDS,
        "bits of the header or payload flipped": _header_bits,
        "a length changed": _lengths,
        "the prefix changed": _prefix,
        "repeated and reordered": _reordered,
        "a random header": _random_header,
        "a msgpack bomb": _bomb,
        "a field changed": _field,
    }


_KINDS = tuple(Mutator.KINDS)
