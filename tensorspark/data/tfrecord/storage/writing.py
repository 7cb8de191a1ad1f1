"""From record batches to the files of one task: cut by directory and by size, encoded, framed, compressed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import frame, open_writer
from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.commit import OutputFile, TaskOutput
from tensorspark.data.tfrecord.storage.paths import directory_name
from tensorspark.errors import StagingError

# Rows are encoded in slices of about this many bytes, so that memory does not grow with Spark's batches.
SLICE_BYTES = 2**23
# Rows that are not sorted by the columns of `partitionBy` come to many directories in turn.
MAX_OPEN_FILES = 64
_EXTENSIONS = {None: ".tfrecord", "gzip": ".tfrecord.gz", "zlib": ".tfrecord.deflate"}


class RowWriter:
    """Writes a task's rows; used by one thread.

    Args:
        output: makes the files.
        schema: of the rows.
        options: of the write.

    Attributes:
        num_records: written so far.
    """

    def __init__(self, output: TaskOutput, schema: pa.Schema, options: Options) -> None:
        self._output = output
        self._options = options
        fields = [field for field in schema if field.name not in options.partition_by]
        self._columns = [field.name for field in fields]
        self._schema = pa.schema(fields)
        self._encoder = Encoder(self._schema, options.record_type)
        self._open: OrderedDict[str, _RecordFile] = OrderedDict()
        self.num_records = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Writes the rows of a batch.

        Raises:
            FeedError: a value that records cannot hold.
            StagingError: a filesystem that cannot be written to, or a record that is over `maxRecordBytes`.
        """
        for directory, rows in self._by_directory(batch):
            data = rows.select(self._columns).cast(self._schema) if rows.num_columns else rows
            for piece in _slices(data):
                self._write_slice(directory, piece)
        self.num_records += batch.num_rows

    def close(self) -> None:
        """Completes all files."""
        while self._open:
            self._open.popitem()[1].close()

    def abandon(self) -> None:
        """Lets go of the open files; they are not complete."""
        while self._open:
            with suppress(Exception):
                self._open.popitem()[1].abandon()

    def _write_slice(self, directory: str, rows: pa.RecordBatch) -> None:
        limit = self._options.max_records_per_file
        while rows.num_rows:
            file = self._file(directory)
            num_rows = min(rows.num_rows, limit - file.num_records) if limit else rows.num_rows
            records = self._encoder.encode(rows.slice(0, num_rows))
            longest = int(np.max(records.lengths, initial=0))
            if longest > self._options.max_record_bytes:
                raise StagingError(
                    f"maxRecordBytes: expected records of at most {self._options.max_record_bytes} bytes, got one of "
                    f"{longest}; raise it for this write and for the reads"
                )
            file.write(frame(records), num_rows)
            rows = rows.slice(num_rows)
            if limit and file.num_records >= limit:
                self._open.pop(directory).close()

    def _file(self, directory: str) -> _RecordFile:
        """The open file of a directory; the one that was not written to for longest is closed where too many are."""
        if directory in self._open:
            self._open.move_to_end(directory)
        else:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            opened = self._output.open(directory, _EXTENSIONS[self._options.codec])
            self._open[directory] = _RecordFile(opened, self._options)
        return self._open[directory]

    def _by_directory(self, batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
        """A batch's rows by the directory that they belong in, each in the order that they came in."""
        names = self._options.partition_by
        if not names:
            yield "", batch
            return
        codes = np.zeros(batch.num_rows, np.int64)
        values: list[pa.Array] = []
        for name in names:
            encoded = pc.dictionary_encode(batch.column(name), null_encoding="encode")
            values.append(encoded.dictionary)
            codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy(zero_copy_only=False)
        for code in np.unique(codes).tolist():
            parts, rest = [], code
            for name, dictionary in zip(reversed(names), reversed(values), strict=True):
                rest, index = divmod(rest, len(dictionary))
                parts.append(directory_name(name, _text(dictionary[index])))
            yield "/".join(reversed(parts)), batch.take(pa.array(np.flatnonzero(codes == code)))


class _RecordFile:
    """A file that is open, with what compresses it."""

    def __init__(self, file: OutputFile, options: Options) -> None:
        self._file = file
        self._writer = open_writer(file, options.codec)  # type: ignore[arg-type]  # needs no more than write
        self.num_records = 0

    def write(self, data: bytes, num_records: int) -> None:
        self._writer.write(data)
        self.num_records += num_records

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


def _slices(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    num_rows = rows.num_rows
    row_bytes = max(1, rows.nbytes // max(1, num_rows))
    step = max(1, SLICE_BYTES // row_bytes)
    return (rows.slice(start, step) for start in range(0, num_rows, step))


def _text(value: pa.Scalar) -> str | None:
    """A value's text in a directory's name, as Spark casts it to string."""
    content: Any = value.as_py()
    if content is None or isinstance(content, str):
        return content
    return str(content).lower() if isinstance(content, bool) else str(content)
