"""From what a task reads to blocks of columns: `RowDecoder` for tuples, `BlockDecoder` for numpy arrays.

`data.arrow` has the one for DataFrames. A feed may hold one `VALIDATION_MARKER`: the rows after it are held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns, convert, is_marker, shape_text
from tensorspark.errors import FeedError


class Decoder(Protocol):
    """Turns a task's elements into columns. Picklable, and the same for all partitions."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What the blocks hold, in this order."""

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        """Decoded rows, any number a block; None once where the marker stood.

        Args:
            partition: its index, for messages.

        Raises:
            FeedError: (while iterating) rows that do not fit; says which and what was expected.
        """


class Place:
    """Where in its partition a decoder is, for messages. Held-out rows count from 0 again."""

    def __init__(self, partition: int) -> None:
        self._partition = partition
        self._kind = "row"
        self.num_rows = 0

    def pass_marker(self) -> None:
        if self._kind != "row":
            raise FeedError(
                f"partition {self._partition}: expected one validation marker, got two: pair each partition of the "
                f"training rows with one of held-out rows"
            )
        self._kind, self.num_rows = "validation row", 0

    def row(self, offset: int) -> str:
        """Names the row `offset` rows on from here."""
        return f"partition {self._partition}, {self._kind} {self.num_rows + offset}"


@dataclass(frozen=True)
class RowDecoder:
    """Rows as tuples or lists with one value a column; with a single column, also the bare value.

    Attributes:
        columns: what is fed, in the order of a row's values.
        block_rows: rows that are decoded at once. The batch size is a good choice: training begins with the first.

    Example:
        >>> decoder = RowDecoder((Column("x", (2,), "float32"), Column("y", (), "int64")))
        >>> [block] = decoder.blocks(iter([([1, 2], 7), ([3, 4], 8)]), partition=0)
        >>> block[0].tolist(), block[1].tolist()
        ([[1.0, 2.0], [3.0, 4.0]], [7, 8])
    """

    columns: tuple[Column, ...]
    block_rows: int = 64

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        place = Place(partition)
        values: list[Sequence[Any]] = []
        for row in rows:
            if is_marker(row):
                yield from self._decode(values, place)
                values = []
                place.pass_marker()
                yield None
                continue
            values.append(self._split(row, place, len(values)))
            if len(values) == self.block_rows:
                yield from self._decode(values, place)
                values = []
        yield from self._decode(values, place)

    def _decode(self, values: list[Sequence[Any]], place: Place) -> Iterator[Columns]:
        if not values:
            return
        block = tuple(
            _stack(column, [row[position] for row in values], place) for position, column in enumerate(self.columns)
        )
        place.num_rows += len(values)
        yield block

    def _split(self, row: Any, place: Place, offset: int) -> Sequence[Any]:
        if isinstance(row, list) and self._is_bare_list(row):
            return (row,)
        if isinstance(row, tuple | list) and len(row) == len(self.columns):
            return row
        if len(self.columns) == 1 and not isinstance(row, tuple):
            return (row,)
        got = f"a {type(row).__name__}" + (f" of {len(row)}" if hasattr(row, "__len__") else "")
        names = ", ".join(column.name for column in self.columns)
        raise FeedError(
            f"{place.row(offset)}: expected a tuple of {len(self.columns)} values ({names}), got {got}; "
            f"give each row a value for each of these"
        )

    def _is_bare_list(self, row: list[Any]) -> bool:
        """Whether `row` is the value of a single column of shape [1], and not a row that holds it."""
        return len(self.columns) == 1 and self.columns[0].shape == (1,) and np.ndim(row) == 1


@dataclass(frozen=True)
class BlockDecoder:
    """Blocks of rows as tuples or lists of numpy arrays, `[rows, ...]` a column; a single column also as a bare array.

    Arrays of a column's own dtype are taken as they are, without a copy: whoever makes them leaves them alone.

    Attributes:
        columns: what is fed, in the order of a block's arrays.

    Example:
        >>> decoder = BlockDecoder((Column("x", (2,), "float32"), Column("y", (), "int64")))
        >>> [block] = decoder.blocks(iter([(np.ones((5, 2)), np.arange(5))]), partition=0)
        >>> block[0].shape, block[0].dtype.name
        ((5, 2), 'float32')
    """

    columns: tuple[Column, ...]

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        place = Place(partition)
        for element in rows:
            if is_marker(element):
                place.pass_marker()
                yield None
                continue
            block = self._split(element, place)
            if len(block[0]):
                yield tuple(_fitting(column, array, place) for column, array in zip(self.columns, block, strict=True))
                place.num_rows += len(block[0])

    def _split(self, element: Any, place: Place) -> Columns:
        bare = isinstance(element, np.ndarray) and len(self.columns) == 1
        block = (element,) if bare else element
        names = ", ".join(column.name for column in self.columns)
        if not isinstance(block, tuple | list) or len(block) != len(self.columns):
            got = f"a {type(element).__name__}" + (f" of {len(element)}" if hasattr(element, "__len__") else "")
            raise FeedError(
                f"{place.row(0)}: expected a tuple of {len(self.columns)} numpy arrays ({names}), got {got}; make each "
                f"element of the feed hold one array a column"
            )
        for column, array in zip(self.columns, block, strict=True):
            if not isinstance(array, np.ndarray) or array.ndim == 0:
                got = f"a {type(array).__name__}" + (" without dimensions" if isinstance(array, np.ndarray) else "")
                raise FeedError(
                    f"{place.row(0)}: expected a numpy array [rows, ...] for {column.name}, got {got}; give it "
                    f"numpy.asarray of a block of rows"
                )
        if len({len(array) for array in block}) > 1:
            lengths = ", ".join(f"{len(array)} of {c.name}" for c, array in zip(self.columns, block, strict=True))
            raise FeedError(f"{place.row(0)}: expected arrays of equally many rows, got {lengths}; cut them alike")
        return tuple(block)


def _fitting(column: Column, array: NDArray[Any], place: Place) -> NDArray[Any]:
    if not column.fits(array.shape[1:]):
        raise FeedError(
            f"{place.row(0)} and those of its block: expected {column} for {column.name}, got shape "
            f"{shape_text(array.shape[1:])}; reshape the block's array"
        )
    return convert_rows(column, array, place)


def convert_rows(column: Column, array: NDArray[Any], place: Place, source: str = "", change: str = "") -> NDArray[Any]:
    """`columns.convert`, whose errors name the first row that is at fault.

    Args:
        array: `[rows, ...]`, the first of them at `place`.
        source, change: where the values come from, and what to do about it.

    Raises:
        FeedError: numbers that `column` cannot hold.
    """
    try:
        return convert(array, column.dtype)
    except (TypeError, ValueError) as error:
        first, reason = _first_bad_row(array, column.dtype) or (0, error)
        of_source = f"{source}: " if source else ""
        raise FeedError(
            f"{place.row(first)}: {of_source}expected {column} for {column.name}: {reason}"
            + (f"; {change}" if change else "")
        ) from error


def _first_bad_row(array: NDArray[Any], dtype: str) -> tuple[int, Exception] | None:
    for index in range(len(array)):
        try:
            convert(array[index : index + 1], dtype)
        except (TypeError, ValueError) as error:
            return index, error
    return None


def _stack(column: Column, values: list[Any], place: Place) -> NDArray[Any]:
    try:
        stacked = _to_array(values, column.dtype)
    except (ValueError, TypeError):
        stacked = None
    if stacked is not None and column.fits(stacked.shape[1:]):
        return stacked
    for offset, value in enumerate(values):
        _check_value(column, value, place.row(offset))
    raise FeedError(f"{place.row(0)} and those after it: the rows' values for {column.name} differ in shape")


def _check_value(column: Column, value: Any, where: str) -> None:
    try:
        shape = _to_array([value], column.dtype).shape[1:]
    except (ValueError, TypeError) as error:
        raise FeedError(f"{where}: expected {column} for {column.name}: {error}") from error
    if not column.fits(shape):
        raise FeedError(f"{where}: expected {column} for {column.name}, got shape {shape_text(shape)}")


def _to_array(values: list[Any], dtype: str) -> NDArray[Any]:
    if np.dtype(dtype).kind == "O":
        values = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
        return convert(np.array(values, object), dtype)
    return convert(np.stack(values) if isinstance(values[0], np.ndarray) else np.asarray(values), dtype)
