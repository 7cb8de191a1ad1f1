"""Schemas of records that bring none: kinds, single values against arrays, and what is merged."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.inference import infer_schema, merge_schemas
from tensorspark.errors import ConfigError, FeedError
from tests.data.tfrecord.messages import delimited, example_of, packed_floats, packed_ints, strings

LONG, FLOAT, STRING, BINARY = pa.int64(), pa.float32(), pa.string(), pa.binary()

FEATURES: list[tuple[bytes, pa.DataType]] = [
    (b"", pa.null()),
    (delimited(3, b""), pa.null()),
    (packed_ints(7), LONG),
    (packed_floats(0.5), FLOAT),
    (strings("ä".encode()), STRING),
    (packed_ints(7, 8), pa.list_(LONG)),
    (packed_floats(0.5, 1.5), pa.list_(FLOAT)),
    (strings(b"x", b""), pa.list_(STRING)),
]


def _infer(*payloads: bytes, record_type: Any = "Example", **options: Any) -> dict[str, pa.DataType]:
    schema = infer_schema([Records.of(list(payloads), "part-0")], record_type, **options)
    assert all(field.nullable for field in schema)
    return {field.name: field.type for field in schema}


@pytest.mark.parametrize(("feature", "expected"), FEATURES)
def test_a_feature_alone_has_the_connectors_type(feature: bytes, expected: pa.DataType) -> None:
    assert _infer(example_of((b"a", feature))) == {"a": expected}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(len(FEATURES)), 2)))
def test_of_two_records_the_later_in_the_connectors_order_holds(one: int, other: int) -> None:
    # FEATURES stand in that order.
    payloads = [example_of((b"a", FEATURES[index][0])) for index in (one, other)]
    for order in (payloads, payloads[::-1]):
        assert _infer(*order) == {"a": FEATURES[other][1]}
        schemas = [infer_schema([Records.of([payload])]) for payload in order]
        assert merge_schemas(schemas) == pa.schema([("a", FEATURES[other][1])])
        assert infer_schema(Records.of([payload]) for payload in order) == pa.schema([("a", FEATURES[other][1])])


def test_columns_stand_by_name_and_come_from_all_records() -> None:
    payloads = [example_of((b"z", packed_ints(1)), (b"b", packed_floats(1))), example_of((b"a", strings(b"x"))), b""]
    assert list(_infer(*payloads).items()) == [("a", STRING), ("b", FLOAT), ("z", LONG)]


def test_byte_strings_that_are_no_text_make_a_column_binary_wherever_they_stand() -> None:
    text, image = example_of((b"a", strings(b"x", b"y"))), example_of((b"a", strings(b"\xff\xd8")))
    assert _infer(text, image) == _infer(image, text) == {"a": pa.list_(BINARY)}
    assert _infer(image) == {"a": BINARY}
    # Halves of one character, which side by side are text.
    halves = example_of((b"a", strings(b"\xc3", b"\xa4")))
    assert _infer(halves) == {"a": pa.list_(BINARY)}
    schemas = [infer_schema([Records.of([payload])]) for payload in (text, image)]
    assert merge_schemas(schemas) == pa.schema([("a", pa.list_(BINARY))])


def test_feature_lists_are_arrays_of_arrays_and_beat_what_the_context_has() -> None:
    def lists(*features: bytes) -> bytes:
        inner = b"".join(delimited(1, each) for each in features)
        return delimited(2, delimited(1, delimited(1, b"a") + delimited(2, inner)))

    context = example_of((b"c", packed_ints(1)))
    nested = pa.list_(pa.list_(LONG))
    assert _infer(context + lists(packed_ints(1)), record_type="SequenceExample") == {"a": nested, "c": LONG}
    assert _infer(lists(packed_ints(1), packed_ints(), packed_ints(2, 3)), record_type="SequenceExample") == {
        "a": nested
    }
    assert _infer(lists(), record_type="SequenceExample") == {"a": pa.null()}
    both = [example_of((b"a", strings(b"x", b"y"))), lists(packed_ints(1))]
    assert _infer(*both, record_type="SequenceExample") == {"a": nested}


def test_byte_arrays_have_one_column_whatever_they_hold() -> None:
    assert _infer(b"anything", record_type="ByteArray") == {"byteArray": BINARY}


def test_no_records_have_no_columns() -> None:
    assert _infer() == {}
    assert infer_schema([]) == pa.schema([])


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda values: packed_ints(*values))
            | st.just(b""),
        ),
        max_size=20,
    )
)
def test_what_is_inferred_from_records_of_one_kind_reads_them(rows: list[dict[str, bytes]]) -> None:
    records = Records.of([example_of(*((name.encode(), value) for name, value in row.items())) for row in rows])
    schema = infer_schema([records])
    assert Decoder(schema).decode(records).num_rows == len(rows)
    assert set(schema.names) == {name for row in rows for name in row}


def test_a_sample_looks_at_the_share_that_is_asked_for() -> None:
    # Each record has a feature of its own name: the columns count the records that were looked at.
    payloads = [example_of((f"{index}".encode(), packed_ints(1))) for index in range(2000)]
    num_seen = len(_infer(*payloads, sample_ratio=0.1))
    assert 140 <= num_seen <= 260
    assert _infer(*payloads, sample_ratio=0.1) == _infer(*payloads, sample_ratio=0.1)
    assert _infer(*payloads, sample_ratio=0.1, seed=1) != _infer(*payloads, sample_ratio=0.1)
    assert len(_infer(*payloads[:3], sample_ratio=1e-9)) == 1


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="inferSchemaSampleRatio"):
        _infer(sample_ratio=ratio)


def test_bytes_that_are_no_example_are_an_error_that_names_file_and_record() -> None:
    with pytest.raises(FeedError, match=r"part-0: record 1: expected a tf\.train\.Example.*recordType"):
        _infer(b"", b"\x0a\x05abc")


def test_feature_lists_among_examples_are_an_error_that_names_the_record_type() -> None:
    context = example_of((b"c", packed_ints(1)))
    lists = delimited(2, delimited(1, delimited(1, b"a") + delimited(2, delimited(1, packed_ints(1)))))
    expected = (
        r"part-0: record 2: expected a tf\.train\.Example, got the feature lists of a SequenceExample.*recordType"
    )
    with pytest.raises(FeedError, match=expected):
        _infer(context, context, context + lists, context, lists)
    assert _infer(context, record_type="SequenceExample") == _infer(context) == {"c": LONG}


def test_a_name_that_is_no_utf8_is_an_error() -> None:
    with pytest.raises(FeedError, match=r"names in UTF-8, got b'\\xff'"):
        _infer(example_of((b"\xff", packed_ints(1))))
