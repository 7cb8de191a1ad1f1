"""Frames: their bytes, and what is refused before any memory is taken."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import (
    LayoutMismatchError,
    LeaseLostError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    RunStoppedError,
)
from tensorspark.ps import protocol
from tensorspark.ps.protocol import Kind

# Frames of version 5 as they were first sent. A frame that changes needs a new protocol.VERSION and new lines here.
FROZEN_FRAMES: list[tuple[Kind, dict[str, Any], int, str]] = [
    (
        Kind.REGISTER,
        {"run": 1, "partition": 300, "is_resuming": True},
        0,
        "5453504b 05 01 2000 0000000000000000 "
        "83 a3 72756e 01 a9 706172746974696f6e cd012c ab 69735f726573756d696e67 c3",
    ),
    (Kind.PULL, {}, 0, "5453504b 05 02 0100 0000000000000000 80"),
    (Kind.PULL, {"version": 300}, 0, "5453504b 05 02 0c00 0000000000000000 81 a7 76657273696f6e cd012c"),
    (
        Kind.PULL,
        {"asked": "evaluate", "epoch": 2},
        0,
        "5453504b 05 02 1700 0000000000000000 82 a5 61736b6564 a8 6576616c75617465 a5 65706f6368 02",
    ),
    (
        Kind.PUSH,
        {"sequence": 7, "progress": None},
        640,
        "5453504b 05 03 1500 8002000000000000 82 a8 73657175656e6365 07 a8 70726f6772657373 c0",
    ),
    (
        Kind.PUSH,
        {"encoded": 320, "sequence": 7},
        336,
        "5453504b 05 03 1600 5001000000000000 82 a7 656e636f646564 cd0140 a8 73657175656e6365 07",
    ),
    (
        Kind.FINISH,
        {"epoch_samples": [5, 200], "step_s": 1.5},
        0,
        "5453504b 05 04 2300 0000000000000000 "
        "82 ad 65706f63685f73616d706c6573 92 05 ccc8 a6 737465705f73 cb3ff8000000000000",
    ),
    (Kind.FAIL, {"message": "no"}, 0, "5453504b 05 05 0c00 0000000000000000 81 a7 6d657373616765 a2 6e6f"),
    (Kind.ALIVE, {}, 0, "5453504b 05 06 0100 0000000000000000 80"),
    (
        Kind.GRANTED,
        {"sequence": 128, "finished": False},
        0,
        "5453504b 05 10 1600 0000000000000000 82 a8 73657175656e6365 cc80 a8 66696e6973686564 c2",
    ),
    (Kind.SKIP, {"epoch": 2}, 0, "5453504b 05 07 0800 0000000000000000 81 a5 65706f6368 02"),
    (
        Kind.EVALUATION,
        {"epoch": 2, "num_samples": 300},
        16,
        "5453504b 05 08 1700 1000000000000000 82 a5 65706f6368 02 ab 6e756d5f73616d706c6573 cd012c",
    ),
    (
        Kind.SNAPSHOT,
        {"version": 300, "order": "train", "values": {"lr": 0.5}},
        2**40,
        "5453504b 05 11 2c00 0000000000010000 83 a7 76657273696f6e cd012c a5 6f72646572 a5 747261696e "
        "a6 76616c756573 81 a2 6c72 cb3fe0000000000000",
    ),
    (
        Kind.SNAPSHOT,
        {"version": 300, "form": "patch"},
        4096,
        "5453504b 05 11 1700 0010000000000000 82 a7 76657273696f6e cd012c a4 666f726d a5 7061746368",
    ),
    (Kind.ACCEPTED, {"sequence": 70000}, 0, "5453504b 05 12 0f00 0000000000000000 81 a8 73657175656e6365 ce00011170"),
    (
        Kind.REFUSED,
        {"code": "lease_lost", "message": "no"},
        0,
        "5453504b 05 13 1c00 0000000000000000 82 a4 636f6465 aa 6c656173655f6c6f7374 a7 6d657373616765 a2 6e6f",
    ),
    (
        Kind.NOTE,
        {"clock": 0.5, "lines": [[30, "x", "no"]]},
        0,
        "5453504b 05 09 1e00 0000000000000000 82 a5 636c6f636b cb3fe0000000000000 a5 6c696e6573 91 93 1e a1 78 a2 6e6f",
    ),
    (Kind.WAIT, {}, 0, "5453504b 05 14 0100 0000000000000000 80"),
]

FRAMES_OF_OLDER_VERSIONS = [
    "5453504b 01 02 0100 0000000000000000 80",
    "5453504b 01 03 1500 8002000000000000 82 a8 73657175656e6365 07 a8 70726f6772657373 c0",
    "5453504b 01 11 0c00 0000000000010000 81 a7 76657273696f6e cd012c",
    "5453504b 01 13 1c00 0000000000000000 82 a4 636f6465 aa 6c656173655f6c6f7374 a7 6d657373616765 a2 6e6f",
    "5453504b 02 02 0100 0000000000000000 80",
    "5453504b 02 03 1500 8002000000000000 82 a8 73657175656e6365 07 a8 70726f6772657373 c0",
    "5453504b 02 11 0c00 0000000000010000 81 a7 76657273696f6e cd012c",
    "5453504b 02 13 1c00 0000000000000000 82 a4 636f6465 aa 6c656173655f6c6f7374 a7 6d657373616765 a2 6e6f",
    "5453504b 03 02 0100 0000000000000000 80",
    "5453504b 03 03 1500 8002000000000000 82 a8 73657175656e6365 07 a8 70726f6772657373 c0",
    "5453504b 03 11 0c00 0000000000010000 81 a7 76657273696f6e cd012c",
    "5453504b 03 13 1c00 0000000000000000 82 a4 636f6465 aa 6c656173655f6c6f7374 a7 6d657373616765 a2 6e6f",
    "5453504b 04 02 0100 0000000000000000 80",
    "5453504b 04 03 1500 8002000000000000 82 a8 73657175656e6365 07 a8 70726f6772657373 c0",
    "5453504b 04 11 0c00 0000000000010000 81 a7 76657273696f6e cd012c",
    "5453504b 04 13 1c00 0000000000000000 82 a4 636f6465 aa 6c656173655f6c6f7374 a7 6d657373616765 a2 6e6f",
]


@pytest.mark.parametrize(("kind", "header", "payload_bytes", "expected"), FROZEN_FRAMES)
def test_frames_of_version_5_keep_their_bytes(
    kind: Kind, header: dict[str, Any], payload_bytes: int, expected: str
) -> None:
    encoded = protocol.encode(kind, header, payload_bytes)
    assert encoded.hex() == expected.replace(" ", "")
    prefix = protocol.decode_prefix(encoded[:16], frozenset(Kind), 2**40)
    assert (prefix.kind, prefix.payload_bytes) == (kind, payload_bytes)
    assert protocol.decode_header(encoded[16:]) == header


def test_every_kind_has_a_frozen_frame() -> None:
    assert {kind for kind, *_ in FROZEN_FRAMES} == set(Kind)


@pytest.mark.parametrize("frame", FRAMES_OF_OLDER_VERSIONS)
def test_frames_of_older_versions_are_refused_with_what_to_do(frame: str) -> None:
    data = bytes.fromhex(frame)[: protocol.PREFIX_BYTES]
    with pytest.raises(
        ProtocolError, match=r"expected protocol version 5, got [1234]: install one tensorspark everywhere"
    ):
        protocol.decode_prefix(data, frozenset(Kind), 2**40)


headers = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers(0, 2**63 - 1) | st.floats(allow_nan=False) | st.text()
)


@given(kind=st.sampled_from(sorted(protocol.FROM_WORKER)), header=headers, payload_bytes=st.integers(0, 2**40))
def test_what_is_encoded_is_decoded(kind: Kind, header: dict[str, object], payload_bytes: int) -> None:
    frame = protocol.encode(kind, header, payload_bytes)
    prefix = protocol.decode_prefix(frame[: protocol.PREFIX_BYTES], protocol.FROM_WORKER, 2**40)
    assert (prefix.kind, prefix.payload_bytes) == (kind, payload_bytes)
    assert len(frame) == protocol.PREFIX_BYTES + prefix.header_bytes
    assert protocol.decode_header(frame[protocol.PREFIX_BYTES :]) == header


@given(st.binary(min_size=16, max_size=16))
def test_any_16_bytes_are_a_prefix_or_a_protocol_error(data: bytes) -> None:
    try:
        prefix = protocol.decode_prefix(data, protocol.FROM_WORKER, 1000)
    except ProtocolError:
        return
    assert prefix.payload_bytes <= 1000
    assert prefix.kind in protocol.FROM_WORKER


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_protocol_error(data: bytes) -> None:
    try:
        header = protocol.decode_header(data)
    except ProtocolError:
        return
    assert isinstance(header, dict)


def prefix(magic: bytes = b"TSPK", version: int = 5, kind: int = Kind.PUSH, payload_bytes: int = 0) -> bytes:
    return struct.pack("<4sBBHQ", magic, version, kind, 1, payload_bytes)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (prefix(magic=b"GET "), "begins with b'TSPK', got b'GET '"),
        (prefix(version=9), "version 5, got 9"),
        (prefix(kind=200), "got kind 200"),
        (prefix(kind=Kind.SNAPSHOT), "ALIVE, EVALUATION, FAIL, FINISH, NOTE, PULL, PUSH, REGISTER, SKIP, got kind 17"),
        (prefix(payload_bytes=101), "at most 100 bytes, got 101"),
    ],
)
def test_a_bad_prefix_says_what_was_expected_and_what_came(data: bytes, expected: str) -> None:
    with pytest.raises(ProtocolError) as error:
        protocol.decode_prefix(data, protocol.FROM_WORKER, 100)
    assert expected in str(error.value)


@pytest.mark.parametrize("value", [[1], 1, {1: 2}, {"a": b"x"} | {b"k": 1}, "text"])
def test_a_header_is_a_map_with_string_keys(value: object) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_header(msgpack.packb(value))


def test_deeply_nested_headers_are_refused() -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_header(b"\x81\xa1a" + b"\x91" * 60_000)


def test_a_header_over_its_length_field_is_not_sent() -> None:
    with pytest.raises(ValueError, match="at most 65535 bytes"):
        protocol.encode(Kind.FAIL, {"traceback": "x" * 70_000})


@pytest.mark.parametrize("value", [None, "7", 7.5, True, -1, 2**63])
def test_a_count_is_an_integer_that_is_not_negative(value: object) -> None:
    with pytest.raises(ProtocolError, match="'sequence'"):
        protocol.count({"sequence": value}, "sequence")


def test_an_integer_does_where_a_float_is_due() -> None:
    assert protocol.field({"loss": 2}, "loss", float) == 2.0


@pytest.mark.parametrize("kind", [RefusedError, LayoutMismatchError, LeaseLostError, NonFiniteError, RunStoppedError])
def test_a_refusal_arrives_as_the_error_that_was_sent(kind: type[RefusedError]) -> None:
    arrived = protocol.refusal(protocol.refusal_header(kind("tensor W:0 holds NaN")))
    assert type(arrived) is kind
    assert str(arrived) == "tensor W:0 holds NaN"


def test_a_refusal_of_a_code_unknown_here_is_a_refusal_still() -> None:
    assert type(protocol.refusal({"code": "of the future", "message": "no"})) is RefusedError
