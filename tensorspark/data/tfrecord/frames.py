"""DataFrames from and to TFRecord files in one call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.examples import widened
from tensorspark.data.tfrecord.format.inference import merge_schemas
from tensorspark.data.tfrecord.format.types import RecordType
from tensorspark.data.tfrecord.options import Options, PathLike, Paths, names_of, paths_of
from tensorspark.data.tfrecord.source.data_source import NAMES, register_tfrecord, session_options
from tensorspark.data.tfrecord.source.schema import spark_schema
from tensorspark.data.tfrecord.storage.paths import DataFile, codec_of, list_files, pack
from tensorspark.data.tfrecord.storage.reading import completed, infer, infer_records
from tensorspark.errors import ConfigError

_loaded: WeakSet[DataFrame] = WeakSet()


def save_tfrecords(
    df: DataFrame,
    path: PathLike,
    *,
    mode: str = "error",
    record_type: RecordType = "Example",
    codec: str = "none",
    partition_by: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """Writes a DataFrame as TFRecord files, one or more per partition that has rows; `_SUCCESS` is there when all are.

    Args:
        path: directory on any filesystem that fsspec knows; a bare path is a local one.
        mode: ``error`` (where the directory exists), ``ignore``, ``append`` or ``overwrite``.
        record_type: ``Example``, ``SequenceExample`` (for arrays of arrays) or ``ByteArray`` (one binary column).
        codec: ``none``, ``gzip`` or ``zlib``.
        partition_by: column, or columns, whose values become directories. The rows are sorted by them within each
            partition.
        options: others of the data source, by their names (`maxRecordsPerFile=10000`).

    Raises:
        ConfigError: an argument that cannot work. Errors of the write itself are Spark's, with ours in their text.
    """
    if not isinstance(df, DataFrame):
        raise ConfigError(f"df: expected a Spark DataFrame, got {type(df).__name__}; spark.createDataFrame makes one")
    target, *others = paths_of(path)
    columns = names_of(partition_by)
    if others or any("," in column for column in columns) or any(name.lower() == "savemode" for name in options):
        raise ConfigError(
            "expected one path, partition_by without commas in names, and mode instead of saveMode; got "
            f"{path!r}, {partition_by!r} and {options!r}"
        )
    given = {
        "recordType": record_type,
        "codec": codec,
        "partitionBy": ",".join(columns),
        "saveMode": mode,
        **{name: _option(value) for name, value in options.items()},
    }
    Options.parse({**given, "path": target})
    register_tfrecord(df.sparkSession)
    rows = df.sortWithinPartitions(*map(_quoted, columns)) if columns else df
    spark_mode = "overwrite" if mode.lower() == "overwrite" else "append"
    rows.write.format(NAMES[0]).mode(spark_mode).options(**given).save(target)


def load_tfrecords(
    spark: SparkSession,
    path: Paths,
    binary_features: str | Iterable[str] = (),
    *,
    schema: StructType | str | None = None,
    record_type: RecordType = "Example",
    widens_floats: bool = False,
    **options: Any,
) -> DataFrame:
    """A DataFrame of TFRecord files. Without a schema one job reads all records to infer it, on the executors.

    With one, no file is looked at here: what is wrong with files is an error of what uses the DataFrame, Spark's with
    ours in its text.

    Args:
        path: file, directory, glob or a list of them, on any filesystem that fsspec knows; a bare path is a local one.
        binary_features: name, or names, of features of bytes that become binary columns; the others become strings.
        schema: of the DataFrame, as for `DataFrameReader.schema`. Features that it lacks are not decoded.
        record_type: as it was written.
        widens_floats: whether inferred columns of floats become doubles, as in TensorFlowOnSpark.
        options: others of the data source, by their names (`verifyChecksum=False`). With `inferSchemaMaxBytes` the
            job reads about so much of the files, each task its share.

    Raises:
        ConfigError: an argument that cannot work, a path that does not exist, or no record to infer from.
        FeedError: a damaged file, or one of another record type.
        StagingError: files that cannot be listed or read.
        PythonException: Spark's, with a FeedError or StagingError in its text, of files that several tasks read.
    """
    given = {
        "recordType": record_type,
        "binaryFeatures": ",".join(names_of(binary_features)),
        **{name: _option(value) for name, value in options.items()},
    }
    register_tfrecord(spark)
    paths = list(paths_of(path))
    lower = {"inferschemamaxbytes": "0", **{name.lower(): value for name, value in given.items()}}
    parsed = session_options(spark, {**lower, "paths": json.dumps(paths)})
    if schema is None:
        inferred = _infer_on_executors(spark, parsed)
        schema = spark_schema(widened(inferred) if widens_floats else inferred)
    reader = spark.read.format(NAMES[0]).options(**given).schema(schema)
    frame = reader.load(paths[0] if len(paths) == 1 else paths)
    _loaded.add(frame)
    return frame


def is_loaded(df: DataFrame) -> bool:
    """Whether a DataFrame is one that `load_tfrecords` returned, itself, not one made from it."""
    return df in _loaded


def _infer_on_executors(spark: SparkSession, options: Options) -> pa.Schema:
    files = list_files(options)
    packed = pack(files, options.max_partition_bytes, options.open_cost_bytes, options.min_partitions)
    if len(packed) <= 1 or options.record_type == "ByteArray":
        return infer(files, options)
    for file in files:
        codec_of(file.path, options.codec)  # raises here, so that below ConfigError says one thing only
    total_bytes = max(1, sum(file.num_bytes for file in files))

    def infer_part(part: Sequence[DataFile]) -> list[bytes]:
        share_bytes = -(-options.infer_max_bytes * sum(file.num_bytes for file in part) // total_bytes)  # 0 for all
        try:
            return [bytes(infer_records(part, replace(options, infer_max_bytes=share_bytes)).serialize())]
        except ConfigError:  # no record in these files
            return []

    parts = spark.sparkContext.parallelize(packed, len(packed)).flatMap(infer_part).collect()
    if not parts:
        return infer(files, options)  # which says so
    return completed(merge_schemas(pa.ipc.read_schema(pa.py_buffer(part)) for part in parts), files, options)


def _quoted(column: str) -> str:
    escaped = column.replace("`", "``")
    return f"`{escaped}`"


def _option(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
