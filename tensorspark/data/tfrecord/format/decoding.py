"""From TFRecord payloads to Arrow record batches, in bulk.

Without TensorFlow, as that was measured to gain nothing: its `tf.io.parse_example` wants every record as a Python
object, names no record in an error, and does not tell an empty list from a missing one. Processor time a row, one
thread, on two busy cores (trust the ratios; `python -m benchmarks.tfrecord` measures again), batches of 4 MiB:

=====================================  =======  ====================  =============================
rows                                   decode   tf.io.parse_example   the same, with `tf.constant`
=====================================  =======  ====================  =============================
784 floats, label                      1.1 µs   1.5 µs                1.9 µs
784 floats, label below 1000           1.1 µs   1.1 µs                1.4 µs
two integers, float, string            0.8 µs   1.1 µs                1.3 µs
two strings                            0.5 µs   0.9 µs                1.0 µs
=====================================  =======  ====================  =============================

The records of the first row have one layout and those of the second two, one for each width of the label
(`features.alike`); the others are walked field by field. A call costs some 0.5 ms for the former, 1 to 2 ms for the
latter, whatever the batch: small batches are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format import features
from tensorspark.data.tfrecord.format.features import Entries, Lists, Messages, Values
from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.ragged import Ints, Ragged
from tensorspark.data.tfrecord.format.types import (
    KIND_NAMES,
    NO_KIND,
    FeatureType,
    RecordType,
    byte_array_field,
    check_record_type,
    feature_type,
)
from tensorspark.data.tfrecord.format.wire import WireError
from tensorspark.errors import FeedError

_MAX_INT32 = 2**31 - 1
Mask = NDArray[np.bool_]


class Decoder:
    """Decodes records to the columns of a schema, in bulk; features that the schema lacks are skipped.

    Not bound to a thread: `decode` changes nothing.

    Raises (when made):
        ConfigError: a schema that records of this type cannot fill.
    """

    def __init__(self, schema: pa.Schema, record_type: RecordType = "Example") -> None:
        check_record_type(record_type)
        self.schema, self.record_type = schema, record_type
        if record_type == "ByteArray":
            byte_array_field(schema)
            return
        self._types = [feature_type(field, record_type) for field in schema]

    def decode(self, records: Records, context: str = "") -> pa.RecordBatch:
        """One row per record; a missing feature is null. A schema without columns gives rows without columns.

        Args:
            context: the file, for errors; `records.name` where it is empty.

        Raises:
            FeedError: a message that is no such record, or a feature that the column cannot hold.
        """
        if not len(self.schema):
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(records), pa.struct([])))
        job = _Job(records, context or records.name, self.record_type)
        if self.record_type == "ByteArray":
            columns = [job.payloads(self.schema.field(0))]
        else:
            columns = job.columns(self.schema, self._types)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


class _Job:
    """The decoding of one batch."""

    def __init__(self, records: Records, context: str, record_type: RecordType) -> None:
        self._rows = records.ragged()
        self._num_rows = len(records)
        self._context, self._first_index = context, records.first_index
        self._record_type = record_type

    def payloads(self, field: pa.Field) -> pa.Array:
        """The records themselves."""
        return self._strings(self._rows, field, field.type)

    def columns(self, schema: pa.Schema, types: list[FeatureType]) -> list[pa.Array]:
        """One array per column of the schema."""
        alike = features.alike(self._rows) if self._record_type == "Example" else None
        if alike is not None:
            return [self._column(*column, partial(self._alike, alike)) for column in zip(schema, types, strict=True)]
        try:
            messages = features.records(self._rows)
            top = messages.fields()
            single = features.entries(messages, top, features.FEATURES)
            listed = None
            if self._record_type == "SequenceExample":
                listed = features.entries(messages, top, features.FEATURE_LISTS)
        except WireError as error:
            raise self._error(error.message, f"expected a tf.train.{self._record_type}, got {error}") from None
        decode = partial(self._walked, single, listed)
        return [self._column(*column, decode) for column in zip(schema, types, strict=True)]

    def _column(
        self, field: pa.Field, kind: FeatureType, decode: Callable[[pa.Field, FeatureType, bytes], pa.Array]
    ) -> pa.Array:
        try:
            array = decode(field, kind, field.name.encode())
        except WireError as error:
            raise self._error(error.message, f"feature {field.name!r}: expected a feature, got {error}") from None
        if not field.nullable and array.null_count:
            row = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
            raise self._error(row, f"feature {field.name!r}: expected a value, as the column is not nullable, got none")
        return array

    def _alike(self, found: dict[bytes, Lists], field: pa.Field, kind: FeatureType, name: bytes) -> pa.Array:
        if name not in found:
            return pa.nulls(self._num_rows, field.type)
        return self._from_features(field, kind, found[name].messages.rows, found[name])

    def _walked(
        self, single: Entries, listed: Entries | None, field: pa.Field, kind: FeatureType, name: bytes
    ) -> pa.Array:
        found = single.last_under(name, self._num_rows)
        of_lists = listed.last_under(name, self._num_rows) if listed is not None else None
        if of_lists is not None and len(of_lists) and not (len(found) and kind.depth < 2):
            return self._from_feature_lists(field, kind, of_lists, found)
        if not len(found):
            return pa.nulls(self._num_rows, field.type)
        return self._from_features(field, kind, found.rows, features.lists(found))

    def _from_features(self, field: pa.Field, kind: FeatureType, rows: Ints, lists: Lists) -> pa.Array:
        """Of a feature that the records `rows` have."""
        if kind.kind == NO_KIND:
            return pa.nulls(self._num_rows, field.type)
        if kind.depth == 2:
            raise self._error(
                int(rows[0]),
                f"feature {field.name!r}: expected a FeatureList for {field.type}, got a feature of the context; make "
                "the column an array",
            )
        values = self._values(field, kind, rows, lists)
        if kind.depth == 0:
            return self._singles(field, kind, rows, values)
        counts, valid = np.zeros(self._num_rows, np.int64), np.zeros(self._num_rows, np.bool_)
        counts[rows] = values.counts
        valid[rows] = lists.kind != NO_KIND
        return self._list_array(field, field.type, counts, valid, self._leaves(field, kind, values, rows))

    def _from_feature_lists(self, field: pa.Field, kind: FeatureType, found: Messages, context: Messages) -> pa.Array:
        """Of arrays of arrays; also of arrays, where each feature of the list has one value."""
        if len(context):
            raise self._error(
                int(context.rows[0]),
                f"feature {field.name!r}: expected a FeatureList, got a feature of the context too",
            )
        if kind.kind == NO_KIND:
            return pa.nulls(self._num_rows, field.type)
        if kind.depth == 0:
            raise self._error(
                int(found.rows[0]),
                f"feature {field.name!r}: expected a single value, got a FeatureList; make it an array of arrays",
            )
        inner, owner = found.within(found.fields().ordered(), 1)
        outer_counts, valid = np.zeros(self._num_rows, np.int64), np.zeros(self._num_rows, np.bool_)
        outer_counts[found.rows] = np.bincount(owner, minlength=len(found))
        valid[found.rows] = True
        values = self._values(field, kind, inner.rows, features.lists(inner))
        if kind.depth == 1:
            self._require_one(field, values.counts, inner.rows)
            return self._list_array(
                field, field.type, outer_counts, valid, self._leaves(field, kind, values, inner.rows)
            )
        leaves = self._leaves(field, kind, values, inner.rows)
        whole = np.ones(len(inner), np.bool_)
        inner_array = self._list_array(field, field.type.value_type, values.counts, whole, leaves)
        return self._list_array(field, field.type, outer_counts, valid, inner_array)

    def _values(self, field: pa.Field, kind: FeatureType, rows: Ints, lists: Lists) -> Values:
        """The values in lists of the records `rows`, which must be of the column's kind."""
        is_wrong = (lists.kind != kind.kind) & (lists.kind != NO_KIND)
        if is_wrong.any():
            wrong = int(is_wrong.argmax())
            raise self._error(
                int(rows[wrong]),
                f"feature {field.name!r}: expected {KIND_NAMES[kind.kind]} for a column of type {field.type}, got "
                f"{KIND_NAMES[int(lists.kind[wrong])]}; correct the schema, or leave the column out",
            )
        return features.values(lists, kind.kind)

    def _singles(self, field: pa.Field, kind: FeatureType, rows: Ints, values: Values) -> pa.Array:
        """A column of single values."""
        if (values.counts > 1).any():
            self._require_one(field, np.maximum(values.counts, 1), rows)
        is_present = values.counts == 1
        if not is_present.all():
            rows = rows[is_present]
        valid = np.zeros(self._num_rows, np.bool_)
        valid[rows] = True
        is_whole = len(rows) == self._num_rows
        if values.strings is not None:
            strings = values.strings
            if not is_whole:
                starts, lengths = np.zeros((2, self._num_rows), np.int64)
                starts[rows], lengths[rows] = strings.starts, strings.lengths
                strings = Ragged(strings.data, starts, lengths)
            return self._strings(strings, field, kind.leaf, valid)
        leaves = self._leaves(field, kind, values, rows)
        if is_whole:
            return leaves
        indices = np.zeros(self._num_rows, np.int64)
        indices[rows] = np.arange(len(rows))
        return leaves.take(pa.array(indices, mask=~valid))

    def _require_one(self, field: pa.Field, counts: Ints, rows: Ints) -> None:
        is_wrong = counts != 1
        if is_wrong.any():
            wrong = int(is_wrong.argmax())
            advice = "an array of arrays" if field.type.num_fields else "an array"
            raise self._error(
                int(rows[wrong]),
                f"feature {field.name!r}: expected one value for {field.type}, got {counts[wrong]}; make the column "
                f"{advice}",
            )

    def _leaves(self, field: pa.Field, kind: FeatureType, values: Values, rows: Ints) -> pa.Array:
        """The values one after another, of the leaf's type. `rows` are those of the features."""
        if values.strings is not None:
            return self._strings(values.strings, field, kind.leaf, of_row=np.repeat(rows, values.counts))
        numbers: Any = values.numbers
        leaf = kind.leaf
        if pa.types.is_boolean(leaf):
            return pa.array(numbers != 0)
        array = pa.array(numbers)
        try:
            return _cast(array, leaf)
        except pa.ArrowInvalid as error:
            wrong = _first_unfit(numbers, leaf)
            row = int(np.repeat(rows, values.counts)[wrong])
            raise self._error(
                row,
                f"feature {field.name!r}: expected values of type {leaf}, got {numbers[wrong]}; make the column wider",
            ) from error

    def _strings(
        self, strings: Ragged, field: pa.Field, leaf: pa.DataType, valid: Mask | None = None, of_row: Ints | None = None
    ) -> pa.Array:
        large = pa.types.is_large_string(leaf) or pa.types.is_large_binary(leaf)
        if not large and int(strings.lengths.sum()) > _MAX_INT32:
            raise self._error(
                0, f"feature {field.name!r}: expected at most 2 GiB in a batch; read fewer bytes at a time"
            )
        try:
            return strings.to_arrow(leaf, valid)
        except pa.ArrowInvalid as error:
            wrong = _first_not_text(strings)
            row = wrong if of_row is None else int(of_row[wrong])
            raise self._error(
                row, f"feature {field.name!r}: expected UTF-8 text, got other bytes; make the column binary"
            ) from error

    def _list_array(
        self, field: pa.Field, data_type: pa.DataType, counts: Ints, valid: Mask, leaves: pa.Array
    ) -> pa.Array:
        """Arrays of so many of the leaves each, in order."""
        bitmap = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        if pa.types.is_fixed_size_list(data_type):
            return self._fixed_lists(field, data_type, counts, valid, leaves)
        dtype = np.int64 if pa.types.is_large_list(data_type) else np.int32
        if dtype == np.int32 and len(leaves) > _MAX_INT32:
            raise self._error(
                0, f"feature {field.name!r}: expected at most 2**31 values in a batch; read fewer at a time"
            )
        offsets = np.zeros(len(counts) + 1, dtype)
        np.cumsum(counts, out=offsets[1:])
        buffers = [bitmap, pa.py_buffer(offsets)]
        return pa.Array.from_buffers(data_type, len(counts), buffers, children=[leaves])

    def _fixed_lists(
        self, field: pa.Field, data_type: pa.DataType, counts: Ints, valid: Mask, leaves: pa.Array
    ) -> pa.Array:
        is_wrong = valid & (counts != data_type.list_size)
        if is_wrong.any():
            wrong = int(is_wrong.argmax())
            raise self._error(
                wrong, f"feature {field.name!r}: expected {data_type.list_size} values, got {counts[wrong]}"
            )
        if valid.all():
            return pa.FixedSizeListArray.from_arrays(leaves, type=data_type)
        free = self._list_array(field, pa.list_(data_type.value_field), counts, valid, leaves)
        return free.cast(data_type)

    def _error(self, row: int, text: str) -> FeedError:
        where = f"{self._context}: " if self._context else ""
        return FeedError(f"{where}record {self._first_index + row}: {text}")


def _cast(array: pa.Array, leaf: pa.DataType) -> pa.Array:
    """Raises pa.ArrowInvalid for a value that the type cannot hold."""
    return (array.cast(pa.float64()) if pa.types.is_decimal(leaf) else array).cast(leaf)


def _first_unfit(numbers: Any, leaf: pa.DataType) -> int:
    """Index of the first number that the type cannot hold."""
    low, high = 0, len(numbers)
    array = pa.array(numbers)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _cast(array[low:middle], leaf)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _first_not_text(strings: Ragged) -> int:
    """Index of the first row that is no UTF-8."""
    for index, row in enumerate(strings.to_arrow(pa.large_binary())):
        try:
            row.as_py().decode()
        except UnicodeDecodeError:
            return index
    return 0
