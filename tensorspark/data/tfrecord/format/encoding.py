"""From Arrow record batches to TFRecord payloads, in bulk.

For each column a row has two pieces: what stands before its values (tags, lengths, the name), and the values. The first
are laid out for all rows at once, those alike in the widths of their lengths together; the second lie in Arrow's own
buffers already, but for integers. Then all pieces of a row are joined, in the order of the schema's columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.ragged import Bytes, Ints, Ragged, interleave
from tensorspark.data.tfrecord.format.types import (
    BYTES,
    FLOATS,
    INTS,
    NO_KIND,
    FeatureType,
    RecordType,
    byte_array_field,
    check_record_type,
    feature_type,
)
from tensorspark.data.tfrecord.format.wire import encode_varints, put_varints, varint_widths
from tensorspark.errors import ConfigError, FeedError

Mask = NDArray[np.bool_]

_FIRST, _SECOND = 0x0A, 0x12
_LIST_TAGS = {BYTES: 0x0A, FLOATS: 0x12, INTS: 0x1A}
_MAX_INT64 = 2**63 - 1


class Encoder:
    """Encodes rows of a schema as records, in bulk.

    Not bound to a thread: `encode` changes nothing.

    Raises (when made):
        ConfigError: a schema that records of this type cannot hold.
    """

    def __init__(self, schema: pa.Schema, record_type: RecordType = "Example") -> None:
        check_record_type(record_type)
        self.schema, self.record_type = schema, record_type
        if record_type == "ByteArray":
            if byte_array_field(schema) is None:
                raise ConfigError("recordType ByteArray: expected one column of type binary, got none")
            return
        self._types = [feature_type(field, record_type) for field in schema]
        if len(set(schema.names)) < len(schema):
            raise ConfigError(f"expected columns of different names, got {', '.join(schema.names)}; rename some")

    def encode(self, batch: pa.RecordBatch) -> Records:
        """One record per row, adjacent in one buffer; `frame(encoder.encode(batch))` is what a file holds.

        Args:
            batch: of the schema's columns, in its order.

        Raises:
            FeedError: a null within an array, an integer beyond int64, or for ByteArray a null row.
        """
        if self.record_type == "ByteArray":
            rows = _payloads(batch.column(0), self.schema.field(0))
        else:
            columns = zip(batch.columns, self.schema, self._types, strict=True)
            single: list[Ragged] = []
            listed: list[Ragged] = []
            for array, field, kind in columns:
                if kind.kind != NO_KIND:
                    (listed if kind.depth == 2 else single).extend(_column(array, field, kind))
            pieces = _message(_FIRST, single, batch.num_rows)
            if self.record_type == "SequenceExample":
                pieces += _message(_SECOND, listed, batch.num_rows)
            rows = interleave(pieces)
        return Records(rows.data, rows.starts, rows.lengths)


def _message(tag: int, pieces: list[Ragged], num_rows: int) -> list[Ragged]:
    """The pieces, with the tag of the message that they make up and its length before them."""
    lengths = np.zeros(num_rows, np.int64)
    for piece in pieces:
        lengths += piece.lengths
    return [_heading(num_rows, [bytes([tag]), _Number.of(lengths)]), *pieces]


def _payloads(array: pa.Array, field: pa.Field) -> Ragged:
    if array.null_count:
        row = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
        raise FeedError(f"column {field.name!r}: expected bytes in each row, got null in row {row} of a batch; drop it")
    rows = _string_rows(array)
    return rows if len(rows) else Ragged.adjacent(np.empty(0, np.uint8), np.empty(0, np.int64))


def _column(array: pa.Array, field: pa.Field, kind: FeatureType) -> list[Ragged]:
    """Two pieces for each row: all before the values, and the values. Both are empty where the row is null."""
    valid = None if not array.null_count else array.is_valid().to_numpy(zero_copy_only=False)
    name = field.name.encode()
    key = bytes([_FIRST]) + encode_varints(np.array([len(name)])).data.tobytes() + name + bytes([_SECOND])
    key_bytes = len(key)
    if kind.depth == 2:
        content = _feature_lists(array, field, kind, valid)
        inner = _Number.of(content.lengths)
        parts: list[bytes | _Number] = [key, inner]
        inside = content.lengths + inner.widths
    else:
        content = _lists(array, field, kind, valid)
        feature, num_bytes = _feature(content.lengths, kind)
        inner = _Number.of(num_bytes)
        parts = [key, inner, *feature]
        inside = num_bytes + inner.widths
    heading = _heading(len(array), [bytes([_FIRST]), _Number.of(inside + key_bytes), *parts])
    if valid is not None:
        heading = Ragged(heading.data, heading.starts, np.where(valid, heading.lengths, 0))
    return [heading, content]


class _Number:
    """A column of variable-length integers in a heading; of width 0 where there is none."""

    def __init__(self, values: Ints, widths: Ints) -> None:
        self.values, self.widths = values, widths

    @classmethod
    def of(cls, values: Ints) -> _Number:
        return cls(values, varint_widths(values))


def _feature(num_bytes: Ints, kind: FeatureType) -> tuple[list[bytes | _Number], Ints]:
    """What stands in a Feature before its values, and how long the Feature is.

    Args:
        num_bytes: `[n]`, of the values. Those of an array of strings have their tags and lengths already.
    """
    tag = bytes([_LIST_TAGS[kind.kind]])
    if kind.kind == BYTES and kind.depth:
        whole = _Number.of(num_bytes)
        return [tag, whole], 1 + whole.widths + num_bytes
    is_present = np.ones(len(num_bytes), np.int64) if kind.kind == BYTES else (num_bytes > 0).astype(np.int64)
    values = _Number.of(num_bytes)
    values.widths = values.widths * is_present
    list_bytes = is_present + values.widths + num_bytes
    whole = _Number.of(list_bytes)
    value_tag = _Number(np.full(len(num_bytes), _FIRST), is_present)
    return [tag, whole, value_tag, values], 1 + whole.widths + list_bytes


def _heading(num_rows: int, parts: Sequence[bytes | _Number]) -> Ragged:
    """The parts side by side, for each row: constants, and integers of different widths."""
    numbers = [part for part in parts if isinstance(part, _Number)]
    code = np.zeros(num_rows, np.int64)
    for number in numbers:
        code = code * 11 + number.widths
    if num_rows and (code == code[0]).all():
        return Ragged.matrix(_same_widths(parts, slice(None), 0, num_rows))
    lengths = sum((number.widths for number in numbers), np.zeros(num_rows, np.int64))
    lengths += sum(len(part) for part in parts if isinstance(part, bytes))
    rows = np.zeros((num_rows, int(lengths.max(initial=0))), np.uint8)
    for group in np.unique(code):
        which = np.flatnonzero(code == group)
        of_group = _same_widths(parts, which, int(which[0]), len(which))
        rows[which, : of_group.shape[1]] = of_group
    return Ragged(rows.reshape(-1), np.arange(num_rows) * rows.shape[1], lengths)


def _same_widths(parts: Sequence[bytes | _Number], which: slice | Ints, example: int, num_rows: int) -> Bytes:
    """`[rows, length]`: the parts of the rows `which`, whose integers all are as wide as those of row `example`."""
    widths = [len(part) if isinstance(part, bytes) else int(part.widths[example]) for part in parts]
    rows = np.empty((num_rows, sum(widths)), np.uint8)
    place = 0
    for part, width in zip(parts, widths, strict=True):
        columns = rows[:, place : place + width]
        if isinstance(part, bytes):
            columns[:] = np.frombuffer(part, np.uint8)
        elif width:
            put_varints(columns, part.values[which])
        place += width
    return rows


def _lists(array: pa.Array, field: pa.Field, kind: FeatureType, valid: Mask | None) -> Ragged:
    """The values of each row, as they stand within their list; nothing where the row is null."""
    if kind.depth == 0:
        rows = _leaves(array, field, kind)
        return rows if valid is None else Ragged(rows.data, rows.starts, np.where(valid, rows.lengths, 0))
    inside, counts = _inside(array, field), _counts(array, valid)
    if kind.kind == FLOATS:
        return _grouped(_floats(inside).view(np.uint8), 4, counts)
    values = _leaves(inside, field, kind)
    if kind.kind == BYTES:
        values = interleave([_heading(len(inside), [bytes([_FIRST]), _Number.of(values.lengths)]), values])
    return _grouped(values.data, values.lengths, counts)


def _feature_lists(array: pa.Array, field: pa.Field, kind: FeatureType, valid: Mask | None) -> Ragged:
    """The Features of each row's arrays, as they stand within a FeatureList."""
    inner = _inside(array, field)
    content = _lists(inner, field, FeatureType(kind.kind, 1, kind.leaf), None)
    feature, num_bytes = _feature(content.lengths, kind)
    heading = _heading(len(inner), [bytes([_FIRST]), _Number.of(num_bytes), *feature])
    whole = interleave([heading, content])
    return _grouped(whole.data, whole.lengths, _counts(array, valid))


def _inside(array: pa.Array, field: pa.Field) -> pa.Array:
    """What is in the arrays, none of it null."""
    inside = array.flatten()
    if inside.null_count:
        raise FeedError(
            f"column {field.name!r}: expected arrays without nulls, got one with a null in it; features have no nulls: "
            "fill or remove them (array_compact)"
        )
    return inside


def _counts(array: pa.Array, valid: Mask | None) -> Ints:
    """How long the arrays are; 0 for null."""
    if pa.types.is_fixed_size_list(array.type):
        counts = np.full(len(array), array.type.list_size, np.int64)
    else:
        counts = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return counts if valid is None else np.where(valid, counts, 0)


def _grouped(data: Bytes, widths: Ints | int, counts: Ints) -> Ragged:
    """Of values that follow one another from the beginning of `data`, so many joined to a row, in order."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    edges = ends * widths if isinstance(widths, int) else np.concatenate([[0], np.cumsum(widths)])[ends]
    return Ragged(data, edges[:-1], np.diff(edges))


def _leaves(array: pa.Array, field: pa.Field, kind: FeatureType) -> Ragged:
    """The bytes of each value. Nulls are of any content."""
    if kind.kind == BYTES:
        return _string_rows(array)
    if kind.kind == FLOATS:
        return Ragged.matrix(_floats(array).view(np.uint8).reshape(-1, 4))
    return encode_varints(_integers(array, field))


def _string_rows(array: pa.Array) -> Ragged:
    is_large = pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)
    _, places, content = array.buffers()
    if not len(array) or places is None:
        return Ragged(np.empty(0, np.uint8), np.zeros(len(array), np.int64), np.zeros(len(array), np.int64))
    every = np.frombuffer(places, np.int64 if is_large else np.int32)
    edges = every[array.offset : array.offset + len(array) + 1].astype(np.int64)
    data = np.frombuffer(content, np.uint8) if content is not None and content.size else np.empty(0, np.uint8)
    return Ragged(data, edges[:-1], np.diff(edges))


def _floats(array: pa.Array) -> NDArray[np.float32]:
    """`[n]`; what float32 cannot hold becomes infinite."""
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    values = _numbers(array)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, np.dtype("<f4"))


def _integers(array: pa.Array, field: pa.Field) -> Ints:
    """`[n]`."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values = _numbers(array)
    if values.dtype == np.uint64 and int(values.max(initial=0)) > _MAX_INT64:
        raise FeedError(
            f"column {field.name!r}: expected integers up to {_MAX_INT64}, got {values.max()}: features hold int64"
        )
    return np.ascontiguousarray(values, np.int64)


def _numbers(array: pa.Array) -> NDArray[np.generic]:
    """`[n]`, a view; nulls are of any content."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    content = array.buffers()[1]
    if not len(array) or content is None:
        return np.zeros(len(array), dtype)
    return np.frombuffer(content, dtype, len(array), array.offset * dtype.itemsize)
