"""Which Arrow (and so Spark) types TFRecord features hold; docs/tfrecord.md has the table, with what is lost.

Integers and booleans are an Int64List, floats and decimals a FloatList of float32, strings and binary a BytesList; an
array has several values in one list, an array of arrays is a FeatureList. A null column value is written as no feature
at all, and a missing feature is read as null, as is one of no kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from tensorspark.errors import ConfigError

RecordType = Literal["Example", "SequenceExample", "ByteArray"]
RECORD_TYPES: tuple[RecordType, ...] = ("Example", "SequenceExample", "ByteArray")
BYTE_ARRAY_COLUMN = "byteArray"

# The number of a list's field in the message tf.train.Feature.
BYTES, FLOATS, INTS = 1, 2, 3
NO_KIND = 0
KIND_NAMES = {NO_KIND: "no kind", BYTES: "BytesList", FLOATS: "FloatList", INTS: "Int64List"}


@dataclass(frozen=True)
class FeatureType:
    """How a column's type lies in features.

    Attributes:
        kind: `BYTES`, `FLOATS` or `INTS`; `NO_KIND` for a column of nulls.
        depth: 0 for a single value, 1 for an array, 2 for an array of arrays.
        leaf: Arrow's type of the values.
    """

    kind: int
    depth: int
    leaf: pa.DataType


def feature_type(field: pa.Field, record_type: RecordType) -> FeatureType:
    """How a column lies in features.

    Raises:
        ConfigError: a type that features cannot hold, or arrays of arrays where the record type has none.
    """
    depth, leaf = 0, field.type
    while _is_array(leaf):
        depth, leaf = depth + 1, leaf.value_type
    kind = _kind(leaf)
    deepest = 2 if record_type == "SequenceExample" else 1
    if kind is None or (kind == NO_KIND and depth) or depth > deepest:
        hint = ": set recordType to SequenceExample" if depth == 2 and kind and record_type == "Example" else ""
        raise ConfigError(
            f"column {field.name!r}: expected a boolean, number, decimal, string or binary, or an array of them "
            f"(SequenceExample: an array of arrays too), got {field.type}; cast or drop the column{hint}"
        )
    return FeatureType(kind, depth, leaf)


def check_record_type(record_type: str) -> None:
    """Raises ConfigError for a name that is no record type's."""
    if record_type not in RECORD_TYPES:
        raise ConfigError(f"recordType: expected one of {', '.join(RECORD_TYPES)}, got {record_type!r}")


def byte_array_field(schema: pa.Schema) -> pa.Field | None:
    """The one column of a ByteArray schema; None where no column is asked for.

    Raises:
        ConfigError: several columns, or one that is not binary or string.
    """
    if not len(schema):
        return None
    field = schema.field(0)
    if len(schema) > 1 or _kind(field.type) != BYTES:
        raise ConfigError(
            f"recordType ByteArray: expected one column of type binary, got "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema)}; select it, or set another recordType"
        )
    return field


def _is_array(data_type: pa.DataType) -> bool:
    types = pa.types
    return any(test(data_type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _kind(leaf: pa.DataType) -> int | None:
    types = pa.types
    if types.is_integer(leaf) or types.is_boolean(leaf):
        return INTS
    if types.is_floating(leaf) or types.is_decimal(leaf):
        return FLOATS
    if any(test(leaf) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        return BYTES
    return NO_KIND if types.is_null(leaf) else None
