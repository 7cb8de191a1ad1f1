"""Arrow record batches become columns: every type, sliced and not, and bad rows and schemas by name."""

from __future__ import annotations

import datetime
import decimal
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorspark.data.arrow import ArrowDecoder, check_schema, known_shape_and_dtype
from tensorspark.data.columns import VALIDATION_MARKER, Column, Columns
from tensorspark.errors import FeedError

VECTOR = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)


def _dense(*values: float) -> dict[str, Any]:
    return {"type": 1, "size": None, "indices": None, "values": list(values)}


def _sparse(size: int, **values: float) -> dict[str, Any]:
    indices = [int(name[1:]) for name in values]
    return {"type": 0, "size": size, "indices": indices, "values": list(values.values())}


def _message(batch: pa.RecordBatch) -> bytes:
    content: bytes = batch.serialize().to_pybytes()
    return content


def _decoder(schema: pa.Schema, *columns: Column, sources: tuple[tuple[str, ...], ...] | None = None) -> ArrowDecoder:
    own = tuple((column.name,) for column in columns)
    return ArrowDecoder(columns, own if sources is None else sources, schema.serialize().to_pybytes())


def _decode(array: pa.Array, shape: tuple[int | None, ...] | None, dtype: str) -> NDArray[Any]:
    """What becomes of a DataFrame's column `v`, in one batch."""
    batch = pa.record_batch([array], ["v"])
    (block,) = _decoder(batch.schema, Column("v", shape, dtype)).blocks(iter([_message(batch)]), 3)
    assert block is not None
    return block[0]


def _bytes(*values: Any, dtype: str = "<f4") -> bytes:
    return np.array(values, dtype).tobytes()


# Type, values, the fed column's shape and dtype, and what is expected of it.
KINDS: dict[str, tuple[pa.DataType, list[Any], tuple[int | None, ...] | None, str, list[Any]]] = {
    "double": (pa.float64(), [1.5, -2.0, 3.25], (), "float64", [1.5, -2.0, 3.25]),
    "double to float": (pa.float64(), [1.5, -2.0, 3.25], (), "float32", [1.5, -2.0, 3.25]),
    "float": (pa.float32(), [1.5, -2.0, 3.25], (), "float32", [1.5, -2.0, 3.25]),
    "half": (pa.float16(), [np.float16(1.5), np.float16(2), np.float16(3)], (), "float16", [1.5, 2, 3]),
    "bigint": (pa.int64(), [5, -6, 2**40], (), "int64", [5, -6, 2**40]),
    "bigint to int": (pa.int64(), [5, -6, 2**31 - 1], (), "int32", [5, -6, 2**31 - 1]),
    "int to bigint": (pa.int32(), [5, -6, 7], (), "int64", [5, -6, 7]),
    "tinyint to float": (pa.int8(), [5, -6, 7], (), "float32", [5, -6, 7]),
    "int to unsigned": (pa.int32(), [0, 255, 7], (), "uint8", [0, 255, 7]),
    "boolean": (pa.bool_(), [True, False, True], (), "bool", [True, False, True]),
    "boolean to float": (pa.bool_(), [True, False, True], (), "float32", [1, 0, 1]),
    "scalar of any shape": (pa.int64(), [5, -6, 7], None, "int64", [5, -6, 7]),
    "scalar of width 1": (pa.int64(), [5, -6, 7], (1,), "int64", [[5], [-6], [7]]),
    "scalar of free width": (pa.int64(), [5, -6, 7], (None,), "int64", [[5], [-6], [7]]),
    "list": (pa.list_(pa.float32()), [[1, 2], [3, 4], [5, 6]], (2,), "float32", [[1, 2], [3, 4], [5, 6]]),
    "list of free length": (pa.list_(pa.int64()), [[1, 2], [3, 4], [5, 6]], (None,), "int64", [[1, 2], [3, 4], [5, 6]]),
    "list of any shape": (pa.list_(pa.int64()), [[1, 2], [3, 4], [5, 6]], None, "int64", [[1, 2], [3, 4], [5, 6]]),
    "list of double to float": (pa.list_(pa.float64()), [[1, 2], [3, 4], [5, 6]], (2,), "float32",
                                [[1, 2], [3, 4], [5, 6]]),
    "list of boolean": (pa.list_(pa.bool_()), [[True, False], [False, False], [True, True]], (2,), "bool",
                        [[True, False], [False, False], [True, True]]),
    "large list": (pa.large_list(pa.int32()), [[1, 2], [3, 4], [5, 6]], (2,), "int32", [[1, 2], [3, 4], [5, 6]]),
    "fixed list": (pa.list_(pa.int32(), 2), [[1, 2], [3, 4], [5, 6]], (2,), "int32", [[1, 2], [3, 4], [5, 6]]),
    "empty lists": (pa.list_(pa.float32()), [[], [], []], (None,), "float32", [[], [], []]),
    "nested list": (pa.list_(pa.list_(pa.float32())), [[[1], [2]], [[3], [4]], [[5], [6]]], (2, 1), "float32",
                    [[[1], [2]], [[3], [4]], [[5], [6]]]),
    "nested fixed list": (pa.list_(pa.list_(pa.int8(), 1), 2), [[[1], [2]], [[3], [4]], [[5], [6]]], (None, 1), "int8",
                          [[[1], [2]], [[3], [4]], [[5], [6]]]),
    "fixed in a list": (pa.list_(pa.list_(pa.int8(), 2)), [[[1, 2]], [[3, 4]], [[5, 6]]], (1, 2), "int8",
                        [[[1, 2]], [[3, 4]], [[5, 6]]]),
    "flat list": (pa.list_(pa.float32()), [[1, 2], [3, 4], [5, 6]], (2, 1), "float32",
                  [[[1], [2]], [[3], [4]], [[5], [6]]]),
    "list of strings": (pa.list_(pa.string()), [["a", "b"], ["c", ""], ["e", "é"]], (2,), "object",
                        [["a", "b"], ["c", ""], ["e", "é"]]),
    "string": (pa.string(), ["a", "", "cé"], (), "object", ["a", "", "cé"]),
    "large string": (pa.large_string(), ["a", "", "cé"], (), "object", ["a", "", "cé"]),
    "binary as strings": (pa.binary(), [b"a", b"", b"\x00\xff"], (), "object", [b"a", b"", b"\x00\xff"]),
    "dense vectors": (VECTOR, [_dense(1, 2), _dense(3, 4), _dense(5, 6)], (2,), "float64", [[1, 2], [3, 4], [5, 6]]),
    "dense vectors to float": (VECTOR, [_dense(1, 2), _dense(3, 4), _dense(5, 6)], (2,), "float32",
                               [[1, 2], [3, 4], [5, 6]]),
    "sparse vectors": (VECTOR, [_sparse(3, i1=5), _sparse(3), _sparse(3, i0=1, i2=2)], (3,), "float32",
                       [[0, 5, 0], [0, 0, 0], [1, 0, 2]]),
    "mixed vectors": (VECTOR, [_sparse(3, i1=5), _dense(7, 8, 9), _sparse(3, i0=1, i2=2)], (None,), "float64",
                      [[0, 5, 0], [7, 8, 9], [1, 0, 2]]),
    "mixed vectors, dense first": (VECTOR, [_dense(7, 8, 9), _sparse(3, i2=5), _dense(1, 2, 3)], None, "float64",
                                   [[7, 8, 9], [0, 0, 5], [1, 2, 3]]),
    "vectors in shape": (VECTOR, [_dense(1, 2), _sparse(2, i1=4), _dense(5, 6)], (1, 2), "float32",
                         [[[1, 2]], [[0, 4]], [[5, 6]]]),
    "raw floats": (pa.binary(), [_bytes(1, 2), _bytes(3, 4), _bytes(5, 6)], (2,), "float32", [[1, 2], [3, 4], [5, 6]]),
    "raw large binary": (pa.large_binary(), [_bytes(1, 2), _bytes(3, 4), _bytes(5, 6)], (2, 1), "float32",
                         [[[1], [2]], [[3], [4]], [[5], [6]]]),
    "raw bytes": (pa.binary(), [b"\x01\x02\x03", b"\x00\xff\x05", b"abc"], (3,), "uint8",
                  [[1, 2, 3], [0, 255, 5], [97, 98, 99]]),
    "raw scalars": (pa.binary(), [_bytes(7, dtype="<i8"), _bytes(-8, dtype="<i8"), _bytes(9, dtype="<i8")], (), "int64",
                    [7, -8, 9]),
    "raw of free length": (pa.binary(), [_bytes(1, 2), _bytes(3, 4), _bytes(5, 6)], (None, 1), "float32",
                           [[[1], [2]], [[3], [4]], [[5], [6]]]),
    "raw booleans": (pa.binary(), [b"\x00\x01", b"\x01\x01", b"\x00\x00"], (2,), "bool",
                     [[False, True], [True, True], [False, False]]),
    "raw nothing": (pa.binary(), [b"", b"", b""], (0,), "float32", [[], [], []]),
}  # fmt: skip
kinds = pytest.mark.parametrize(("data_type", "values", "shape", "dtype", "expected"), KINDS.values(), ids=list(KINDS))


@kinds
def test_columns_of_every_type_are_taken(
    data_type: pa.DataType, values: list[Any], shape: Any, dtype: str, expected: list[Any]
) -> None:
    got = _decode(pa.array(values, data_type), shape, dtype)
    assert got.dtype == np.dtype(dtype)
    assert got.flags.aligned
    assert got.tolist() == expected


@kinds
@pytest.mark.parametrize(("start", "stop"), [(1, 3), (0, 2), (1, 2), (2, 2)])
@pytest.mark.parametrize("nullable", [False, True], ids=["", "after a null"])
def test_slices_are_their_own_rows(
    data_type: pa.DataType,
    values: list[Any],
    shape: Any,
    dtype: str,
    expected: list[Any],
    start: int,
    stop: int,
    nullable: bool,
) -> None:
    """Not only those of serialized batches, which Arrow cuts to size: those that the decoder cuts, too."""
    from tensorspark.data import arrow
    from tensorspark.data.decoders import Place

    front = [None] if nullable else []
    array = pa.array([*front, *values], data_type).slice(len(front) + start, stop - start)
    serialized = pa.record_batch([array], ["v"])
    if start == stop:
        assert (
            list(_decoder(serialized.schema, Column("v", shape, dtype)).blocks(iter([_message(serialized)]), 3)) == []
        )
        return
    assert _decode(array, shape, dtype).tolist() == expected[start:stop]
    sliced = pa.record_batch([pa.array([*front, *values], data_type)], ["v"]).slice(len(front) + start, stop - start)
    assert arrow._values(sliced, Column("v", shape, dtype), ("v",), Place(3)).tolist() == expected[start:stop]


ROWS = st.lists(
    st.tuples(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3), st.integers(-9, 9), st.text()),
    max_size=40,
)


@given(rows=ROWS, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), max_bytes=st.integers(1, 400))
def test_batches_of_any_size_hold_all_rows_in_order(rows: list[Any], sizes: list[int], max_bytes: int) -> None:
    from tensorspark.data import arrow

    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64()), ("name", pa.string())])
    messages, first = [], 0
    while first < len(rows):
        size = sizes[len(messages) % len(sizes)]
        columns = list(zip(*rows[first : first + size], strict=True)) or [[], [], []]
        messages.append(
            _message(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema))
        )
        first += size
    decoder = _decoder(schema, Column("y", (), "int32"), Column("name", (), "object"), Column("x", (3,), "float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "_MAX_BLOCK_BYTES", max_bytes)
        blocks = [block for block in decoder.blocks(iter(messages), 3) if block is not None]
    assert all(len(block[0]) == 1 or len(block[0]) * 40 <= max_bytes for block in blocks)
    got = [row for block in blocks for row in zip(*(column.tolist() for column in block), strict=True)]
    assert got == [(y, name, x) for x, y, name in rows]


def _shares_memory(column: NDArray[Any], message: bytes) -> bool:
    return np.may_share_memory(column, np.frombuffer(message, np.uint8))


@pytest.mark.parametrize(
    ("array", "shape", "dtype"),
    [
        (pa.array([[1.0] * 784] * 50, pa.list_(pa.float32())), (784,), "float32"),
        (pa.array([[1.0] * 784] * 50, pa.list_(pa.float32())), (28, 28, 1), "float32"),
        (pa.array([[1.0] * 784] * 50, pa.list_(pa.float32(), 784)), (784,), "float32"),
        (pa.array([[[1.0] * 28] * 28] * 50, pa.list_(pa.list_(pa.float32()))), (28, 28), "float32"),
        (pa.array([_dense(*[1.0] * 784)] * 50, VECTOR), (784,), "float64"),
        (pa.array(range(9000), pa.int64()), (), "int64"),
        (pa.array([bytes(784)] * 50, pa.binary()), (784,), "uint8"),
        (pa.array([bytes(784)] * 50, pa.binary()), (196,), "float32"),
    ],
    ids=["list", "in shape", "fixed list", "nested", "vectors", "scalars", "raw bytes", "raw floats"],
)
def test_what_arrow_holds_as_the_column_does_is_not_copied(array: pa.Array, shape: Any, dtype: str) -> None:
    batch = pa.record_batch([array], ["v"])
    message = _message(batch)
    (block,) = _decoder(batch.schema, Column("v", shape, dtype)).blocks(iter([message]), 3)
    assert block is not None
    assert _shares_memory(block[0], message)


def test_a_small_part_of_a_large_message_does_not_keep_it_alive() -> None:
    batch = pa.record_batch([pa.array([[1.0] * 784] * 50, pa.list_(pa.float64())), pa.array(range(50))], ["x", "y"])
    message = _message(batch)
    decoder = _decoder(batch.schema, Column("x", (784,), "float32"), Column("y", (), "int64"))
    (block,) = decoder.blocks(iter([message]), 3)
    assert block is not None
    assert not any(_shares_memory(column, message) for column in block)
    assert block[1].tolist() == list(range(50))


def test_scalar_columns_stand_side_by_side() -> None:
    batch = pa.record_batch([pa.array([1.5, 2.5]), pa.array([3, 4]), pa.array([True, False])], ["a", "b", "c"])
    decoder = _decoder(batch.schema, Column("x", (3,), "float32"), sources=(("c", "a", "b"),))
    (block,) = decoder.blocks(iter([_message(batch)]), 3)
    assert block is not None
    assert block[0].dtype == np.float32
    assert block[0].tolist() == [[1, 1.5, 3], [0, 2.5, 4]]


def test_a_decoder_survives_pickling() -> None:
    decoder = _decoder(pa.schema([("x", pa.int64())]), Column("x", (), "int64"))
    assert pickle.loads(pickle.dumps(decoder)) == decoder


# Bad rows


SPOILED: dict[str, tuple[pa.DataType, Any, Any, tuple[int | None, ...], str, str]] = {
    "null": (pa.int64(), 1, None, (), "int64", "got null; fill it or drop the row"),
    "null boolean": (pa.bool_(), True, None, (), "bool", "got null; fill it or drop the row"),
    "null string": (pa.string(), "a", None, (), "object", "got null; fill it or drop the row"),
    "null array": (pa.list_(pa.float32()), [1, 2], None, (2,), "float32", "got null; fill it or drop the row"),
    "null fixed array": (pa.list_(pa.float32(), 2), [1, 2], None, (2,), "float32", "got null; fill it"),
    "null vector": (VECTOR, _dense(1, 2), None, (2,), "float32", "got null; fill it or drop the row"),
    "null bytes": (pa.binary(), b"1234", None, (1,), "float32", "got null; fill it or drop the row"),
    "null inside": (pa.list_(pa.float32()), [1, 2], [3, None], (2,), "float32", "got an array with a null in it"),
    "null inside fixed": (pa.list_(pa.int8(), 2), [1, 2], [None, 3], (2,), "int8", "got an array with a null in it"),
    "null array inside": (pa.list_(pa.list_(pa.int8())), [[1], [2]], [[1], None], (2, 1), "int8",
                          "got an array with a null in it"),
    "null deep inside": (pa.list_(pa.list_(pa.int8())), [[1], [2]], [[1], [None]], (2, 1), "int8",
                         "got an array with a null in it"),
    "null in a vector": (VECTOR, _dense(1, 2), {**_dense(), "values": [1, None]}, (2,), "float32",
                         "got an array with a null in it"),
    "short array": (pa.list_(pa.float32()), [1, 2], [1], (2,), "float32", "got an array of length 1 instead of 2"),
    "long array": (pa.list_(pa.float32()), [1, 2], [1, 2, 3], (2,), "float32", "an array of length 3 instead of 2"),
    "short inside": (pa.list_(pa.list_(pa.int8())), [[1], [2]], [[1], []], (2, 1), "int8", "length 0 instead of 1"),
    "short outside": (pa.list_(pa.list_(pa.int8())), [[1], [2]], [[1]], (2, 1), "int8", "length 1 instead of 2"),
    "flat too short": (pa.list_(pa.int8()), [1, 2, 3, 4], [1, 2], (2, 2), "int8", "length 2 instead of 4"),
    "short vector": (VECTOR, _dense(1, 2), _dense(1), (2,), "float32", "got a vector of length 1 instead of 2"),
    "short sparse vector": (VECTOR, _sparse(3, i1=1), _sparse(2, i1=1), (3,), "float32", "vector of length 2 instead"),
    "sparse vector past its end": (VECTOR, _sparse(3, i1=1), _sparse(3, i3=1), (3,), "float32", "a value at 3 of 3"),
    "sparse vector before its start": (VECTOR, _dense(1, 2, 3),
                                       {"type": 0, "size": 3, "indices": [-1], "values": [1.0]}, (3,), "float32",
                                       "a value at -1 of 3"),
    "few bytes": (pa.binary(), b"12345678", b"1234", (2,), "float32", "got bytes of length 4 instead of 8"),
    "too large an integer": (pa.int64(), 5, 256, (), "uint8", r"out of uint8's range \[0, 255\]"),
    "too large a float": (pa.float64(), 5, 1e300, (), "float32", "too large for float32"),
    "too large inside": (pa.list_(pa.float64()), [1, 2], [1, -1e300], (2,), "float32", "too large for float32"),
    "too large in a vector": (VECTOR, _dense(1, 2), _dense(1, -1e300), (2,), "float32", "too large for float32"),
}  # fmt: skip


@pytest.mark.parametrize("position", [0, 3, 5, 8])
@pytest.mark.parametrize(("data_type", "good", "bad", "shape", "dtype", "message"), SPOILED.values(), ids=list(SPOILED))
def test_a_bad_row_is_named_with_its_column_what_was_expected_and_what_came(
    data_type: pa.DataType, good: Any, bad: Any, shape: Any, dtype: str, message: str, position: int
) -> None:
    values = [good] * 9
    values[position] = bad
    schema = pa.schema([("v", data_type)])
    messages = [
        _message(pa.record_batch([pa.array(values[first : first + size], data_type)], schema))
        for first, size in ((0, 3), (3, 4), (7, 2))
    ]
    decoder = _decoder(schema, Column("v", shape, dtype))
    with pytest.raises(
        FeedError, match=rf"partition 3, row {position}: column 'v' of the DataFrame: .*{message}"
    ) as caught:
        list(decoder.blocks(iter(messages), 3))
    assert f"expected {Column('v', shape, dtype)} for v" in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("data_type", "good", "bad", "message"),
    [
        (pa.list_(pa.float32()), [1, 2], [1, 2, 3], "an array of length 3, and 2 before"),
        (pa.list_(pa.float32()), [1, 2], [], "an array of length 0, and 2 before"),
        (VECTOR, _dense(1, 2), _sparse(3, i1=5), "a vector of length 3, and 2 before"),
        (pa.binary(), b"12345678", b"1234", "bytes of length 4, and 8 before"),
    ],
    ids=["longer array", "empty array", "vector", "bytes"],
)
def test_a_row_that_is_unlike_those_before_it_is_named(
    data_type: pa.DataType, good: Any, bad: Any, message: str
) -> None:
    with pytest.raises(FeedError, match=f"partition 3, row 4: column 'v' of the DataFrame: .*got {message}"):
        _decode(pa.array([good] * 4 + [bad] + [good], data_type), (None,), "float32")


def test_bytes_that_are_no_whole_rows_are_refused() -> None:
    with pytest.raises(FeedError, match=r"row 0: column 'v' .* got 6 bytes; make them a multiple of 4"):
        _decode(pa.array([b"123456"]), (None,), "float32")


def test_a_bad_row_of_a_part_of_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorspark.data import arrow

    monkeypatch.setattr(arrow, "_MAX_BLOCK_BYTES", 8 * 2 * 3)
    values: list[Any] = [[i, 1] for i in range(10)]
    values[7] = [7]
    batch = pa.record_batch([pa.array(values, pa.list_(pa.int64()))], ["v"])
    blocks = _decoder(batch.schema, Column("v", (2,), "int64")).blocks(iter([_message(batch)]), 3)
    assert [len(block[0]) for block in (next(blocks), next(blocks)) if block] == [3, 3]
    with pytest.raises(FeedError, match=r"row 7: .* got an array of length 1 instead of 2"):
        next(blocks)


def test_rows_after_the_marker_are_held_out_and_counted_from_it() -> None:
    batch = pa.record_batch([pa.array([1, 2, 3])], ["v"])
    bad = pa.record_batch([pa.array([4, None])], ["v"])
    decoder = _decoder(batch.schema, Column("v", (), "int64"))
    blocks = decoder.blocks(iter([_message(batch), VALIDATION_MARKER, _message(batch), _message(bad)]), 3)
    assert [None if block is None else block[0].tolist() for block in (next(blocks), next(blocks), next(blocks))] == [
        [1, 2, 3],
        None,
        [1, 2, 3],
    ]
    with pytest.raises(FeedError, match=r"partition 3, validation row 4: .* got null"):
        next(blocks)


@pytest.mark.parametrize("message", [b"nothing of the kind", b"", 5, ("a",), None], ids=str)
def test_what_is_no_record_batch_is_refused(message: Any) -> None:
    decoder = _decoder(pa.schema([("v", pa.int64())]), Column("v", (), "int64"))
    with pytest.raises(FeedError, match="partition 3, row 0: expected the bytes of an Arrow record batch"):
        list(decoder.blocks(iter([message]), 3))


# Schemas


def _check(data_type: pa.DataType, shape: Any, dtype: str) -> None:
    check_schema([Column("x", shape, dtype)], [("v",)], pa.schema([("v", data_type)]))


@kinds
def test_a_schema_that_can_be_fed_passes(
    data_type: pa.DataType, values: list[Any], shape: Any, dtype: str, expected: list[Any]
) -> None:
    _check(data_type, shape, dtype)


UNFIT: dict[str, tuple[pa.DataType, Any, str, str]] = {
    "double for int": (pa.float64(), (), "int64", "got double, which does not convert without loss: cast the column"),
    "list of double for int": (pa.list_(pa.float64()), (2,), "int64", "got list.*cast the column"),
    "vector for int": (VECTOR, (2,), "int64", "got a Spark ML vector, which does not convert without loss"),
    "vector for a scalar": (VECTOR, (), "float32", "got a Spark ML vector: name a scalar column"),
    "vector for string": (VECTOR, (2,), "object", "got a Spark ML vector: cast it to string"),
    "string for float": (pa.string(), (), "float32", "got string: index or hash the strings first"),
    "int for string": (pa.int64(), (), "object", "got int64: cast it to string"),
    "int for bool": (pa.int64(), (), "bool", "got int64, which does not convert without loss"),
    "scalar for array": (pa.float32(), (784,), "float32", r"got float: make it a column of arrays of shape \[784\]"),
    "scalar for image": (pa.float32(), (28, 28), "float32", r"arrays of shape \[28, 28\] or \[784\]"),
    "array for scalar": (pa.list_(pa.int64()), (), "int64", "name a scalar column"),
    "nested for flat": (pa.list_(pa.list_(pa.int64())), (4,), "int64", r"make it a column of arrays of shape \[4\]"),
    "flat for free": (pa.list_(pa.int64()), (None, 3), "int64", r"make it a column of arrays of shape \[any, 3\]"),
    "length": (pa.list_(pa.int64(), 3), (4,), "int64", r"make it a column of arrays of shape \[4\]"),
    "raw of any shape": (pa.binary(), None, "float32", "raw bytes do not say their shape"),
    "raw of two free sizes": (pa.binary(), (None, None), "float32", "raw bytes do not say their shape"),
    "decimal": (pa.decimal128(10, 2), (), "float32", "decimal128.*, which cannot be fed: cast it to double"),
    "decimals": (pa.list_(pa.decimal128(10, 2)), (2,), "float32", "which cannot be fed: cast it to double"),
    "timestamp": (pa.timestamp("us"), (), "int64", r"timestamp\[us\], which cannot be fed: cast it to double"),
    "duration": (pa.duration("us"), (), "int64", "which cannot be fed: cast it to double"),
    "date": (pa.date32(), (), "int64", "which cannot be fed: make a number of it"),
    "map": (pa.map_(pa.string(), pa.int64()), (), "int64", "which cannot be fed: select its parts"),
    "struct": (pa.struct([("a", pa.int64())]), (), "int64", "which cannot be fed: select its parts"),
    "nulls": (pa.null(), (), "int64", "which cannot be fed: it holds nulls only"),
}


@pytest.mark.parametrize(("data_type", "shape", "dtype", "message"), UNFIT.values(), ids=list(UNFIT))
def test_a_schema_that_cannot_be_fed_is_refused_on_both_sides(
    data_type: pa.DataType, shape: Any, dtype: str, message: str
) -> None:
    with pytest.raises(FeedError, match=f"column 'v' of the DataFrame.*{message}"):
        _check(data_type, shape, dtype)
    decoder = _decoder(pa.schema([("v", data_type)]), Column("v", shape, dtype))
    with pytest.raises(FeedError, match=f"column 'v' of the DataFrame.*{message}"):
        list(decoder.blocks(iter([]), 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imag", r"the DataFrame has no column 'imag': did you mean 'image'\?; it has image, Label, twice, twice"),
        ("label", r"no column 'label': did you mean 'Label'\?"),
        ("zzz", r"the DataFrame has no column 'zzz'; it has image, Label"),
        ("twice", "expected one column 'twice' in the DataFrame, got 2: rename or drop"),
    ],
)
def test_a_column_that_is_not_there_once_is_refused_with_those_that_are(name: str, message: str) -> None:
    schema = pa.schema([(have, pa.int64()) for have in ("image", "Label", "twice", "twice")])
    with pytest.raises(FeedError, match=message):
        check_schema([Column("x", (), "int64")], [(name,)], schema)


@pytest.mark.parametrize(
    ("second", "width", "message"),
    [
        (pa.list_(pa.float64()), 2, "column 'b' .* among 2 columns: only scalar columns"),
        (VECTOR, 2, "column 'b' .* among 2 columns: only scalar columns"),
        (pa.binary(), 2, "column 'b' .* among 2 columns: only scalar columns"),
        (pa.string(), 2, "column 'b' .* index or hash"),
        (pa.float64(), 3, "column 'a' .* and 1 more: name as many columns as x is wide"),
    ],
)
def test_columns_that_cannot_stand_side_by_side_are_refused(second: pa.DataType, width: int, message: str) -> None:
    schema = pa.schema([("a", pa.float64()), ("b", second)])
    with pytest.raises(FeedError, match=message):
        check_schema([Column("x", (width,), "float32")], [("a", "b")], schema)


@pytest.mark.parametrize(
    ("data_type", "expected"),
    [
        (pa.int32(), ((), "int32")),
        (pa.float64(), ((), "float64")),
        (pa.bool_(), ((), "bool")),
        (pa.string(), ((), "object")),
        (pa.binary(), ((), "object")),
        (pa.list_(pa.float32()), (None, "float32")),
        (pa.list_(pa.float32(), 3), ((3,), "float32")),
        (pa.list_(pa.list_(pa.int8(), 2), 3), ((3, 2), "int8")),
        (pa.list_(pa.list_(pa.int8(), 2)), (None, "int8")),
        (VECTOR, (None, "float64")),
    ],
    ids=str,
)
def test_what_a_schema_knows_of_a_column(data_type: pa.DataType, expected: Any) -> None:
    assert known_shape_and_dtype(pa.field("label", data_type)) == expected


@pytest.mark.parametrize("value", [decimal.Decimal("1.5"), datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1)])
def test_what_cannot_be_fed_is_known_to_nobody(value: Any) -> None:
    with pytest.raises(FeedError, match=r"column 'label' of the DataFrame is .* which cannot be fed"):
        known_shape_and_dtype(pa.field("label", pa.array([value]).type))


def _spark_rows(sc: Any) -> tuple[Any, pa.Schema]:
    """A DataFrame's batches as Spark itself makes them."""
    from pyspark import RDD
    from pyspark.ml.linalg import Vectors
    from pyspark.serializers import FramedSerializer
    from pyspark.sql import SparkSession
    from pyspark.sql.pandas.types import to_arrow_schema

    class Raw(FramedSerializer):
        def loads(self, obj: bytes) -> bytes:
            return obj

    vectors = [Vectors.sparse(3, [1], [float(i)]) if i % 3 else Vectors.dense([1.0, 2.0, i]) for i in range(10)]
    rows = [([i + 0.5, -1.0 * i], vectors[i], i, f"row {i}", bytearray(_bytes(i, i))) for i in range(10)]
    frame = SparkSession(sc).createDataFrame(rows, ["x", "v", "y", "name", "raw"])
    return RDD(frame._jdf.toArrowBatchRdd().toJavaRDD(), sc, Raw()), to_arrow_schema(frame.schema)


def test_batches_that_spark_makes_are_decoded(sc: Any) -> None:
    rdd, schema = _spark_rows(sc)
    columns = (
        Column("x", (2,), "float32"),
        Column("v", (3,), "float32"),
        Column("y", (), "int64"),
        Column("name", (), "object"),
        Column("raw", (2,), "float32"),
    )
    blocks: list[Columns] = [block for block in _decoder(schema, *columns).blocks(iter(rdd.collect()), 0) if block]
    x, v, y, name, raw = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert x.tolist() == [[i + 0.5, -i] for i in range(10)]
    assert v.tolist() == [[0, i, 0] if i % 3 else [1, 2, i] for i in range(10)]
    assert y.tolist() == list(range(10))
    assert name.tolist() == [f"row {i}" for i in range(10)]
    assert raw.tolist() == [[i, i] for i in range(10)]
