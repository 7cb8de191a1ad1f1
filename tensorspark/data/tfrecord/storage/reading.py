"""From TFRecord files to Arrow record batches, with the columns that directories give; needs no Spark."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem
from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.framing import Records, read_records
from tensorspark.data.tfrecord.format.inference import infer_schema
from tensorspark.data.tfrecord.format.types import BYTE_ARRAY_COLUMN
from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.paths import (
    SETTING,
    DataFile,
    codec_of,
    is_local,
    partition_schema,
    partition_value,
)
from tensorspark.errors import ConfigError, FeedError

_log = logging.getLogger(__name__)


def read_batches(files: Sequence[DataFile], schema: pa.Schema, options: Options) -> Iterator[pa.RecordBatch]:
    """The files' rows, file by file. Holds one batch of records, not a file, in memory.

    Args:
        schema: the columns that are wanted, in this order; those named as a directory's are taken from there.

    Raises:
        ConfigError: a schema that records cannot fill, or a directory's value that is not of its column's type.
        FeedError: a damaged file, or a feature of another kind than its column.
        StagingError: a file that cannot be read.
    """
    from_directories = {name for file in files for name, _ in file.values}
    exact = {name.lower(): name for name in from_directories}
    for name in schema.names:
        if exact.get(name.lower(), name) != name and name not in from_directories:
            raise ConfigError(
                f"column {name!r}: expected {exact[name.lower()]!r}, as the directories' names have it; upper and "
                "lower case differ here, whatever spark.sql.caseSensitive says"
            )
    columns = [name for name in schema.names if name in from_directories]
    decoder = Decoder(pa.schema([field for field in schema if field.name not in from_directories]), options.record_type)
    reader = FileReader(options)
    for file in files:
        constants = {name: partition_value(file, schema.field(name)) for name in columns}
        for records in reader.read(file):
            batch = decoder.decode(records, records.name)
            yield _with_constants(batch, constants, schema, len(records)) if constants else batch
    if reader.num_skipped:
        _log.warning("ignoreCorruptFiles: skipped the rest of %d of %d files", reader.num_skipped, len(files))


class FileReader:
    """Reads the records of one file after another, over one connection where they are on one filesystem.

    Attributes:
        num_skipped: files whose rest was skipped because they are damaged.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._filesystems: dict[str, fsspec.AbstractFileSystem] = {}
        self.num_skipped = 0

    def read(self, file: DataFile) -> Iterator[Records]:
        """The records of one file, in batches.

        Raises:
            ConfigError: a file of a codec that is not supported.
            FeedError: a damaged file, unless the options say to skip its rest.
            StagingError: a file that cannot be read.
        """
        options = self._options
        on_corrupt: Literal["raise", "skip"] = "skip" if options.skips_corrupt else "raise"
        with self._opened(file) as opened:
            yield from read_records(
                opened,
                name=_display(file),
                codec=codec_of(file.path, options.codec),
                verifies=options.verifies,
                max_record_bytes=options.max_record_bytes,
                on_corrupt=on_corrupt,
                counter=self._count,
            )

    def _count(self, error: FeedError) -> None:
        self.num_skipped += 1
        _log.warning("ignoreCorruptFiles: skipped the rest of a file: %s", error)

    @contextmanager
    def _opened(self, file: DataFile) -> Iterator[IO[bytes]]:
        if file.root not in self._filesystems:
            self._filesystems[file.root] = open_filesystem(file.root, self._options.user, SETTING)[0]
        filesystem, name = self._filesystems[file.root], _display(file)
        opened = attempt("open", name, partial(filesystem.open, file.path, "rb"), TRANSFER_DEADLINE_S, SETTING)
        try:
            reader: Any = opened if is_local(filesystem) else _DeadlineReader(opened, name)
            yield reader
        finally:
            opened.close()


def infer(files: Sequence[DataFile], options: Options) -> pa.Schema:
    """The schema of the files' records, then the columns that directories give.

    Reads `infer_max_bytes` of the files in this process, from files that are spread evenly over the list.

    Raises:
        ConfigError: no record to infer from.
        FeedError: a damaged file, or one of another record type. Features of one name and different kinds are an error
            when they are read, not here.
    """
    if options.record_type == "ByteArray":
        inferred = pa.schema([pa.field(BYTE_ARRAY_COLUMN, pa.binary())])
    else:
        inferred = infer_records(files, options)
    return completed(inferred, files, options)


def completed(inferred: pa.Schema, files: Sequence[DataFile], options: Options) -> pa.Schema:
    """What `infer_records` found, with what the options say of binary features and the directories of columns."""
    directories = partition_schema(files)
    fields = [field for field in inferred if field.name not in directories.names]
    return pa.schema([*with_binary(pa.schema(fields), options.binary_features), *directories])


def with_binary(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """The schema with binary where the columns `names` have string."""

    def binary(data_type: pa.DataType) -> pa.DataType:
        if pa.types.is_list(data_type):
            return pa.list_(binary(data_type.value_type))
        return pa.binary() if pa.types.is_string(data_type) else data_type

    return pa.schema([field.with_type(binary(field.type)) if field.name in names else field for field in schema])


def infer_records(files: Sequence[DataFile], options: Options) -> pa.Schema:
    """The schema of the files' records alone; raises as `infer` does."""
    num_seen = 0

    def counted() -> Iterator[Records]:
        nonlocal num_seen
        for records in _sample(files, options):
            num_seen += len(records)
            yield records

    inferred = infer_schema(counted(), options.record_type, sample_ratio=options.sample_ratio)
    if not num_seen:
        raise ConfigError(
            f"path: expected records to infer a schema from, but {', '.join(options.urls)} has none "
            f"({len(files)} files); give a schema"
        )
    return inferred


def _sample(files: Sequence[DataFile], options: Options) -> Iterator[Records]:
    """Records of all files while the limit lasts; then of as many as it allows, spread over the list."""
    reader = FileReader(options)
    total_bytes = sum(file.num_bytes for file in files)
    limit_bytes = options.infer_max_bytes
    if not limit_bytes or total_bytes <= limit_bytes:
        for file in files:
            yield from reader.read(file)
        return
    left_bytes = limit_bytes
    _log.warning(
        "inferring the schema from %d of %d bytes: set inferSchemaMaxBytes to 0 to read all, or give a schema",
        limit_bytes,
        total_bytes,
    )
    stride = max(1, round(total_bytes / limit_bytes))
    order = [file for start in range(stride) for file in files[start::stride]]
    for file in order:
        for records in reader.read(file):
            yield records
            left_bytes -= int(records.lengths.sum())
            if left_bytes <= 0:
                return


def _with_constants(
    batch: pa.RecordBatch, constants: dict[str, pa.Scalar], schema: pa.Schema, num_rows: int
) -> pa.RecordBatch:
    columns = [
        pa.repeat(constants[field.name], num_rows) if field.name in constants else batch.column(field.name)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _display(file: DataFile) -> str:
    """The file's name in errors: with the scheme and host of its URL, where it is not a local path."""
    scheme, separator, rest = file.root.partition("://")
    if not separator or scheme == "file":
        return file.path
    host = rest.partition("/")[0]
    return f"{scheme}://{host}{file.path}" if file.path.startswith("/") else f"{scheme}://{file.path}"


class _DeadlineReader:
    """A remote file whose reads do not wait for ever."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name

    def read(self, size: int = -1) -> bytes:
        return attempt("read", self._name, partial(self._file.read, size), TRANSFER_DEADLINE_S, SETTING)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)
