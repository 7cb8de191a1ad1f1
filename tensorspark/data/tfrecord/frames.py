"""DataFrames from and to TFRecord files in one call, and rows from and to serialized `tf.train.Example` messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import pyarrow as pa
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.inference import infer_schema, merge_schemas
from tensorspark.data.tfrecord.format.types import RecordType
from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.source.data_source import NAMES, register_tfrecord
from tensorspark.data.tfrecord.source.schema import spark_schema
from tensorspark.data.tfrecord.storage.paths import DataFile, codec_of, list_files, pack
from tensorspark.data.tfrecord.storage.reading import as_binary, completed, infer, infer_records
from tensorspark.errors import ConfigError

_CHUNK_ROWS = 1024
_LEAVES: dict[str, pa.DataType] = {
    "boolean": pa.bool_(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
}
_loaded: WeakKeyDictionary[DataFrame, str] = WeakKeyDictionary()


class SerializableExample(Protocol):
    """A `tf.train.Example`, of which no more is needed."""

    def SerializeToString(self) -> bytes:
        """The message's bytes."""


def save_tfrecords(
    df: DataFrame,
    path: str,
    *,
    mode: str = "error",
    record_type: RecordType = "Example",
    codec: str = "none",
    partition_by: Sequence[str] = (),
    **options: Any,
) -> None:
    """Writes a DataFrame as TFRecord files, one or more per partition; all become visible together, or none does.

    Args:
        path: directory on any filesystem that fsspec knows; a bare path is a local one.
        mode: ``error`` (where the directory exists), ``ignore``, ``append`` or ``overwrite``.
        record_type: ``Example``, ``SequenceExample`` (for arrays of arrays) or ``ByteArray`` (one binary column).
        codec: ``none``, ``gzip`` or ``zlib``.
        partition_by: columns whose values become directories. The rows are sorted by them within each partition.
        options: others of the data source, by their names (`maxRecordsPerFile=10000`).

    Raises:
        ConfigError: an argument that cannot work. Errors of the write itself are Spark's, with ours in their text.
    """
    given = {
        "recordType": record_type,
        "codec": codec,
        "partitionBy": ",".join(partition_by),
        "saveMode": mode,
        **{name: _option(value) for name, value in options.items()},
    }
    Options.parse({**given, "path": path})
    register_tfrecord(df.sparkSession)
    rows = df.sortWithinPartitions(*partition_by) if partition_by else df
    spark_mode = "overwrite" if mode.lower() == "overwrite" else "append"
    rows.write.format(NAMES[0]).mode(spark_mode).options(**given).save(path)


def load_tfrecords(
    spark: SparkSession,
    path: str | Sequence[str],
    binary_features: Iterable[str] = (),
    *,
    schema: StructType | str | None = None,
    record_type: RecordType = "Example",
    widens_floats: bool = False,
    **options: Any,
) -> DataFrame:
    """A DataFrame of TFRecord files. Without a schema one job reads all records to infer it, on the executors.

    Args:
        path: file, directory, glob or a list of them, on any filesystem that fsspec knows; a bare path is a local one.
        binary_features: names of features of bytes that become binary columns; the others become strings.
        schema: of the DataFrame, as for `DataFrameReader.schema`. Features that it lacks are not decoded.
        record_type: as it was written.
        widens_floats: whether inferred columns of floats become doubles, as in TensorFlowOnSpark.
        options: others of the data source, by their names (`verifyChecksum=False`).

    Raises:
        ConfigError: an argument that cannot work, a path that does not exist, or no record to infer from.
    """
    given = {
        "recordType": record_type,
        "binaryFeatures": ",".join(binary_features),
        **{name: _option(value) for name, value in options.items()},
    }
    register_tfrecord(spark)
    paths = [path] if isinstance(path, str) else list(path)
    if schema is None:
        inferred = _infer_on_executors(spark, replace(Options.parse(given | {"path": "-"}), urls=tuple(paths)))
        schema = spark_schema(_widened(inferred) if widens_floats else inferred)
    reader = spark.read.format(NAMES[0]).options(**given).schema(schema)
    frame = reader.load(paths[0] if len(paths) == 1 else paths)
    _loaded[frame] = ",".join(paths)
    return frame


def is_loaded(df: DataFrame) -> bool:
    """Whether a DataFrame is one that `load_tfrecords` returned, itself, not one made from it."""
    return df in _loaded


def rows_to_examples(
    dtypes: Sequence[tuple[str, str]],
) -> Callable[[Iterable[Sequence[Any]]], Iterator[tuple[bytearray, None]]]:
    """What `RDD.mapPartitions` takes to make rows into serialized examples, each beside a None.

    Args:
        dtypes: names and types of the columns, as `DataFrame.dtypes` gives them.

    Raises:
        ConfigError: a type that examples cannot hold.
    """
    schema = pa.schema([pa.field(name, _arrow_type(name, text)) for name, text in dtypes])
    Encoder(schema)

    def convert(rows: Iterable[Sequence[Any]]) -> Iterator[tuple[bytearray, None]]:
        encoder = Encoder(schema)
        for chunk in _chunks(rows):
            columns = [
                pa.array(column, field.type) for column, field in zip(zip(*chunk, strict=True), schema, strict=True)
            ]
            for payload in encoder.encode(pa.RecordBatch.from_arrays(columns, schema=schema)).payloads():
                yield bytearray(payload), None

    return convert


def examples_to_rows(
    records: Iterable[tuple[bytes | bytearray, Any]], binary_features: Iterable[str] = ()
) -> Iterator[Row]:
    """Rows of serialized examples, as `RDD.mapPartitions` takes and gives them.

    A feature of one value becomes that value, one of several a list, one of none None; so does a feature that other
    examples nearby have and this one lacks. Bytes become text unless `binary_features` names them.

    Raises:
        FeedError: no example, features of different kinds under one name, or bytes that are no text.
    """
    binary = frozenset(binary_features)
    for chunk in _chunks(records):
        payloads = Records.of([bytes(record[0]) for record in chunk])
        inferred = infer_schema([payloads])
        schema = pa.schema([as_binary(field) if field.name in binary else field for field in inferred])
        for values in Decoder(schema).decode(payloads).to_pylist():
            yield Row(**{name: _unwrapped(value) for name, value in sorted(values.items())})


def example_schema(example: SerializableExample, binary_features: Iterable[str] = ()) -> StructType:
    """The schema that `load_tfrecords` with `widens_floats` would infer from one `tf.train.Example`.

    Raises:
        FeedError: features that no column can hold.
    """
    binary = frozenset(binary_features)
    inferred = _widened(infer_schema([Records.of([example.SerializeToString()])]))
    return spark_schema(pa.schema([as_binary(field) if field.name in binary else field for field in inferred]))


def _infer_on_executors(spark: SparkSession, options: Options) -> pa.Schema:
    files = list_files(options)
    parallelism = spark.sparkContext.defaultParallelism
    packed = pack(files, options.max_partition_bytes, options.open_cost_bytes, parallelism)
    if len(packed) <= 1 or options.record_type == "ByteArray":
        return infer(files, options)
    for file in files:
        codec_of(file.path, options.codec)  # raises here, so that below ConfigError says one thing only
    readable = replace(options, infer_max_bytes=0)

    def infer_part(part: Sequence[DataFile]) -> list[bytes]:
        try:
            return [bytes(infer_records(part, readable).serialize())]
        except ConfigError:  # no record in these files
            return []

    parts = spark.sparkContext.parallelize(packed, len(packed)).flatMap(infer_part).collect()
    if not parts:
        return infer(files, options)  # which says so
    merged = merge_schemas(pa.ipc.read_schema(pa.py_buffer(part)) for part in parts)
    return completed(merged, files, options)


def _widened(schema: pa.Schema) -> pa.Schema:
    def widen(data_type: pa.DataType) -> pa.DataType:
        if pa.types.is_list(data_type):
            return pa.list_(widen(data_type.value_type))
        return pa.float64() if pa.types.is_float32(data_type) else data_type

    return pa.schema([field.with_type(widen(field.type)) for field in schema])


def _arrow_type(name: str, text: str) -> pa.DataType:
    if match := re.fullmatch(r"array<(.*)>", text):
        return pa.list_(_arrow_type(name, match[1]))
    if match := re.fullmatch(r"decimal\((\d+),(\d+)\)", text):
        return pa.decimal128(int(match[1]), int(match[2]))
    if text not in _LEAVES:
        raise ConfigError(
            f"column {name!r}: expected one of {', '.join(_LEAVES)}, decimal, or an array of them, got {text}; cast it"
        )
    return _LEAVES[text]


def _unwrapped(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return value if len(value) > 1 else value[0] if value else None


def _option(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk
