"""From a DataFrame's Arrow record batches to blocks of columns, without a copy where the types allow it.

Taken are: numbers and booleans, alone or as several columns side by side; arrays of them, nested too; Spark ML vectors;
strings; binary columns that hold a tensor's raw bytes. A flat array also fills a column of several dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorspark.data.arrow_schema import (
    Source,
    check_schema,
    is_array,
    is_binary,
    is_vector,
    known_shape_and_dtype,
    level_lengths,
    unwrap,
)
from tensorspark.data.columns import Column, Columns, is_marker
from tensorspark.data.decoders import Place, convert_rows
from tensorspark.errors import FeedError

__all__ = ["ArrowDecoder", "Source", "check_schema", "known_shape_and_dtype"]

_MAX_BLOCK_BYTES = 2**25
_DENSE = 1  # a vector's type; sparse ones have 0


@dataclass(frozen=True)
class ArrowDecoder:
    """Record batches of a DataFrame, each as the bytes of one Arrow IPC message.

    Attributes:
        columns: what is fed.
        sources: for each of `columns`, the DataFrame's columns that it is made of.
        schema_bytes: the batches' schema, as `pa.Schema.serialize` makes it.
    """

    columns: tuple[Column, ...]
    sources: tuple[Source, ...]
    schema_bytes: bytes = field(repr=False)

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        schema = pa.ipc.read_schema(pa.py_buffer(self.schema_bytes))
        check_schema(self.columns, self.sources, schema)
        place = Place(partition)
        for message in rows:
            if is_marker(message):
                place.pass_marker()
                yield None
                continue
            yield from self._decode(_read(message, schema, place), message, place)

    def decode(self, batch: pa.RecordBatch, place: Place) -> Iterator[tuple[pa.RecordBatch, Columns]]:
        """A record batch that is at hand, its schema checked: its rows in parts of 32 MiB or so, and their columns.

        Args:
            place: where the batch begins; moved on by what was decoded.
        """
        # Not all at once: sparse vectors become many times larger.
        num_rows = _rows_within(_MAX_BLOCK_BYTES, self.columns)
        for start in range(0, batch.num_rows, num_rows):
            part = batch.slice(start, num_rows)
            block = tuple(
                _values(part, column, source, place) for column, source in zip(self.columns, self.sources, strict=True)
            )
            place.num_rows += part.num_rows
            yield part, block

    def _decode(self, batch: pa.RecordBatch, message: Any, place: Place) -> Iterator[Columns]:
        for part, block in self.decode(batch, place):
            yield _released(block, message, part.num_rows / batch.num_rows)


def _read(message: Any, schema: pa.Schema, place: Place) -> pa.RecordBatch:
    try:
        return pa.ipc.read_record_batch(pa.py_buffer(message), schema)
    except (TypeError, OSError, EOFError, pa.ArrowException) as error:
        raise FeedError(
            f"{place.row(0)}: expected the bytes of an Arrow record batch with the DataFrame's schema, got "
            f"{type(message).__name__}: {error}"
        ) from error


def _released(block: Columns, message: Any, part: float) -> Columns:
    """The block, copied where keeping it would keep a message alive that is much larger than what is used of it.

    Args:
        part: of the message's rows that the block holds.
    """
    content = np.frombuffer(message, np.uint8)
    is_shared = [np.may_share_memory(column, content) for column in block]
    num_used = sum(column.nbytes for column, shared in zip(block, is_shared, strict=True) if shared)
    if num_used * 4 >= len(content) * part * 3:
        return block
    return tuple(column.copy() if shared else column for column, shared in zip(block, is_shared, strict=True))


def _rows_within(num_bytes: int, columns: Sequence[Column]) -> int:
    """As many rows as so many bytes hold, where the columns say how large a row is."""
    known = [math.prod(size or 1 for size in column.shape or ()) * 8 for column in columns]
    return max(num_bytes // max(sum(known), 1), 1)


def _values(batch: pa.RecordBatch, column: Column, source: Source, place: Place) -> NDArray[Any]:
    """`[rows, ...]` of `column`."""
    if len(source) > 1:
        parts = [_Field(column, name, place).scalars(batch.column(name)) for name in source]
        return np.stack(parts, axis=1)
    (name,) = source
    return _Field(column, name, place).values(batch.column(name))


@dataclass(frozen=True)
class _Field:
    """One column of the DataFrame on its way to `column`; `place` is that of the batch's first row."""

    column: Column
    name: str
    place: Place

    def values(self, array: pa.Array) -> NDArray[Any]:
        """`[rows, ...]`, of the column's shape and dtype."""
        if is_vector(array.type):
            values = self._vectors(array)
        elif is_binary(array.type) and self._dtype.kind != "O":
            return self._tensors(array)
        elif is_array(array.type):
            values = self._arrays(array)
        else:
            return self.scalars(array).reshape(len(array), *([1] if self.column.shape else []))
        return self._convert(values).reshape(len(array), *self._row_shape(values.shape[1:]))

    def scalars(self, array: pa.Array) -> NDArray[Any]:
        """`[rows]`, of the column's dtype."""
        self._refuse_nulls(array, 1)
        return self._convert(_to_numpy(array))

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.column.dtype)

    def _row_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The column's shape for rows of `shape`, which may be flat."""
        wanted = self.column.shape
        if wanted is None or len(wanted) == len(shape):
            return shape
        return tuple(size for size in wanted if size is not None)

    def _arrays(self, array: pa.Array) -> NDArray[Any]:
        """`[rows, ...]` of nested arrays that all are equally long."""
        num_rows, shape = len(array), []
        lengths, _ = unwrap(array.type)
        per_row = 1
        for wanted in level_lengths(self.column, lengths) or lengths:
            self._refuse_nulls(array, per_row)
            shape.append(self._length(_lengths(array), wanted, per_row, "an array"))
            array = array.flatten()
            per_row *= shape[-1]
        self._refuse_nulls(array, per_row)
        return _to_numpy(array).reshape(num_rows, *shape)

    def _vectors(self, array: pa.Array) -> NDArray[Any]:
        """`[rows, size]` of Spark ML vectors, dense and sparse ones."""
        self._refuse_nulls(array, 1)
        is_dense = _to_numpy(array.field("type").fill_null(0)) == _DENSE
        values = array.field("values")
        num_values = _lengths(values)
        sizes = np.where(is_dense, num_values, _to_numpy(array.field("size").fill_null(0)))
        (wanted,) = level_lengths(self.column, [None]) or [None]
        size = self._length(sizes, wanted, 1, "a vector")
        numbers = values.flatten()
        if is_dense.all():
            self._refuse_nulls(numbers, size)
            return _to_numpy(numbers).reshape(len(array), size)
        rows = np.repeat(np.arange(len(array)), num_values)
        positions = np.empty(len(rows), np.int64)
        positions[is_dense[rows]] = np.tile(np.arange(size), int(is_dense.sum()))
        positions[~is_dense[rows]] = _to_numpy(array.field("indices").flatten())
        if len(rows) and not 0 <= positions.min() <= positions.max() < size:
            wrong = int(((positions < 0) | (positions >= size)).argmax())
            raise self._error(int(rows[wrong]), f"a value at {positions[wrong]} of {size}", "correct the sparse vector")
        dense = np.zeros((len(array), size))
        dense[rows, positions] = _to_numpy(numbers)
        return dense

    def _tensors(self, array: pa.Array) -> NDArray[Any]:
        """`[rows, ...]` of tensors' raw bytes, little-endian."""
        self._refuse_nulls(array, 1)
        shape, item_bytes = self.column.shape or (), self._dtype.itemsize
        known = math.prod(size for size in shape if size is not None) * item_bytes
        sizes = _lengths(array)
        num_bytes = self._length(sizes, None if None in shape else known, 1, "bytes")
        if None in shape and (not known or num_bytes % known):
            raise self._error(0, f"{num_bytes} bytes", f"make them a multiple of {known}")
        _, offsets, content = array.buffers()
        start = int(_offsets(offsets, array)[0])
        raw = np.frombuffer(content, np.uint8, num_bytes * len(array), start) if num_bytes else np.empty(0, np.uint8)
        free = num_bytes // known if known else 0
        values = raw != 0 if self._dtype.kind == "b" else raw.view(self._dtype.newbyteorder("<"))
        values = np.require(values, self._dtype, "A")
        return values.reshape(len(array), *(free if size is None else size for size in shape))

    def _length(self, lengths: NDArray[Any], wanted: int | None, per_row: int, what: str) -> int:
        """The length that all have."""
        first = wanted if wanted is not None else int(lengths[0]) if len(lengths) else 0
        wrong = lengths != first
        if wrong.any():
            index = int(wrong.argmax())
            other = f", and {first} before" if wanted is None else f" instead of {first}"
            raise self._error(
                index // per_row, f"{what} of length {lengths[index]}{other}", "make all equally long, or drop the row"
            )
        return first

    def _refuse_nulls(self, array: pa.Array, per_row: int) -> None:
        if array.null_count:
            index = int(_to_numpy(array.is_null()).argmax())
            got = "null" if per_row == 1 else "an array with a null in it"
            raise self._error(index // per_row, got, "fill it or drop the row, with fillna() or dropna() for example")

    def _convert(self, values: NDArray[Any]) -> NDArray[Any]:
        source = f"column {self.name!r} of the DataFrame"
        return convert_rows(self.column, values, self.place, source, "correct the row, or cast the column")

    def _error(self, row: int, got: str, change: str) -> FeedError:
        return FeedError(
            f"{self.place.row(row)}: column {self.name!r} of the DataFrame: expected {self.column} for "
            f"{self.column.name}, got {got}; {change}"
        )


def _to_numpy(array: pa.Array) -> NDArray[Any]:
    """An array without nulls; a view where it holds numbers."""
    is_number = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=is_number)
    return values


def _lengths(array: pa.Array) -> NDArray[Any]:
    """How long the arrays or byte strings of `array` are, `[len(array)]`; 0 for null."""
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    if is_binary(array.type):
        return np.diff(_offsets(array.buffers()[1], array))
    return np.diff(_to_numpy(array.offsets))


def _offsets(buffer: pa.Buffer, array: pa.Array) -> NDArray[Any]:
    is_large = pa.types.is_large_binary(array.type)
    every = np.frombuffer(buffer, np.int64 if is_large else np.int32)
    return every[array.offset : array.offset + len(array) + 1]
