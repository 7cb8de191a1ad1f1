"""From what a user hands to `fit` and `evaluate` to a feed of the columns that the model takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pyspark import RDD, SparkContext
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema

from tensorspark.data.arrow import Source, known_shape_and_dtype
from tensorspark.data.arrow_schema import field_called
from tensorspark.data.columns import Column, is_convertible
from tensorspark.data.decoders import Decoder
from tensorspark.driver.inputs import (
    DatasetContext,
    Feed,
    Label,
    Names,
    array_feed,
    as_sources,
    dataframe_feed,
    dataset_feed,
    is_block,
    labels_of,
    rdd_feed,
)
from tensorspark.errors import ConfigError, FeedError


class FedModel(Protocol):
    """What a model says of the columns that it is fed.

    Attributes:
        is_free: whether it takes columns as they come, in the order in which they are named.
    """

    is_free: bool

    def expected_columns(
        self, names: Any = None, labels: Sequence[Label | None] | None = None, *, weighted: bool = False
    ) -> tuple[Column, ...]: ...

    def dataset_decoder(self, dataset_fn: Callable[[Any], Any], context: Any) -> tuple[Decoder, bool]: ...


@dataclass(frozen=True)
class Data:
    """What is trained, evaluated or predicted on, as the user gave it.

    Attributes:
        x: a DataFrame; an RDD of rows or blocks; an array, or several in a list or a dict by input; or a function that
            makes a `tf.data.Dataset` of single rows from a `DatasetContext`.
        y, sample_weight: arrays that go with arrays.
        names: the columns of a DataFrame.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    names: Names = field(default_factory=Names)


@dataclass(frozen=True)
class Rows:
    """A feed, and what its columns are to the model.

    Attributes:
        input_names: for a model that does not say itself what it takes.
        weighted: whether the last column is the rows' weights.
    """

    feed: Feed
    columns: tuple[Column, ...]
    input_names: Any
    weighted: bool


def rows_of(data: Data, model: FedModel, spark_context: SparkContext, num_slots: Callable[[], int]) -> Rows:
    """Resolves `data` for `model`.

    Args:
        num_slots: into how many partitions arrays are cut, and for how many workers datasets are made.

    Raises:
        ConfigError: arguments that do not go together.
        FeedError: columns that are missing or that the model cannot take, arrays of different lengths, no row.
    """
    if model.is_free and not callable(data.x):
        return free_rows_of(data, spark_context, num_slots)
    if isinstance(data.x, DataFrame):
        _refuse_arrays(data, "a DataFrame", "name its columns with label= and sample_weight=")
        return _of_dataframe(data.x, data.names, model)
    if type(data.x).__module__.startswith("pandas."):
        raise ConfigError("expected a Spark DataFrame, got one of pandas: pass spark.createDataFrame(it)")
    if data.names != Names():
        raise ConfigError(
            f"features, label and sample_weight name columns of a DataFrame, got {data.names} with "
            f"{type(data.x).__name__}: leave them out"
        )
    if isinstance(data.x, RDD):
        _refuse_arrays(data, "an RDD", "put labels and weights into its rows")
        return _of_rdd(data.x, model)
    if callable(data.x):
        _refuse_arrays(data, "a dataset_fn", "have the dataset yield (x, y, sample_weight)")
        num_shards = num_slots()
        decoder, weighted = model.dataset_decoder(data.x, DatasetContext(0, num_shards))
        return Rows(dataset_feed(spark_context, decoder, num_shards), decoder.columns, None, weighted)
    return _of_arrays(data, model, spark_context, num_slots())


def decoder_alike(held_out: Rows, columns: Sequence[Column]) -> Decoder:
    """The decoder of held-out rows, made to give them the training rows' dtypes and shapes: workers evaluate with the
    model that they train.

    Args:
        columns: the training rows', as many as the held-out ones'.

    Raises:
        FeedError: values that do not convert to these dtypes.
    """
    for have, want in zip(held_out.columns, columns, strict=True):
        if not is_convertible(np.dtype(have.dtype), np.dtype(want.dtype)):
            raise FeedError(
                f"validation_data: {have.name} is {have.dtype}, which does not convert without loss to the training "
                f"rows' {want.dtype}: cast it"
            )
    alike = [
        replace(have, shape=want.shape, dtype=want.dtype) for have, want in zip(held_out.columns, columns, strict=True)
    ]
    decoder: Any = held_out.feed.decoder  # each kind is a dataclass with columns
    alike_decoder: Decoder = replace(decoder, columns=tuple(alike))
    return alike_decoder


def free_rows_of(data: Data, spark_context: SparkContext, num_slots: Callable[[], int]) -> Rows:
    """The data's columns in the order in which they are named, whatever they are; see `rows_of`."""
    if isinstance(data.x, DataFrame):
        return _free_of_dataframe(data.x, data.names)
    if isinstance(data.x, RDD):
        first = data.x.take(1)
        if not first:
            raise FeedError("the RDD has no rows: look at what filters it")
        values = [np.asarray(value) for value in (first[0] if isinstance(first[0], tuple | list) else first)]
        lengths = {len(value) if value.ndim else 0 for value in values}
        is_blocks = len(lengths) == 1 and 0 not in lengths and any(value.ndim > 1 for value in values)
        columns = _free_columns([value if is_blocks else value[None] for value in values])
        return Rows(rdd_feed(data.x, columns, is_blocks=is_blocks), columns, None, False)
    given = [data.x, data.y, data.sample_weight]
    groups = [value.values() if isinstance(value, Mapping) else value for value in given if value is not None]
    arrays = [np.asarray(a) for group in groups for a in (group if not isinstance(group, np.ndarray) else [group])]
    columns = _free_columns(arrays)
    return Rows(array_feed(spark_context, arrays, columns, num_slots()), columns, None, False)


def _free_columns(arrays: Sequence[NDArray[Any]]) -> tuple[Column, ...]:
    return tuple(
        Column(f"column_{index}", array.shape[1:], "float32" if array.dtype == np.float64 else array.dtype.name)
        for index, array in enumerate(arrays)
    )


def _free_of_dataframe(df: DataFrame, names: Names) -> Rows:
    groups = [names.features, names.label, names.sample_weight]
    listed = [
        list(group.values()) if isinstance(group, Mapping) else [group] if isinstance(group, str) else group
        for group in groups
        if group is not None
    ]
    if names.features is None:
        raise ConfigError("features must name the columns to feed, in the order of the step's arguments; got None")
    sources = tuple((name,) if isinstance(name, str) else tuple(name) for group in listed for name in group)
    schema = to_arrow_schema(df.schema)
    columns = []
    for source in sources:
        shape, dtype = known_shape_and_dtype(field_called(source[0], schema))
        shape = (len(source),) if len(source) > 1 else shape
        columns.append(Column(source[0], shape, "float32" if dtype == "float64" else dtype))
    if any(column.shape is None for column in columns):
        columns = list(_completed(columns, _first_row(df, columns, sources)))
    return Rows(dataframe_feed(df, columns, sources), tuple(columns), None, False)


def _refuse_arrays(data: Data, what: str, instead: str) -> None:
    if data.y is not None or data.sample_weight is not None:
        raise ConfigError(f"y and sample_weight arrays go with arrays, got them with {what}: {instead}")


def _of_dataframe(df: DataFrame, names: Names, model: FedModel) -> Rows:
    given = {name: name for name in names.features} if isinstance(names.features, Mapping) else None
    inputs = [column.name for column in model.expected_columns(given, [])]
    outputs = [column.name for column in model.expected_columns(given)[len(inputs) :]]
    weighted = names.sample_weight is not None
    if names.features is None and not set(inputs) <= set(df.columns):
        raise ConfigError(
            f"features must name the column that is fed, as the DataFrame has none called as the model's inputs are "
            f"({', '.join(inputs)}): pass features=, one of {', '.join(df.columns)}"
        )
    sources = as_sources(names, inputs, outputs)
    labels = labels_of(df, sources[len(inputs) : len(inputs) + len(outputs)])
    columns = model.expected_columns(given, labels, weighted=weighted)
    columns = tuple(replace(c, name=s[0]) if len(s) == 1 else c for c, s in zip(columns, sources, strict=True))
    if any(column.shape is None for column in columns):
        columns = _completed(columns, _first_row(df, columns, sources))
    return Rows(dataframe_feed(df, columns, sources), columns, given, weighted)


def _first_row(df: DataFrame, columns: Sequence[Column], sources: Sequence[Source]) -> tuple[NDArray[Any], ...]:
    feed = dataframe_feed(df.limit(1), columns, sources)
    for block in feed.decoder.blocks(iter(feed.rdd.collect()), 0):
        if block and len(block[0]):
            return block
    raise FeedError("the DataFrame has no rows: look at what filters it")


def _completed(columns: Sequence[Column], sample: Sequence[NDArray[Any]]) -> tuple[Column, ...]:
    """Columns with the shapes that a sample of rows has, where they are not known."""
    return tuple(
        replace(column, shape=array.shape[1:]) if column.shape is None else column
        for column, array in zip(columns, sample, strict=True)
    )


def _of_rdd(rdd: RDD[Any], model: FedModel) -> Rows:
    first = rdd.take(1)
    if not first:
        raise FeedError("the RDD has no rows: look at what filters it")
    num_inputs = len(model.expected_columns(None, []))
    num_outputs = len(model.expected_columns()) - num_inputs
    values = list(first[0]) if isinstance(first[0], tuple | list) and num_inputs + num_outputs > 1 else [first[0]]
    num_expected = num_inputs + num_outputs
    if len(values) not in (num_expected, num_expected + 1):
        raise FeedError(
            f"expected rows of {num_expected} values ({num_inputs} inputs and {num_outputs} labels), or one more for "
            f"the sample's weight; got {len(values)} in the first"
        )
    weighted = len(values) > num_expected
    blocks = is_block(values, model.expected_columns(None, [])) and (not num_outputs or np.ndim(values[num_inputs]) > 0)
    labels = [_label(value, blocks) for value in values[num_inputs:num_expected]]
    columns = model.expected_columns(None, labels, weighted=weighted)
    columns = _completed(columns, [np.asarray(value) if blocks else np.asarray(value)[None] for value in values])
    return Rows(rdd_feed(rdd, columns, is_blocks=blocks), columns, None, weighted)


def _label(value: Any, is_blocks: bool) -> Label:
    array = np.asarray(value)
    shape = array.shape[1:] if is_blocks else array.shape
    if array.dtype.kind not in "iufb":
        raise FeedError(f"expected labels that are numbers, got {array.dtype}: turn them into class numbers first")
    return shape, "float32" if array.dtype == np.float64 else array.dtype.name


def _of_arrays(data: Data, model: FedModel, spark_context: SparkContext, num_partitions: int) -> Rows:
    given = {name: name for name in data.x} if isinstance(data.x, Mapping) else None
    inputs = model.expected_columns(given, [])
    x = _arrays("x", data.x, [column.name for column in inputs])
    outputs = model.expected_columns(given)[len(inputs) :]
    if data.y is None and outputs:
        raise ConfigError("expected y, the labels of the arrays in x, got None")
    y = _arrays("y", data.y, [column.name for column in outputs])
    weights = [np.asarray(data.sample_weight, np.float32)] if data.sample_weight is not None else []
    arrays = [*x, *y, *weights]
    columns = model.expected_columns(given, [_label(array, True) for array in y], weighted=bool(weights))
    columns = _completed(columns, arrays)
    fitted = [_fitted(array, column) for array, column in zip(arrays, columns, strict=True)]
    feed = array_feed(spark_context, fitted, columns, num_partitions)
    return Rows(feed, columns, given, bool(weights))


def _arrays(argument: str, value: Any, names: Sequence[str]) -> list[NDArray[Any]]:
    if isinstance(value, Mapping):
        if value.keys() != set(names):
            raise ConfigError(f"{argument} must have the keys {sorted(names)}, got {sorted(value)}")
        return [np.asarray(value[name]) for name in names]
    values = list(value) if len(names) > 1 else [value]
    if len(values) != len(names):
        raise ConfigError(f"{argument} must be {len(names)} arrays ({', '.join(names)}), got {len(values)}")
    return [np.asarray(array) for array in values]


def _fitted(array: NDArray[Any], column: Column) -> NDArray[Any]:
    """Flat rows in the column's shape; and one number a row as the array of one that the column may ask for."""
    shape = [size for size in column.shape or () if size is not None]
    if len(shape) == len(column.shape or ()) and math.prod(array.shape[1:]) == math.prod(shape):
        return array.reshape(len(array), *shape)
    return array
