"""The decoded rows of a partition, kept for later epochs: in memory, or in files that are mapped."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import deque
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Columns, num_bytes
from tensorspark.errors import FeedError, StagingError

Selection = slice | NDArray[np.int64]
"""Rows by their place: a slice with a step of 1, or their indices in any order."""


class EpochCache:
    """Collects blocks of columns and gives their rows back, in any order.

    Up to `memory_bytes` the blocks stay in memory. Past it they go to files under `directory`, unlinked as soon as
    they are opened (so nothing is left behind, however the process ends) and mapped when they are read.

    Raises:
        StagingError: `directory` cannot be written to; names ``spark.tmp.dir``.
        FeedError: blocks whose rows differ in shape.

    Example:
        >>> with EpochCache(2**20, "/tmp") as cache:
        ...     cache.append((np.array([5, 6]), np.array([[0.5], [0.25]])))
        ...     cache.append((np.array([7]), np.array([[4.0]])))
        ...     cache.rows(slice(1, 3))[0].tolist(), cache.rows(np.array([2, 0]))[1].tolist()
        ([6, 7], [[4.0], [0.5]])
    """

    def __init__(self, memory_bytes: int, directory: str) -> None:
        self._memory_bytes = memory_bytes
        self._directory = directory
        self._blocks: list[Columns] = []
        self._num_bytes = 0
        self._num_rows = 0
        self._files: list[_ArrayFile | _StringFile] | None = None
        self._first: Columns | None = None
        self._columns: list[NDArray[Any] | _MappedStrings] | None = None

    def __enter__(self) -> EpochCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_spilled(self) -> bool:
        """Whether the rows are in files."""
        return self._files is not None

    @property
    def num_rows(self) -> int:
        return self._num_rows

    @property
    def row_bytes(self) -> float:
        """What a row takes in memory, on average; 0 where there are none."""
        return self._num_bytes / self._num_rows if self._num_rows else 0.0

    def append(self, block: Columns) -> None:
        """Adds rows: one `[rows, ...]` array a column, which the caller leaves alone from now on.

        An array of objects holds strings, text or bytes.
        """
        if not len(block[0]):
            return
        if self._first is None:
            # Not a view, which would hold on to the block's memory.
            self._first = tuple(np.empty((0, *column.shape[1:]), column.dtype) for column in block)
        for column, first in zip(block, self._first, strict=True):
            if column.dtype != first.dtype:
                raise ValueError(f"from row {self._num_rows} on, rows are {column.dtype}, expected {first.dtype}")
            if column.shape[1:] != first.shape[1:]:
                raise FeedError(
                    f"from row {self._num_rows} on, rows have shape {list(column.shape[1:])}, "
                    f"expected {list(first.shape[1:])} as in the rows before: make them equal"
                )
        self._num_rows += len(block[0])
        self._num_bytes += num_bytes(block)
        self._blocks.append(block)
        if self._num_bytes > self._memory_bytes or self.is_spilled:
            self._spill()

    def rows(self, selection: Selection) -> Columns:
        """The rows of `selection`, `[num_selected, ...]` a column; an empty tuple where none were added.

        Ends the collecting. A slice of numbers is a view, not to be written to; anything else is a copy.
        """
        if self._columns is None:
            self._columns = self._collect()
        if isinstance(selection, slice):
            return tuple(column[selection] for column in self._columns)
        return tuple(column.take(selection, axis=0) for column in self._columns)

    def close(self) -> None:
        """Lets go of rows and files; columns given out stay valid."""
        self._blocks = []
        self._columns = None
        for file in self._files or []:
            with contextlib.suppress(OSError):  # a full disk has been reported, and the rows are of no more use
                file.close()

    def _collect(self) -> list[NDArray[Any] | _MappedStrings]:
        if self._first is None:
            return []
        if self._files is not None:
            return [file.map(self._num_rows) for file in self._files]
        blocks, self._blocks = deque(self._blocks), []
        if len(blocks) == 1:
            return list(blocks[0])
        whole = [np.empty((self._num_rows, *first.shape[1:]), first.dtype) for first in self._first]
        start = 0
        while blocks:  # one after the other lets go of its memory, so that the rows are not there twice
            block = blocks.popleft()
            for column, rows in zip(whole, block, strict=True):
                column[start : start + len(rows)] = rows
            start += len(block[0])
        return [*whole]

    def _spill(self) -> None:
        assert self._first is not None
        try:
            if self._files is None:
                self._files = [
                    (_StringFile if first.dtype.kind == "O" else _ArrayFile)(first, self._directory)
                    for first in self._first
                ]
            for block in self._blocks:
                for column, file in zip(block, self._files, strict=True):
                    file.write(column)
        except OSError as error:
            raise StagingError(
                f"cannot keep the decoded partition in {self._directory}: {error}; set spark.tmp.dir to a local "
                f"directory with room for it, or raise spark.tensorspark.cache.memory"
            ) from error
        self._blocks.clear()


class _ArrayFile:
    """A column of numbers in a file, as its bytes."""

    def __init__(self, first: NDArray[Any], directory: str) -> None:
        self._shape = first.shape[1:]
        self._dtype = first.dtype
        self._file = _open(directory)

    def write(self, column: NDArray[Any]) -> None:
        # Through uint8: bfloat16 and its like know no buffer protocol. Rows without a byte cannot be viewed so.
        if column.nbytes:
            self._file.write(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)
            self._file.flush()

    def map(self, num_rows: int) -> NDArray[Any]:
        return _map(self._file, self._dtype, (num_rows, *self._shape))

    def close(self) -> None:
        self._file.close()


class _StringFile:
    """A column of strings in two files: what they say, one after the other, and where each of them ends."""

    def __init__(self, first: NDArray[Any], directory: str) -> None:
        self._shape = first.shape[1:]
        self._content = _open(directory)
        self._ends = _ArrayFile(np.empty(0, np.int64), directory)
        self._ends.write(np.zeros(1, np.int64))
        self._num_bytes = 0

    def write(self, column: NDArray[Any]) -> None:
        values = column.ravel().tolist()
        encoded = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in values]
        ends = self._num_bytes + np.cumsum([len(value) for value in encoded], dtype=np.int64)
        self._content.write(b"".join(encoded))
        self._content.flush()
        self._ends.write(ends << 1 | np.array([isinstance(value, str) for value in values], np.int64))
        self._num_bytes = int(ends[-1]) if len(ends) else self._num_bytes

    def map(self, num_rows: int) -> _MappedStrings:
        num_values = num_rows * math.prod(self._shape)
        content = _map(self._content, np.dtype(np.uint8), (self._num_bytes,))
        return _MappedStrings(content, self._ends.map(num_values + 1), (num_rows, *self._shape))

    def close(self) -> None:
        self._content.close()
        self._ends.close()


class _MappedStrings:
    """The rows of a `_StringFile`, read when they are asked for.

    Args:
        content: `[bytes] uint8`.
        ends: `[1 + num_values] int64`, the first 0: where each value ends, times 2, plus 1 where it is text.
        shape: of all rows, `[rows, ...]`.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        self._content = content.data
        self._ends = ends
        self._num_rows = shape[0]
        self._row_shape = shape[1:]
        self._width = math.prod(shape[1:])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(self._num_rows)
        codes = self._ends[start * self._width : stop * self._width + 1]
        return self._read(codes[:-1] >> 1, codes[1:]).reshape(stop - start, *self._row_shape)

    def take(self, rows: NDArray[np.int64], axis: int) -> NDArray[Any]:
        values = (rows[:, np.newaxis] * self._width + np.arange(self._width)).ravel()
        return self._read(self._ends[values] >> 1, self._ends[values + 1]).reshape(len(rows), *self._row_shape)

    def _read(self, begins: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[Any]:
        content = self._content
        strings = np.empty(len(begins), object)
        strings[:] = [
            str(content[begin : code >> 1], "utf-8", "surrogatepass") if code & 1 else bytes(content[begin : code >> 1])
            for begin, code in zip(begins.tolist(), codes.tolist(), strict=True)
        ]
        return strings


def _open(directory: str) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=directory, prefix="tensorspark-epoch-")


def _map(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The file as an array that cannot be written to; without a byte there is nothing to map."""
    if not math.prod(shape) * dtype.itemsize:
        return np.empty(shape, dtype)
    # As a plain array: every slice of a memmap costs several times one of an array.
    return np.asarray(np.memmap(file, dtype, "r", shape=shape))
