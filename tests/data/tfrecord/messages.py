"""For tests: rows of random types and values, and the same as TensorFlow's own messages."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from hypothesis import strategies as st

Row = dict[str, Any]

floats = st.floats(width=32, allow_nan=True) | st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 2.0**-149])
_LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 127, 128, -1, 2**63 - 1, -(2**63)])),
    (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.int16(), st.integers(-(2**15), 2**15 - 1)),
    (pa.float32(), floats),
    (pa.float64(), floats),
    (pa.bool_(), st.booleans()),
    (pa.string(), st.text(max_size=20)),
    (pa.large_string(), st.text(max_size=20)),
    (pa.binary(), st.binary(max_size=200)),
]
names = st.text(min_size=1, max_size=12) | st.sampled_from(["a", "b", "long name " * 20])


@st.composite
def tables(draw: st.DrawFn, deepest: int = 1) -> tuple[pa.Schema, list[Row]]:
    """A schema, and rows of it in which some values are null."""
    fields, columns = [], {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        leaf, values = draw(st.sampled_from(_LEAVES))
        for _ in range(draw(st.integers(0, deepest))):
            leaf, values = draw(st.sampled_from([pa.list_, pa.large_list]))(leaf), st.lists(values, max_size=5)
        fields.append(pa.field(name, leaf))
        columns[name] = draw(st.sampled_from([values, values | st.none()]))
    rows = draw(st.lists(st.fixed_dictionaries(columns), max_size=25))
    return pa.schema(fields), rows


def feature(value: Any, data_type: pa.DataType) -> tf.train.Feature:
    """TensorFlow's Feature of a value or list."""
    leaf = data_type
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf):
        leaf = leaf.value_type
    values = value if isinstance(value, list) else [value]
    if pa.types.is_integer(leaf) or pa.types.is_boolean(leaf):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[int(each) for each in values]))
    if pa.types.is_floating(leaf):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    encoded = [each.encode() if isinstance(each, str) else each for each in values]
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))


def example(row: Row, schema: pa.Schema) -> tf.train.Example:
    """TensorFlow's Example of a row: a null is no feature."""
    given = {name: feature(value, schema.field(name).type) for name, value in row.items() if value is not None}
    return tf.train.Example(features=tf.train.Features(feature=given))


def is_nested(data_type: pa.DataType) -> bool:
    """Whether it is an array of arrays."""
    is_list = pa.types.is_list(data_type) or pa.types.is_large_list(data_type)
    inner = data_type.value_type if is_list else None
    return inner is not None and (pa.types.is_list(inner) or pa.types.is_large_list(inner))


def sequence_example(row: Row, schema: pa.Schema) -> tf.train.SequenceExample:
    """TensorFlow's SequenceExample of a row: arrays of arrays are feature lists, all else is context."""
    given = {name: value for name, value in row.items() if value is not None}
    lists = {
        name: tf.train.FeatureList(feature=[feature(each, schema.field(name).type) for each in given[name]])
        for name in given
        if is_nested(schema.field(name).type)
    }
    context = {name: feature(given[name], schema.field(name).type) for name in given.keys() - lists.keys()}
    return tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=lists)
    )


def comparable(value: Any) -> Any:
    """The same with floats as their bits, for NaN and minus zero."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, list):
        return [comparable(each) for each in value]
    if isinstance(value, dict):
        return {name: comparable(each) for name, each in value.items()}
    return value


def varint(value: int) -> bytes:
    """Protobuf's variable-length integer, as its documentation says."""
    value %= 2**64
    encoded = b""
    while value >= 128:
        encoded += bytes([value % 128 + 128])
        value //= 128
    return encoded + bytes([value])


def delimited(number: int, content: bytes) -> bytes:
    """A field of a message, string or packed list."""
    return varint(number * 8 + 2) + varint(len(content)) + content


def example_of(*entries: tuple[bytes, bytes]) -> bytes:
    """An Example's bytes from names and Features' bytes."""
    return delimited(1, b"".join(delimited(1, delimited(1, name) + delimited(2, value)) for name, value in entries))


def packed_floats(*values: float) -> bytes:
    """A Feature of floats."""
    return delimited(2, delimited(1, np.array(values, "<f4").tobytes()))


def packed_ints(*values: int) -> bytes:
    """A Feature of integers."""
    return delimited(3, delimited(1, b"".join(varint(value) for value in values)))


def strings(*values: bytes) -> bytes:
    """A Feature of byte strings."""
    return delimited(1, b"".join(delimited(1, value) for value in values))
