"""Rows and blocks become columns; bad ones are named."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tensorspark.data.columns import VALIDATION_MARKER, Column, Columns
from tensorspark.data.decoders import BlockDecoder, RowDecoder
from tensorspark.errors import FeedError

X = Column("x:0", (2,), "float32")
Y = Column("y:0", (), "int64")
NAME = Column("name:0", (), "object")


def _rows(num_rows: int) -> list[tuple[list[float], int]]:
    return [([i + 0.5, -i], 1000 + i) for i in range(num_rows)]


def _decode(rows: Iterable[Any], columns: tuple[Column, ...] = (X, Y), block_rows: int = 100) -> list[Columns | None]:
    return list(RowDecoder(columns, block_rows).blocks(iter(rows), 3))


class Example(NamedTuple):
    """As pyspark's Row: a tuple of its own class."""

    x: Any
    y: Any


@pytest.mark.parametrize(
    "row",
    [
        ([1.5, 2.0], 7),
        [[1.5, 2.0], 7],
        ((1.5, 2.0), 7),
        (np.array([1.5, 2.0]), np.int32(7)),
        (np.array([1.5, 2.0], np.float16), True + 6),
        Example([1.5, 2], 7),
        ([np.float64(1.5), 2], np.array(7)),
    ],
    ids=["lists", "a list", "tuples", "arrays", "float16", "named tuple", "numpy numbers"],
)
def test_rows_of_many_kinds_give_the_same_columns(row: Any) -> None:
    (columns,) = _decode([row, row])
    assert [column.dtype for column in columns] == [np.float32, np.int64]
    assert columns[0].tolist() == [[1.5, 2.0]] * 2
    assert columns[1].tolist() == [7, 7]


@pytest.mark.parametrize("value", [[1.5, 2.0], np.array([1.5, 2.0])], ids=["list", "array"])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: (v,), lambda v: [v]], ids=["bare", "tuple", "list"])
def test_a_single_column_takes_bare_and_wrapped_values(value: Any, wrap: Any) -> None:
    (columns,) = _decode([wrap(value)] * 3, (X,))
    assert columns[0].tolist() == [[1.5, 2.0]] * 3


def test_a_single_scalar_column_takes_bare_numbers() -> None:
    (columns,) = _decode([4, (5,), [6]], (Y,))
    assert columns[0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("row", [[5.0], ([5.0],), [[5.0]], np.array([5.0])], ids=["bare", "tuple", "list", "array"])
def test_a_single_column_of_one_number_takes_bare_and_wrapped_lists(row: Any) -> None:
    (columns,) = _decode([row] * 2, (Column("x:0", (1,), "float32"),))
    assert columns[0].tolist() == [[5.0]] * 2


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("uint8", [0, 255]),
        ("uint16", [0, 65535]),
        ("uint64", [0, 2**63 - 1]),
        ("int8", [-128, 127]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("float16", [0.5, -2.0]),
        ("float64", [1e300, 3]),
        ("float32", [True, 2]),
        ("bool", [True, False]),
        ("complex64", [1 + 2j, 3.0]),
    ],
)
def test_python_numbers_that_a_column_can_hold_are_taken(dtype: str, values: list[Any]) -> None:
    (columns,) = _decode([(value,) for value in values], (Column("v:0", (), dtype),))
    assert columns[0].dtype == np.dtype(dtype)
    assert columns[0].tolist() == values


def test_strings_may_have_a_shape() -> None:
    (columns,) = _decode([(["a", "b"],), (["c", "d"],)], (Column("words:0", (2,), "object"),))
    assert columns[0].tolist() == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("shape", [(None,), (None, None), None], ids=str)
def test_a_free_size_takes_what_all_rows_have(shape: tuple[int | None, ...] | None) -> None:
    row = [1.0, 2.0, 3.0] if shape != (None, None) else [[1.0, 2.0, 3.0]]
    (columns,) = _decode([(row,)] * 2, (Column("x:0", shape, "float32"),))
    assert columns[0].tolist() == [row] * 2


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "ragged": (([1.0, [2.0, 3.0]], 1), r"x:0"),
    "too long": (([1.0, 2.0, 3.0], 1), r"float32 of shape \[2\] for x:0, got shape \[3\]"),
    "too short": (([1.0], 1), r"float32 of shape \[2\] for x:0, got shape \[1\]"),
    "scalar for a vector": ((1.0, 1), r"float32 of shape \[2\] for x:0, got shape \[\]"),
    "nested": (([[1.0, 2.0]], 1), r"float32 of shape \[2\] for x:0, got shape \[1, 2\]"),
    "strings for floats": ((["1.0", "2.0"], 1), r"float32 of shape \[2\] for x:0.*<U3"),
    "none": ((None, 1), r"float32 of shape \[2\] for x:0"),
    "none inside": (([1.0, None], 1), r"float32 of shape \[2\] for x:0.*object"),
    "a dict": (({"a": 1.0}, 1), r"float32 of shape \[2\] for x:0"),
    "complex for float": (([1.0, 2j], 1), r"float32 of shape \[2\] for x:0.*complex"),
    "float for int": (([1.0, 2.0], 1.5), r"int64 of shape \[\] for y:0.*float64"),
    "vector for a scalar": (([1.0, 2.0], [1]), r"int64 of shape \[\] for y:0, got shape \[1\]"),
    "string for int": (([1.0, 2.0], "7"), r"int64 of shape \[\] for y:0"),
    "none for int": (([1.0, 2.0], None), r"int64 of shape \[\] for y:0"),
    "too many values": (([1.0, 2.0], 1, 2), r"tuple of 2 values \(x:0, y:0\), got a tuple of 3"),
    "too few values": (([1.0, 2.0],), r"tuple of 2 values \(x:0, y:0\), got a tuple of 1"),
    "no tuple": (5, r"tuple of 2 values \(x:0, y:0\), got a int"),
    "an array": (np.ones(2), r"tuple of 2 values \(x:0, y:0\), got a ndarray of 2"),
    "nothing": (None, r"tuple of 2 values \(x:0, y:0\), got a NoneType"),
}


@pytest.mark.parametrize("block_rows", [4, 1024])
@pytest.mark.parametrize("position", [0, 2, 9, 1500])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_a_bad_row_is_named_with_what_was_expected(row: Any, message: str, position: int, block_rows: int) -> None:
    rows: list[Any] = list(_rows(1600))
    rows[position] = row
    with pytest.raises(FeedError, match=rf"partition 3, row {position}: expected .*{message}"):
        _decode(rows, block_rows=block_rows)


def test_the_first_of_several_bad_rows_is_named() -> None:
    rows: list[Any] = list(_rows(12))
    rows[6] = rows[9] = ([1.0], 5)
    with pytest.raises(FeedError, match="row 6:"):
        _decode(rows)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int32", 2**40), ("int32", -(2**31) - 1), ("int8", 300), ("uint8", -1), ("uint8", 256), ("int64", 2**64)],
)
def test_an_integer_that_does_not_fit_is_refused_not_wrapped(dtype: str, value: int) -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*v:0"):
        _decode([(1,), (value,)], (Column("v:0", (), dtype),))


@pytest.mark.parametrize(("dtype", "value"), [("float32", 1e300), ("float16", 70000.0), ("float16", 70000)])
def test_a_number_that_does_not_fit_is_refused_not_made_infinite(dtype: str, value: float) -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*v:0"):
        _decode([(type(value)(1),), (value,)], (Column("v:0", (), dtype),))


def test_infinity_and_nan_in_rows_are_data() -> None:
    (columns,) = _decode([(math.inf,), (math.nan,)], (Column("v:0", (), "float32"),))
    np.testing.assert_array_equal(columns[0], [np.inf, np.nan])


@pytest.mark.parametrize("value", [None, 5, 1.5, ["a"], {"a": 1}], ids=str)
def test_what_is_no_string_is_refused_in_a_column_of_strings(value: Any) -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*name:0"):
        _decode([("a",), (value,)], (NAME,))


@pytest.mark.parametrize("block_rows", [4, 1024])
def test_rows_that_differ_within_a_free_size_are_named(block_rows: int) -> None:
    rows = [([1.0] * (2 if i < 6 else 3), 0) for i in range(8)]
    with pytest.raises(FeedError, match=r"partition 3, row .*x:0 differ in shape"):
        _decode(rows, (Column("x:0", (None,), "float32"), Y), block_rows)


def test_a_column_says_what_it_takes() -> None:
    assert str(X) == "float32 of shape [2]"
    assert str(Column("x", (None, 3), "int8")) == "int8 of shape [any, 3]"
    assert str(Column("x", None, "int8")) == "int8 of any shape"
    assert Column("x", (None, 3), "int8").fits((7, 3))
    assert not Column("x", (None, 3), "int8").fits((7, 4))
    assert not Column("x", (None, 3), "int8").fits((3,))
    assert Column("x", None, "int8").fits((7, 4, 1))


@pytest.mark.parametrize("num_rows", [0, 1, 4, 5, 9])
def test_rows_come_in_blocks_of_the_size_asked_for(num_rows: int) -> None:
    blocks = _decode(_rows(num_rows), block_rows=4)
    sizes = [len(block[0]) for block in blocks if block is not None]
    assert sizes == [4] * (num_rows // 4) + [num_rows % 4] * (num_rows % 4 > 0)
    assert [value for block in blocks if block is not None for value in block[1]] == list(range(1000, 1000 + num_rows))


def test_a_block_is_given_out_before_more_rows_are_read() -> None:
    rows = iter(_rows(8))
    next(RowDecoder((X, Y), 4).blocks(rows, 3))
    assert next(rows)[1] == 1004


DECODERS = {"rows": RowDecoder((X, Y), 4), "blocks": BlockDecoder((X, Y))}


def _elements(kind: str, ids: range) -> list[Any]:
    rows = [([i + 0.5, -i], 1000 + i) for i in ids]
    if kind == "rows":
        return rows
    return [
        (np.array([x for x, _ in rows[start : start + 3]]), np.array([y for _, y in rows[start : start + 3]]))
        for start in range(0, len(rows), 3)
    ]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(("num_before", "num_after"), [(0, 0), (0, 5), (5, 0), (6, 4), (8, 8)])
def test_none_stands_where_the_marker_stood(kind: str, num_before: int, num_after: int) -> None:
    elements = [
        *_elements(kind, range(num_before)),
        VALIDATION_MARKER,
        *_elements(kind, range(num_before, num_before + num_after)),
    ]
    parts: list[list[int]] = [[]]
    for block in DECODERS[kind].blocks(iter(elements), 3):
        if block is None:
            parts.append([])
        else:
            parts[-1].extend(block[1])
    assert parts == [
        list(range(1000, 1000 + num_before)),
        list(range(1000 + num_before, 1000 + num_before + num_after)),
    ]


@pytest.mark.parametrize("kind", DECODERS)
def test_bad_rows_after_the_marker_are_counted_from_it(kind: str) -> None:
    bad: Any = ([1.0], 1) if kind == "rows" else (np.ones((1, 1)), np.ones(1, np.int64))
    elements = [*_elements(kind, range(7)), VALIDATION_MARKER, *_elements(kind, range(6)), bad]
    with pytest.raises(FeedError, match=r"partition 3, validation row 6.*: expected float32 of shape \[2\] for x:0"):
        list(DECODERS[kind].blocks(iter(elements), 3))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_second_marker_is_refused(kind: str) -> None:
    with pytest.raises(FeedError, match="partition 3: expected one validation marker, got two"):
        list(DECODERS[kind].blocks(iter([VALIDATION_MARKER, VALIDATION_MARKER]), 3))


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_survive_pickling(kind: str) -> None:
    assert pickle.loads(pickle.dumps(DECODERS[kind])) == DECODERS[kind]


# Blocks


def _block(num_rows: int, first: int = 0) -> tuple[Any, Any]:
    ids = np.arange(first, first + num_rows)
    return np.stack([ids + 0.5, -ids], axis=1).astype(np.float32), 1000 + ids


def _decode_blocks(elements: Iterable[Any], columns: tuple[Column, ...] = (X, Y)) -> list[Any]:
    return list(BlockDecoder(columns).blocks(iter(elements), 3))


def test_blocks_of_the_columns_dtypes_are_taken_without_a_copy() -> None:
    block = _block(5)
    (columns,) = _decode_blocks([block])
    assert all(got is given for got, given in zip(columns, block, strict=True))


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: (a,), lambda a: [a]], ids=["bare", "tuple", "list"])
def test_a_single_column_takes_bare_and_wrapped_arrays(wrap: Any) -> None:
    (columns,) = _decode_blocks([wrap(np.array([[1, 2], [3, 4]]))], (X,))
    assert columns[0].dtype == np.float32
    assert columns[0].tolist() == [[1, 2], [3, 4]]


def test_blocks_without_rows_are_left_out() -> None:
    assert [len(columns[0]) for columns in _decode_blocks([_block(0), _block(2), _block(0)])] == [2]


@pytest.mark.parametrize(
    "strings", [np.array(["a", "bc"]), np.array(["a", "bc"], object), np.array([b"a", b"bc"])], ids=["U", "O", "S"]
)
def test_blocks_of_strings_become_arrays_of_objects(strings: Any) -> None:
    (columns,) = _decode_blocks([strings], (NAME,))
    assert columns[0].dtype == object
    assert columns[0].tolist() == strings.tolist()


BAD_BLOCKS: dict[str, tuple[Any, str]] = {
    "bare": (np.ones((2, 2)), r"row 7: expected a tuple of 2 numpy arrays \(x:0, y:0\), got a ndarray of 2"),
    "too few": ((np.ones((2, 2)),), r"row 7: expected a tuple of 2 numpy arrays \(x:0, y:0\), got a tuple of 1"),
    "a list": (([[1.0, 2.0]], np.ones(1, int)), r"row 7: expected a numpy array \[rows, ...\] for x:0, got a list"),
    "a number": ((np.ones((2, 2)), np.array(3)), r"row 7: .* for y:0, got a ndarray without dimensions"),
    "uneven": ((np.ones((2, 2)), np.ones(3, int)), r"row 7: expected arrays of equally many rows, got 2 of x:0, 3 of"),
    "shape": ((np.ones((2, 3)), np.ones(2, int)), r"row 7 and those of its block: .*x:0, got shape \[3\]"),
    "kind": ((np.ones((2, 2)), np.ones(2)), r"row 7: expected int64 of shape \[\] for y:0: got float64"),
    "too large": ((np.array([[1, 2], [1e300, 2]]), np.ones(2, int)), r"row 8: expected float32 .* too large"),
    "strings": ((np.array([["a", "b"]]), np.ones(1, int)), r"row 7: expected float32 .* got <U1"),
    "none": (None, r"row 7: expected a tuple of 2 numpy arrays .* got a NoneType"),
}


@pytest.mark.parametrize(("block", "message"), BAD_BLOCKS.values(), ids=list(BAD_BLOCKS))
def test_a_bad_block_is_named_with_its_first_row_and_what_was_expected(block: Any, message: str) -> None:
    with pytest.raises(FeedError, match="partition 3, " + message):
        _decode_blocks([_block(4), _block(3, 4), block])


def test_an_integer_of_a_block_that_does_not_fit_is_named_with_its_row() -> None:
    columns = (Column("v:0", (), "uint8"),)
    with pytest.raises(FeedError, match=r"row 5: expected uint8 .* out of uint8's range \[0, 255\]"):
        _decode_blocks([np.arange(3), np.array([0, 255, 256, -1])], columns)


def test_something_that_is_no_string_is_named_with_its_row() -> None:
    with pytest.raises(FeedError, match=r"row 1: expected object .* got a NoneType, not a string"):
        _decode_blocks([np.array(["a", None, "b", 5], object)], (NAME,))
