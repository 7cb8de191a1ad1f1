"""The streaming reader of the TFRecord data source: each file once, in batches by modification time.

An offset is what the query has seen, and nothing else is kept anywhere::

    {"newest_us": latest modification time seen, "seen": {hash of a path: its modification time, ...}, "batch": [files]}

``seen`` has the files whose modification time is at most `maxFileAge` before the newest; what appears with an older one
is taken for seen. ``batch`` names the files between the offset before and this one, so that a batch that Spark repeats
has the same files, whatever has come since. Files must appear whole, by a rename; this source's own writer does that.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyspark.sql.datasource import DataSourceStreamReader, InputPartition
from pyspark.sql.streaming.datasource import (
    ReadAllAvailable,
    ReadLimit,
    ReadMaxFiles,
    SupportsTriggerAvailableNow,
)
from pyspark.sql.types import StructType

from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.source.reader import FilePartition, partitions_of
from tensorspark.data.tfrecord.source.schema import arrow_schema
from tensorspark.data.tfrecord.storage.paths import DataFile, list_files
from tensorspark.data.tfrecord.storage.reading import read_batches

_log = logging.getLogger(__name__)


class TFRecordStreamReader(DataSourceStreamReader, SupportsTriggerAvailableNow):
    """Reads files as they appear.

    Args:
        schema: of the stream.
        options: of the read.
    """

    def __init__(self, schema: StructType, options: Options) -> None:
        self._schema = arrow_schema(schema)
        self._options = options
        # What was there when a query with the trigger availableNow began; None for other triggers.
        self._available: set[str] | None = None

    def initialOffset(self) -> dict[str, Any]:
        """Before the first file."""
        return {"newest_us": 0, "seen": {}, "batch": []}

    def getDefaultReadLimit(self) -> ReadLimit:
        """`maxFilesPerTrigger`."""
        limit = self._options.max_files_per_trigger
        return ReadMaxFiles(limit) if limit else ReadAllAvailable()

    def prepareForTriggerAvailableNow(self) -> None:
        """Leaves what comes later to another run."""
        self._available = {_key(file) for file in list_files(self._options)}

    def latestOffset(self, start: dict[str, Any], limit: ReadLimit) -> dict[str, Any]:
        """The offset after the oldest files that were not seen yet; `start` itself where there are none."""
        max_files = limit.max_files if isinstance(limit, ReadMaxFiles) else None
        unseen = self._unseen(start)[:max_files]
        if not unseen:
            return start
        newest_us = max(start["newest_us"], *(file.modified_us for file in unseen))
        times = {**start["seen"], **{_key(file): file.modified_us for file in unseen}}
        oldest_us = newest_us - self._age_us
        return {
            "newest_us": newest_us,
            "seen": {key: time_us for key, time_us in times.items() if time_us >= oldest_us},
            "batch": [_as_json(file) for file in unseen],
        }

    def partitions(self, start: dict[str, Any], end: dict[str, Any]) -> list[InputPartition]:
        """The batch's files, packed."""
        return partitions_of([_from_json(file) for file in end["batch"]], self._options) if start != end else []

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """Yields record batches of the schema."""
        if isinstance(partition, FilePartition):
            yield from read_batches(partition.files, self._schema, self._options)

    def commit(self, end: dict[str, Any]) -> None:
        """Nothing to do: offsets hold all there is."""

    @property
    def _age_us(self) -> int:
        return int(self._options.max_file_age_s * 1e6)

    def _unseen(self, start: dict[str, Any]) -> list[DataFile]:
        """Files that are not in `start`, the oldest first."""
        files = [file for file in list_files(self._options) if _key(file) not in start["seen"]]
        if self._available is not None:
            files = [file for file in files if _key(file) in self._available]
        oldest_us = start["newest_us"] - self._age_us
        fresh = [file for file in files if file.modified_us >= oldest_us]
        return sorted(fresh, key=lambda file: (file.modified_us, file.path))


def _key(file: DataFile) -> str:
    return hashlib.blake2b(f"{file.root}\0{file.path}".encode(), digest_size=12).hexdigest()


def _as_json(file: DataFile) -> dict[str, Any]:
    return {
        "root": file.root,
        "path": file.path,
        "num_bytes": file.num_bytes,
        "modified_us": file.modified_us,
        "values": [list(value) for value in file.values],
    }


def _from_json(content: dict[str, Any]) -> DataFile:
    values = tuple((name, text) for name, text in content["values"])
    return DataFile(content["root"], content["path"], content["num_bytes"], content["modified_us"], values)
