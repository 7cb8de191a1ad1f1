"""From a partition's rows to stretches of batches: seeded shuffles, every row trained, held-out rows apart.

A decoder turns rows into blocks of columns; `PartitionFeed` cuts them into batches, epoch after epoch, the last one of
an epoch smaller where the rows do not divide. Shuffles depend on (seed, epoch, partition) alone, so a task that takes
over a partition finds the same batches and skips those trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Columns, num_bytes, permutation
from tensorspark.data.decoders import Decoder
from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedError

MAX_STRETCH_BYTES = 2**25


@dataclass(frozen=True)
class Stretch:
    """Consecutive batches of one epoch.

    All batches have `batch_size` rows, but a stretch may be one smaller batch: the last of its epoch.

    Attributes:
        epoch, index: of the first batch, both from 0.
        columns: the batches' rows, one after the other: `[num_rows, ...]` each, not to be written to.
        epoch_batches: batches of the whole epoch; None while that is not known.
    """

    epoch: int
    index: int
    num_batches: int
    batch_size: int
    columns: Columns
    epoch_batches: int | None
    is_last_of_epoch: bool

    @property
    def num_rows(self) -> int:
        return len(self.columns[0])


class PartitionFeed:
    """The batches of one partition, over all epochs, and its held-out rows. Not thread-safe.

    Rows after a `VALIDATION_MARKER` are held out; so is row i where floor((i + 1) * split) > floor(i * split).
    The rows are read to their end, also by `drain`: Spark keeps a Python worker process for the next task only then.

    Args:
        rows: what `decoder` reads.
        partition: index of the partition, for the shuffle and for messages.
        cache: holds the decoded rows for later epochs; the caller closes it.
        validation_cache: the same for held-out rows. None: they are forgotten.
        validation_split: the part of the rows that is held out, from 0 to below 1.
        max_bytes: a stretch holds no more, unless a batch does.

    Raises:
        FeedError: (from all methods but `seek` and `drain`) rows that do not fit; says which and what was expected.
        StagingError: (the same) rows that no longer fit into memory and cannot be written to a file.

    Example:
        >>> from tensorspark.data.columns import Column
        >>> from tensorspark.data.decoders import RowDecoder
        >>> decoder = RowDecoder((Column("x", (), "float32"),))
        >>> with EpochCache(2**20, "/tmp") as cache:
        ...     feed = PartitionFeed([1, 2, 3], decoder, partition=0, batch_size=2, num_epochs=1, shuffle=False,
        ...                          seed=0, cache=cache)
        ...     while stretch := feed.take(4):
        ...         stretch.columns[0].tolist()
        [1.0, 2.0]
        [3.0]
    """

    def __init__(
        self,
        rows: Iterable[Any],
        decoder: Decoder,
        *,
        partition: int,
        batch_size: int,
        num_epochs: int,
        shuffle: bool,
        seed: int,
        cache: EpochCache,
        validation_cache: EpochCache | None = None,
        validation_split: float = 0.0,
        max_bytes: int = MAX_STRETCH_BYTES,
    ) -> None:
        if batch_size < 1 or not 0 <= validation_split < 1:
            raise ValueError(
                f"expected a batch_size of 1 or more and a validation_split from 0 to below 1, got {batch_size} and "
                f"{validation_split}"
            )
        self._rows = iter(rows)
        self._columns = decoder.columns
        self._partition = partition
        self._batch_size = batch_size
        self._num_epochs = num_epochs
        self._shuffle = shuffle
        self._seed = seed
        self._cache = cache
        self._validation_cache = validation_cache
        self._max_bytes = max_bytes
        self._epoch = self._batch = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._blocks = decoder.blocks(self._rows, partition)
        self._reader: _Reader | None = None
        self._split = validation_split
        self._waiting = _Waiting()

    def seek(self, epoch: int, batch: int) -> None:
        """Begins at batch `batch` of epoch `epoch`, both from 0. To be called before all else."""
        if self._reader is not None:
            raise ValueError("seek comes before the first take")
        self._epoch, self._batch = epoch, batch

    def take(self, max_batches: int) -> Stretch | None:
        """The next batches, as many as there are up to `max_batches`, an epoch's end and a limit in bytes (which a
        single batch may exceed). None after the last epoch, or where there are no rows."""
        if max_batches < 1:
            raise ValueError(f"max_batches must be 1 or more, got {max_batches}")
        reader = self._begin()
        while self._epoch < self._num_epochs:
            stretch = self._next_streamed(max_batches) if self._is_streaming else self._next_kept(max_batches)
            if stretch is None or stretch.is_last_of_epoch:
                self._epoch, self._batch = self._epoch + 1, 0
            else:
                self._batch += stretch.num_batches
            if stretch is not None:
                return stretch
        reader.read_all()
        self.drain()
        return None

    def validation(self) -> Iterator[Columns]:
        """The held-out rows in blocks, once an epoch, when the first has been taken."""
        reader = self._begin()
        if self._is_streaming and self._fill(1):
            raise ValueError("validation comes after the first epoch")
        reader.read_all()
        if (held_out := self._validation_cache) is None:
            return
        # Whole batches, so that the model meets few different batch sizes.
        num_rows = self._batch_size * self._batches_within(held_out.row_bytes)
        for start in range(0, held_out.num_rows, num_rows):
            yield held_out.rows(slice(start, start + num_rows))

    def drain(self) -> None:
        """Reads what is left of the rows and forgets it."""
        for _ in self._rows:
            pass

    @property
    def _is_streaming(self) -> bool:
        """Whether rows are trained while they arrive: in the first epoch, in their own order."""
        return self._epoch == 0 and not self._shuffle and self._num_epochs > 0

    def _begin(self) -> _Reader:
        if self._reader is None:
            keeps = self._epoch < self._num_epochs and (self._num_epochs > 1 or self._shuffle)
            self._reader = _Reader(
                self._blocks, self._partition, self._split, self._cache if keeps else None, self._validation_cache
            )
            if self._is_streaming:
                self._waiting.skip(self._batch * self._batch_size)
        return self._reader

    def _fill(self, num_rows: int) -> int:
        """Reads until so many rows wait, or none follow; says how many wait."""
        assert self._reader is not None
        while self._waiting.num_rows < num_rows and (block := self._reader.read()) is not None:
            self._waiting.append(block)
        return self._waiting.num_rows

    def _next_streamed(self, max_batches: int) -> Stretch | None:
        size = self._batch_size
        if not self._fill(1):
            self._require_reached(self._batch - self._waiting.num_skipped // size)
            return None
        num_batches = min(max_batches, self._batches_within(self._waiting.row_bytes(size)))
        # One row more than that says whether the epoch ends with them.
        num_waiting = self._fill(num_batches * size + 1)
        assert self._reader is not None
        epoch_batches = self._batch - (-num_waiting // size) if self._reader.has_ended else None
        num_equal = self._waiting.num_equal_rows()
        num_rows = min(num_batches, max(num_waiting // size, 1)) * size
        num_rows = min(num_rows, num_waiting)
        if num_equal < num_rows:
            if num_equal < size:
                raise FeedError(self._unequal())
            num_rows = num_equal // size * size
        is_last = self._reader.has_ended and num_rows == num_waiting
        return self._stretch(self._waiting.cut(num_rows), epoch_batches, is_last)

    def _next_kept(self, max_batches: int) -> Stretch | None:
        assert self._reader is not None
        self._reader.read_all()
        num_rows, size = self._cache.num_rows, self._batch_size
        epoch_batches = -(-num_rows // size)
        if self._batch >= epoch_batches:
            self._require_reached(epoch_batches)
            return None
        num_full = num_rows // size - self._batch
        num_batches = max(min(max_batches, num_full, self._batches_within(self._cache.row_bytes)), 1)
        end = self._batch + num_batches
        rows = slice(self._batch * size, min(end * size, num_rows))
        columns = self._cache.rows(self._permutation(num_rows)[rows] if self._shuffle else rows)
        return self._stretch(columns, epoch_batches, end == epoch_batches)

    def _require_reached(self, epoch_batches: int) -> None:
        """A batch that training is to go on at was there before: where it is gone, these are other rows."""
        if epoch_batches < self._batch:
            raise FeedError(
                f"partition {self._partition}: training goes on at batch {self._batch} of {self._batch_size} rows, but "
                f"the feed gave {epoch_batches} batches: a retried or restored run needs the same rows in the same "
                f"order (sort or cache() what comes out of a shuffle)"
            )

    def _stretch(self, columns: Columns, epoch_batches: int | None, is_last: bool) -> Stretch:
        num_batches = -(-len(columns[0]) // self._batch_size)
        return Stretch(self._epoch, self._batch, num_batches, self._batch_size, columns, epoch_batches, is_last)

    def _permutation(self, num_rows: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != self._epoch:
            self._order = self._epoch, permutation(self._seed, self._epoch, self._partition, num_rows)
        return self._order[1]

    def _batches_within(self, row_bytes: float) -> int:
        """As many batches as `max_bytes` hold, but at least one."""
        return max(int(self._max_bytes // max(row_bytes * self._batch_size, 1)), 1)

    def _unequal(self) -> str:
        for column, shapes in zip(self._columns, self._waiting.shapes(), strict=True):
            if len(shapes) > 1:
                found = " and ".join(str(list(shape)) for shape in shapes)
                return (
                    f"partition {self._partition}, batch {self._batch}: the rows' values for {column.name} differ in "
                    f"shape, {found}; make them equal, or use batch_size=1"
                )
        raise AssertionError("the rows are equal")


class _Reader:
    """Blocks of training rows as they arrive; held-out rows go to their cache."""

    def __init__(
        self,
        blocks: Iterator[Columns | None],
        partition: int,
        split: float,
        kept: EpochCache | None,
        held_out: EpochCache | None,
    ) -> None:
        self._blocks = blocks
        self._partition = partition
        self._split = split
        self._kept = kept
        self._held_out = held_out
        self._num_rows = 0
        self.has_ended = False

    def read(self) -> Columns | None:
        """The next training rows, at least one; None at their end."""
        while not self.has_ended:
            block = next(self._blocks, None)  # None also where the marker stands
            if block is None:
                self.has_ended = True
                return None
            block = self._without_held_out(block)
            if len(block[0]):
                self._keep(block, self._kept, "")
                return block
        return None

    def read_all(self) -> None:
        """Reads all that somebody keeps."""
        if self._kept is not None or self._held_out is not None:
            while self.read() is not None:
                pass
        if self._held_out is not None:
            for block in self._blocks:
                assert block is not None, "a decoder tells two markers"
                self._keep(block, self._held_out, "validation: ")

    def _without_held_out(self, block: Columns) -> Columns:
        first, self._num_rows = self._num_rows, self._num_rows + len(block[0])
        if not self._split:
            return block
        is_held_out = np.diff(np.floor(np.arange(first, self._num_rows + 1) * self._split)) > 0
        if is_held_out.any():
            self._keep(tuple(column[is_held_out] for column in block), self._held_out, "validation: ")
            block = tuple(column[~is_held_out] for column in block)
        return block

    def _keep(self, block: Columns, cache: EpochCache | None, kind: str) -> None:
        if cache is None:
            return
        try:
            cache.append(block)
        except FeedError as error:
            raise FeedError(f"partition {self._partition}: {kind}{error}") from error


class _Waiting:
    """Rows that arrived and are not cut into batches yet; `num_skipped` more are to be left out."""

    def __init__(self) -> None:
        self._blocks: deque[Columns] = deque()
        self.num_skipped = 0
        self.num_rows = 0

    def skip(self, num_rows: int) -> None:
        """Leaves out the next rows that arrive."""
        self.num_skipped += num_rows

    def append(self, block: Columns) -> None:
        skipped = min(self.num_skipped, len(block[0]))
        self.num_skipped -= skipped
        if skipped < len(block[0]):
            self._blocks.append(tuple(column[skipped:] for column in block))
            self.num_rows += len(block[0]) - skipped

    def row_bytes(self, num_rows: int) -> float:
        """What one of the first rows takes in memory, judged by `num_rows` of them."""
        first = tuple(column[:num_rows] for column in self._blocks[0])
        return num_bytes(first) / len(first[0])

    def num_equal_rows(self) -> int:
        """Rows from the first on that are equal in shape."""
        num_rows = 0
        for block in self._blocks:
            if any(a.shape[1:] != b.shape[1:] for a, b in zip(block, self._blocks[0], strict=True)):
                break
            num_rows += len(block[0])
        return num_rows

    def shapes(self) -> list[list[tuple[int, ...]]]:
        """For each column the different shapes of its rows, in the order of their appearance."""
        return [
            list(dict.fromkeys(column.shape[1:] for column in columns)) for columns in zip(*self._blocks, strict=True)
        ]

    def cut(self, num_rows: int) -> Columns:
        """The first rows: a view where they are of one block, otherwise a copy."""
        self.num_rows -= num_rows
        pieces: list[Columns] = []
        while num_rows:
            block = self._blocks.popleft()
            if len(block[0]) > num_rows:
                self._blocks.appendleft(tuple(column[num_rows:] for column in block))
                block = tuple(column[:num_rows] for column in block)
            pieces.append(block)
            num_rows -= len(block[0])
        return (
            pieces[0] if len(pieces) == 1 else tuple(np.concatenate(columns) for columns in zip(*pieces, strict=True))
        )
