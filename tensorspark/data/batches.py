"""From a partition's rows to batches: columnar decoding with checks, seeded shuffles, every row trained.

A feed has one column per fed tensor. Rows are decoded once, in blocks, to one array a column; `PartitionFeed` cuts
them into batches, epoch after epoch, the last one of an epoch smaller where the rows do not divide. Shuffles depend on
(seed, epoch, partition) alone, so a task that takes over a partition finds the same batches and skips those trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedError

Columns = tuple[NDArray[Any], ...]
"""One array per fed tensor, `[rows, ...]` each."""

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Column:
    """What one fed tensor expects of a row: `shape` without the batch dimension (None: any size, or any shape)."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else f"shape {_shape_text(self.shape)}"
        return f"{self.dtype} of {shape}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True)
class Batch:
    """A batch and its place: `index` in `epoch`, both from 0; `num_batches` of the epoch, None if not known yet."""

    epoch: int
    index: int
    columns: Columns
    num_batches: int | None
    is_last_of_epoch: bool

    @property
    def num_rows(self) -> int:
        return len(self.columns[0])


class PartitionFeed:
    """The batches of one partition, over all epochs.

    The rows are read to their end, also by `drain`: Spark keeps a Python worker process for the next task only then.

    Args:
        rows: tuples or lists with one value a column; with a single column, also the bare value.
        columns: what is fed, in the order of a row's values.
        partition: index of the partition, for the shuffle and for messages.
        cache: holds the decoded rows for later epochs; the caller closes it.

    Raises:
        FeedError: (while iterating) a row that does not fit; says which and what was expected.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        columns: Sequence[Column],
        *,
        partition: int,
        batch_size: int,
        num_epochs: int,
        shuffle: bool,
        seed: int,
        cache: EpochCache,
    ) -> None:
        self._rows = iter(rows)
        self._columns = tuple(columns)
        self._partition = partition
        self._batch_size = batch_size
        self._num_epochs = num_epochs
        self._shuffle = shuffle
        self._seed = seed
        self._cache = cache

    def batches(self, epoch: int = 0, index: int = 0) -> Iterator[Batch]:
        """Batches from batch `index` of epoch `epoch` on, to the end of the last epoch."""
        if self._shuffle or epoch > 0:
            for block in self._decode(_BLOCK_ROWS):
                self._keep(block)
        else:
            yield from self._stream(index)
            epoch, index = 1, 0
        if epoch >= self._num_epochs:
            self.drain()
            return
        columns = self._cache.columns()
        if not columns:
            self._require_reached(index, 0)
        while columns and epoch < self._num_epochs:
            yield from self._cut(columns, epoch, index)
            epoch, index = epoch + 1, 0

    def drain(self) -> None:
        """Reads what is left of the rows and forgets it."""
        for _ in self._rows:
            pass

    def _stream(self, start: int) -> Iterator[Batch]:
        """The first epoch in the rows' own order, trained while they arrive."""
        blocks = self._decode(self._batch_size)
        block = next(blocks, None)
        index = 0
        while block is not None:
            if self._num_epochs > 1:
                self._keep(block)
            following = next(blocks, None)
            num_batches = index + 1 if following is None else None
            if index >= start:
                yield Batch(0, index, block, num_batches, following is None)
            block, index = following, index + 1
        self._require_reached(start, index)

    def _require_reached(self, start: int, num_batches: int) -> None:
        """A batch that training is to go on at was there before: where it is gone, these are other rows."""
        if num_batches < start:
            raise FeedError(
                f"partition {self._partition}: training goes on at batch {start} of {self._batch_size} rows, but the "
                f"feed gave {num_batches} batches: a retried or restored run needs the same rows in the same order "
                f"(sort or cache() what comes out of a shuffle)"
            )

    def _keep(self, block: Columns) -> None:
        try:
            self._cache.append(block)
        except FeedError as error:
            raise FeedError(f"partition {self._partition}: {error}") from error

    def _cut(self, columns: Columns, epoch: int, start: int) -> Iterator[Batch]:
        num_rows, size = len(columns[0]), self._batch_size
        num_batches = -(-num_rows // size)
        self._require_reached(start, num_batches)
        order = permutation(self._seed, epoch, self._partition, num_rows) if self._shuffle else None
        for index in range(start, num_batches):
            rows = slice(index * size, min((index + 1) * size, num_rows))
            cut = tuple(column[rows] if order is None else column.take(order[rows], axis=0) for column in columns)
            yield Batch(epoch, index, cut, num_batches, index + 1 == num_batches)

    def _decode(self, block_rows: int) -> Iterator[Columns]:
        first_row = 0
        while rows := list(islice(self._rows, block_rows)):
            yield self._decode_block(rows, first_row)
            first_row += len(rows)

    def _decode_block(self, rows: list[Any], first_row: int) -> Columns:
        values = [self._split(row, first_row + offset) for offset, row in enumerate(rows)]
        return tuple(
            self._stack(column, [row[position] for row in values], first_row)
            for position, column in enumerate(self._columns)
        )

    def _split(self, row: Any, index: int) -> Sequence[Any]:
        if isinstance(row, list) and self._is_bare_list(row):
            return (row,)
        if isinstance(row, tuple | list) and len(row) == len(self._columns):
            return row
        if len(self._columns) == 1 and not isinstance(row, tuple):
            return (row,)
        got = f"a {type(row).__name__}" + (f" of {len(row)}" if hasattr(row, "__len__") else "")
        names = ", ".join(column.name for column in self._columns)
        raise FeedError(
            f"{self._where(index)}: expected a tuple of {len(self._columns)} values ({names}), got {got}; "
            f"make the feed's rows as long as feed_name_list"
        )

    def _is_bare_list(self, row: list[Any]) -> bool:
        """Whether `row` is the value of a single column of shape [1], and not a row that holds it."""
        return len(self._columns) == 1 and self._columns[0].shape == (1,) and np.ndim(row) == 1

    def _stack(self, column: Column, values: list[Any], first_row: int) -> NDArray[Any]:
        try:
            stacked = _to_array(values, column.dtype)
        except (ValueError, TypeError):
            stacked = None
        if stacked is not None and column.fits(stacked.shape[1:]):
            return stacked
        for offset, value in enumerate(values):
            self._check_value(column, value, first_row + offset)
        raise FeedError(
            f"{self._where(first_row)} and those after it: the rows' values for {column.name} differ in shape"
        )

    def _check_value(self, column: Column, value: Any, index: int) -> None:
        try:
            shape = _to_array([value], column.dtype).shape[1:]
        except (ValueError, TypeError) as error:
            raise FeedError(f"{self._where(index)}: expected {column} for {column.name}: {error}") from error
        if not column.fits(shape):
            raise FeedError(
                f"{self._where(index)}: expected {column} for {column.name}, got shape {_shape_text(shape)}"
            )

    def _where(self, index: int) -> str:
        return f"partition {self._partition}, row {index}"


def permutation(seed: int, epoch: int, partition: int, num_rows: int) -> NDArray[np.int64]:
    """The order of an epoch's rows: `[num_rows] int64`, the same for the same arguments, on every machine."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, partition))))
    return generator.permutation(num_rows)


def _to_array(values: list[Any], dtype: str) -> NDArray[Any]:
    target = np.dtype(dtype)
    if target.kind == "O":
        return _to_strings(values)
    array = np.stack(values) if isinstance(values[0], np.ndarray) else np.asarray(values)
    both_integers = array.dtype.kind in "iu" and target.kind in "iu"
    if not both_integers and not np.can_cast(array.dtype, target, "same_kind"):
        raise TypeError(f"got {array.dtype}, which does not convert to {dtype} without loss")
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(target, copy=False)
    if both_integers and array.size:
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"got a number out of {dtype}'s range [{limits.min}, {limits.max}]")
    if (
        array.dtype.kind == "f"
        and target.itemsize < array.itemsize
        and not (np.isfinite(converted) == np.isfinite(array)).all()
    ):
        raise ValueError(f"got a number that is too large for {dtype}")
    return converted


def _to_strings(values: list[Any]) -> NDArray[Any]:
    """`values` (strings, or equally nested ones) as an object array that holds the strings themselves."""
    array = np.array([value.tolist() if isinstance(value, np.ndarray) else value for value in values], object)
    for value in array.flat:
        if not isinstance(value, str | bytes):
            raise TypeError(f"got a {type(value).__name__}, not a string")
    return array


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
