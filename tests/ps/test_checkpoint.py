"""Checkpoints as files: round trips, what the safetensors library reads, and every way to damage them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and the like with numpy
import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import CheckpointError
from tensorspark.history import PointSums, RecorderState, WorkerReport
from tensorspark.ps.checkpoint import MARK, SLOTS, WEIGHTS, RunCheckpoint, decode, encode
from tensorspark.ps.messages import Cursor, EpochProgress, PartitionProgress
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import TensorSpec, WeightLayout

STANDARD_DTYPES = [
    *("float16", "float32", "float64", "bfloat16", "complex64", "float8_e4m3fn", "float8_e5m2"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
]
DTYPES_STORED_AS_BYTES = ["complex128", "longdouble", "int4", "float8_e4m3fnuz", ">f4", ">i8"]

LAYOUT = WeightLayout([TensorSpec("W:0", (2, 3), "float32"), TensorSpec("b:0", (3,), "float64")])
WEIGHTS_NOW = LAYOUT.pack(
    {"W:0": np.array([[1.5, -2, 3], [4, 5, 6.25]], np.float32), "b:0": np.array([0.1, -0.2, 0.3])}
)
MOMENTUM = LAYOUT.pack({"W:0": np.full((2, 3), 0.5, np.float32), "b:0": np.array([7.0, 8.0, 9.0])})

CHECKPOINT = RunCheckpoint(
    layout=LAYOUT,
    weights=WEIGHTS_NOW,
    version=41,
    seconds=12.5,
    partitions=(
        PartitionProgress(
            7, Cursor(1, 3), 7, 0.25, WorkerReport(0, "h1", 2, 70, 700, epoch_samples=(5, 6), epoch_seconds=(0.5, 0.25))
        ),
        PartitionProgress(9, Cursor(2, 0), 9, None, WorkerReport(1, finished=True)),
        PartitionProgress(4, Cursor(2, 0), 9, 0.5, WorkerReport(2), bytes(range(16)), 40, 1, b"\xff" * 16, 7),
    ),
    points=RecorderState(2, 1, (PointSums(0.1, 2, 20, 20, {"loss": 0.1 * 3}), PointSums(0.2, 3, 30, 10, {}))),
    plan={"seed": 2**40, "shuffle": True, "rate": 0.5, "name": "mnist", "limit": None},
    combiner="FedOptCombiner",
    combiner_settings={"rate": 0.5, "nesterov": True},
    combiner_state=CombinerState({"momentum": MOMENTUM}, {"count": 3, "was_first": False}),
    is_complete=False,
    epochs=EpochProgress(1, {"learning_rate": 0.1, "momentum": -math.inf}, is_over=True),
)
PLAIN = replace(CHECKPOINT, combiner_state=CombinerState())


def files_of(checkpoint: RunCheckpoint) -> dict[str, bytes]:
    return {f"c{ending}": b"".join(file.parts) for ending, file in encode(checkpoint).items()}


def read(files: dict[str, bytes]) -> RunCheckpoint:
    def open_file(name: str) -> io.BytesIO:
        if name not in files:
            raise FileNotFoundError(name)
        return io.BytesIO(files[name])

    return decode("c", open_file)


def assert_same(left: RunCheckpoint, right: RunCheckpoint) -> None:
    assert left.layout.specs == right.layout.specs
    assert left.layout.fingerprint == right.layout.fingerprint
    assert left.weights.tobytes() == right.weights.tobytes()
    for name in (
        "version",
        "partitions",
        "points",
        "plan",
        "combiner",
        "combiner_settings",
        "is_complete",
        "seconds",
        "epochs",
    ):
        assert repr(getattr(left, name)) == repr(getattr(right, name)), name  # repr: NaN, and True is not 1
    for mine, other in zip(left.partitions, right.partitions, strict=True):
        assert (mine.epoch_totals, mine.evaluation_totals) == (other.epoch_totals, other.evaluation_totals)
    assert repr(left.combiner_state.values) == repr(right.combiner_state.values)
    assert {n: s.tobytes() for n, s in left.combiner_state.slots.items()} == {
        n: s.tobytes() for n, s in right.combiner_state.slots.items()
    }


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, PLAIN], ids=["with slots", "without"])
def test_what_was_encoded_is_decoded(checkpoint: RunCheckpoint) -> None:
    assert_same(read(files_of(checkpoint)), checkpoint)


def test_the_mark_is_written_last_and_slots_only_where_there_are_any() -> None:
    assert list(encode(CHECKPOINT)) == [WEIGHTS, SLOTS, MARK]
    assert list(encode(PLAIN)) == [WEIGHTS, MARK]


def test_decoded_weights_are_aligned_and_writable() -> None:
    decoded = read(files_of(CHECKPOINT))
    for buffer in (decoded.weights, decoded.combiner_state.slots["momentum"]):
        assert buffer.ctypes.data % 64 == 0
        buffer[0] = 1


def random_bytes(layout: WeightLayout, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A buffer with random bits in its tensors (NaN and infinity too) and zeros between them."""
    rng = np.random.default_rng(seed)
    buffer = layout.allocate()
    for spec in layout.specs:
        start = layout.offsets[spec.name]
        buffer[start : start + spec.num_bytes] = rng.integers(0, 256, spec.num_bytes, np.uint8)
    return buffer


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.builds(
    TensorSpec,
    NAMES,
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(STANDARD_DTYPES + DTYPES_STORED_AS_BYTES),
)
LAYOUTS = st.lists(SPECS, min_size=1, max_size=6, unique_by=lambda spec: spec.name).map(WeightLayout)
INTEGERS = st.integers() | st.integers(2**63, 2**200) | st.integers(-(2**200), -(2**62))
VALUES = INTEGERS | st.floats() | NAMES | st.booleans()
MAPS = st.dictionaries(NAMES, VALUES | st.none(), max_size=4)
COUNTS = st.integers(0, 2**63)
REPORTS = st.builds(
    WorkerReport,
    partition=COUNTS,
    host=NAMES,
    num_steps=COUNTS,
    epoch_samples=st.lists(COUNTS, max_size=3).map(tuple),
    epoch_seconds=st.lists(st.floats(), max_size=3).map(tuple),
    finished=st.booleans(),
)
PROGRESSES = st.builds(
    PartitionProgress,
    COUNTS,
    st.builds(Cursor, COUNTS, COUNTS),
    COUNTS,
    st.none() | st.floats(0, 1),
    REPORTS,
    st.binary(max_size=24),
    COUNTS,
    st.none() | COUNTS,
    st.binary(max_size=24),
    COUNTS,
)
SUMS = st.builds(PointSums, st.floats(), COUNTS, COUNTS, COUNTS, st.dictionaries(NAMES, st.floats(), max_size=3))


@st.composite
def checkpoints(draw: st.DrawFn) -> RunCheckpoint:
    layout = draw(LAYOUTS)
    slot_names = draw(st.lists(NAMES.filter(lambda name: name and "/" not in name), unique=True, max_size=3))
    seed = draw(st.integers(0, 2**32))
    return RunCheckpoint(
        layout=layout,
        weights=random_bytes(layout, seed),
        version=draw(COUNTS),
        seconds=draw(st.floats(0)),
        partitions=tuple(draw(st.lists(PROGRESSES, max_size=3))),
        points=draw(st.builds(RecorderState, COUNTS, COUNTS, st.lists(SUMS, max_size=3).map(tuple))),
        plan=draw(MAPS),
        combiner=draw(NAMES),
        combiner_settings=draw(MAPS),
        combiner_state=CombinerState(
            {name: random_bytes(layout, seed + 1 + i) for i, name in enumerate(slot_names)},
            draw(st.dictionaries(NAMES, VALUES, max_size=3)),
        ),
        is_complete=draw(st.booleans()),
        epochs=draw(
            st.none() | st.builds(EpochProgress, COUNTS, st.dictionaries(NAMES, st.floats(), max_size=3), st.booleans())
        ),
    )


@given(checkpoint=checkpoints())
def test_any_layout_dtype_and_state_round_trips_to_the_bit(checkpoint: RunCheckpoint) -> None:
    assert_same(read(files_of(checkpoint)), checkpoint)


def test_numpy_scalars_come_back_as_plain_numbers() -> None:
    decoded = read(files_of(replace(CHECKPOINT, version=np.int64(5), plan={"rate": np.float64(0.5)})))  # type: ignore[arg-type]
    assert (type(decoded.version), type(decoded.plan["rate"])) == (int, float)


# --- the files are what others expect ---------------------------------------------------------------------------------


def test_the_safetensors_library_reads_weights_and_slots_by_name() -> None:
    files = files_of(CHECKPOINT)
    weights = safetensors.numpy.load(files[f"c{WEIGHTS}"])
    np.testing.assert_array_equal(weights["W:0"], np.array([[1.5, -2, 3], [4, 5, 6.25]], np.float32), strict=True)
    np.testing.assert_array_equal(weights["b:0"], np.array([0.1, -0.2, 0.3]), strict=True)
    slots = safetensors.numpy.load(files[f"c{SLOTS}"])
    np.testing.assert_array_equal(slots["momentum/b:0"], np.array([7.0, 8.0, 9.0]), strict=True)
    assert set(slots) == {"momentum/W:0", "momentum/b:0"}


@pytest.mark.parametrize("dtype", STANDARD_DTYPES)
def test_the_library_knows_the_dtype(dtype: str) -> None:
    layout = WeightLayout([TensorSpec("x", (3,), dtype)])
    buffer = random_bytes(layout, 1)
    ((name, tensor),) = safetensors.deserialize(files_of(replace(PLAIN, layout=layout, weights=buffer))[f"c{WEIGHTS}"])
    assert (name, tensor["shape"], tensor["dtype"] == "U8") == ("x", [3], dtype == "uint8")
    assert bytes(tensor["data"]) == buffer[: 3 * np.dtype(dtype).itemsize].tobytes()


@pytest.mark.parametrize("dtype", DTYPES_STORED_AS_BYTES)
def test_a_dtype_that_safetensors_lacks_is_bytes_that_numpy_can_view(dtype: str) -> None:
    layout = WeightLayout([TensorSpec("x", (2, 2), dtype), TensorSpec("y", (), dtype)])
    values = np.array([[1, -2], [3, 4]]).astype(np.dtype(dtype))
    weights = layout.pack({"x": values, "y": values[1, 1:].reshape(())})
    data = files_of(replace(PLAIN, layout=layout, weights=weights))[f"c{WEIGHTS}"]
    (header_bytes,) = np.frombuffer(data[:8], "<u8")
    metadata = json.loads(data[8 : 8 + int(header_bytes)])["__metadata__"]
    loaded = safetensors.numpy.load(data)
    assert loaded["x"].dtype == np.uint8
    for name, expected in (("x", values), ("y", values[1, 1])):
        np.testing.assert_array_equal(loaded[name].view(metadata[name])[..., 0], expected)


def test_tensors_of_all_alignments_in_one_file_are_read_by_the_library() -> None:
    layout = WeightLayout([TensorSpec(dtype, (3,), dtype) for dtype in ("int8", "float64", "complex128", "uint16")])
    data = files_of(replace(PLAIN, layout=layout, weights=random_bytes(layout, 3)))[f"c{WEIGHTS}"]
    assert set(safetensors.numpy.load(data)) == {"int8", "float64", "complex128", "uint16"}


def test_a_file_of_format_version_1_is_still_read() -> None:
    """Written by the first version of the format; it must be readable as long as the version is 1."""
    files = {"c.safetensors": bytes.fromhex(FROZEN_WEIGHTS), "c.msgpack": bytes.fromhex(FROZEN_MARK)}
    decoded = read(files)
    assert decoded.layout.views(decoded.weights)["w"].tolist() == [1.5, -2.0]
    assert decoded.partitions == (PartitionProgress(3, Cursor(1, 2), 3, 0.5, WorkerReport(0, "h", num_steps=9)),)
    assert decoded.points == RecorderState(1, 1, (PointSums(0.5, 9, 90, 90, {"loss": 4.5}),))
    assert (decoded.version, decoded.plan, decoded.combiner) == (3, {"seed": 2**70}, "Delta")
    assert decoded.epochs is None


# --- memory -----------------------------------------------------------------------------------------------------------

BIG_LAYOUT = WeightLayout([TensorSpec("x", (2_000_000,), "float64")])  # 16 MB
BIG = replace(PLAIN, layout=BIG_LAYOUT, weights=BIG_LAYOUT.allocate())


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        result = action()
        del result
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_encoding_copies_no_weights() -> None:
    assert peak_bytes(lambda: encode(BIG)) < BIG_LAYOUT.num_bytes / 10
    parts = encode(BIG)[WEIGHTS].parts
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), BIG.weights)


def test_decoding_takes_the_weights_memory_once(tmp_path: Any) -> None:
    for name, data in files_of(BIG).items():
        (tmp_path / name).write_bytes(data)
    opened = []

    def open_file(name: str) -> Any:
        opened.append((tmp_path / name).open("rb"))
        return opened[-1]

    peak = peak_bytes(lambda: decode("c", open_file))
    for file in opened:
        file.close()
    assert BIG_LAYOUT.num_bytes <= peak < 1.7 * BIG_LAYOUT.num_bytes


def resigned(mark: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(mark)
    return body + b"\xc4\x20" + hashlib.sha256(body).digest()


def mark_of(files: dict[str, bytes]) -> dict[str, Any]:
    mark: dict[str, Any] = msgpack.unpackb(files[f"c{MARK}"][:-34])
    return mark


def test_a_mark_that_claims_a_terabyte_takes_no_memory() -> None:
    files = files_of(PLAIN)
    mark = mark_of(files)
    mark["tensors"][0]["shape"] = [2**37]
    mark["files"][WEIGHTS]["num_bytes"] = 2**40
    files[f"c{MARK}"] = resigned(mark)

    def attempt() -> None:
        with pytest.raises(CheckpointError, match=r"c\.safetensors: torn: expected 1099511627776 bytes, got"):
            read(files)

    assert peak_bytes(attempt) < 10**6


def test_tensors_that_do_not_fit_their_file_are_refused_before_memory_is_taken() -> None:
    files = files_of(PLAIN)
    mark = mark_of(files)
    mark["tensors"][0]["shape"] = [2**37]
    files[f"c{MARK}"] = resigned(mark)

    def attempt() -> None:
        with pytest.raises(CheckpointError, match=r"c\.safetensors: expected \d+ bytes for the tensors"):
            read(files)

    assert peak_bytes(attempt) < 10**6


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = files_of(CHECKPOINT)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: .*gone"):
        read({other: data for other, data in FILES.items() if other != name})


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_and_named(name: str) -> None:
    for length in range(len(FILES[name])):
        with pytest.raises(CheckpointError, match=f"^{name}: "):
            read({**FILES, name: FILES[name][:length]})


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_more_at_its_end_is_refused_and_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: "):
        read({**FILES, name: FILES[name] + b"\0"})


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_and_the_file_named(name: str) -> None:
    for position in range(len(FILES[name])):
        damaged = bytearray(FILES[name])
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(CheckpointError, match=f"^{name}: "):
            read({**FILES, name: bytes(damaged)})


def test_weights_of_another_checkpoint_of_the_same_model_are_refused() -> None:
    other = files_of(replace(CHECKPOINT, weights=MOMENTUM))
    with pytest.raises(CheckpointError, match=r"^c\.safetensors: damaged: its SHA-256"):
        read({**FILES, f"c{WEIGHTS}": other[f"c{WEIGHTS}"]})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_named(version: object) -> None:
    mark = resigned({**mark_of(FILES), "format_version": version})
    with pytest.raises(CheckpointError, match=rf"c\.msgpack: expected format version 1, got {version!r}: restore it"):
        read({**FILES, f"c{MARK}": mark})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "other"}, "expected the mark of a tensorspark checkpoint"),
        ({"version": "41"}, r"c\.msgpack\.version is '41' \(str\), expected int"),
        ({"version": True}, r"version is 'True' \(bool\), expected int"),
        ({"partitions": [{"sequence": 1}]}, r"partitions\[0\] has no field 'cursor'"),
        ({"new_field": 1}, "has a field 'new_field' that this version does not know"),
        ({"plan": {"seed": [1]}}, r"plan\['seed'\] is '\[1\]' \(list\)"),
        ({"tensors": []}, "at least one tensor"),
        ({"tensors": [{"name": "x", "shape": [2], "dtype": "O"}]}, "expected a number type"),
        ({"tensors": [{"name": "x", "shape": [2], "dtype": "f4,f4"}]}, "expected a number type"),
        ({"combiner_slots": ["a/b"]}, "without '/'"),
        ({"combiner_slots": []}, r"expected it to name \['\.safetensors'\], got"),
        ({"files": {}}, "expected it to name"),
    ],
)
def test_a_mark_with_a_right_digest_and_wrong_content_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read({**FILES, f"c{MARK}": resigned({**mark_of(FILES), **change})})


def test_a_field_with_a_default_may_be_absent() -> None:
    mark = mark_of(FILES)
    del mark["partitions"][1]["report"]["num_repeated"]
    assert read({**FILES, f"c{MARK}": resigned(mark)}).partitions == CHECKPOINT.partitions


@given(data=st.binary(max_size=300), is_signed=st.booleans())
def test_arbitrary_bytes_for_a_mark_give_a_checkpoint_error(data: bytes, is_signed: bool) -> None:
    mark = data + b"\xc4\x20" + hashlib.sha256(data).digest() if is_signed else data
    with pytest.raises(CheckpointError):
        read({**FILES, f"c{MARK}": mark})


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path] + [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list):
        return [path] + [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


@given(data=st.data())
def test_a_mark_with_any_part_exchanged_is_read_or_refused_and_never_worse(data: st.DataObject) -> None:
    mark = mark_of(FILES)
    *parents, last = data.draw(st.sampled_from(leaves(mark)[1:]))
    target: Any = mark
    for key in parents:
        target = target[key]
    target[last] = data.draw(JUNK)
    try:
        decoded = read({**FILES, f"c{MARK}": resigned(mark)})
    except CheckpointError:
        return
    assert decoded.weights.nbytes == decoded.layout.num_bytes


@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_for_tensors_give_a_checkpoint_error(data: bytes) -> None:
    for name in (f"c{WEIGHTS}", f"c{SLOTS}"):
        with pytest.raises(CheckpointError, match=f"^{name}: "):
            read({**FILES, name: data})


# --- what cannot be written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plan": {"shape": (1, 2)}}, r"plan\['shape'\].*\(list\)"),
        ({"plan": {"x": object()}}, r"plan\['x'\].*\(object\)"),
        ({"plan": {"x": 1 << 10_000}}, "size cannot be written"),
        ({"combiner": "\ud800"}, "surrogates not allowed"),
        ({"version": 1.5}, r"version is '1\.5' \(float\), expected int"),
        ({"combiner_state": CombinerState({"a/b": MOMENTUM})}, "without '/', got 'a/b'"),
        ({"combiner_state": CombinerState({"": MOMENTUM})}, "without '/', got ''"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        encode(replace(CHECKPOINT, **changes))


def test_a_tensor_with_the_name_that_safetensors_keeps_is_refused() -> None:
    layout = WeightLayout([TensorSpec("__metadata__", (1,), "float32")])
    with pytest.raises(CheckpointError, match="__metadata__"):
        encode(replace(PLAIN, layout=layout, weights=layout.allocate()))


def test_a_buffer_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[\d+\] uint8 for the weights, got \[64\] uint8"):
        encode(replace(CHECKPOINT, weights=WEIGHTS_NOW[:64]))
    with pytest.raises(ValueError, match="for momentum/"):
        encode(replace(CHECKPOINT, combiner_state=CombinerState({"momentum": MOMENTUM[:64]})))


def test_nan_in_weights_and_sums_comes_back() -> None:
    weights = LAYOUT.pack({"W:0": np.full((2, 3), np.nan, np.float32), "b:0": np.full(3, -np.inf)})
    points = RecorderState(1, 1, (PointSums(0.1, 1, 1, 1, {"loss": math.nan}),))
    decoded = read(files_of(replace(PLAIN, weights=weights, points=points)))
    assert decoded.weights.tobytes() == weights.tobytes()
    assert math.isnan(decoded.points.points[0].sums["loss"])


FROZEN_WEIGHTS = (
    "48000000000000007b225f5f6d657461646174615f5f223a7b7d2c2277223a7b226474797065223a22463332222c227368617065223a"
    "5b325d2c22646174615f6f666673657473223a5b302c385d7d7d0000c03f000000c0"
)
FROZEN_MARK = (
    "8ea6666f726d6174b674656e736f72737061726b2d636865636b706f696e74ae666f726d61745f76657273696f6e01a566696c657381"
    "ac2e7361666574656e736f727382a96e756d5f627974657358a6736861323536c420132b4f85d47d863007629a87c3c9348af7ff061e"
    "2a8515348a312727396cfb2fa774656e736f72739183a46e616d65a177a573686170659102a56474797065a7666c6f61743332ae636f"
    "6d62696e65725f736c6f747390af636f6d62696e65725f76616c75657380a776657273696f6e03a77365636f6e6473cb400400000000"
    "0000aa706172746974696f6e739185a873657175656e636503a6637572736f7282a565706f636801a5626174636802a5726f756e6403"
    "a870726f6772657373cb3fe0000000000000a67265706f72748fa9706172746974696f6e00a4686f7374a168ac6e756d5f617474656d"
    "70747300a96e756d5f737465707309ab6e756d5f73616d706c657300ae6e756d5f7265636f6e6e6563747300aa6e756d5f7075736865"
    "6400ab6e756d5f6170706c69656400ab6e756d5f7265667573656400ac6e756d5f726570656174656400ad65706f63685f73616d706c"
    "657390ad65706f63685f7365636f6e647390a6737465705f73cb0000000000000000a673796e635f73cb0000000000000000a866696e"
    "6973686564c2a6706f696e747383a673747269646501ab6e756d5f696e5f6c61737401a6706f696e74739185a77365636f6e6473cb3f"
    "e0000000000000a96e756d5f737465707309ab6e756d5f73616d706c65735aa67765696768745aa473756d7381a46c6f7373cb401200"
    "0000000000a4706c616e81a473656564c70901400000000000000000a8636f6d62696e6572a544656c7461b1636f6d62696e65725f73"
    "657474696e677380ab69735f636f6d706c657465c2c4209b14152d8dd9a079d7f4ab6866f428b6f61d149c58ad1009cba91ce708ab51"
    "17"
)
