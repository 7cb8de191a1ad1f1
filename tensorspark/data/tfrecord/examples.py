"""Rows from and to serialized `tf.train.Example` messages: what TensorFlowOnSpark's `dfutil` has besides files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
from pyspark.sql import Row
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.inference import infer_schema
from tensorspark.data.tfrecord.options import names_of
from tensorspark.data.tfrecord.source.schema import spark_schema
from tensorspark.data.tfrecord.storage.reading import with_binary
from tensorspark.errors import ConfigError, FeedError

_CHUNK_ROWS = 1024
_LEAVES: dict[str, pa.DataType] = {
    "boolean": pa.bool_(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
    "void": pa.null(),
}


class SerializableExample(Protocol):
    """A `tf.train.Example`, of which no more is needed."""

    def SerializeToString(self) -> bytes:
        """The message's bytes."""


def rows_to_examples(
    dtypes: Sequence[tuple[str, str]],
) -> Callable[[Iterable[Sequence[Any] | Mapping[str, Any]]], Iterator[tuple[bytearray, None]]]:
    """What `RDD.mapPartitions` takes to make rows into serialized examples, each beside a None.

    Values are taken by name from a `Row` with fields or a mapping, which may have others too; by position from a tuple.

    Args:
        dtypes: names and types of the columns, as `DataFrame.dtypes` gives them.

    Raises:
        ConfigError: a type that examples cannot hold.
        FeedError: from the function that is returned: a row that lacks a column, or a tuple of another length.
    """
    schema = pa.schema([pa.field(name, _arrow_type(name, text)) for name, text in dtypes])
    Encoder(schema)

    def convert(rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> Iterator[tuple[bytearray, None]]:
        encoder = Encoder(schema)
        for chunk in _chunks(rows):
            ordered = [_in_order(row, schema.names) for row in chunk]
            columns = [
                pa.array(column, field.type) for column, field in zip(zip(*ordered, strict=True), schema, strict=True)
            ]
            for payload in encoder.encode(pa.RecordBatch.from_arrays(columns, schema=schema)).payloads():
                yield bytearray(payload), None

    return convert


def examples_to_rows(
    records: Iterable[tuple[bytes | bytearray, Any]], binary_features: str | Iterable[str] = ()
) -> Iterator[Row]:
    """Rows of serialized examples, as `RDD.mapPartitions` takes and gives them.

    A feature of one value becomes that value, one of several a list, one of none None; so does a feature that other
    examples nearby have and this one lacks. Bytes become text, or bytearrays where `binary_features` names them.

    Raises:
        FeedError: no example, features of different kinds under one name, or bytes that are no text.
    """
    binary = frozenset(names_of(binary_features))
    for chunk in _chunks(records):
        payloads = Records.of([bytes(record[0]) for record in chunk])
        schema = with_binary(infer_schema([payloads]), binary)
        for values in Decoder(schema).decode(payloads).to_pylist():
            yield Row(**{name: _unwrapped(value) for name, value in sorted(values.items())})


def example_schema(example: SerializableExample, binary_features: str | Iterable[str] = ()) -> StructType:
    """The schema of the row that one `tf.train.Example` becomes, with TensorFlowOnSpark's rules: floats are doubles.

    A feature without a value is a string.

    Raises:
        FeedError: features that no column can hold.
    """
    inferred = widened(infer_schema([Records.of([example.SerializeToString()])]))
    strings = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in inferred]
    return spark_schema(with_binary(pa.schema(strings), frozenset(names_of(binary_features))))


def widened(schema: pa.Schema) -> pa.Schema:
    """The schema with float64 where it has float32."""

    def widen(data_type: pa.DataType) -> pa.DataType:
        if pa.types.is_list(data_type):
            return pa.list_(widen(data_type.value_type))
        return pa.float64() if pa.types.is_float32(data_type) else data_type

    return pa.schema([field.with_type(widen(field.type)) for field in schema])


def _arrow_type(name: str, text: str) -> pa.DataType:
    if match := re.fullmatch(r"array<(.*)>", text):
        return pa.list_(_arrow_type(name, match[1]))
    if match := re.fullmatch(r"decimal\((\d+),(\d+)\)", text):
        return pa.decimal128(int(match[1]), int(match[2]))
    if text not in _LEAVES:
        raise ConfigError(
            f"column {name!r}: expected one of {', '.join(_LEAVES)}, decimal, or an array of them, got {text}; cast it"
        )
    return _LEAVES[text]


def _in_order(row: Any, names: list[str]) -> list[Any]:
    """A row's values for the columns `names`."""
    # Spark's Row has this where its values have names.
    fields = list(row) if isinstance(row, Mapping) else getattr(row, "__fields__", None)
    if fields == names:
        return list(row.values() if isinstance(row, Mapping) else row)
    if fields is None:
        if len(row) != len(names):
            raise FeedError(
                f"expected rows of {len(names)} values ({', '.join(names)}), got one of {len(row)}; give dtypes and "
                "rows of the same DataFrame, or a Row"
            )
        return list(row)
    if missing := [name for name in names if name not in fields]:
        raise FeedError(
            f"expected rows with the columns {', '.join(names)}, got one with {', '.join(fields)}, which lacks "
            f"{', '.join(missing)}; give dtypes and rows of the same DataFrame"
        )
    return [row[name] for name in names]


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list):
        values = [_unwrapped(each) for each in value]
        return values if len(values) > 1 else values[0] if values else None
    return bytearray(value) if isinstance(value, bytes) else value


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk
