"""Predictions on Spark: `predicted` appends a model's outputs to a DataFrame."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray
from pyspark import TaskContext
from pyspark.errors import PySparkException
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column as SqlColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as sql
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.pandas.types import to_arrow_type
from pyspark.sql.types import ArrayType, DoubleType, StructField, StructType, UserDefinedType

from tensorspark.data.arrow import ArrowDecoder, check_schema
from tensorspark.data.arrow_schema import Source
from tensorspark.data.columns import Column
from tensorspark.data.decoders import Place
from tensorspark.driver.prediction_schema import Appended
from tensorspark.driver.shipping import Shipped, ship
from tensorspark.errors import ConfigError
from tensorspark.trainers.base import Captured, Trainer

_VALUES = ArrayType(DoubleType(), containsNull=False)


@dataclass(frozen=True)
class _Prediction:
    """What a task needs to know."""

    shipped: Shipped
    decoder: ArrowDecoder
    appended: Appended
    names: tuple[str, ...]
    batch_size: int

    def structs(self, batches: Iterable[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        """The outputs for each batch of rows.

        Args:
            batches: the columns called `names`.
        """
        context = TaskContext.get()
        assert context is not None
        place = Place(context.partitionId())
        trainer: Trainer | None = None  # until there is a row: TensorFlow need not be loaded for none
        for arrays in batches:
            batch = pa.RecordBatch.from_arrays(list(arrays), names=list(self.names))
            check_schema(self.decoder.columns, self.decoder.sources, batch.schema)
            parts = []
            for _, inputs in self.decoder.decode(batch, place):
                trainer = trainer or self.shipped.predictor()
                parts.append(self._struct(trainer.predict(inputs, self.batch_size)))
            yield pa.concat_arrays(parts) if parts else pa.array([], self._type)

    def _struct(self, outputs: tuple[NDArray[Any], ...]) -> pa.Array:
        return pa.StructArray.from_arrays(self.appended.arrays(outputs), names=[f.name for f in self.appended.fields])

    @property
    def _type(self) -> pa.DataType:
        return to_arrow_type(_carried(self.appended.fields))


def predicted(
    df: DataFrame,
    captured: Captured,
    columns: Sequence[Column],
    sources: Sequence[Source],
    appended: Appended,
    batch_size: int,
) -> DataFrame:
    """The DataFrame with the model's predictions appended, computed where and when it is used, also a streaming one.

    Only the columns that the model needs go to Python, and only the predictions come back. They do not need the session
    any more: the model has been broadcast, and is kept as long as the DataFrame.

    Args:
        captured: the model, as `KerasDriverModel.capture` reads it off with the inputs' columns alone.
        columns: its inputs.
        sources: for each of `columns`, the DataFrame's columns that it is made of.
        batch_size: rows that the model computes at once.

    Raises:
        ConfigError: a column to be appended that is there already, or an input that Arrow cannot carry.
        FeedError: a column that is missing or of a type that the model cannot take.
    """
    _require_free(df, appended.fields)
    if not appended.fields:
        return df
    names = tuple(dict.fromkeys(chain.from_iterable(sources)))
    arrow_schema = _arrow_schema(df, names)
    check_schema(columns, sources, arrow_schema)
    job = _Prediction(
        shipped=ship(df.sparkSession.sparkContext, captured),
        decoder=ArrowDecoder(tuple(columns), tuple(sources), arrow_schema.serialize().to_pybytes()),
        appended=appended,
        names=names,
        batch_size=batch_size,
    )
    # Spark computes what it takes for deterministic again where it is used again, in a filter for example.
    predict = _as_udf(job).asNondeterministic()
    struct = f"predicted_{secrets.token_hex(8)}"
    computed = df.withColumn(struct, predict(*(_sent(df.schema[name]) for name in names)))
    return computed.select("*", *(_returned(struct, field) for field in appended.fields)).drop(struct)


def _as_udf(job: _Prediction) -> Any:
    """A function of the columns called `job.names`. Spark passes one column as it is, several as a tuple, and learns
    from the type hints what it is to pass."""

    def of_one(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        return job.structs((array,) for array in batches)

    def of_several(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return job.structs(batches)

    make: Any = arrow_udf  # its stub knows no struct
    return make(of_one if len(job.names) == 1 else of_several, _carried(job.appended.fields))


def _carried(fields: Sequence[StructField]) -> StructType:
    """What comes from Python: arrays for vectors, as Arrow carries no user-defined types in streams."""
    return StructType([StructField(f.name, _VALUES if _is_vector(f) else f.dataType) for f in fields])


def _is_vector(field: StructField) -> bool:
    return isinstance(field.dataType, VectorUDT)


def _sent(field: StructField) -> SqlColumn:
    """A column on its way to Python."""
    column = sql.col("`" + field.name.replace("`", "``") + "`")
    return sql.unwrap_udt(column) if isinstance(field.dataType, UserDefinedType) else column


def _returned(struct: str, field: StructField) -> SqlColumn:
    """A column to be appended, of the struct that comes from Python."""
    column = sql.col(struct).getField(field.name)
    return (array_to_vector(column) if _is_vector(field) else column).alias(field.name)


def _require_free(df: DataFrame, fields: Sequence[StructField]) -> None:
    """Raises ConfigError unless `df` and `fields` have each name once."""
    is_case_sensitive = str(df.sparkSession.conf.get("spark.sql.caseSensitive", "false")).lower() == "true"

    def known(name: str) -> str:
        return name if is_case_sensitive else name.lower()

    counts = Counter(known(name) for name in df.columns)
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(f"the DataFrame has {count} columns {name!r}: rename or drop all but one of them")
    for field in fields:
        if known(field.name) in counts:
            raise ConfigError(
                f"the DataFrame has a column {field.name!r} already: choose another name for the prediction, or drop it"
            )
        counts[known(field.name)] += 1
    if len(counts) != len(df.columns) + len(fields):
        raise ConfigError(f"predictions need different names, got {', '.join(field.name for field in fields)}")


def _arrow_schema(df: DataFrame, names: Sequence[str]) -> pa.Schema:
    """The Arrow types of the columns called `names`; other columns are there too, with no type."""
    fields = []
    for field in df.schema.fields:
        try:
            arrow_type = to_arrow_type(field.dataType) if field.name in names else pa.null()
        except PySparkException as error:
            raise ConfigError(
                f"column {field.name!r} cannot go through Arrow, so cast it or name another: {error}"
            ) from error
        fields.append(pa.field(field.name, arrow_type))
    return pa.schema(fields)
