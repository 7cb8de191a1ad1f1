"""The cache of decoded rows: the same columns from memory and from files, and nothing left behind."""

from __future__ import annotations

import gc
import os
import tempfile
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedError, StagingError

Block = tuple[NDArray[Any], ...]

ALL = slice(None)


def _blocks(num_blocks: int = 4, rows: int = 25, strings: bool = False) -> Iterator[Block]:
    generator = np.random.default_rng(8)
    for index in range(num_blocks):
        block: Block = (
            generator.normal(size=(rows, 3, 2)).astype(np.float32),
            generator.integers(-9, 9, rows),
            generator.random((rows, 4)) < 0.5,
        )
        if strings:
            block += (np.array([f"block {index} row {row}" for row in range(rows)], object),)
        yield block


def _filled(cache: EpochCache, blocks: list[Block]) -> Block:
    for block in blocks:
        cache.append(block)
    return cache.rows(ALL)


def _expected(blocks: list[Block]) -> list[NDArray[Any]]:
    return [np.array([row for column in columns for row in column]) for columns in zip(*blocks, strict=True)]


@pytest.mark.parametrize("strings", [False, True], ids=["numbers", "with strings"])
@pytest.mark.parametrize("memory_bytes", [0, 1, 1500, 10**9])
def test_columns_come_back_the_same_from_memory_and_from_files(
    tmp_path: Path, memory_bytes: int, strings: bool
) -> None:
    blocks = list(_blocks(strings=strings))
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        columns = _filled(cache, blocks)
        assert cache.is_spilled is (memory_bytes < 10**9)
        for got, want in zip(columns, _expected(blocks), strict=True):
            np.testing.assert_array_equal(got, want)
        assert [column.dtype for column in columns] == [column.dtype for column in blocks[0]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 9), max_size=8), memory_bytes=st.integers(0, 400))
def test_any_limit_and_any_block_sizes_keep_all_rows_in_order(
    tmp_path: Path, sizes: list[int], memory_bytes: int
) -> None:
    values = np.arange(sum(sizes), dtype=np.int32)
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            rows = values[end - size : end]
            cache.append((rows, np.stack([rows, -rows], axis=1).astype(np.float64)))
        columns = cache.rows(ALL)
        assert cache.is_spilled is (values.nbytes * 5 > memory_bytes)
        if not sizes:
            assert columns == ()
            return
        np.testing.assert_array_equal(columns[0], values)
        np.testing.assert_array_equal(columns[1], np.stack([values, -values], axis=1))


def test_just_the_limit_stays_in_memory(tmp_path: Path) -> None:
    with EpochCache(80, str(tmp_path)) as cache:
        cache.append((np.arange(5.0),))
        cache.append((np.arange(5.0),))
        assert not cache.is_spilled
        cache.append((np.arange(1.0),))
        assert cache.is_spilled
        assert cache.rows(ALL)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_files_have_no_name_from_the_start(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        for block in _blocks():
            cache.append(block)
            assert cache.is_spilled
            assert list(tmp_path.iterdir()) == []
        assert cache.rows(ALL)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_files_are_in_the_given_directory(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        cache.append((np.arange(5.0),))
        links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if link.is_symlink()]
        assert sum(target.startswith(str(tmp_path)) for target in targets) == 1


def test_closing_lets_go_of_the_files_while_columns_stay_valid(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cache = EpochCache(0, str(tmp_path))
    cache.append((np.arange(5000.0),))
    (column,) = cache.rows(ALL)
    cache.close()
    cache.close()
    assert column.sum() == 5000 * 4999 / 2
    del column
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_mapped_columns_cannot_be_written_to(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        cache.append((np.arange(5.0),))
        with pytest.raises(ValueError, match="read-only"):
            cache.rows(ALL)[0][0] = 7.0


@pytest.mark.parametrize("strings", [False, True], ids=["numbers", "with strings"])
def test_memory_does_not_grow_with_a_large_partition(tmp_path: Path, strings: bool) -> None:
    """Every numeric block that went to the file is freed; the first may stay, for its shape and dtype."""
    with EpochCache(100_000, str(tmp_path)) as cache:
        alive = []
        for index in range(50):
            column = np.full((100, 50), float(index))
            alive.append(weakref.ref(column))
            names: Block = (np.array(["row"] * 100, object),) if strings else ()
            cache.append((column, *names))
            del column, names
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        assert cache.rows(ALL)[0][:, 0].tolist() == [float(row // 100) for row in range(5000)]


@pytest.mark.parametrize(
    "column",
    [
        np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16),
        np.array([1.5, -2.0, 3.0], np.float16),
        np.array([1 + 2j, 3j], np.complex64),
        np.array([2**63, 5], np.uint64),
        np.arange(24).reshape(4, 3, 2).transpose(0, 2, 1),
        np.zeros((3, 0), np.float32),
        np.array([["a", "b"], ["c", "d"]], object),
        np.array(["abc", "d"]),
    ],
    ids=["bfloat16", "float16", "complex64", "uint64", "strided", "no width", "strings", "fixed width strings"],
)
def test_columns_of_every_kind_survive_the_file(tmp_path: Path, column: NDArray[Any]) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        (got,) = _filled(cache, [(column,), (column[:1],)])
        assert got.dtype == column.dtype
        assert got.tolist() == column.tolist() + column[:1].tolist()


def test_without_rows_there_are_no_columns(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        assert cache.rows(ALL) == ()
        assert not cache.is_spilled


@pytest.mark.parametrize("memory_bytes", [0, 10**6])
def test_rows_of_another_shape_are_refused_with_the_row_and_both_shapes(tmp_path: Path, memory_bytes: int) -> None:
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        cache.append((np.ones((7, 3)), np.ones(7)))
        with pytest.raises(FeedError, match=r"row 7.*\[4\].*\[3\]"):
            cache.append((np.ones((2, 4)), np.ones(2)))


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_directory_that_cannot_be_written_to_is_named_with_its_setting(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "spill"
    if kind == "a file":
        directory.write_text("not a directory")
    with (
        EpochCache(0, str(directory)) as cache,
        pytest.raises(StagingError, match=r"spark\.tmp\.dir") as caught,
    ):
        cache.append((np.ones(3),))
    assert str(directory) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
@pytest.mark.parametrize("num_rows", [10, 1_000_000], ids=["less than a file's buffer", "more"])
def test_a_full_disk_is_named_with_the_setting_also_when_the_cache_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    def full_disk(*args: Any, buffering: int = -1, **kwargs: Any) -> Any:
        return open("/dev/full", "r+b" if buffering == 0 else "wb", buffering)

    monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)

    def keep() -> None:
        with EpochCache(0, str(tmp_path)) as cache:
            cache.append((np.ones(num_rows),))
            cache.rows(ALL)

    with pytest.raises(StagingError, match=r"spark\.tmp\.dir"):
        keep()


# Rows in any order


WORDS = np.array([["a", ""], ["é\ud800", "b" * 300], [b"\x00\xff", "c"], ["", b""], ["line\nend", "z"]], object)


@pytest.mark.parametrize("memory_bytes", [0, 10**6], ids=["from files", "from memory"])
@pytest.mark.parametrize("column", [np.arange(10.0).reshape(5, 2), WORDS, WORDS[:, 0]], ids=["numbers", "2", "strings"])
@pytest.mark.parametrize(
    "selection",
    [slice(1, 4), slice(None), slice(3, 99), slice(2, 2), np.array([4, 0, 0, 2]), np.array([], np.int64)],
    ids=["slice", "all", "past the end", "none", "indices", "no indices"],
)
def test_selected_rows_come_back_as_from_an_array(
    tmp_path: Path, memory_bytes: int, column: NDArray[Any], selection: Any
) -> None:
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        for start in (0, 2, 4):
            cache.append((column[start : start + 2],))
        assert cache.num_rows == 5
        (got,) = cache.rows(selection)
        expected = column[selection]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.tolist() == expected.tolist()
        assert [type(value) for value in got.flat] == [type(value) for value in expected.flat]


@pytest.mark.parametrize("shape", [(3, 0), (3, 0, 2)], ids=str)
def test_strings_without_width_survive_the_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        cache.append((np.empty(shape, object), np.arange(3)))
        assert cache.is_spilled
        assert cache.rows(slice(1, 3))[0].shape == (2, *shape[1:])
        assert cache.rows(np.array([2]))[0].shape == (1, *shape[1:])


@given(
    blocks=st.lists(st.lists(st.text() | st.binary(), min_size=1, max_size=5), min_size=1, max_size=6), data=st.data()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_strings_survive_the_file(tmp_path: Path, blocks: list[list[str | bytes]], data: Any) -> None:
    values = [value for block in blocks for value in block]
    order = np.array(data.draw(st.permutations(range(len(values)))))
    with EpochCache(0, str(tmp_path)) as cache:
        for block in blocks:
            column = np.empty(len(block), object)
            column[:] = block
            cache.append((column, np.arange(len(block))))
        assert cache.rows(slice(None))[0].tolist() == values
        assert cache.rows(order)[0].tolist() == [values[index] for index in order]


def test_long_strings_count_towards_the_limit(tmp_path: Path) -> None:
    with EpochCache(100_000, str(tmp_path)) as cache:
        cache.append((np.array(["x" * 40_000], object),))
        assert not cache.is_spilled
        cache.append((np.array(["x" * 80_000], object),))
        assert cache.is_spilled
        assert cache.row_bytes == pytest.approx(60_000, rel=0.01)


def test_strings_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        tracemalloc.start()
        for index in range(50):
            cache.append((np.array([f"{index} {row}" * 20 for row in range(1000)], object),))
        cache.rows(slice(5000, 5010))
        num_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cache.rows(np.array([7003]))[0].tolist() == ["7 3" * 20]
    assert num_bytes < 100_000  # of more than 5 MB


def test_blocks_without_rows_are_left_out(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        cache.append((np.empty((0, 3)),))
        assert (cache.num_rows, cache.row_bytes, cache.is_spilled) == (0, 0.0, False)
        cache.append((np.ones((1, 2)),))
        cache.append((np.empty((0, 3)),))
        assert cache.rows(ALL)[0].tolist() == [[1.0, 1.0]]


def test_a_column_that_changes_its_dtype_is_refused(tmp_path: Path) -> None:
    with EpochCache(0, str(tmp_path)) as cache:
        cache.append((np.ones(3, np.float32),))
        with pytest.raises(ValueError, match=r"from row 3 on, rows are float64, expected float32"):
            cache.append((np.ones(3),))


def test_blocks_in_memory_are_let_go_of_when_they_are_joined() -> None:
    with EpochCache(10**9, "/nonexistent") as cache:
        tracemalloc.start()
        for index in range(50):
            cache.append((np.full((100, 50), float(index)),))
        (column,) = cache.rows(ALL)
        num_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert column[:, 3].tolist() == [float(row // 100) for row in range(5000)]
    assert num_bytes < 1.1 * column.nbytes
