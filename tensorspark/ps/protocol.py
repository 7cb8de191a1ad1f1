"""Frames: what a worker and the server say to each other after the HTTP upgrade to ``tensorspark/5``.

A frame is a fixed 16-byte prefix, a msgpack header (a map with string keys) and a raw payload::

    offset  0  magic           4 bytes  "TSPK"
            4  version         u8       `VERSION`
            5  kind            u8       `Kind`
            6  header length   u16      little endian, as all numbers
            8  payload length  u64

The payload is a flat weights buffer as `WeightLayout` lays it out, or empty. A push may carry its weights as the run's
codec has written them (`weights.codecs`): its header's ``encoded`` says how many bytes. A snapshot's header says in
``form`` what it carries: the weights, encoded or not, or what of them changed since the version that the PULL named, or
nothing (`ps.snapshots.Form`). In a run with epochs, a push's weights may have the *totals* of its rows behind them, and
an evaluation has its totals for a payload: float64, little-endian, of a length that both sides know, at most 1 MiB (a
header could not hold them). Lengths are checked against what the receiver
expects before any memory is taken; nothing is ever unpickled. A change of the format raises `VERSION`, and the tests
keep frozen frames of every version.
"""

from __future__ import annotations

import enum
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack

from tensorspark.errors import (
    LayoutMismatchError,
    LeaseLostError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    RunStoppedError,
)

MAGIC = b"TSPK"
VERSION = 5
PATH = "/workers"
UPGRADE = f"tensorspark/{VERSION}"
PREFIX_BYTES = 16
MAX_HEADER_BYTES = 2**16 - 1
_MAX_MESSAGE_CHARACTERS = 2**13  # of up to four bytes each

_PREFIX = struct.Struct("<4sBBHQ")
_T = TypeVar("_T")


class Kind(enum.IntEnum):
    """What a frame says. Workers send the first nine, the server the others.

    ALIVE and WAIT say nothing but that their sender lives: the worker while it computes, the server while it has a
    worker wait. NOTE has lines of a worker's log and how long its steps took; nothing answers it.
    """

    REGISTER = 1
    PULL = 2
    PUSH = 3
    FINISH = 4
    FAIL = 5
    ALIVE = 6
    SKIP = 7
    EVALUATION = 8
    NOTE = 9
    GRANTED = 16
    SNAPSHOT = 17
    ACCEPTED = 18
    REFUSED = 19
    WAIT = 20


FROM_WORKER = frozenset(
    {Kind.REGISTER, Kind.PULL, Kind.PUSH, Kind.FINISH, Kind.FAIL, Kind.ALIVE, Kind.SKIP, Kind.EVALUATION, Kind.NOTE}
)
FROM_SERVER = frozenset(Kind) - FROM_WORKER

_REFUSALS: dict[str, type[RefusedError]] = {
    error.code: error for error in (RefusedError, LayoutMismatchError, LeaseLostError, NonFiniteError, RunStoppedError)
}


@dataclass(frozen=True)
class Prefix:
    """The fixed part of a frame, checked."""

    kind: Kind
    header_bytes: int
    payload_bytes: int


def encode(kind: Kind, header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame; the payload follows it on the wire, from its own memory.

    Raises:
        ValueError: the header does not fit into 65,535 bytes.
    """
    packed: bytes = msgpack.packb(dict(header))
    if len(packed) > MAX_HEADER_BYTES:
        raise ValueError(f"a frame's header holds at most {MAX_HEADER_BYTES} bytes, got {len(packed)}")
    return _PREFIX.pack(MAGIC, VERSION, kind, len(packed), payload_bytes) + packed


def decode_prefix(data: bytes | bytearray | memoryview, expected: frozenset[Kind], payload_limit_bytes: int) -> Prefix:
    """Checks the 16 bytes that begin a frame.

    Args:
        data: exactly 16 bytes.
        expected: the kinds that the other side may send.
        payload_limit_bytes: the longest payload that the receiver takes.

    Raises:
        ProtocolError: a foreign magic, another version, an unknown or unexpected kind, a payload over the limit.
    """
    magic, version, kind, header_bytes, payload_bytes = _PREFIX.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"expected a frame that begins with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise ProtocolError(f"expected protocol version {VERSION}, got {version}: install one tensorspark everywhere")
    if kind not in expected:
        names = ", ".join(sorted(k.name for k in expected))
        raise ProtocolError(f"expected a frame of kind {names}, got kind {kind}")
    if payload_bytes > payload_limit_bytes:
        raise ProtocolError(f"expected a payload of at most {payload_limit_bytes} bytes, got {payload_bytes}")
    return Prefix(Kind(kind), header_bytes, payload_bytes)


def decode_header(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Reads a frame's header; raises `ProtocolError` for bytes that are not a msgpack map with string keys."""
    try:
        header = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"expected a msgpack header, got bytes that do not decode: {error}") from error
    if not isinstance(header, dict) or not all(isinstance(key, str) for key in header):
        raise ProtocolError(f"expected a header that is a map with string keys, got {type(header).__name__}")
    return header


def field(header: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A header's field, checked to be of `kind` (an int is not a bool, and fits where a float is due).

    Raises:
        ProtocolError: the field is missing or of another type.
    """
    value = header.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        # Not its whole repr: a header may nest deeper than Python's stack bears, and be as long as the log is wide.
        raise ProtocolError(f"expected header field {name!r} to be {kind.__name__}, got {reprlib.repr(value)}")
    return value


def count(header: Mapping[str, Any], name: str, bits: int = 63) -> int:
    """A header's field that is an integer from 0 to 2**bits - 1."""
    value = field(header, name, int)
    if not 0 <= value < 2**bits:
        raise ProtocolError(f"expected header field {name!r} to be from 0 to 2**{bits} - 1, got {value}")
    return value


def numbers(header: Mapping[str, Any], name: str, kind: type[_T]) -> tuple[_T, ...]:
    """A header's field that is a list of `kind`."""
    return tuple(field({name: value}, name, kind) for value in field(header, name, list))


def refusal_header(error: RefusedError) -> dict[str, str]:
    """The header of a REFUSED frame; a message that quotes more of what the worker sent than would fit is cut."""
    return {"code": error.code, "message": str(error)[:_MAX_MESSAGE_CHARACTERS]}


def refusal(header: Mapping[str, Any]) -> RefusedError:
    """The error that a REFUSED frame's header names."""
    return _REFUSALS.get(field(header, "code", str), RefusedError)(field(header, "message", str))
