"""What a worker makes of a snapshot's payload, and of what it pushes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tensorspark.errors import ProtocolError
from tensorspark.ps.payloads import Intake, Outlet
from tensorspark.weights.blocks import add_scaled
from tensorspark.weights.changes import Units
from tensorspark.weights.codecs import codec_of
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

LAYOUT = WeightLayout(
    [
        TensorSpec("embedding", (500, 8), "float32"),
        TensorSpec("W", (3000,), "float32"),
        TensorSpec("step", (1,), "int64"),
    ]
)
LOSSY = pytest.mark.parametrize("spec", ["float16", "bfloat16", "int8", "topk:0.1"])


class Bytes:
    """A payload that has come."""

    def __init__(self, data: bytes | Buffer) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self.num_read = 0

    def fill(self, payload: Buffer) -> None:
        payload[:] = self._data[self.num_read : self.num_read + payload.nbytes]
        self.num_read += payload.nbytes


def numbers(seed: int, scale: float = 1.0) -> Buffer:
    rng = np.random.default_rng(seed)
    return LAYOUT.pack(
        {
            "embedding": (rng.standard_normal((500, 8)) * scale).astype(np.float32),
            "W": (rng.standard_normal(3000) * scale).astype(np.float32),
            "step": rng.integers(1, 100, 1),
        }
    )


def decoded(payload: Buffer, num_bytes: int, spec: str) -> Buffer:
    """What a server makes of it."""
    if not num_bytes:
        return payload.copy()
    assert len(payload) == num_bytes < LAYOUT.num_bytes
    codec = codec_of(spec)
    assert codec is not None
    room = LAYOUT.allocate()
    room[LAYOUT.num_bytes - num_bytes :] = payload
    codec.decode(LAYOUT, room, num_bytes)
    return room


def floats(buffer: Buffer) -> np.ndarray:
    views = LAYOUT.views(buffer)
    return np.concatenate([views["embedding"].reshape(-1), views["W"]]).astype(np.float64)


# In


def test_whole_weights_are_received_as_they_are() -> None:
    out = numbers(1)
    source = Bytes(numbers(2))
    Intake(None, NO_COMPRESSION).receive(source, "whole", LAYOUT.num_bytes, out, None)
    assert np.array_equal(out, numbers(2))


def test_of_the_same_version_nothing_is_read() -> None:
    out, source = numbers(1), Bytes(b"the next frame")
    Intake(LAYOUT, NO_COMPRESSION).receive(source, "same", 0, out, 7)
    assert source.num_read == 0
    assert np.array_equal(out, numbers(1))


@pytest.mark.parametrize("compression", [NO_COMPRESSION, Compression(pull="rows"), Compression(pull="float16")])
def test_a_patch_changes_the_held_weights_in_the_units_of_the_run(compression: Compression) -> None:
    units = Units(LAYOUT, by_row=compression.pulls_rows)
    chosen = np.zeros(units.num_units, np.bool_)
    chosen[2] = True
    patch = units.write(numbers(2), chosen)
    out = numbers(1)
    intake = Intake(LAYOUT, compression)
    for _ in range(2):  # the second time, too
        intake.receive(Bytes(patch), "patch", len(patch), out, 3)
    expected = numbers(1)
    part = slice(2 * 32, 3 * 32) if compression.pulls_rows else slice(2 * 4096, 3 * 4096)
    expected[part] = numbers(2)[part]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("spec", ["float16", "bfloat16", "int8"])
def test_encoded_weights_are_decoded_where_they_come(spec: str) -> None:
    codec = codec_of(spec)
    assert codec is not None
    room = np.empty(LAYOUT.num_bytes, np.uint8)
    num_bytes = codec.encode(LAYOUT, numbers(2), room)
    out = numbers(1)
    Intake(LAYOUT, Compression(pull=spec)).receive(Bytes(room[:num_bytes]), "encoded", num_bytes, out, None)
    assert np.array_equal(out, decoded(room[:num_bytes], num_bytes, spec))
    assert LAYOUT.views(out)["step"] == LAYOUT.views(numbers(2))["step"]
    assert np.abs(floats(out) - floats(numbers(2))).max() < 0.05


@pytest.mark.parametrize(
    ("form", "num_bytes", "held"),
    [
        ("whole", LAYOUT.num_bytes - 1, None),
        ("whole", 0, 3),
        ("same", 0, None),
        ("same", 1, 3),
        ("patch", 100, None),
        ("encoded", 0, 3),
        ("SAME", 0, 3),
        ("", LAYOUT.num_bytes, 3),
        ("x" * 100_000, 5, 3),
    ],
)
def test_what_cannot_come_is_refused_and_nothing_is_read(form: str, num_bytes: int, held: int | None) -> None:
    out, source = numbers(1), Bytes(bytes(LAYOUT.num_bytes))
    with pytest.raises(ProtocolError, match=rf"expected a snapshot of {LAYOUT.num_bytes} bytes, got {num_bytes}") as e:
        Intake(LAYOUT, Compression(pull="int8")).receive(source, form, num_bytes, out, held)
    assert source.num_read == 0
    assert np.array_equal(out, numbers(1))
    assert len(str(e.value)) < 200


@pytest.mark.parametrize(("form", "held"), [("encoded", None), ("encoded", 3)])
def test_encoded_weights_are_refused_where_the_run_has_no_codec(form: str, held: int | None) -> None:
    with pytest.raises(ProtocolError, match="encoded"):
        Intake(LAYOUT, Compression(push="int8", pull="rows")).receive(Bytes(bytes(99)), form, 99, numbers(1), held)


@pytest.mark.parametrize("form", ["patch", "encoded"])
def test_without_a_layout_only_whole_weights_can_come(form: str) -> None:
    with pytest.raises(ProtocolError, match=form):
        Intake(None, Compression(pull="int8")).receive(Bytes(bytes(99)), form, 99, numbers(1), 3)


def test_a_damaged_patch_is_refused_and_changes_nothing() -> None:
    out = numbers(1)
    damaged = struct.pack("<3I", 1, 0, 500) + bytes(4096)  # there is no block 500
    with pytest.raises(ProtocolError, match="patch"):
        Intake(LAYOUT, NO_COMPRESSION).receive(Bytes(damaged), "patch", len(damaged), out, 3)
    assert np.array_equal(out, numbers(1))


# Out


@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_without_a_codec_what_is_pushed_is_sent_itself(layout: WeightLayout | None) -> None:
    outlet = Outlet(layout, Compression(pull="int8"))
    values = numbers(1)
    payload, num_bytes = outlet.encode(values)
    assert payload is values
    assert num_bytes == 0
    assert not outlet.is_encoding
    assert not Outlet(None, Compression(push="int8")).is_encoding


@LOSSY
def test_what_a_codec_leaves_out_is_sent_later(spec: str) -> None:
    outlet = Outlet(LAYOUT, Compression(push=spec))
    assert outlet.is_encoding
    received = np.zeros(7000)
    pushed = np.zeros(7000)
    num_steps = 0
    for seed in range(30):
        values = numbers(seed)
        pushed += floats(values)
        num_steps += int(LAYOUT.views(values)["step"][0])
        payload, num_bytes = outlet.encode(values)
        assert num_bytes
        got = decoded(payload, num_bytes, spec)
        received += floats(got)
        num_steps -= int(LAYOUT.views(got)["step"][0])
    assert num_steps == 0  # integers are exact, and have no error
    # All that was pushed and not received is still to come: a push of zeros brings (a part of) it.
    missing = pushed - received
    assert np.abs(missing).max() > 0
    for _ in range(200 if spec.startswith("topk") else 3):
        values = LAYOUT.allocate()
        payload, num_bytes = outlet.encode(values)
        received += floats(decoded(payload, num_bytes, spec))
    np.testing.assert_allclose(received, pushed, rtol=0, atol=1e-4 if spec != "float16" else 1e-3)


@LOSSY
def test_the_first_push_is_what_the_codec_alone_would_send(spec: str) -> None:
    codec = codec_of(spec)
    assert codec is not None
    room = np.empty(LAYOUT.num_bytes, np.uint8)
    expected = room[: codec.encode(LAYOUT, numbers(4), room)]
    payload, num_bytes = Outlet(LAYOUT, Compression(push=spec)).encode(numbers(4))
    assert num_bytes == len(expected)
    assert np.array_equal(payload, expected)


def test_rows_are_encoded_without_loss_and_leave_the_values_as_they_are() -> None:
    outlet = Outlet(LAYOUT, Compression(push="rows"))
    for seed in (1, 2):
        values = numbers(seed)
        LAYOUT.views(values)["embedding"][5:] = 0
        before = values.copy()
        payload, num_bytes = outlet.encode(values)
        assert 0 < num_bytes < 13_000
        assert np.array_equal(values, before)
        assert np.array_equal(decoded(payload, num_bytes, "rows"), before)


def test_where_encoding_does_not_pay_the_values_go_with_all_that_was_left_out_before() -> None:
    outlet = Outlet(LAYOUT, Compression(push="int8"))
    first = numbers(1)
    payload, num_bytes = outlet.encode(first)
    left_out = floats(numbers(1)) - floats(decoded(payload, num_bytes, "int8"))
    assert np.abs(left_out).max() > 1e-3
    second = numbers(2)
    LAYOUT.views(second)["embedding"][0, 0] = np.inf  # a block that is not finite goes as it is
    payload, num_bytes = outlet.encode(second)
    assert num_bytes == 0
    assert payload is second
    expected = floats(numbers(2)) + left_out
    expected[0] = np.inf
    np.testing.assert_allclose(floats(second), expected, rtol=0, atol=1e-5)


@LOSSY
def test_an_error_that_is_left_in_the_values_is_the_one_that_would_have_been_kept(spec: str) -> None:
    keeping, leaving = Outlet(LAYOUT, Compression(spec)), Outlet(LAYOUT, Compression(spec, leaves_error=True))
    values = LAYOUT.allocate()
    for seed in range(5):
        add_scaled(LAYOUT, numbers(seed), values, 1.0)
        expected, num_expected = keeping.encode(numbers(seed))
        payload, num_bytes = leaving.encode(values)
        assert num_bytes == num_expected > 0
        assert np.array_equal(payload, expected)
    assert floats(values).any()


def test_where_encoding_does_not_pay_no_error_is_left_and_the_payload_stays() -> None:
    outlet = Outlet(LAYOUT, Compression(push="int8", leaves_error=True))
    values = numbers(2)
    LAYOUT.views(values)["embedding"][0, 0] = np.inf
    sent = values.copy()
    payload, num_bytes = outlet.encode(values)
    assert num_bytes == 0
    assert not values.any()
    values[:] = numbers(3)  # what is pushed next is added up while this one is not accepted
    assert np.array_equal(payload, sent)


def test_nothing_that_is_lost_is_sent_twice() -> None:
    # The error of one push is in the next, and only there.
    outlet = Outlet(LAYOUT, Compression(push="int8"))
    values = numbers(1)
    first = floats(decoded(*outlet.encode(values), "int8"))
    second = floats(decoded(*outlet.encode(LAYOUT.allocate()), "int8"))
    third = floats(decoded(*outlet.encode(LAYOUT.allocate()), "int8"))
    errors = [np.abs(floats(numbers(1)) - total).max() for total in (first, first + second, first + second + third)]
    assert errors[0] > 50 * errors[1] > 0
    assert errors[1] > 50 * errors[2]
