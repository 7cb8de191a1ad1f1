"""`tensorflowonspark.dfutil`: DataFrames from and to TFRecord files, under its names.

What differs:

- `saveAsTFRecords` and `loadTFRecords` need no jar of tensorflow-hadoop, and paths without a scheme are local.
- `loadTFRecords` fits the schema to all records, not to the first alone; a feature that none has a value of is void.
- Bytes of which some are no text are binary without being named in `binary_features`; a named feature that has several
  values is an array of binary, where only the first came.
- A null becomes a missing feature, and a decimal a float, instead of errors.
- `fromTFExample`, and what `toTFExample` returns, give iterators instead of lists. A row has a None for a feature that
  other examples nearby have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tensorspark.data.tfrecord.examples import SerializableExample, example_schema, examples_to_rows, rows_to_examples
from tensorspark.data.tfrecord.frames import is_loaded, load_tfrecords, save_tfrecords

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import DataFrame, Row
    from pyspark.sql.types import StructType

__all__ = ["fromTFExample", "infer_schema", "isLoadedDF", "loadTFRecords", "saveAsTFRecords", "toTFExample"]


def saveAsTFRecords(df: DataFrame, output_dir: str) -> None:
    """`save_tfrecords` with its defaults: an error where the directory exists."""
    save_tfrecords(df, output_dir)


def loadTFRecords(sc: SparkContext, input_dir: str, binary_features: str | Iterable[str] = ()) -> DataFrame:
    """`load_tfrecords` on the session of a context; floats become doubles."""
    from pyspark.sql import SparkSession

    return load_tfrecords(SparkSession(sc), input_dir, binary_features, widens_floats=True)


def isLoadedDF(df: DataFrame) -> bool:
    """Whether a DataFrame is one that `loadTFRecords` returned, itself, not one made from it."""
    return is_loaded(df)


def toTFExample(
    dtypes: Sequence[tuple[str, str]],
) -> Callable[[Iterable[Any]], Iterator[tuple[bytearray, None]]]:
    """What `RDD.mapPartitions` takes to make rows into serialized examples, each beside a None.

    Values are taken by name from a `Row` with fields or a mapping, which may have others too; by position from a tuple.

    Args:
        dtypes: names and types of the columns, as `DataFrame.dtypes` gives them.

    Raises:
        ConfigError: a type that examples cannot hold.
        FeedError: from the function that is returned: a row that lacks a column, or a tuple of another length.
    """
    return rows_to_examples(dtypes)


def fromTFExample(
    iter: Iterable[tuple[bytes | bytearray, Any]], binary_features: str | Iterable[str] = ()
) -> Iterator[Row]:
    """Rows of serialized examples, as `RDD.mapPartitions` takes and gives them.

    A feature of one value becomes that value, one of several a list, one of none None. Bytes become text, or bytearrays
    where `binary_features` names them.

    Raises:
        FeedError: no example, features of different kinds under one name, or bytes that are no text.
    """
    return examples_to_rows(iter, binary_features)


def infer_schema(example: SerializableExample, binary_features: str | Iterable[str] = ()) -> StructType:
    """The schema of the row that one `tf.train.Example` becomes; a feature without a value is a string.

    Raises:
        FeedError: features that no column can hold.
    """
    return example_schema(example, binary_features)
