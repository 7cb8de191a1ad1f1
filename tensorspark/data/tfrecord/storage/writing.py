"""From record batches to the files of one task: cut by directory and by size, encoded, framed, compressed."""

from __future__ import annotations

import decimal
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import framed, open_writer
from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.paths import directory_name
from tensorspark.data.tfrecord.storage.task_output import OutputFile, TaskOutput
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
    """

    def __init__(self, output: TaskOutput, schema: pa.Schema, options: Options) -> None:
        self._output = output
        self._options = options
        fields = [field for field in schema if field.name not in options.partition_by]
        self._columns = [field.name for field in fields]
        self._schema = pa.schema(fields)
        self._encoder = Encoder(self._schema, options.record_type)
        self._open: OrderedDict[str, _RecordFile] = OrderedDict()

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
            file.write(framed(records).data, num_rows)
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
        for name in names:
            encoded = pc.dictionary_encode(batch.column(name), null_encoding="encode")
            codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy(zero_copy_only=False)
            # Numbered anew, below the number of rows: products of all columns' numbers may not fit into 64 bits.
            codes = np.unique(codes, return_inverse=True)[1]
        order = np.argsort(codes, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []:
            parts = [directory_name(name, _text(batch.column(name)[int(rows[0])])) for name in names]
            yield "/".join(parts), batch.take(pa.array(rows))


class _RecordFile:
    """A file that is open, with what compresses it."""

    def __init__(self, file: OutputFile, options: Options) -> None:
        self._file = file
        self._writer = open_writer(file, options.codec)
        self.num_records = 0

    def write(self, data: memoryview, num_records: int) -> None:
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
    if isinstance(content, float):
        return _float_text(np.float32(content) if pa.types.is_float32(value.type) else np.float64(content))
    if isinstance(content, decimal.Decimal):
        return f"{content:f}"
    return str(content).lower() if isinstance(content, bool) else str(content)


def _float_text(value: np.floating[Any]) -> str:
    """The fewest digits that tell a number from others of its type, arranged as Java does.

    Java before 19 writes a digit too many of a few numbers (JDK-4511638); both texts are read as the same number.
    """
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return np.format_float_positional(value, trim="0")
    return np.format_float_scientific(value, trim="0", exp_digits=1).replace("+", "").replace("e", "E")
