"""RDDs of serialized records from and to TFRecord files: what tensorflow-hadoop's input and output formats were for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyspark.sql import SparkSession
from pyspark.sql.types import BinaryType, StructField, StructType

from tensorspark.data.tfrecord.format.types import BYTE_ARRAY_COLUMN
from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords
from tensorspark.data.tfrecord.options import PathLike, Paths
from tensorspark.errors import FeedError

if TYPE_CHECKING:
    from pyspark import RDD

_SCHEMA = StructType([StructField(BYTE_ARRAY_COLUMN, BinaryType(), nullable=False)])


def save_tfrecords_rdd(
    rdd: RDD[Any], path: PathLike, *, mode: str = "error", codec: str = "none", **options: Any
) -> None:
    """Writes an RDD of serialized records as TFRecord files, one or more per partition.

    For messages that are made already, of `tf.train.Example` or of anything else. Rows go through pickle, one by one:
    a DataFrame and `save_tfrecords` are many times faster.

    Args:
        rdd: of bytes or bytearrays, or of tuples that begin with them, as Hadoop's formats have.
        path: as for `save_tfrecords`; so are `mode`, `codec` and the options.

    Raises:
        ConfigError: an argument that cannot work. Errors of the write itself are Spark's, with ours in their text:
            a FeedError for an element that is no record.
    """
    rows = SparkSession(rdd.context).createDataFrame(rdd.map(_as_row), _SCHEMA, verifySchema=False)
    save_tfrecords(rows, path, mode=mode, record_type="ByteArray", codec=codec, **options)


def load_tfrecords_rdd(spark: SparkSession, path: Paths, **options: Any) -> RDD[bytes]:
    """An RDD of the records of TFRecord files, serialized as they are.

    Args:
        path: as for `load_tfrecords`; so are the options.

    Raises:
        ConfigError: an argument that cannot work.
        AnalysisException: Spark's, with a ConfigError or StagingError in its text: a path that does not exist, or files
            that cannot be listed.
    """
    records = load_tfrecords(spark, path, schema=_SCHEMA, record_type="ByteArray", **options)
    return records.rdd.map(lambda row: bytes(row[0]))


def _as_row(element: Any) -> tuple[bytes]:
    record = element[0] if isinstance(element, tuple) and element else element
    if not isinstance(record, bytes | bytearray):
        raise FeedError(
            f"expected an RDD of bytes, or of tuples that begin with them, got {type(record).__name__}; serialize the "
            "records, or make a DataFrame and use save_tfrecords"
        )
    return (bytes(record),)
