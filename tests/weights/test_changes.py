"""Patches: what changed between two buffers, written down and applied elsewhere."""

from __future__ import annotations

import doctest
import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import ProtocolError
from tensorspark.weights import changes
from tensorspark.weights.changes import Units
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.weights.patches import apply

BLOCK = 4096
# A table whose rows (12 bytes) are no multiple of a word, with a gap of 52 bytes behind it, and a vector of two blocks
# and a bit that begins after the gap.
ODD = WeightLayout([TensorSpec("table", (257, 3), "float32"), TensorSpec("bias", (2100,), "float32")])
TABLE_BYTES, GAP_BYTES, BIAS_AT = 257 * 12, 52, 3136
# Sixteen blocks.
FLAT = WeightLayout([TensorSpec("W", (16 * 1024,), "float32")])
BY_ROW = pytest.mark.parametrize("by_row", [True, False], ids=["rows", "blocks"])


def numbers(layout: WeightLayout, seed: int = 7) -> Buffer:
    """Random non-zero values in every tensor, zeros in the gaps."""
    rng = np.random.default_rng(seed)
    return layout.pack(
        {
            spec.name: rng.integers(1, 100, spec.shape).astype(spec.dtype)  # exact in every dtype used here
            for spec in layout.specs
        }
    )


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def as_buffer(data: bytes) -> Buffer:
    return np.frombuffer(data, np.uint8)


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    """Tensors of several dtypes, tables (64 rows and more) and others, some of them empty."""
    shapes = st.one_of(
        st.tuples(st.integers(64, 600), st.integers(1, 40)),
        st.tuples(st.integers(64, 100), st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(0, 5000)),
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5)),
        st.just(()),
    )
    dtypes = st.sampled_from(["float32", "float64", "float16", "int64", "uint8"])
    specs = draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=5))
    layout = WeightLayout([TensorSpec(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(specs)])
    if not layout.num_bytes:
        return WeightLayout([*layout.specs, TensorSpec("last", (300, 2), "float32")])
    return layout


@dataclass(frozen=True)
class Place:
    """A unit as the module's docstring tells it, found without the module's own arithmetic."""

    start: int
    stop: int


def units_of(layout: WeightLayout, by_row: bool) -> tuple[list[Place], int]:
    """All units in a buffer's order, and the number of groups."""
    tables = sorted(layout.offsets[s.name] for s in layout.specs if by_row and s.is_table)
    by_offset = {layout.offsets[s.name]: s for s in layout.specs if s.num_bytes}
    places: list[Place] = []
    num_groups, at = 0, 0

    def cut(stop: int) -> None:
        nonlocal num_groups, at
        num_groups += (stop - at >= BLOCK) + ((stop - at) % BLOCK > 0)
        while at < stop:
            places.append(Place(at, min(at + BLOCK, stop)))
            at = places[-1].stop

    for start in tables:
        cut(start)
        spec = by_offset[start]
        row_bytes = spec.num_bytes // spec.shape[0]
        places += [Place(start + i * row_bytes, start + (i + 1) * row_bytes) for i in range(spec.shape[0])]
        num_groups += 1
        at = start + spec.num_bytes
    cut(layout.num_bytes)
    return places, num_groups


@given(layout=layouts(), by_row=st.booleans(), seed=st.integers(0, 2**16), data=st.data())
def test_a_patch_turns_the_old_buffer_into_the_new_one(
    layout: WeightLayout, by_row: bool, seed: int, data: st.DataObject
) -> None:
    places, num_groups = units_of(layout, by_row)
    units = Units(layout, by_row=by_row)
    assert units.num_units == len(places)
    old = numbers(layout, seed)
    new = old.copy()
    changed = data.draw(st.sets(st.integers(0, len(places) - 1), max_size=6))
    for index in changed:
        new[data.draw(st.integers(places[index].start, places[index].stop - 1))] ^= 0x40
    flags = units.changed(old, new)
    if flags is None:  # small layouts only: of the sample, most may have been hit
        assert 64 * len(changed) > len(places)
        return
    assert set(np.flatnonzero(flags).tolist()) == changed
    patch = units.write(new, flags)
    num_bytes = 4 * num_groups + sum(4 + places[i].stop - places[i].start for i in changed)
    assert len(patch) == units.patch_bytes(flags) == num_bytes
    apply(units, patch, old)
    assert np.array_equal(old, new)


@BY_ROW
def test_a_patch_holds_units_that_did_not_change_where_it_is_told_to(by_row: bool) -> None:
    # A worker that is several versions behind gets what changed since, whether it has changed back or not.
    units = Units(ODD, by_row=by_row)
    new = numbers(ODD)
    chosen = np.zeros(units.num_units, np.bool_)
    chosen[0] = True
    patch = units.write(new, chosen)
    old = numbers(ODD, seed=8)
    apply(units, patch, old)
    changed = 12 if by_row else BLOCK
    assert np.array_equal(old[:changed], new[:changed])
    assert np.array_equal(old[changed:], numbers(ODD, seed=8)[changed:])


def test_the_bytes_are_those_of_the_docstring_by_rows() -> None:
    # Groups: 257 rows; from the gap on two blocks, from there the rest.
    new = numbers(ODD)
    rest_at = TABLE_BYTES + 2 * BLOCK
    expected = (
        words(2, 1, 1)
        + words(3, 256)
        + words(1)
        + words(0)
        + new[36:48].tobytes()
        + new[256 * 12 : 257 * 12].tobytes()
        + new[TABLE_BYTES + BLOCK : rest_at].tobytes()
        + new[rest_at:].tobytes()
    )
    units = Units(ODD, by_row=True)
    assert units.num_units == 257 + 2 + 1
    old = new.copy()
    for at in (36, 257 * 12 - 1, TABLE_BYTES + BLOCK, ODD.num_bytes - 1):
        old[at] ^= 0xFF
    flags = units.changed(old, new)
    assert flags is not None
    assert np.flatnonzero(flags).tolist() == [3, 256, 258, 259]
    patch = units.write(new, flags)
    assert np.array_equal(patch, as_buffer(expected))
    apply(units, as_buffer(expected), old)
    assert np.array_equal(old, new)


def test_the_bytes_are_those_of_the_docstring_by_blocks() -> None:
    new = numbers(FLAT)
    flags = np.zeros(16, np.bool_)
    flags[[2, 5]] = True
    patch = Units(FLAT, by_row=False).write(new, flags)
    expected = words(2) + words(2, 5) + new[2 * BLOCK : 3 * BLOCK].tobytes() + new[5 * BLOCK : 6 * BLOCK].tobytes()
    assert np.array_equal(patch, as_buffer(expected))


def test_nothing_changed_is_a_patch_of_counts_alone() -> None:
    units = Units(FLAT, by_row=False)
    weights = numbers(FLAT)
    flags = units.changed(weights, weights.copy())
    assert flags is not None
    patch = units.write(weights, flags)
    assert patch.tobytes() == words(0)
    apply(units, patch, weights)
    assert np.array_equal(weights, numbers(FLAT))


@BY_ROW
def test_where_all_changed_there_are_no_flags(by_row: bool) -> None:
    assert Units(ODD, by_row=by_row).changed(numbers(ODD), ~numbers(ODD)) is None


@BY_ROW
def test_of_all_units_a_patch_is_the_buffer_and_an_index_each(by_row: bool) -> None:
    units = Units(ODD, by_row=by_row)
    flags = np.ones(units.num_units, np.bool_)
    patch = units.write(numbers(ODD), flags)
    num_groups = 3 if by_row else 2
    assert len(patch) == units.patch_bytes(flags) == 4 * num_groups + 4 * units.num_units + ODD.num_bytes
    old = numbers(ODD, seed=8)
    apply(units, patch, old)
    assert np.array_equal(old, numbers(ODD))


@BY_ROW
def test_the_gap_behind_a_table_stays_zero(by_row: bool) -> None:
    old, new = numbers(ODD), numbers(ODD)
    ODD.views(new)["table"][256] += 1
    ODD.views(new)["bias"][0] += 1
    units = Units(ODD, by_row=by_row)
    flags = units.changed(old, new)
    assert flags is not None
    patch = units.write(new, flags)
    target = old.copy()
    apply(units, patch, target)
    assert np.array_equal(target, new)
    assert not target[TABLE_BYTES:BIAS_AT].any()


def test_a_changed_row_costs_that_row_and_not_its_block() -> None:
    layout = WeightLayout([TensorSpec("embedding", (10_000, 16), "float32")])
    old, new = numbers(layout), numbers(layout)
    layout.views(new)["embedding"][[5, 700, 9_999]] += 1
    sizes = []
    for by_row in (True, False):
        units = Units(layout, by_row=by_row)
        flags = units.changed(old, new)
        assert flags is not None
        patch = units.write(new, flags)
        sizes.append(len(patch))
    # 640,000 bytes are 156 blocks and a rest of 1,024, in which the last row is.
    assert sizes == [4 + 3 * (4 + 64), 8 + 2 * (4 + BLOCK) + 4 + 1024]


# Two rows (1 and 4) and the bias's second block of ODD, by rows.
GOOD = words(2, 1, 0) + words(1, 4) + words(1) + bytes(24) + bytes(BLOCK)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "at least 12 bytes, got 0"),
        (GOOD[:11], "at least 12 bytes, got 11"),
        (GOOD[:-1], f"{len(GOOD)} bytes, got {len(GOOD) - 1}"),
        (GOOD + b"\0", f"{len(GOOD)} bytes, got {len(GOOD) + 1}"),
        (words(3, 1, 0) + GOOD[12:], "bytes, got"),
        (words(2**32 - 1, 2**32 - 1, 2**32 - 1) + GOOD[12:], "bytes, got"),
        (words(2, 1, 0) + words(4, 1) + GOOD[20:], "ascending indices"),
        (words(2, 1, 0) + words(4, 4) + GOOD[20:], "ascending indices"),
        (words(2, 1, 0) + words(1, 257) + GOOD[20:], "indices under 257"),
        (words(2, 1, 0) + words(2**32 - 1, 4) + GOOD[20:], "ascending indices"),
        (words(2, 1, 0) + words(1, 4) + words(2) + GOOD[24:], "indices under 2 "),
    ],
)
def test_a_damaged_patch_is_refused_and_leaves_the_buffer_as_it_was(damaged: bytes, message: str) -> None:
    weights = numbers(ODD)
    with pytest.raises(ProtocolError, match=message):
        apply(Units(ODD, by_row=True), as_buffer(damaged), weights)
    assert np.array_equal(weights, numbers(ODD))


def test_the_patch_that_the_damaged_ones_are_made_of_is_whole() -> None:
    weights = numbers(ODD)
    apply(Units(ODD, by_row=True), as_buffer(GOOD), weights)
    expected = numbers(ODD)
    expected[12:24] = expected[48:60] = 0
    expected[TABLE_BYTES + BLOCK : TABLE_BYTES + 2 * BLOCK] = 0
    assert np.array_equal(weights, expected)


def test_a_patch_that_is_received_is_never_whole_in_memory() -> None:
    layout = WeightLayout([TensorSpec("table", (40_000, 16), "float32"), TensorSpec("W", (100_000,), "float32")])
    old, new = numbers(layout), numbers(layout, seed=8)
    units = Units(layout, by_row=True)
    flags = np.arange(units.num_units) % 3 > 0
    patch = units.write(new, flags)
    parts: list[int] = []

    def fill(part: Buffer) -> None:
        at = sum(parts)
        parts.append(len(part))
        part[:] = patch[at : at + len(part)]

    by_pieces, at_once = old.copy(), old.copy()
    units.receive(fill, len(patch), by_pieces)
    apply(units, patch, at_once)
    assert sum(parts) == len(patch) > 6 * 2**18
    assert max(parts) <= 2**18
    assert np.array_equal(by_pieces, at_once)
    changed = np.flatnonzero(flags[:40_000])
    assert np.array_equal(layout.views(by_pieces)["table"][changed], layout.views(new)["table"][changed])
    assert np.array_equal(layout.views(by_pieces)["table"][::3], layout.views(old)["table"][::3])


@given(position=st.integers(0, 23), bit=st.integers(0, 7), num_cut=st.integers(0, 30))
def test_whatever_hits_a_patchs_head_it_is_applied_whole_or_not_at_all(position: int, bit: int, num_cut: int) -> None:
    damaged = bytearray(GOOD[: len(GOOD) - num_cut])
    damaged[position] ^= 1 << bit
    weights, before = numbers(ODD), numbers(ODD)
    try:
        apply(Units(ODD, by_row=True), as_buffer(bytes(damaged)), weights)
    except ProtocolError:
        assert np.array_equal(weights, before)
    else:  # other indices, then: as many bytes as it should write
        assert not num_cut
        assert 0 < np.count_nonzero(weights != before) <= 24 + BLOCK


@pytest.mark.parametrize(
    ("shape", "num_units"),
    [
        ((64, 100), 64),
        ((300, 2, 2), 300),
        ((64, 65_536), 64),
        ((63, 100), 7),  # by blocks, as the others that follow: too few rows
        ((64, 65_537), 4097),  # too long rows: of 16,777,472 bytes
        ((5000,), 5),
    ],
)
def test_tables_of_many_rows_are_told_apart_by_row(shape: tuple[int, ...], num_units: int) -> None:
    assert Units(WeightLayout([TensorSpec("t", shape, "float32")]), by_row=True).num_units == num_units


def test_the_examples_come_out_as_they_say() -> None:
    result = doctest.testmod(changes)
    assert result.attempted > 0
    assert result.failed == 0
