"""TFRecord as a data source of Spark, under the names ``tfrecord`` and ``tfrecords``; no jar is needed.

>>> register_tfrecord(spark)  # doctest: +SKIP
>>> frame.write.format("tfrecord").mode("append").save("hdfs://namenode:8020/images")  # doctest: +SKIP
>>> spark.read.format("tfrecord").load("hdfs://namenode:8020/images")  # doctest: +SKIP

`Options` has the options. What Spark's interface for sources in Python (pyspark 4.1 and later) does not let through:

- Modes error and ignore, and so `DataFrameWriter`'s default: Spark refuses them. Write with ``mode("append")`` and
  ``option("saveMode", "error")`` (or ``"ignore"``), or with `save_tfrecords`.
- `DataFrameWriter.partitionBy`: Spark refuses it. The option ``partitionBy`` takes its place.
- Which columns a query needs: all columns of the schema are decoded. A schema with fewer columns makes a read faster.
- Which rows a query needs, where directories give columns: Spark hands filters on, but forgets whose they are
  (`reader`). Load the directories that are wanted, with the option ``basePath``.
- Streaming reads need pyspark 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pyspark.sql import SparkSession
from pyspark.sql.datasource import (
    DataSource,
    DataSourceReader,
    DataSourceStreamReader,
    DataSourceStreamWriter,
    DataSourceWriter,
)
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.source.reader import TFRecordReader
from tensorspark.data.tfrecord.source.schema import spark_schema
from tensorspark.data.tfrecord.source.writer import TFRecordStreamWriter, TFRecordWriter
from tensorspark.data.tfrecord.storage.paths import list_files
from tensorspark.data.tfrecord.storage.reading import infer
from tensorspark.errors import ConfigError

NAMES = ("tfrecord", "tfrecords")


class TFRecordSource(DataSource):
    """What Spark asks for schemas, readers and writers, in a Python process on the driver.

    Attributes:
        format_name: under which it is registered.
        defaults: of options, from the session that it was registered with.
    """

    format_name: ClassVar[str] = NAMES[0]
    defaults: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def name(cls) -> str:
        """The format's name."""
        return cls.format_name

    def schema(self) -> StructType:
        """The schema of the records, inferred, then the columns that directories give.

        Raises:
            ConfigError: a path that does not exist or has no records.
            FeedError: a damaged file, or one of another record type. Features of one name and different kinds are an
                error when they are read.
        """
        options = self._parsed()
        return spark_schema(infer(list_files(options), options))

    def reader(self, schema: StructType) -> DataSourceReader:
        """A reader for a query."""
        return TFRecordReader(schema, self._parsed())

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceWriter:
        """A writer for one write."""
        return TFRecordWriter(schema, self._parsed(), overwrite)

    def streamReader(self, schema: StructType) -> DataSourceStreamReader:
        """A reader for a streaming query; raises ConfigError on a pyspark that is too old."""
        try:
            from tensorspark.data.tfrecord.source.stream import TFRecordStreamReader
        except ImportError as error:
            raise ConfigError("reading a stream of TFRecords needs pyspark 4.2 or later: upgrade pyspark") from error
        return TFRecordStreamReader(schema, self._parsed())

    def streamWriter(self, schema: StructType, overwrite: bool) -> DataSourceStreamWriter:
        """A writer for a streaming query."""
        return TFRecordStreamWriter(schema, self._parsed(), overwrite)

    def _parsed(self) -> Options:
        return _parsed(self.defaults, self.options)


def register_tfrecord(spark: SparkSession) -> None:
    """Makes ``format("tfrecord")`` and ``format("tfrecords")`` known to a session, for reads, writes and streams.

    Call it once per session, and again for one made by `newSession`, in a thread that is to write, and after a change
    of those settings of Spark from which `Options` takes its defaults: they are what they are now. Makes the session
    the thread's active one, as Spark looks for the sources of a write there.

    Raises:
        ConfigError: something else than a session.
    """
    if not isinstance(spark, SparkSession):
        raise ConfigError(f"expected pyspark's SparkSession, got {type(spark).__name__}")
    jvm: Any = spark._jvm
    jvm.org.apache.spark.sql.SparkSession.setActiveSession(spark._jsparkSession)
    defaults = _defaults(spark)
    for name in NAMES:
        # A class of its own, so that Spark ships what it holds instead of its name.
        attributes: dict[str, Any] = {"format_name": name, "defaults": defaults}
        spark.dataSource.register(type(f"TFRecordSource_{name}", (TFRecordSource,), attributes))


def session_options(spark: SparkSession, given: Mapping[str, str]) -> Options:
    """The options of a read on the driver: those that are given, and of the others what Spark's settings say.

    Raises:
        ConfigError: as `Options.parse`.
    """
    return _parsed(_defaults(spark), given)


def _parsed(defaults: Mapping[str, str], given: Mapping[str, str]) -> Options:
    return Options.parse({**defaults, **{name.lower(): value for name, value in given.items()}})


def _defaults(spark: SparkSession) -> dict[str, str]:
    """What Spark's own file sources heed, and a source in Python is not told; names in lower case."""
    given = {
        "maxpartitionbytes": spark.conf.get("spark.sql.files.maxPartitionBytes", None),
        "opencostinbytes": spark.conf.get("spark.sql.files.openCostInBytes", None),
        "minpartitionnum": spark.conf.get("spark.sql.files.minPartitionNum", None)
        or str(spark.sparkContext.defaultParallelism),
        "ignorecorruptfiles": spark.conf.get("spark.sql.files.ignoreCorruptFiles", None),
        "maxrecordsperfile": spark.conf.get("spark.sql.files.maxRecordsPerFile", None),
        "partitionoverwritemode": spark.conf.get("spark.sql.sources.partitionOverwriteMode", None),
    }
    return {name: value for name, value in given.items() if value is not None}
