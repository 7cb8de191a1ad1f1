"""The decoded rows of a partition, kept for later epochs: in memory, or in files that are mapped."""

from __future__ import annotations

import contextlib
import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import FeedError, StagingError


class EpochCache:
    """Collects blocks of columns and gives them back as whole columns.

    Up to `memory_bytes` the blocks stay in memory. Past it they go to one file a column under `directory`, unlinked as
    soon as it is opened (so nothing is left behind, however the process ends) and mapped when it is read. Columns of
    strings stay in memory.

    Raises:
        StagingError: `directory` cannot be written to; names ``spark.tmp.dir``.
        FeedError: blocks whose rows differ in shape.
    """

    def __init__(self, memory_bytes: int, directory: str) -> None:
        self._memory_bytes = memory_bytes
        self._directory = directory
        self._blocks: list[tuple[NDArray[Any], ...]] = []
        self._num_bytes = 0
        self._num_rows = 0
        self._num_written = 0
        self._files: list[IO[bytes] | None] | None = None
        self._first: tuple[NDArray[Any], ...] | None = None

    def __enter__(self) -> EpochCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_spilled(self) -> bool:
        """Whether the rows are in files."""
        return self._files is not None

    def append(self, block: tuple[NDArray[Any], ...]) -> None:
        """Adds rows: one `[rows, ...]` array a column, which the caller leaves alone from now on."""
        if self._first is None:
            self._first = tuple(column[:0] for column in block)
        for column, first in zip(block, self._first, strict=True):
            if column.shape[1:] != first.shape[1:]:
                raise FeedError(
                    f"from row {self._num_rows} on, rows have shape {list(column.shape[1:])}, "
                    f"expected {list(first.shape[1:])} as in the rows before: make them equal"
                )
        self._num_rows += len(block[0])
        self._num_bytes += sum(column.nbytes for column in block)
        self._blocks.append(block)
        if self._num_bytes > self._memory_bytes or self.is_spilled:
            self._spill()

    def columns(self) -> tuple[NDArray[Any], ...]:
        """All rows, `[num_rows, ...]` a column; an empty tuple where there are none. Ends the collecting."""
        if self._first is None:
            return ()
        columns = tuple(self._column(position) for position in range(len(self._first)))
        self._blocks = [columns] if not self.is_spilled else []
        return columns

    def close(self) -> None:
        """Lets go of rows and files; columns given out stay valid."""
        self._blocks = []
        for file in self._files or []:
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk has been reported, and the rows are of no more use
                    file.close()

    def _column(self, position: int) -> NDArray[Any]:
        assert self._first is not None
        file = self._files[position] if self._files else None
        if file is None:
            blocks = [block[position] for block in self._blocks]
            return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        first = self._first[position]
        return np.memmap(file, first.dtype, "r", shape=(self._num_rows, *first.shape[1:]))

    def _spill(self) -> None:
        assert self._first is not None
        try:
            if self._files is None:
                self._files = [self._open(column) for column in self._first]
            for block in self._blocks[self._num_written :]:
                for column, file in zip(block, self._files, strict=True):
                    if file is not None:
                        file.write(_bytes_of(column))
            for file in self._files:
                if file is not None:
                    file.flush()
        except OSError as error:
            raise StagingError(
                f"cannot keep the decoded partition in {self._directory}: {error}; set spark.tmp.dir to a local "
                f"directory with room for it, or raise spark.tensorspark.cache.memory"
            ) from error
        # What is in a file is let go of: an empty view would hold on to the block it is cut from.
        self._blocks[self._num_written :] = [
            tuple(
                column if file is None else np.empty(0, column.dtype)
                for column, file in zip(block, self._files, strict=True)
            )
            for block in self._blocks[self._num_written :]
        ]
        self._num_written = len(self._blocks)

    def _open(self, column: NDArray[Any]) -> IO[bytes] | None:
        if column.dtype.kind == "O" or column.itemsize == 0 or 0 in column.shape[1:]:
            return None
        return tempfile.TemporaryFile(dir=self._directory, prefix="tensorspark-epoch-")


def _bytes_of(column: NDArray[Any]) -> memoryview:
    # Through uint8: bfloat16 and its like know no buffer protocol.
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data
