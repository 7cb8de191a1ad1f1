"""Rows become what TensorFlow's own messages parse; then back, the same rows."""

from __future__ import annotations

import decimal
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import Records, frame
from tensorspark.errors import ConfigError, FeedError
from tests.data.tfrecord.messages import Row, comparable, example, sequence_example, tables


def _payloads(schema: pa.Schema, rows: list[Row], record_type: Any = "Example") -> list[bytes]:
    batch = pa.RecordBatch.from_struct_array(pa.array(rows, pa.struct(list(schema)))) if rows else _empty(schema)
    return [bytes(payload) for payload in Encoder(schema, record_type).encode(batch).payloads()]


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema)


def _bits(message: Any) -> Any:
    """A message with its floats as bits: NaN is not equal to itself."""
    return message.SerializeToString(deterministic=True)


@given(tables())
def test_examples_parse_to_tensorflows_own(table: tuple[pa.Schema, list[Row]]) -> None:
    schema, rows = table
    parsed = [tf.train.Example.FromString(payload) for payload in _payloads(schema, rows)]
    assert [_bits(message) for message in parsed] == [_bits(_with_features(example(row, schema))) for row in rows]


def _with_features(message: tf.train.Example) -> tf.train.Example:
    message.features.SetInParent()
    return message


@given(tables(deepest=2))
def test_sequence_examples_parse_to_tensorflows_own(table: tuple[pa.Schema, list[Row]]) -> None:
    schema, rows = table
    payloads = _payloads(schema, rows, "SequenceExample")
    parsed = [tf.train.SequenceExample.FromString(payload) for payload in payloads]
    assert [_bits(message) for message in parsed] == [_bits(sequence_example(row, schema)) for row in rows]


@given(tables(deepest=2), st.integers(0, 5))
def test_rows_come_back_as_they_were(table: tuple[pa.Schema, list[Row]], start: int) -> None:
    schema, rows = table
    batch = pa.RecordBatch.from_pylist(rows, schema).slice(start) if len(schema) else _empty(schema)
    records = Encoder(schema, "SequenceExample").encode(batch)
    back = Decoder(schema, "SequenceExample").decode(records)
    back.validate(full=True)
    assert back.schema == schema
    assert comparable(back.to_pylist()) == comparable(batch.to_pylist())


@given(tables(), st.integers(5, 9))
def test_buffers_larger_than_a_views_reach_are_given_in_windows(table: tuple[pa.Schema, list[Row]], bits: int) -> None:
    schema, rows = table
    with pytest.MonkeyPatch.context() as patch:
        # Two to this are 1 GiB: small here, so that there are several.
        patch.setattr("tensorspark.data.tfrecord.format.ragged._WINDOW_BITS", bits)
        payloads = _payloads(schema, rows)
        back = Decoder(schema).decode(Records.of(payloads))
    assert comparable(back.to_pylist()) == comparable(rows)
    assert payloads == _payloads(schema, rows)


def test_rows_without_columns_are_empty_examples() -> None:
    batch = pa.RecordBatch.from_struct_array(pa.array([{}, {}], pa.struct([])))
    payloads = [bytes(payload) for payload in Encoder(pa.schema([])).encode(batch).payloads()]
    assert [tf.train.Example.FromString(payload) for payload in payloads] == [_with_features(tf.train.Example())] * 2


def test_a_value_of_ten_megabytes_comes_back(tmp_path: Path) -> None:
    value = np.random.default_rng(1).bytes(10_000_000)
    numbers = np.arange(2_500_000, dtype=np.float32)
    schema = pa.schema([("small", pa.int64()), ("bytes", pa.binary()), ("floats", pa.list_(pa.float32()))])
    rows = [{"small": 7, "bytes": b"x", "floats": [1.0]}, {"small": 300, "bytes": value, "floats": numbers}]
    records = Encoder(schema).encode(pa.RecordBatch.from_pylist(rows, schema))
    (tmp_path / "a").write_bytes(frame(records))
    first, second = tf.data.TFRecordDataset(str(tmp_path / "a")).as_numpy_iterator()
    assert tf.train.Example.FromString(first).features.feature["small"].int64_list.value == [7]
    parsed = tf.train.Example.FromString(second).features.feature
    assert parsed["bytes"].bytes_list.value == [value]
    np.testing.assert_array_equal(parsed["floats"].float_list.value, numbers)
    back = Decoder(schema).decode(records)
    assert back["bytes"][1].as_py() == value
    np.testing.assert_array_equal(back["floats"][1].values, numbers)


def test_doubles_and_decimals_are_rounded_to_float32() -> None:
    schema = pa.schema([("double", pa.float64()), ("decimal", pa.decimal128(10, 2))])
    rows = [{"double": 1e300, "decimal": decimal.Decimal("12345.67")}, {"double": 0.1, "decimal": None}]
    first, second = (tf.train.Example.FromString(each).features.feature for each in _payloads(schema, rows))
    assert first["double"].float_list.value == [math.inf]
    assert first["decimal"].float_list.value == [np.float32(12345.67)]
    assert second["double"].float_list.value == [np.float32(0.1)]
    assert "decimal" not in second


def test_arrays_of_a_fixed_size_and_slices_of_them_are_encoded() -> None:
    schema = pa.schema([("pair", pa.list_(pa.int32(), 2))])
    rows = [{"pair": [1, 2]}, {"pair": None}, {"pair": [-3, 400]}, {"pair": [5, 6]}]
    batch = pa.RecordBatch.from_pylist(rows, schema).slice(1, 2)
    records = Encoder(schema).encode(batch)
    parsed = [tf.train.Example.FromString(bytes(each)).features.feature for each in records.payloads()]
    assert "pair" not in parsed[0]
    assert parsed[1]["pair"].int64_list.value == [-3, 400]
    assert Decoder(schema).decode(records).to_pylist() == batch.to_pylist()


def test_values_beneath_a_null_array_are_not_written() -> None:
    values = pa.array([1, 2, 3, 4, 5])
    arrays = pa.ListArray.from_arrays([0, 2, 3, 5], values, mask=pa.array([False, True, False]))
    batch = pa.RecordBatch.from_arrays([arrays], ["a"])
    assert Decoder(batch.schema).decode(Encoder(batch.schema).encode(batch)).to_pylist() == [
        {"a": [1, 2]},
        {"a": None},
        {"a": [4, 5]},
    ]


@pytest.mark.parametrize("num_rows", [1, 15, 16, 500])
def test_rows_that_are_laid_out_alike_but_for_one_come_back(num_rows: int) -> None:
    schema = pa.schema([("image", pa.list_(pa.float32())), ("label", pa.int64()), ("name", pa.string())])
    rows: list[Row] = [{"image": [index / 2, 1.0], "label": index % 10, "name": "abc"} for index in range(num_rows)]
    odd: list[Row] = [
        {"image": [2.0, 1.0], "label": 7, "name": "xyz"},
        {"image": [2.0, 1.0], "label": 700, "name": "xy"},
        {"image": [2.0, 1.0], "label": None, "name": "xyz"},
        {"image": [2.0], "label": 3, "name": "abc long"},
    ]
    for other in odd:
        for place in {0, num_rows // 2, num_rows}:
            mixed = [*rows[:place], other, *rows[place:]]
            assert Decoder(schema).decode(Records.of(_payloads(schema, mixed))).to_pylist() == mixed


def test_byte_arrays_are_records_as_they_are() -> None:
    schema = pa.schema([("byteArray", pa.binary())])
    values = [b"", b"abc", bytes(300)]
    assert _payloads(schema, [{"byteArray": value} for value in values], "ByteArray") == values
    with pytest.raises(FeedError, match=r"'byteArray'.*null in row 1"):
        _payloads(schema, [{"byteArray": b"a"}, {"byteArray": None}], "ByteArray")


@pytest.mark.parametrize("record_type", ["Example", "SequenceExample"])
def test_a_null_within_an_array_is_an_error_that_names_the_column(record_type: str) -> None:
    schema = pa.schema([("a", pa.list_(pa.int64()))])
    with pytest.raises(FeedError, match="column 'a': expected arrays without nulls"):
        _payloads(schema, [{"a": [1]}, {"a": [1, None]}], record_type)


def test_an_integer_beyond_int64_is_an_error_that_names_the_column() -> None:
    schema = pa.schema([("a", pa.uint64())])
    assert len(_payloads(schema, [{"a": 2**63 - 1}])) == 1
    with pytest.raises(FeedError, match=f"column 'a'.*got {2**63}"):
        _payloads(schema, [{"a": 2**63}])


@pytest.mark.parametrize(
    ("field", "record_type", "expected"),
    [
        (pa.field("a", pa.timestamp("us")), "Example", "column 'a'.*got timestamp"),
        (pa.field("a", pa.struct([("b", pa.int64())])), "Example", "column 'a'.*got struct"),
        (pa.field("a", pa.list_(pa.list_(pa.int64()))), "Example", "set recordType to SequenceExample"),
        (pa.field("a", pa.list_(pa.list_(pa.list_(pa.int64())))), "SequenceExample", "column 'a'"),
        (pa.field("a", pa.int64()), "ByteArray", "one column of type binary, got a: int64"),
        (pa.field("a", pa.int64()), "Exmaple", "recordType: expected one of Example, SequenceExample, ByteArray"),
    ],
)
def test_a_schema_that_records_cannot_hold_is_refused(field: pa.Field, record_type: Any, expected: str) -> None:
    for kernel in (Encoder, Decoder):
        with pytest.raises(ConfigError, match=expected):
            kernel(pa.schema([field]), record_type)


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="different names, got a, a"):
        Encoder(pa.schema([("a", pa.int64()), ("a", pa.int64())]))
