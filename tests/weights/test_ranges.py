"""Buffers of weights, cut into ranges for several servers."""

from __future__ import annotations

import doctest
import itertools
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorspark.weights import ranges as module
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tensorspark.weights.ranges import Shard, split

MIN_BYTES = 4096


def random_bytes(layout: WeightLayout) -> Buffer:
    buffer = layout.allocate()
    buffer[:] = np.random.default_rng(3).integers(0, 256, layout.num_bytes, np.uint8)
    return buffer


def as_bytes(value: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(value.tobytes(), np.uint8)


def pieces(shards: tuple[Shard, ...], buffer: Buffer, layout: WeightLayout) -> dict[str, list[NDArray[np.uint8]]]:
    """By tensor, the bytes of its pieces in order; each compared with the slice of the tensor that its name tells."""
    whole = layout.views(buffer)
    found: dict[str, list[NDArray[np.uint8]]] = {}
    for shard in shards:
        for spec in shard.layout.specs:
            value = shard.layout.views(shard.of(buffer))[spec.name]
            match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", spec.name)
            name = match[1] if match else spec.name
            expected = whole[name]
            if match:
                is_by_row = value.ndim == expected.ndim
                expected = (expected if is_by_row else expected.reshape(-1))[int(match[2]) : int(match[3])]
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            assert np.array_equal(as_bytes(value), as_bytes(expected))
            assert np.shares_memory(value, buffer)
            found.setdefault(name, []).append(value.reshape(-1).view(np.uint8))
    return found


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    shapes = st.one_of(
        st.tuples(st.integers(1, 30_000)),
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
        st.just((0, 3)),
        st.just(()),
    )
    dtypes = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "complex128"])
    specs = draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6))
    first = TensorSpec("scalar", (), "float32")
    return WeightLayout([first, *(TensorSpec(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(specs))])


@given(layout=layouts(), num_shards=st.integers(1, 9), whole_tensors=st.booleans())
def test_shards_cover_the_buffer_and_hold_every_tensor_once(
    layout: WeightLayout, num_shards: int, whole_tensors: bool
) -> None:
    shards = split(layout, num_shards, whole_tensors=whole_tensors)
    assert 1 <= len(shards) <= num_shards
    assert (shards[0].start, shards[-1].stop) == (0, layout.num_bytes)
    assert all(before.stop == after.start for before, after in itertools.pairwise(shards))
    for shard in shards:
        assert shard.start % 64 == 0
        assert shard.layout.num_bytes == shard.stop - shard.start > 0
    buffer = random_bytes(layout)
    found = pieces(shards, buffer, layout)
    for name, value in layout.views(buffer).items():
        joined = np.concatenate([np.empty(0, np.uint8), *found.get(name, [])])
        assert np.array_equal(joined, as_bytes(value))
    if whole_tensors:
        names = [spec.name for shard in shards for spec in shard.layout.specs]
        assert sorted(names) == sorted(spec.name for spec in layout.specs if spec.num_bytes)


@given(layout=layouts(), num_shards=st.integers(1, 9))
def test_no_shard_is_much_longer_than_its_share(layout: WeightLayout, num_shards: int) -> None:
    num_fitting = max(1, min(num_shards, layout.num_bytes // MIN_BYTES))
    # Cuts are up to a sixteenth of a tensor before the place that would be even, or one alignment.
    longest = layout.num_bytes / num_fitting + max(layout.num_bytes / 16, 64) + 1
    assert all(shard.stop - shard.start <= longest for shard in split(layout, num_shards))


def test_a_long_vector_is_cut_evenly() -> None:
    layout = WeightLayout([TensorSpec("W", (1_000_003,), "float32")])
    sizes = [shard.stop - shard.start for shard in split(layout, 4)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 128


def test_a_table_is_cut_between_rows() -> None:
    layout = WeightLayout([TensorSpec("E", (999, 7), "float32")])  # rows of 28 bytes: 16 of them are aligned
    shards = split(layout, 3)
    assert len(shards) == 3
    specs = [spec for shard in shards for spec in shard.layout.specs]
    assert [spec.shape[1:] for spec in specs] == [(7,)] * 3
    assert sum(spec.shape[0] for spec in specs) == 999


def test_rows_that_are_too_long_to_be_kept_whole_are_cut_through() -> None:
    layout = WeightLayout([TensorSpec("W", (3, 5000), "float32")])
    shards = split(layout, 2)  # half of the 60,032 bytes, padded as they are, is 469 times the alignment
    assert [spec.shape for shard in shards for spec in shard.layout.specs] == [(7504,), (7496,)]
    pieces(shards, random_bytes(layout), layout)


def test_whole_tensors_are_dealt_out_where_they_lie() -> None:
    layout = WeightLayout([TensorSpec(name, (2048,), "float32") for name in "abcdefgh"])
    shards = split(layout, 3, whole_tensors=True)
    assert [[spec.name for spec in shard.layout.specs] for shard in shards] == [["a", "b", "c"], ["d", "e"], [*"fgh"]]


def test_a_tensor_that_is_most_of_the_weights_cannot_be_shared_where_it_is_to_stay_whole() -> None:
    layout = WeightLayout([TensorSpec("W", (100_000,), "float32"), TensorSpec("b", (100,), "float32")])
    assert len(split(layout, 4)) == 4
    shards = split(layout, 4, whole_tensors=True)
    assert [[spec.name for spec in shard.layout.specs] for shard in shards] == [["W"], ["b"]]
    assert len(split(WeightLayout(layout.specs[:1]), 4, whole_tensors=True)) == 1


@pytest.mark.parametrize(("num_bytes", "expected"), [(4, 1), (8128, 1), (8192, 2), (40_960, 10), (400_000, 50)])
def test_there_are_no_more_shards_than_are_worth_a_process(num_bytes: int, expected: int) -> None:
    layout = WeightLayout([TensorSpec("W", (num_bytes,), "uint8")])
    assert len(split(layout, 50)) == expected
    assert len(split(layout, 1)) == 1


def test_one_shard_is_the_layout_itself() -> None:
    layout = WeightLayout([TensorSpec("i", (5,), "int64"), TensorSpec("W", (200, 30), "float32")])
    (shard,) = split(layout, 1)
    assert shard.layout.fingerprint == layout.fingerprint


def test_writing_to_a_shards_range_writes_to_the_buffer() -> None:
    layout = WeightLayout([TensorSpec("W", (4096,), "float32")])
    buffer = layout.pack({"W": np.full(4096, 3, np.float32)})
    second = split(layout, 2)[1]
    second.layout.views(second.of(buffer))["W[2048:4096]"][:] = 7
    assert layout.views(buffer)["W"].tolist() == [3.0] * 2048 + [7.0] * 2048


def test_the_same_cut_is_made_everywhere() -> None:
    layout = WeightLayout([TensorSpec("W", (999, 33), "float32"), TensorSpec("b", (99,), "float64")])
    ours, theirs = split(layout, 3), split(pickle.loads(pickle.dumps(layout)), 3)
    assert [(s.start, s.stop, s.layout.fingerprint) for s in ours] == [
        (s.start, s.stop, s.layout.fingerprint) for s in theirs
    ]


def test_the_examples_come_out_as_they_say() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
