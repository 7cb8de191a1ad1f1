"""What an Arrow schema says of a DataFrame's columns: which can be fed, and what is wrong with the others."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tensorspark.data.columns import Column, is_convertible, shape_text
from tensorspark.errors import FeedError

Source = tuple[str, ...]
"""Names of the DataFrame's columns that make up one fed column: one, or several scalar ones that go side by side."""

_VECTOR_FIELDS = ["type", "size", "indices", "values"]


def check_schema(columns: Sequence[Column], sources: Sequence[Source], schema: pa.Schema) -> None:
    """Looks for what no row could repair, before a task starts.

    Raises:
        FeedError: a column that is missing, stands twice, or is of a type that its fed column cannot take.
    """
    for column, source in zip(columns, sources, strict=True):
        for name in source:
            _check_present(name, schema)
            _check_type(column, schema.field(name), len(source))


def known_shape_and_dtype(column: pa.Field) -> tuple[tuple[int, ...] | None, str]:
    """What is known of a DataFrame column's rows before one is read: their shape and dtype.

    The shape is None where the schema does not say it, as for arrays of any length. Binary values count as strings.

    Raises:
        FeedError: a type that cannot be fed.
    """
    lengths, dtype = _numpy_type(column)
    known = [length for length in lengths if length is not None]
    return (tuple(known) if len(known) == len(lengths) else None), dtype.name


def field_called(name: str, schema: pa.Schema) -> pa.Field:
    """The field of that name; raises FeedError unless there is exactly one."""
    _check_present(name, schema)
    return schema.field(name)


def _check_present(name: str, schema: pa.Schema) -> None:
    num_found = schema.names.count(name)
    if num_found == 1:
        return
    if num_found:
        raise FeedError(f"expected one column {name!r} in the DataFrame, got {num_found}: rename or drop the others")
    by_lower = {have.lower(): have for have in schema.names}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    raise FeedError(
        f"the DataFrame has no column {name!r}"
        + (f": did you mean {by_lower[near[0]]!r}?" if near else "")
        + f"; it has {', '.join(schema.names) or 'none'}"
    )


def _check_type(column: Column, found: pa.Field, num_sources: int) -> None:
    expected = f"{_named(found)}: expected {column} for {column.name}, got {_type_text(found.type)}"
    target = np.dtype(column.dtype)
    if num_sources > 1 and (pa.types.is_nested(found.type) or is_binary(found.type)):
        raise FeedError(f"{expected} among {num_sources} columns: only scalar columns can stand side by side")
    if num_sources > 1 and not column.fits((num_sources,)):
        raise FeedError(f"{expected} and {num_sources - 1} more: name as many columns as {column.name} is wide")
    if is_binary(found.type) and target.kind != "O":
        if column.shape is None or column.shape.count(None) > 1:
            raise FeedError(f"{expected}: raw bytes do not say their shape; use an array column")
        return
    lengths, dtype = _numpy_type(found)
    if dtype.kind == "O" or target.kind == "O":
        if dtype.kind != target.kind:
            hint = "index or hash the strings first" if dtype.kind == "O" else "cast it to string"
            raise FeedError(f"{expected}: {hint}")
    elif not is_convertible(dtype, target):
        raise FeedError(f"{expected}, which does not convert without loss: cast the column")
    if num_sources == 1 and level_lengths(column, lengths) is None:
        raise FeedError(f"{expected}: {_shape_hint(column.shape or ())}")


def _shape_hint(shape: tuple[int | None, ...]) -> str:
    if not shape:
        return "name a scalar column"
    flat = "" if None in shape or len(shape) == 1 else f" or [{math.prod(size or 1 for size in shape)}]"
    return f"make it a column of arrays of shape {shape_text(shape)}{flat}"


def _named(found: pa.Field) -> str:
    return f"column {found.name!r} of the DataFrame"


def _numpy_type(found: pa.Field) -> tuple[list[int | None], np.dtype[Any]]:
    """Lengths of the nested arrays, outermost first, None where they are free; and the dtype of their values."""
    if is_vector(found.type):
        return [None], np.dtype(np.float64)
    lengths, leaf = unwrap(found.type)
    return lengths, _leaf_dtype(leaf, found)


def unwrap(data_type: pa.DataType) -> tuple[list[int | None], pa.DataType]:
    """Lengths of the nested arrays, outermost first, None where they are free; and the type of their values."""
    lengths: list[int | None] = []
    while is_array(data_type):
        lengths.append(data_type.list_size if pa.types.is_fixed_size_list(data_type) else None)
        data_type = data_type.value_type
    return lengths, data_type


def _leaf_dtype(leaf: pa.DataType, found: pa.Field) -> np.dtype[Any]:
    types = pa.types
    if types.is_boolean(leaf) or types.is_integer(leaf) or types.is_floating(leaf):
        dtype: np.dtype[Any] = np.dtype(leaf.to_pandas_dtype())
        return dtype
    if _is_string(leaf) or is_binary(leaf):
        return np.dtype(object)
    change = "select its parts as columns of their own"
    if types.is_decimal(leaf):
        change = "cast it to double, or to bigint where it has no fraction"
    elif types.is_timestamp(leaf) or types.is_duration(leaf) or types.is_time(leaf):
        change = "cast it to double (seconds), or make features of it with hour(), dayofweek() and so on"
    elif types.is_date(leaf):
        change = "make a number of it, with datediff() or dayofyear() for example"
    elif types.is_null(leaf):
        change = "it holds nulls only: cast it to the type that it should have, and fill it"
    raise FeedError(f"{_named(found)} is {_type_text(found.type)}, which cannot be fed: {change}")


def _type_text(data_type: pa.DataType) -> str:
    return "a Spark ML vector" if is_vector(data_type) else str(data_type)


def is_array(data_type: pa.DataType) -> bool:
    types = pa.types
    return any(test(data_type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def is_vector(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_struct(data_type)) and [part.name for part in data_type] == _VECTOR_FIELDS


def _is_string(data_type: pa.DataType) -> bool:
    types = pa.types
    return any(test(data_type) for test in (types.is_string, types.is_large_string, types.is_string_view))


def is_binary(data_type: pa.DataType) -> bool:
    return any(test(data_type) for test in (pa.types.is_binary, pa.types.is_large_binary))


def level_lengths(column: Column, lengths: Sequence[int | None]) -> list[int | None] | None:
    """What `column` wants each level of the nested arrays to be long, None where it leaves that open.

    None in place of the list: their number does not fit.
    """
    shape = column.shape
    if shape is None:
        return list(lengths)
    if not lengths and len(shape) == 1 and shape[0] in (None, 1):  # a scalar column that is one feature wide
        return []
    if len(shape) == len(lengths):
        wanted = list(shape)
    elif len(lengths) == 1 and shape and None not in shape:
        wanted = [math.prod(size for size in shape if size is not None)]
    else:
        return None
    fits = all(want is None or have is None or want == have for want, have in zip(wanted, lengths, strict=True))
    return wanted if fits else None
