"""The layout of weights in one buffer: where tensors lie, and that both sides mean the same."""

from __future__ import annotations

import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import LayoutMismatchError
from tensorspark.weights.layout import ALIGNMENT_BYTES, TensorSpec, WeightLayout

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int32", "int64", "uint16", "complex64")

MIXED = (
    TensorSpec("W", (3, 5), "float32"),
    TensorSpec("step", (), "int64"),
    TensorSpec("b", (5,), "float32"),
    TensorSpec("half", (7,), "bfloat16"),
    TensorSpec("none", (0, 4), "float32"),
    TensorSpec("count", (2,), "int64"),
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=12).map(
    lambda rows: [TensorSpec(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(rows)]
)


def _values(layout: WeightLayout, seed: int = 5) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {s.name: generator.integers(1, 100, s.shape).astype(s.dtype) for s in layout.specs}


@given(specs=specs)
def test_every_tensor_is_aligned_inside_the_buffer_and_overlaps_no_other(specs: list[TensorSpec]) -> None:
    layout = WeightLayout(specs)
    taken = np.zeros(layout.num_bytes, int)
    for spec in specs:
        offset = layout.offsets[spec.name]
        num_bytes = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        assert offset % ALIGNMENT_BYTES == 0
        assert 0 <= offset <= offset + num_bytes <= layout.num_bytes
        taken[offset : offset + num_bytes] += 1
    assert taken.max(initial=0) <= 1
    # No more is wasted than what aligning each tensor takes.
    assert (taken == 0).sum() < ALIGNMENT_BYTES * len(specs)


@given(specs=specs)
def test_packed_values_come_back_exactly_in_shape_and_dtype(specs: list[TensorSpec]) -> None:
    layout = WeightLayout(specs)
    values = _values(layout)
    views = layout.views(layout.pack(values))
    assert list(views) == [spec.name for spec in specs]
    for name, value in values.items():
        assert views[name].dtype == value.dtype
        assert views[name].shape == value.shape
        assert views[name].tobytes() == value.tobytes()


@given(specs=specs)
def test_runs_tile_the_buffer_with_one_dtype_each(specs: list[TensorSpec]) -> None:
    layout = WeightLayout(specs)
    assert [segment.start for segment in layout.segments] == [0, *[segment.stop for segment in layout.segments[:-1]]]
    assert layout.segments[-1].stop == layout.num_bytes
    dtypes = [segment.dtype for segment in layout.segments]
    assert len(set(dtypes)) == len(dtypes) == len({spec.dtype for spec in specs})
    for spec in specs:
        segment = next(segment for segment in layout.segments if segment.dtype == np.dtype(spec.dtype))
        assert segment.start <= layout.offsets[spec.name] <= segment.stop


@given(specs=specs)
def test_arithmetic_over_runs_is_arithmetic_over_tensors(specs: list[TensorSpec]) -> None:
    layout = WeightLayout(specs)
    values = _values(layout)
    buffer = layout.pack(values)
    for segment in layout.segments:
        segment.of(buffer)[...] += segment.of(buffer)
    for name, view in layout.views(buffer).items():
        np.testing.assert_array_equal(view, values[name] + values[name])


def test_the_gaps_between_tensors_are_zero() -> None:
    layout = WeightLayout(MIXED)
    buffer = layout.pack(_values(layout))
    for view in layout.views(buffer).values():
        view[...] = 0
    assert not buffer.any()


@pytest.mark.parametrize("num_elements", [1, 15, 16, 17, 1000, 100_003])
def test_buffers_are_zeroed_and_aligned_in_memory(num_elements: int) -> None:
    layout = WeightLayout([TensorSpec("x", (num_elements,), "float32")])
    buffers = [layout.allocate() for _ in range(5)]
    for buffer in buffers:
        assert buffer.ctypes.data % ALIGNMENT_BYTES == 0
        assert buffer.dtype == np.uint8
        assert buffer.shape == (layout.num_bytes,)
        assert not buffer.any()


def test_views_are_the_buffers_own_memory() -> None:
    layout = WeightLayout(MIXED)
    buffer = layout.pack(_values(layout))
    views = layout.views(buffer)
    views["b"][2] = 77.5
    views["step"][...] = 10**12
    again = layout.views(buffer)
    assert again["b"][2] == 77.5
    assert again["step"] == 10**12
    assert all(np.shares_memory(view, buffer) for view in views.values() if view.size)


def test_packing_copies_its_input_whatever_its_strides() -> None:
    layout = WeightLayout([TensorSpec("W", (3, 5), "float64")])
    transposed = np.arange(15.0).reshape(5, 3).T
    buffer = layout.pack({"W": transposed, "other": np.ones(3)})
    transposed[...] = -1
    np.testing.assert_array_equal(layout.views(buffer)["W"], np.arange(15.0).reshape(5, 3).T)


def test_sizes_of_a_scalar_and_an_empty_tensor() -> None:
    assert TensorSpec("s", (), "float64").num_elements == 1
    assert TensorSpec("s", (), "float64").num_bytes == 8
    assert TensorSpec("e", (3, 0), "float32").num_bytes == 0
    assert TensorSpec("h", (3, 2), "bfloat16").num_bytes == 12


def test_sizes_do_not_overflow() -> None:
    assert TensorSpec("W", (2**20, 2**20), "float32").num_bytes == 2**42


def test_a_layout_of_nothing_but_empty_tensors_packs() -> None:
    layout = WeightLayout([TensorSpec("a", (0,), "float32"), TensorSpec("b", (2, 0), "int64")])
    views = layout.views(layout.pack({"a": np.zeros(0, np.float32), "b": np.zeros((2, 0), np.int64)}))
    assert [view.shape for view in views.values()] == [(0,), (2, 0)]
    assert layout.find_non_finite(layout.allocate()) is None


def _fingerprint(*specs: TensorSpec) -> str:
    return WeightLayout(specs).fingerprint


def test_equal_layouts_have_equal_fingerprints_also_after_pickling() -> None:
    layout = WeightLayout(MIXED)
    clone = pickle.loads(pickle.dumps(layout))
    assert clone.fingerprint == layout.fingerprint == _fingerprint(*MIXED)
    assert (clone.specs, clone.offsets, clone.segments, clone.num_bytes) == (
        layout.specs,
        layout.offsets,
        layout.segments,
        layout.num_bytes,
    )


@pytest.mark.parametrize(
    "other",
    [
        [TensorSpec("V", (2, 6), "float32"), TensorSpec("b", (3,), "float32")],
        [TensorSpec("W", (6, 2), "float32"), TensorSpec("b", (3,), "float32")],
        [TensorSpec("W", (12,), "float32"), TensorSpec("b", (3,), "float32")],
        [TensorSpec("W", (2, 6), "int32"), TensorSpec("b", (3,), "float32")],
        [TensorSpec("b", (3,), "float32"), TensorSpec("W", (2, 6), "float32")],
        [TensorSpec("W", (2, 6), "float32")],
        [TensorSpec("W", (2, 6), "float32"), TensorSpec("b", (3,), "float32"), TensorSpec("c", (0,), "float32")],
        [TensorSpec("W", (2, 6), "float32"), TensorSpec("b", (), "float32")],
    ],
    ids=["name", "transposed", "flat", "dtype", "order", "one less", "one more, empty", "scalar"],
)
def test_the_fingerprint_tells_layouts_apart(other: list[TensorSpec]) -> None:
    layout = WeightLayout([TensorSpec("W", (2, 6), "float32"), TensorSpec("b", (3,), "float32")])
    different = WeightLayout(other).fingerprint
    assert different != layout.fingerprint
    layout.require_same(layout.fingerprint)
    with pytest.raises(LayoutMismatchError) as caught:
        layout.require_same(different)
    for part in (different, layout.fingerprint, "W float32[2, 6]", "b float32[3]"):
        assert part in str(caught.value)


def test_a_layout_needs_tensors() -> None:
    with pytest.raises(ValueError, match="at least one"):
        WeightLayout([])


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'W'"):
        WeightLayout([TensorSpec("W", (1,), "float32"), TensorSpec("W", (2,), "int32")])


@pytest.mark.parametrize("dtype", ["object", "str", "U3", "S5", "bool", "datetime64[s]", "V4", "float31", "resource"])
def test_what_is_no_number_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ValueError, match=dtype.partition("[")[0]):
        WeightLayout([TensorSpec("x", (2,), dtype)])


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, "none"),
        ({"W": np.zeros((3, 2), np.float32)}, r"float32\[3, 2\]"),
        ({"W": np.zeros(6, np.float32)}, r"float32\[6\]"),
        ({"W": np.zeros((2, 3), np.float64)}, r"float64\[2, 3\]"),
        ({"W": np.zeros((2, 3), np.int32)}, r"int32\[2, 3\]"),
    ],
)
def test_packing_a_value_that_does_not_fit_says_what_came(tensors: dict[str, np.ndarray], expected: str) -> None:
    layout = WeightLayout([TensorSpec("W", (2, 3), "float32")])
    with pytest.raises(ValueError, match=r"W float32\[2, 3\].*" + expected):
        layout.pack(tensors)


@pytest.mark.parametrize("name", ["W", "b", "half"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_the_first_tensor_that_is_not_finite_is_named(name: str, value: float, position: int) -> None:
    layout = WeightLayout(MIXED)
    buffer = layout.pack(_values(layout))
    assert layout.find_non_finite(buffer) is None
    layout.views(buffer)[name].reshape(-1)[position] = value
    assert layout.find_non_finite(buffer) == name


def test_the_largest_numbers_are_finite() -> None:
    layout = WeightLayout(MIXED)
    buffer = layout.allocate()
    views = layout.views(buffer)
    views["W"][...] = np.finfo(np.float32).max
    views["half"][...] = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    views["count"][...] = np.iinfo(np.int64).max
    assert layout.find_non_finite(buffer) is None


def test_bfloat16_is_known_though_nobody_imported_ml_dtypes() -> None:
    code = (
        "from tensorspark.weights.layout import TensorSpec, WeightLayout\n"
        "print(WeightLayout([TensorSpec('x', (3,), 'bfloat16')]).specs[0].num_bytes)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "6\n", result.stderr
