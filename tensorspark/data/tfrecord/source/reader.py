"""The batch reader of the TFRecord data source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql.datasource import DataSourceReader, InputPartition
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.source.schema import arrow_schema
from tensorspark.data.tfrecord.storage.paths import DataFile, list_files, pack
from tensorspark.data.tfrecord.storage.reading import read_batches


@dataclass
class FilePartition(InputPartition):
    """The files that one task reads."""

    files: tuple[DataFile, ...]


class TFRecordReader(DataSourceReader):
    """Reads files whole: a task has one or more.

    Without `pushFilters`: Spark 4.3 keeps what a reader planned for one query on a DataFrame and takes it for the next
    query on the same DataFrame too, whose filters are others. To leave out directories would lose that query's rows.

    Args:
        schema: of the DataFrame.
        options: of the read.
    """

    def __init__(self, schema: StructType, options: Options) -> None:
        self._schema = arrow_schema(schema)
        self._options = options

    def partitions(self) -> list[InputPartition]:
        """Lists the files, and packs them."""
        return partitions_of(list_files(self._options), self._options)

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """Yields record batches of the schema; Spark passes a partition of its own where there are no files."""
        if isinstance(partition, FilePartition):
            yield from read_batches(partition.files, self._schema, self._options)


def partitions_of(files: list[DataFile], options: Options) -> list[InputPartition]:
    """The files, packed into Spark partitions."""
    packed = pack(files, options.max_partition_bytes, options.open_cost_bytes, options.min_partitions)
    return [FilePartition(tuple(part)) for part in packed]
