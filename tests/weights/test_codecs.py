"""The codecs: one contract for all, what each loses, its bytes, and bytes that are none."""

from __future__ import annotations

import doctest
import importlib
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tensorspark.errors import ConfigError, ProtocolError
from tensorspark.weights.blocks import BLOCK_BYTES
from tensorspark.weights.codecs import CODEC_SPECS, Codec, codec_from_json, codec_of, floats
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

SPECS = ["float16", "bfloat16", "int8", "topk:0.01", "topk:0.3", "rows"]
LOSSY = [spec for spec in SPECS if spec != "rows"]
FLOATS = ("float32", "float64", "float16", "bfloat16")
BLOCK = BLOCK_BYTES // 4  # numbers of a block of float32

LAYOUTS: dict[str, WeightLayout] = {
    "one tensor": WeightLayout([TensorSpec("W", (300, 40), "float32")]),
    "many dtypes": WeightLayout(
        [
            TensorSpec("embedding", (500, 7), "float32"),
            TensorSpec("kernel", (33, 9), "float32"),
            TensorSpec("count", (), "int64"),
            TensorSpec("wide", (70, 11), "float64"),
            TensorSpec("half", (3001,), "float16"),
            TensorSpec("brain", (400, 5), "bfloat16"),
            TensorSpec("complex", (65, 3), "complex64"),
            TensorSpec("bytes", (999,), "uint8"),
            TensorSpec("bias", (9,), "float32"),
        ]
    ),
    "empty and scalar": WeightLayout(
        [
            TensorSpec("none", (0,), "float32"),
            TensorSpec("no columns", (100, 0), "float32"),
            TensorSpec("scalar", (), "float32"),
            TensorSpec("W", (901,), "float32"),
            TensorSpec("nothing", (0, 5), "float64"),
        ]
    ),
    "no bytes": WeightLayout([TensorSpec("none", (0, 3), "float32")]),
    "integers": WeightLayout([TensorSpec("a", (5000,), "int32"), TensorSpec("b", (70,), "uint8")]),
    "a scalar": WeightLayout([TensorSpec("s", (), "float32")]),
    **{
        f"a block{more:+d}": WeightLayout([TensorSpec("W", (BLOCK + more,), "float32"), TensorSpec("n", (3,), "int32")])
        for more in (-16, -1, 0, 1, 16)
    },
    "two blocks of 16 bits": WeightLayout([TensorSpec("b", (3 * BLOCK,), "bfloat16"), TensorSpec("c", (9, 5), "int8")]),
    "rows around blocks": WeightLayout(
        [
            TensorSpec("first", (7,), "float32"),
            TensorSpec("E", (9001, 33), "float32"),
            TensorSpec("between", (BLOCK + 5,), "float32"),
            TensorSpec("F", (64, BLOCK), "uint8"),
            TensorSpec("G", (4096, 3), "int16"),
        ]
    ),
}


def _codec(spec: str) -> Codec:
    codec = codec_of(spec)
    assert codec is not None
    return codec


def _fill(layout: WeightLayout, seed: int, scale: float = 1e-2) -> Buffer:
    """Normally distributed numbers; of tensors with 64 rows and more, only every third row on average."""
    generator = np.random.default_rng(seed)
    buffer = layout.allocate()
    for view in layout.views(buffer).values():
        numbers = generator.standard_normal(view.shape) * (scale if view.dtype.kind not in "iu" else 30)
        if view.ndim > 1 and len(view) >= 64:
            numbers[generator.random(len(view)) > 0.33] = 0
        view[...] = np.abs(numbers).astype(view.dtype) if view.dtype.kind == "u" else numbers.astype(view.dtype)
    return buffer


def _encoded(codec: Codec, layout: WeightLayout, values: Buffer, *, keeps_error: bool = False) -> bytes:
    out = np.full(codec.capacity(layout) + 64, 0xA5, np.uint8)
    encode = codec.encode_keeping_error if keeps_error else codec.encode
    num_bytes = encode(layout, values, out[: codec.capacity(layout)])
    assert (out[codec.capacity(layout) :] == 0xA5).all()
    return out[:num_bytes].tobytes()


def _decoded(codec: Codec, layout: WeightLayout, encoded: bytes) -> Buffer:
    buffer = layout.allocate()
    buffer[:] = 0x5A
    buffer[layout.num_bytes - len(encoded) :] = np.frombuffer(encoded, np.uint8)
    codec.decode(layout, buffer, len(encoded))
    return buffer


def _received(codec: Codec, layout: WeightLayout, values: Buffer) -> Buffer:
    """What arrives: decoded, or the buffer itself where it did not pay."""
    encoded = _encoded(codec, layout, values)
    return _decoded(codec, layout, encoded) if encoded else values.copy()


def _one(numbers: NDArray[Any], shape: tuple[int, ...] | None = None) -> tuple[WeightLayout, Buffer]:
    layout = WeightLayout([TensorSpec("W", shape or numbers.shape, numbers.dtype.name)])
    return layout, layout.pack({"W": numbers.reshape(shape or numbers.shape)})


def _bound(spec: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """The most that a codec may lose of each number of a flat tensor, by its documentation; runs begin at its front."""
    magnitudes = np.abs(values.astype(np.float64))
    to_float32 = np.spacing(np.minimum(magnitudes, 3e38).astype(np.float32)).astype(np.float64) / 2
    if spec == "float16":
        return np.maximum(magnitudes * 2**-11, 2**-25) + to_float32
    if spec == "bfloat16":
        return np.maximum(magnitudes * 2**-8, 2.0**-134) + to_float32
    if spec == "int8":
        padded = np.pad(magnitudes, (0, -len(magnitudes) % 256)).reshape(-1, 256)
        scales = np.repeat(padded.max(axis=1) / 127, 256)[: len(magnitudes)]
        return scales * 0.5001 + np.where(scales < 2.0**-126, magnitudes, 0)
    return magnitudes  # a number of top-k is there or not


# The contract


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
class TestContract:
    def test_it_is_shorter_or_not_at_all_and_leaves_the_values(self, spec: str, layout: WeightLayout) -> None:
        values = _fill(layout, 1)
        before = values.tobytes()
        encoded = _encoded(_codec(spec), layout, values)
        assert len(encoded) < max(1, layout.num_bytes)
        assert values.tobytes() == before

    def test_what_is_decoded_and_the_error_are_the_values(self, spec: str, layout: WeightLayout) -> None:
        codec, values = _codec(spec), _fill(layout, 2)
        kept = values.copy()
        encoded = _encoded(codec, layout, kept, keeps_error=True)
        assert encoded == _encoded(codec, layout, values)
        if not encoded:
            assert kept.tobytes() == values.tobytes()
            return
        decoded = _decoded(codec, layout, encoded)
        for name, exact in layout.views(values).items():
            received, lost = layout.views(decoded)[name], layout.views(kept)[name]
            np.testing.assert_array_equal(received + lost, exact)
            if not codec.is_lossy or exact.dtype.name not in FLOATS:
                assert received.tobytes() == exact.tobytes()
                assert not lost.any()

    def test_gaps_are_zero_and_what_it_does_not_encode_is_whole(self, spec: str, layout: WeightLayout) -> None:
        values = _fill(layout, 3)
        received = _received(_codec(spec), layout, values)
        assert layout.pack(layout.views(received)).tobytes() == received.tobytes()
        for spec_of, view in zip(layout.specs, layout.views(received).values(), strict=True):
            if spec_of.dtype not in FLOATS:
                assert view.tobytes() == layout.views(values)[spec_of.name].tobytes()

    def test_the_same_values_give_the_same_bytes(self, spec: str, layout: WeightLayout) -> None:
        values = _fill(layout, 4)
        again = pickle.loads(pickle.dumps(_codec(spec)))
        assert _encoded(_codec(spec), layout, values) == _encoded(again, layout, values.copy())

    def test_zeros_come_back_as_zeros(self, spec: str, layout: WeightLayout) -> None:
        assert not _received(_codec(spec), layout, layout.allocate()).any()

    def test_nan_and_infinity_arrive(self, spec: str, layout: WeightLayout) -> None:
        values = _fill(layout, 5)
        for index, view in enumerate(layout.views(values).values()):
            if view.size and view.dtype.kind not in "iu":
                view.reshape(-1)[-1] = (np.nan, np.inf, -np.inf)[index % 3]
        kept = values.copy()
        encoded = _encoded(_codec(spec), layout, kept, keeps_error=True)
        received = _decoded(_codec(spec), layout, encoded) if encoded else values
        for name, view in layout.views(received).items():
            if view.size and view.dtype.kind not in "iu":
                assert view.reshape(-1)[-1].tobytes() == layout.views(values)[name].reshape(-1)[-1].tobytes()
        if encoded:
            assert layout.find_non_finite(kept) is None


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-6, 1.0, 1e3])
def test_no_number_loses_more_than_the_bound(spec: str, dtype: str, scale: float) -> None:
    exact = (np.random.default_rng(6).standard_normal(3 * BLOCK + 77) * scale).astype(dtype)
    layout, values = _one(exact)
    encoded = _encoded(_codec(spec), layout, values)
    received = layout.views(_decoded(_codec(spec), layout, encoded))["W"]
    assert encoded
    assert (np.abs(received.astype("f8") - exact.astype("f8")) <= _bound(spec, exact)).all()


_numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("spec", LOSSY)
@settings(max_examples=60, deadline=None)
@given(exact=arrays(np.float32, st.integers(100, 600), elements=_numbers, fill=_numbers))
def test_any_numbers_arrive_within_the_bound_or_whole(spec: str, exact: NDArray[np.float32]) -> None:
    layout, values = _one(exact)
    kept = values.copy()
    encoded = _encoded(_codec(spec), layout, kept, keeps_error=True)
    received = layout.views(_decoded(_codec(spec), layout, encoded) if encoded else values)["W"]
    if not np.isfinite(exact).all():
        assert received.tobytes() == exact.tobytes()
        return
    wide, error = received.astype("f8"), layout.views(kept)["W"].astype("f8")
    limit = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}.get(spec, math.inf)
    clipped = np.clip(exact.astype("f8"), -limit, limit)
    assert (np.abs(wide - clipped) <= _bound(spec, clipped)).all()
    if encoded:
        tolerance = np.abs(exact.astype("f8")) * np.where(clipped == exact, 0, 2.0**-23)
        assert (np.abs(wide + error - exact.astype("f8")) <= tolerance).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(64, 700),
    width=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "uint8", "float64", "int16"]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_rows_arrive_bit_for_bit(rows: int, width: int, dtype: str, share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 256, (rows, width * np.dtype(dtype).itemsize), np.uint8)  # NaN of every kind too
    words[generator.random(rows) > share] = 0
    layout = WeightLayout([TensorSpec("a", (5,), "float32"), TensorSpec("E", (rows, width), dtype)])
    values = layout.allocate()
    layout.views(values)["E"][...] = words.view(dtype)
    assert _received(_codec("rows"), layout, values).tobytes() == values.tobytes()


@pytest.mark.parametrize("spec", LOSSY)
def test_error_feedback_loses_nothing_over_many_rounds(spec: str) -> None:
    generator = np.random.default_rng(7)
    layout = WeightLayout([TensorSpec("W", (5000,), "float32"), TensorSpec("b", (11,), "float64")])
    codec, error = _codec(spec), layout.allocate()
    names = ["W", "b"]
    sent = {name: np.zeros(layout.views(error)[name].shape) for name in names}
    wanted = {name: np.zeros_like(total) for name, total in sent.items()}
    for _ in range(50):
        change = layout.allocate()
        for name in names:
            view = layout.views(change)[name]
            view[...] = generator.standard_normal(view.shape) * 1e-3 + 2e-4
            wanted[name] += view
            view += layout.views(error)[name]
        encoded = _encoded(codec, layout, change, keeps_error=True)
        decoded = layout.views(_decoded(codec, layout, encoded))
        for name in names:
            sent[name] += decoded[name]
        error = change
    for name in names:
        remaining = layout.views(error)[name]
        np.testing.assert_allclose(sent[name] + remaining, wanted[name], rtol=0, atol=1e-6)
        # What is held back does not grow with the rounds: at most what one round loses, or a few for rare numbers.
        largest = {"topk:0.01": 0.02, "topk:0.3": 0.003}.get(spec, 2e-5)
        assert np.abs(remaining).max() < largest


# What each does with special numbers


def test_float16_rounds_as_the_definition_says_at_every_number_and_midpoint() -> None:
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middle = ((half[1:] + half[:-1]) / 2).astype(np.float32)
    above, below = (np.nextafter(middle, np.float32(towards)) for towards in (np.inf, -np.inf))
    exact = np.concatenate([half.astype(np.float32), middle, above, below])
    exact = np.concatenate([exact, -exact])
    layout, values = _one(exact)
    received = layout.views(_received(_codec("float16"), layout, values))["W"]
    assert received.tobytes() == exact.astype(np.float16).astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("spec", "limit"), [("float16", 65504.0), ("bfloat16", float.fromhex("0x1.fep127"))])
def test_numbers_out_of_range_are_clipped_and_the_error_keeps_the_rest(spec: str, limit: float, dtype: str) -> None:
    top = float(np.finfo(dtype).max)
    exact = np.zeros(100, dtype)
    exact[:6] = [limit, limit * 1.00001, -limit * 1.003, top, -top, 1.0]
    layout, values = _one(exact)
    encoded = _encoded(_codec(spec), layout, values, keeps_error=True)
    received, error = (layout.views(b)["W"] for b in (_decoded(_codec(spec), layout, encoded), values))
    assert received[:6].tolist() == [limit, limit, -limit, limit, -limit, 1.0]
    np.testing.assert_allclose(error + received, exact, rtol=1e-7)


def test_int8_is_a_count_of_the_scale_of_its_run() -> None:
    exact = np.zeros(600, np.float32)
    exact[:5] = [254, -254, 3, -2.9, 1]  # the scale is 2
    exact[256:259] = [0.5, 0.25, -0.001]
    exact[599] = 1e-45  # its scale would be below what float32 can divide by
    layout, values = _one(exact)
    encoded = _encoded(_codec("int8"), layout, values, keeps_error=True)
    section = encoded[8:]
    scales, counts = np.frombuffer(section[:12], "<f4"), np.frombuffer(section[12:], np.int8)
    assert scales.tolist() == [2.0, float(np.float32(0.5) / np.float32(127)), 0.0]
    assert counts[:5].tolist() == [127, -127, 2, -1, 0]  # 1.5 to the even 2, 0.5 to 0
    assert counts[256:259].tolist() == [127, 64, 0]
    assert not counts[512:].any()
    assert layout.views(values)["W"][[0, 2, 3, 4]].tolist() == pytest.approx([0, -1, -0.9, 1], abs=1e-6)
    assert layout.views(values)["W"][599] == np.float32(1e-45)


def _reference_topk(block: NDArray[Any], num: int) -> NDArray[Any]:
    """The largest by a stable sort; zeros are not sent."""
    order = np.argsort(-np.abs(block.astype("f8")), kind="stable")[:num]
    kept = np.zeros_like(block)
    kept[order] = block[order].astype("f4").astype(block.dtype) if block.dtype == np.float64 else block[order]
    return kept


@pytest.mark.parametrize("ratio", [1e-6, 0.001, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "ties", "few", "columns", "sorted"])
def test_topk_sends_the_largest_of_each_block_and_the_first_of_equals(ratio: float, dtype: str, kind: str) -> None:
    num = BLOCK_BYTES // np.dtype(dtype).itemsize
    generator = np.random.default_rng(8)
    exact = generator.standard_normal(num + num // 3)
    if kind == "ties":
        exact = np.round(exact)
    elif kind == "few":
        exact[generator.random(len(exact)) > 0.002] = 0
    elif kind == "columns":
        exact[np.arange(len(exact)) % 17 == 0] *= 100  # all that the sample sees
    elif kind == "sorted":
        exact.sort()
    exact = exact.astype(dtype)
    exact = exact[: len(exact) // 64 * 64]
    layout, values = _one(exact)
    received = layout.views(_received(_codec(f"topk:{ratio}"), layout, values))["W"]
    for block in (slice(0, num), slice(num, len(exact))):
        expected = _reference_topk(exact[block], math.ceil(ratio * len(exact[block])))
        np.testing.assert_array_equal(received[block], expected)


def test_topk_sends_raw_what_float32_cannot_hold() -> None:
    layout, values = _one(np.array([1e300, 1.0] * 100))
    assert _received(_codec("topk:0.01"), layout, values).tobytes() == values.tobytes()


def test_rows_keep_negative_zeros_and_the_bits_of_nan() -> None:
    table = np.zeros((200, 4), np.float32)
    table[7, 1] = -0.0
    table.view(np.uint32)[50, 3] = 0x7F800001  # a signaling NaN
    table.view(np.uint32)[199] = 0xFFC12345
    layout, values = _one(table)
    encoded = _encoded(_codec("rows"), layout, values)
    assert len(encoded) == 4 + 4 + 3 * (4 + 16)
    assert _decoded(_codec("rows"), layout, encoded).tobytes() == values.tobytes()


# Where it does not pay


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["integers", "a scalar", "no bytes"])
def test_nothing_to_encode_returns_zero(spec: str, name: str) -> None:
    layout = LAYOUTS[name]
    values = _fill(layout, 9) if name != "a scalar" else layout.pack({"s": np.array(np.nan, np.float32)})
    assert _encoded(_codec(spec), layout, values) == b""


@pytest.mark.parametrize("spec", LOSSY)
def test_weights_that_are_nan_throughout_are_sent_raw_and_stay(spec: str) -> None:
    layout, values = _one(np.full(3 * BLOCK, np.nan, np.float32))
    before = values.tobytes()
    assert _encoded(_codec(spec), layout, values, keeps_error=True) == b""
    assert values.tobytes() == before


@pytest.mark.parametrize("spec", LOSSY)
def test_a_last_block_that_saves_less_than_the_directory_is_sent_raw_and_stays(spec: str) -> None:
    """All blocks but the last are NaN, and that one is one alignment long: what it saves is less than the rest adds."""
    exact = np.full(20 * BLOCK + 16, np.nan, np.float32)
    exact[-16:] = 0.125
    layout, values = _one(exact)
    before = values.tobytes()
    assert _encoded(_codec(spec), layout, values, keeps_error=True) == b""
    assert values.tobytes() == before


def test_the_errors_of_blocks_before_it_was_certain_to_pay_are_kept_too() -> None:
    layout = WeightLayout(
        [TensorSpec("tiny", (3,), "float32"), TensorSpec("n", (70_000,), "int64"), TensorSpec("W", (900,), "float64")]
    )
    values = layout.pack(
        {"tiny": np.full(3, 0.1, np.float32), "n": np.arange(70_000), "W": np.full(900, 0.1, np.float64)}
    )
    assert _encoded(_codec("float16"), layout, values, keeps_error=True)
    views = layout.views(values)
    assert views["tiny"][0] == np.float32(0.1) - np.float32(np.float16(0.1))
    assert views["W"][899] == 0.1 - np.float64(np.float16(0.1))
    assert not views["n"].any()


def test_dense_changes_of_a_table_are_sent_raw() -> None:
    generator = np.random.default_rng(10)
    layout, values = _one(generator.standard_normal((3000, 20)).astype(np.float32))
    assert _encoded(_codec("rows"), layout, values) == b""


@pytest.mark.parametrize(("width", "num_bytes"), [(20, 4 + 4 + 2304 * (4 + 80)), (2, 0)])
def test_rows_that_the_sample_misses_are_counted_all_the_same(width: int, num_bytes: int) -> None:
    table = np.ones((2560, width), np.float32)
    table[::10] = 0  # all that the sample of 256 rows sees
    layout, values = _one(table)
    assert len(_encoded(_codec("rows"), layout, values)) == num_bytes
    assert _received(_codec("rows"), layout, values).tobytes() == values.tobytes()


@pytest.mark.parametrize("where", ["front", "back", "middle", "spread"])
def test_rows_are_decoded_in_place_where_nearly_all_changed(where: str) -> None:
    """What is read is as near before what is written as it can be."""
    num, width = 8000, 100
    zero = {
        "front": np.arange(90),
        "back": np.arange(num - 90, num),
        "middle": np.arange(4000, 4090),
        "spread": np.arange(0, num, num // 90) + 1,
    }[where]
    table = np.random.default_rng(15).standard_normal((num, width)).astype(np.float32)
    table[zero] = 0
    layout = WeightLayout([TensorSpec("E", (num, width), "float32"), TensorSpec("F", (num, width), "float32")])
    values = layout.pack({"E": table, "F": table[::-1]})
    encoded = _encoded(_codec("rows"), layout, values)
    assert 0.98 < len(encoded) / layout.num_bytes < 1
    assert _decoded(_codec("rows"), layout, encoded).tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_topk_of_too_many_returns_zero(dtype: str) -> None:
    layout, values = _one(np.ones(5000, dtype))
    assert _encoded(_codec("topk:0.7"), layout, values) == b""


# The bytes

_FROZEN_LAYOUT = WeightLayout([TensorSpec("E", (64, 2), "float32"), TensorSpec("step", (1,), "int32")])
_FROZEN = {
    "float16": "663136010001000040"
    + "00" * 16
    + "3c00b8"
    + "00" * 52
    + "484202"
    + "00" * 181
    + "80c1405607"
    + "00" * 63,
    "bfloat16": "623136010001000040"
    + "00" * 15
    + "803f00bf"
    + "00" * 52
    + "4940d733"
    + "00" * 180
    + "30c0c84207"
    + "00" * 63,
    "int8": "696e740184000000400000002693493f00000000000001ff" + "00" * 26 + "04" + "00" * 91 + "fd7f07" + "00" * 63,
    "topk:0.05": "746f700124000000400000000000803f000000bfdb0f494095bfd633000030c00000c84206000700220023007e007f0007"
    + "00" * 63,
    "rows": "726f77010300000003000000110000003f0000000000803f000000bfdb0f494095bfd633000030c00000c84207" + "00" * 63,
}


def _frozen_values() -> Buffer:
    table = np.zeros((64, 2), np.float32)
    table[[3, 17, 63]] = [[1.0, -0.5], [3.1415927, 1e-7], [-2.75, 100.0]]
    return _FROZEN_LAYOUT.pack({"E": table, "step": np.array([7], np.int32)})


@pytest.mark.parametrize("spec", _FROZEN)
def test_the_bytes_are_those_of_version_1(spec: str) -> None:
    frozen = bytes.fromhex(_FROZEN[spec])
    assert _encoded(_codec(spec), _FROZEN_LAYOUT, _frozen_values()) == frozen


def test_a_reader_by_the_documentation_alone_reads_the_rows() -> None:
    encoded = bytes.fromhex(_FROZEN["rows"])
    assert encoded[:4] == b"row\x01"
    assert np.frombuffer(encoded[4:8], "<u4").tolist() == [3]
    assert np.frombuffer(encoded[8:20], "<u4").tolist() == [3, 17, 63]
    sent = np.frombuffer(encoded[20:44], "<f4").reshape(3, 2)
    np.testing.assert_array_equal(sent, _FROZEN_LAYOUT.views(_frozen_values())["E"][[3, 17, 63]])
    assert np.frombuffer(encoded[44:], "<i4").tolist() == [7] + [0] * 15


# Bytes that are none

_FUZZED = WeightLayout(
    [TensorSpec("E", (80, 3), "float32"), TensorSpec("n", (3,), "int32"), TensorSpec("d", (40,), "float64")]
)


def _guarded(layout: WeightLayout, encoded: bytes) -> tuple[Buffer, Callable[[], bool]]:
    """A buffer with the encoded bytes at its end, and whether the memory around it is as it was."""
    memory = np.full(layout.num_bytes + 256, 0x77, np.uint8)
    buffer = memory[128 : 128 + layout.num_bytes]
    if encoded:
        buffer[-len(encoded) :] = np.frombuffer(encoded, np.uint8)
    return buffer, lambda: bool((memory[:128] == 0x77).all() and (memory[-128:] == 0x77).all())


def _mutations(encoded: bytes, num: int) -> Iterator[bytes]:
    generator = np.random.default_rng(11)
    for _ in range(num):
        changed = bytearray(encoded)
        kind = generator.integers(5)
        if kind == 0:
            changed = changed[: generator.integers(len(changed))]
        elif kind == 1:
            changed += generator.bytes(int(generator.integers(1, 40)))
        elif kind == 2:  # a directory entry or what stands near it
            at = int(generator.integers(4, 24))
            changed[at : at + 4] = generator.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1]).astype("<u4").tobytes()
        else:
            for _ in range(generator.integers(1, 6)):
                changed[generator.integers(4 * (kind == 3), len(changed))] = generator.integers(256)
        yield bytes(changed)


@pytest.mark.parametrize("spec", SPECS)
def test_mutated_bytes_raise_or_decode_and_touch_nothing_else(spec: str) -> None:
    codec, values = _codec(spec), _fill(_FUZZED, 12)
    encoded = _encoded(codec, _FUZZED, values)
    num_refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mutated in _mutations(encoded, 2000):
            buffer, is_untouched_around = _guarded(_FUZZED, mutated[: _FUZZED.num_bytes])
            try:
                codec.decode(_FUZZED, buffer, len(mutated))
            except ProtocolError:
                num_refused += 1
            else:
                assert _FUZZED.pack(_FUZZED.views(buffer)).tobytes() == buffer.tobytes()
            assert is_untouched_around()
    assert 200 < num_refused < 2000


@pytest.mark.parametrize("spec", SPECS)
def test_directories_that_add_up_but_are_wrong_raise_or_decode(spec: str) -> None:
    layout = WeightLayout(
        [
            TensorSpec("E", (200, 8), "float32"),
            TensorSpec("F", (200, 8), "float32"),
            TensorSpec("W", (70_000,), "float32"),
        ]
    )
    codec, generator = _codec(spec), np.random.default_rng(16)
    encoded = bytearray(_encoded(codec, layout, _fill(layout, 16)))
    entries = np.frombuffer(encoded[4:12], "<u4").astype(np.int64)  # two blocks, or two tables with rows of a size
    num_refused = 0
    for _ in range(300):
        moved = int(generator.integers(-entries[0], entries[1] + 1))
        encoded[4:12] = (entries + np.array([moved, -moved])).astype("<u4").tobytes()
        buffer, is_untouched_around = _guarded(layout, bytes(encoded))
        try:
            codec.decode(layout, buffer, len(encoded))
        except ProtocolError:
            num_refused += 1
        assert is_untouched_around()
    assert num_refused > 200


@pytest.mark.parametrize("spec", SPECS)
def test_every_truncation_is_refused(spec: str) -> None:
    encoded = _encoded(_codec(spec), _FUZZED, _fill(_FUZZED, 13))
    for num_bytes in range(len(encoded)):
        for part in (encoded[:num_bytes], encoded[len(encoded) - num_bytes :]):
            with pytest.raises(ProtocolError, match=f"expected weights encoded as '{spec}', got"):
                _decoded(_codec(spec), _FUZZED, part)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("other", SPECS)
def test_the_bytes_of_another_codec_are_refused(spec: str, other: str) -> None:
    encoded = _encoded(_codec(other), _FUZZED, _fill(_FUZZED, 14))
    if spec.partition(":")[0] == other.partition(":")[0]:
        _decoded(_codec(spec), _FUZZED, encoded)
    else:
        with pytest.raises(ProtocolError, match="begin with"):
            _decoded(_codec(spec), _FUZZED, encoded)


@pytest.mark.parametrize("num_bytes", [-1, 0, 3, 10**9])
@pytest.mark.parametrize("spec", SPECS)
def test_impossible_sizes_are_refused(spec: str, num_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"{num_bytes} bytes, where"):
        _codec(spec).decode(_FUZZED, _FUZZED.allocate(), num_bytes)


def test_sections_longer_than_their_block_are_refused() -> None:
    layout = WeightLayout([TensorSpec("W", (16,), "float32"), TensorSpec("d", (100,), "float64")])
    head = b"top\x01" + np.array([16 * 6, 0], "<u4").tobytes()
    encoded = head + np.ones(16, "<f4").tobytes() + np.arange(16, dtype="<u2").tobytes()
    with pytest.raises(ProtocolError, match="a section of 96 bytes for 64 bytes of float32"):
        _decoded(_codec("topk:0.3"), layout, encoded)


@pytest.mark.parametrize("spec", LOSSY)
def test_integers_can_only_be_sent_as_they_are(spec: str) -> None:
    layout = WeightLayout([TensorSpec("n", (16,), "int32"), TensorSpec("d", (100,), "float64")])
    head = _codec(spec).mark + np.array([0, 0], "<u4").tobytes()
    with pytest.raises(ProtocolError, match="a section of 0 bytes for 64 bytes of int32"):
        _decoded(_codec(spec), layout, head)


@pytest.mark.parametrize("spec", ["topk:0.3", "rows"])
def test_indices_that_do_not_ascend_are_refused(spec: str) -> None:
    table = np.zeros((100, 4), np.float32)
    table[[5, 9], 0] = 1.0
    layout, values = _one(table)
    encoded = bytearray(_encoded(_codec(spec), layout, values))
    indices = {"rows": slice(8, 16), "topk:0.3": slice(16, 20)}[spec]
    assert np.frombuffer(encoded[indices], "<u4" if spec == "rows" else "<u2").tolist() in ([5, 9], [20, 36])
    half = len(encoded[indices]) // 2
    first, second = encoded[indices][:half], encoded[indices][half:]
    for broken in (second + first, first + first, first + b"\xff" * half):
        encoded[indices] = broken
        with pytest.raises(ProtocolError, match="ascend"):
            _decoded(_codec(spec), layout, bytes(encoded))


@pytest.mark.parametrize("spec", SPECS)
def test_buffers_of_the_wrong_size_are_misuse(spec: str) -> None:
    layout = LAYOUTS["one tensor"]
    codec, values = _codec(spec), layout.allocate()
    with pytest.raises(ValueError, match="room for"):
        codec.encode(layout, values, values[:-1].copy())
    with pytest.raises(ValueError, match="expected 48000"):
        codec.encode(layout, values[:-64], layout.allocate())
    with pytest.raises(ValueError, match="expected a buffer of 48000 bytes"):
        codec.decode(layout, values[:-64], 100)


# Names and JSON


@pytest.mark.parametrize("spec", [*SPECS, "topk:1e-05"])
def test_a_codec_is_its_spec(spec: str) -> None:
    codec = _codec(spec)
    assert codec.spec == spec
    assert repr(codec) == f"codec_of('{spec}')"
    assert codec == _codec(spec)
    assert hash(codec) == hash(_codec(spec))
    assert codec != codec_of("topk:0.02")
    assert codec_from_json(codec.to_json()) == codec
    assert pickle.loads(pickle.dumps(codec)) == codec
    assert codec.is_sparse == (spec.startswith(("topk", "rows")))
    assert codec.is_lossy == (spec != "rows")


def test_a_ratio_has_one_canonical_form() -> None:
    assert _codec("topk:.010").spec == "topk:0.01"
    assert _codec("topk:1e-2").to_json() == {"codec": "topk", "ratio": 0.01}
    assert _codec("int8").to_json() == {"codec": "int8"}


def test_none_is_no_codec() -> None:
    assert codec_of("none") is None
    assert codec_from_json(None) is None
    assert codec_from_json({"codec": "none"}) is None


@pytest.mark.parametrize("spec", ["", "gzip", "Float16", "float16:2", "topk", "topk:", "topk:x", "rows:", None, 8])
def test_an_unknown_codec_is_refused_with_the_valid_ones(spec: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        codec_of(spec)
    assert all(valid in str(caught.value) for valid in CODEC_SPECS)
    assert str(caught.value).endswith(f"got {spec!r}")


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 1 for 'topk', such as 0\.01, got"):
        codec_of(f"topk:{ratio}")
    with pytest.raises(ConfigError, match=r"between 0 and 1 for 'topk', such as 0\.01, got"):
        codec_from_json({"codec": "topk", "ratio": ratio})


@pytest.mark.parametrize(
    "value",
    [
        "int8",
        [],
        {},
        {"codec": "topk"},
        {"codec": "topk", "ratio": "0.1"},
        {"codec": "topk", "ratio": True},
        {"codec": "int8", "ratio": 0.1},
        {"codec": "lzma"},
        {"codec": ["int8"]},
    ],
)
def test_json_that_describes_no_codec_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        codec_from_json(value)


def test_bfloat16_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    floats._bfloat16.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ConfigError, match="ml_dtypes"):
        codec_of("bfloat16")
    monkeypatch.undo()
    floats._bfloat16.cache_clear()
    assert floats._bfloat16() == np.dtype(ml_dtypes.bfloat16)


def test_the_examples_come_out_as_they_say() -> None:
    result = doctest.testmod(importlib.import_module("tensorspark.weights.codecs"))
    assert result.attempted > 0
    assert result.failed == 0
