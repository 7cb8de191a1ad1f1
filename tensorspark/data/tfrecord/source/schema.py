"""Spark's schemas and Arrow's, for the TFRecord data source."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import (
    BooleanType,
    DataType,
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegralType,
    StringType,
    StructType,
    UserDefinedType,
)

from tensorspark.data.tfrecord.storage.paths import is_hidden
from tensorspark.errors import ConfigError

# What has a text that a directory's name can hold, and that can be read back.
_DIRECTORY_TYPES: tuple[type[DataType], ...] = (
    *(BooleanType, DateType, DecimalType, DoubleType, FloatType, IntegralType, StringType),
)


def arrow_schema(schema: StructType) -> pa.Schema:
    """What Spark takes the columns of a schema as, to the bit.

    Raises:
        ConfigError: a type that Arrow cannot hold, or two columns of one name.
    """
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise ConfigError(f"expected columns of different names, got {', '.join(twice)} twice; rename or drop one")
    for field in schema.fields:
        if isinstance(field.dataType, UserDefinedType):
            raise ConfigError(
                f"column {field.name!r}: expected a boolean, number, decimal, string or binary, or an array of them, "
                f"got {field.dataType.simpleString()}; convert it (pyspark.ml.functions.vector_to_array for ML vectors)"
            )
    return to_arrow_schema(schema, timezone="UTC")


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark schema of inferred columns; all may be null."""
    return from_arrow_schema(schema, prefer_timestamp_ntz=False)


def check_partition_columns(schema: StructType, names: Sequence[str]) -> None:
    """Raises ConfigError unless rows of `schema` can be written into a directory per value of the columns `names`."""
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ConfigError(f"partitionBy: expected columns of the DataFrame ({', '.join(schema.names)}), got {missing}")
    for name in names:
        if is_hidden(f"{name}="):
            raise ConfigError(
                f"partitionBy: expected a name that does not begin with a dot, as such directories are not read, got "
                f"{name!r}; rename the column"
            )
        if not isinstance(schema[name].dataType, _DIRECTORY_TYPES):
            raise ConfigError(
                f"partitionBy: expected a boolean, number, date or string, got {schema[name].dataType.simpleString()} "
                f"in column {name!r}; cast it to string"
            )
    if names and set(names) == set(schema.names):
        raise ConfigError("partitionBy: expected a column that is left to write, got all columns of the DataFrame")
