"""What users train, evaluate and predict on, as an RDD and a decoder of its elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark import RDD, SparkContext
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema

from tensorspark.data.arrow import ArrowDecoder, Source, check_schema, known_shape_and_dtype
from tensorspark.data.columns import Column, Columns, is_marker
from tensorspark.data.decoders import BlockDecoder, Decoder, RowDecoder
from tensorspark.driver.feeding import RawSerializer
from tensorspark.errors import ConfigError, FeedError

_BLOCK_BYTES = 2**20

Label = tuple[tuple[int | None, ...], str]
"""Shape of a row's label, and its dtype."""


@dataclass(frozen=True)
class Names:
    """Which of a DataFrame's columns are fed, as the user says.

    Attributes:
        features: a column, a list of columns, or a dict from the model's inputs to either; None: the model's inputs'
            own names.
        label: a column, or a list of them or a dict by the model's outputs.
        sample_weight: a column.
    """

    features: Any = None
    label: Any = None
    sample_weight: str | None = None


@dataclass(frozen=True)
class Feed:
    """Rows to train or evaluate on: `decoder` reads the elements of `rdd`."""

    rdd: RDD[Any]
    decoder: Decoder


@dataclass(frozen=True)
class MarkedDecoder:
    """One decoder for what comes before the `VALIDATION_MARKER`, another for what comes after it."""

    before: Decoder
    after: Decoder

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.before.columns

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        yield from self.before.blocks(itertools.takewhile(lambda row: not is_marker(row), rows), partition)
        yield None
        try:
            yield from self.after.blocks(rows, partition)
        except FeedError as error:
            raise FeedError(f"validation_data: {error}") from error


def as_sources(names: Names, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[Source, ...]:
    """The DataFrame's columns for each of the model's columns, in their order.

    Args:
        inputs, outputs: the model's.

    Raises:
        ConfigError: names that do not match the model's inputs and outputs.
    """
    sources = [*_feature_sources(names.features, inputs), *_label_sources(names.label, outputs)]
    if names.sample_weight is not None:
        sources.append((names.sample_weight,))
    return tuple(sources)


def _feature_sources(features: Any, inputs: Sequence[str]) -> list[Source]:
    if features is None:
        return [(name,) for name in inputs]
    if isinstance(features, str):
        features = [features]
    if isinstance(features, Mapping) and len(features) == len(inputs) == 1:
        return [_as_source(next(iter(features.values())))]  # whatever the only input is called
    if isinstance(features, Mapping):
        _require_names("features", features, inputs, "inputs")
        return [_as_source(features[name]) for name in inputs]
    if not isinstance(features, list | tuple) or not features:
        raise ConfigError(f"features must be a column's name, a list of names or a dict by input, got {features!r}")
    if len(inputs) == 1:
        return [_as_source(features)]
    if len(features) != len(inputs):
        raise ConfigError(
            f"features names {len(features)} columns, but the model has the {len(inputs)} inputs {', '.join(inputs)}: "
            f"pass a dict from inputs to columns"
        )
    return [_as_source(name) for name in features]


def _label_sources(label: Any, outputs: Sequence[str]) -> list[Source]:
    if not outputs:
        return []
    if isinstance(label, Mapping):
        _require_names("label", label, outputs, "outputs")
        return [_as_source(label[name]) for name in outputs]
    labels = [label] if isinstance(label, str) else label
    if not isinstance(labels, list | tuple) or len(labels) != len(outputs):
        raise ConfigError(
            f"label must name a column for each of the model's outputs ({', '.join(outputs)}), as a name, a list or a "
            f"dict by output; got {label!r}"
        )
    return [_as_source(name) for name in labels]


def _require_names(argument: str, given: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    if given.keys() != set(names):
        raise ConfigError(f"{argument} must have the model's {what} as keys: {sorted(names)}, got {sorted(given)}")


def _as_source(value: Any) -> Source:
    source = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not source or not all(isinstance(name, str) and name for name in source):
        raise ConfigError(f"expected a column's name, or a list of names, got {value!r}")
    return source


# DataFrames


def labels_of(df: DataFrame, sources: Sequence[Source]) -> list[Label | None]:
    """What the schema says of the label columns; None where it says nothing, a length of None where they are arrays."""
    schema = to_arrow_schema(df.schema)
    labels: list[Label | None] = []
    for source in sources:
        if len(source) > 1 or source[0] not in schema.names:
            labels.append(None)  # whatever is wrong is told later, with all that is known then
            continue
        shape, dtype = known_shape_and_dtype(schema.field(source[0]))
        if dtype == "object":
            raise FeedError(
                f"label column {source[0]!r} holds strings: turn them into class numbers first, with "
                f"pyspark.ml.feature.StringIndexer for example"
            )
        labels.append(((None,) if shape is None else shape, "float32" if dtype == "float64" else dtype))
    return labels


def dataframe_feed(df: DataFrame, columns: Sequence[Column], sources: Sequence[Source]) -> Feed:
    """A DataFrame's Arrow record batches, as `mapInArrow` would have them, in an RDD.

    `mapInArrow` itself hides how many partitions there are until they run, and passes a batch stream that broke off for
    one that ended: the server needs the first, and trained rows must not be lost to the second.

    Raises:
        FeedError: columns that are missing or of a type that the model cannot take.
    """
    used = list(dict.fromkeys(name for source in sources for name in source))
    schema = to_arrow_schema(df.schema)
    check_schema(columns, sources, schema)
    selected = df.select(*[df[f"`{name}`"] for name in used])
    schema = to_arrow_schema(selected.schema)
    java_rdd = selected._jdf.toArrowBatchRdd().toJavaRDD()
    rdd: RDD[Any] = RDD(java_rdd, df.sparkSession.sparkContext, RawSerializer())
    return Feed(rdd, ArrowDecoder(tuple(columns), tuple(sources), schema.serialize().to_pybytes()))


# RDDs and arrays


def rdd_feed(rdd: RDD[Any], columns: Sequence[Column], *, is_blocks: bool) -> Feed:
    """An RDD of rows (tuples of values), or of blocks (tuples of arrays of rows)."""
    return Feed(rdd, (BlockDecoder if is_blocks else RowDecoder)(tuple(columns)))


def is_block(element: Any, columns: Sequence[Column]) -> bool:
    """Whether an RDD's element holds many rows: every value an array with one dimension more than its column has."""
    values = element if isinstance(element, tuple | list) else (element,)
    known = [(value, column) for value, column in zip(values, columns, strict=False) if column.shape is not None]
    return bool(known) and all(
        isinstance(value, np.ndarray) and value.ndim == len(column.shape or ()) + 1 for value, column in known
    )


def array_feed(
    spark_context: SparkContext, arrays: Sequence[NDArray[Any]], columns: Sequence[Column], num_partitions: int
) -> Feed:
    """Arrays in the driver's memory, `[rows, ...]` each, in equal shares.

    Raises:
        FeedError: arrays of different lengths.
    """
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise FeedError(f"expected arrays of equally many rows, got {sorted(lengths)}")
    (num_rows,) = lengths
    row_bytes = max(1, sum(array.nbytes for array in arrays) // max(1, num_rows))
    block_rows = max(1, _BLOCK_BYTES // row_bytes)
    bounds = [index * num_rows // num_partitions for index in range(num_partitions + 1)]
    shares = [
        [tuple(array[row : min(row + block_rows, stop)] for array in arrays) for row in range(start, stop, block_rows)]
        for start, stop in itertools.pairwise(bounds)
    ]
    rdd = spark_context.parallelize(shares, num_partitions).flatMap(lambda share: share)
    return Feed(rdd, BlockDecoder(tuple(columns)))


# Datasets


@dataclass(frozen=True)
class DatasetContext:
    """Which part of the data a worker is to read; what `dataset_fn(context)` is given.

    Attributes:
        shard_index, num_shards: `dataset.shard(context.num_shards, context.shard_index)`, or every so manieth file.
    """

    shard_index: int
    num_shards: int


def dataset_feed(spark_context: SparkContext, decoder: Decoder, num_shards: int) -> Feed:
    """A `tf.data.Dataset` a partition: each worker makes its own, and reads it there."""
    contexts = [DatasetContext(index, num_shards) for index in range(num_shards)]
    return Feed(spark_context.parallelize(contexts, num_shards), decoder)
