"""What predictions append to a DataFrame: the columns' types, and how arrays become Arrow columns of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    ByteType,
    DataType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    ShortType,
    StringType,
    StructField,
)

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError

# A model's dtype, the numpy dtype in which it reaches Arrow, and Spark's type. Spark has neither halves nor unsigned.
_TYPES: dict[str, tuple[str, DataType]] = {
    "bfloat16": ("float32", FloatType()),
    "float16": ("float32", FloatType()),
    "float32": ("float32", FloatType()),
    "float64": ("float64", DoubleType()),
    "bool": ("bool", BooleanType()),
    "int8": ("int8", ByteType()),
    "uint8": ("int16", ShortType()),
    "int16": ("int16", ShortType()),
    "uint16": ("int32", IntegerType()),
    "int32": ("int32", IntegerType()),
    "uint32": ("int64", LongType()),
    "int64": ("int64", LongType()),
    "object": ("object", StringType()),
}
_MAX_VALUES = np.iinfo(np.int32).max  # of a record batch's column: Arrow counts them so


class Appended(Protocol):
    """The columns that predictions append. Picklable."""

    @property
    def fields(self) -> tuple[StructField, ...]:
        """What they are, as announced to Spark."""

    def arrays(self, outputs: tuple[NDArray[Any], ...]) -> list[pa.Array]:
        """One Arrow array for each of `fields`: for vectors one of arrays of doubles.

        Args:
            outputs: the model's, `[rows, ...]` each.
        """


@dataclass(frozen=True)
class OutputColumns:
    """A column for each of the model's outputs: numbers where an output has one a row, else arrays, nested or not.

    Attributes:
        outputs: the columns' names, and shapes and dtypes of what the model makes.

    Example:
        >>> columns = OutputColumns((Column("p", (1,), "float32"), Column("box", (4,), "float64")))
        >>> [field.simpleString() for field in columns.fields]
        ['p:float', 'box:array<double>']
        >>> columns.arrays((np.ones((2, 1), np.float32), np.zeros((2, 4))))[0].to_pylist()
        [1.0, 1.0]

    Raises:
        ModelError: an output of a dtype that Spark has no type for, or of unknown rank.
    """

    outputs: tuple[Column, ...]

    def __post_init__(self) -> None:
        for column in self.outputs:
            if column.shape is None or column.dtype not in _TYPES:
                raise ModelError(
                    f"output {column.name!r} of the model is {column}, which makes no column: expected a known number "
                    f"of dimensions and one of the dtypes {', '.join(_TYPES)}"
                )

    @property
    def fields(self) -> tuple[StructField, ...]:
        return tuple(StructField(column.name, _spark_type(column)) for column in self.outputs)

    def arrays(self, outputs: tuple[NDArray[Any], ...]) -> list[pa.Array]:
        return [_output_array(column, values) for column, values in zip(self.outputs, outputs, strict=True)]


def numbers(values: NDArray[Any]) -> pa.Array:
    """An Arrow array of `[rows, ...]` numbers: one a row as they are, several as arrays, nested where they have more
    dimensions. Without a copy where the memory is contiguous.

    Raises:
        ModelError: more values than a record batch can count.
    """
    if values.size > _MAX_VALUES:
        raise ModelError(
            f"{len(values)} rows of {values.size // len(values)} predicted values are too many for one Arrow record "
            f"batch: lower spark.sql.execution.arrow.maxRecordsPerBatch"
        )
    array = _flat(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        array = _lists(array, math.prod(values.shape[:axis]), values.shape[axis])
    return array


def _is_scalar(column: Column) -> bool:
    return column.shape in ((), (1,))


def _spark_type(column: Column) -> DataType:
    spark_type = _TYPES[column.dtype][1]
    for _ in () if _is_scalar(column) else column.shape or ():
        spark_type = ArrayType(spark_type, containsNull=False)
    return spark_type


def _output_array(column: Column, values: NDArray[Any]) -> pa.Array:
    return numbers(values.reshape(-1) if _is_scalar(column) else values)


def _flat(values: NDArray[Any]) -> pa.Array:
    if values.dtype.kind == "O":
        as_bytes = [value.encode() if isinstance(value, str) else value for value in values]
        return pa.array(as_bytes, pa.binary()).cast(pa.string())
    return pa.array(values.astype(_TYPES[values.dtype.name][0], copy=False))


def _lists(values: pa.Array, num_lists: int, length: int) -> pa.Array:
    offsets = np.arange(num_lists + 1, dtype=np.int32) * np.int32(length)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
