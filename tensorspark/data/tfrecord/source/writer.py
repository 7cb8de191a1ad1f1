"""The writers of the TFRecord data source: for a DataFrame, and for a stream's micro-batches."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql.datasource import DataSourceArrowWriter, DataSourceStreamArrowWriter, WriterCommitMessage
from pyspark.sql.types import StructType

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem
from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.options import Options, SaveMode
from tensorspark.data.tfrecord.source.schema import arrow_schema, check_partition_columns
from tensorspark.data.tfrecord.storage.commit import abort_job, commit_batch, commit_job
from tensorspark.data.tfrecord.storage.job import TaskFiles, WriteJob
from tensorspark.data.tfrecord.storage.paths import SETTING, describe, is_local
from tensorspark.data.tfrecord.storage.task_output import TaskOutput
from tensorspark.data.tfrecord.storage.writing import RowWriter
from tensorspark.errors import ConfigError

# What Spark sets for the jobs of a streaming query.
_QUERY_PROPERTY = "sql.streaming.queryId"
_BATCH_PROPERTY = "streaming.sql.batchId"


@dataclass
class Written(WriterCommitMessage):
    """What a task tells the driver: its files, and for a stream the query that they are of."""

    files: TaskFiles
    query: str = ""


class TFRecordWriter(DataSourceArrowWriter):
    """Writes a DataFrame: a file per task (and per directory of `partitionBy`), visible when all tasks are through.

    Args:
        schema: of the DataFrame.
        options: of the write.
        overwrites: whether the mode is overwrite; Spark knows only this and append for sources in Python.

    Raises:
        ConfigError: a schema that records cannot hold, or a directory that is there and must not.
        StagingError: a filesystem that does not answer.
    """

    def __init__(self, schema: StructType, options: Options, overwrites: bool) -> None:
        self._schema = checked_schema(schema, options)
        self._options = options
        self._job = plan_job(options, overwrites, str(uuid.uuid4()))

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        """Writes a task's rows, on an executor."""
        if self._job.is_skipped:
            return Written(TaskFiles(""))
        return Written(write_rows(iterator, self._job, self._schema, self._options))

    def commit(self, messages: list[WriterCommitMessage | None]) -> None:
        """Makes the files visible, on the driver."""
        if not self._job.is_skipped:
            commit_job(self._job, _files(messages))

    def abort(self, messages: list[WriterCommitMessage | None]) -> None:
        """Removes what the tasks wrote, on the driver."""
        if not self._job.is_skipped:
            abort_job(self._job, _files(messages))


class TFRecordStreamWriter(DataSourceStreamArrowWriter):
    """Writes each micro-batch once, also where Spark repeats one after the driver died.

    Args:
        schema: of the stream.
        options: of the write.
        overwrites: whether each batch replaces what was there (output mode complete).
    """

    def __init__(self, schema: StructType, options: Options, overwrites: bool) -> None:
        if options.locality == "local" or options.save_mode in ("error", "ignore"):
            raise ConfigError(
                "a stream is written with writeLocality distributed and by its output mode; leave out "
                "writeLocality and saveMode"
            )
        self._schema = checked_schema(schema, options)
        self._options = options
        self._job = plan_job(options, overwrites, "")

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        """Writes a task's rows, on an executor."""
        context = _task_context()
        query, batch = context.getLocalProperty(_QUERY_PROPERTY), context.getLocalProperty(_BATCH_PROPERTY)
        if query is None or batch is None:
            raise ConfigError("expected a task of a streaming query, but Spark names no query for it; use writeStream")
        return Written(write_rows(iterator, self._job_of(query, int(batch)), self._schema, self._options), query)

    def commit(self, messages: list[WriterCommitMessage | None], batchId: int) -> None:
        """Makes the batch's files visible, on the driver; does nothing where they are."""
        for query in _queries(messages):
            commit_batch(self._job_of(query, batchId), _files(messages), query, batchId)

    def abort(self, messages: list[WriterCommitMessage | None], batchId: int) -> None:
        """Removes what the batch's tasks wrote, on the driver."""
        for query in _queries(messages):
            abort_job(self._job_of(query, batchId), _files(messages))

    def _job_of(self, query: str, batch: int) -> WriteJob:
        return replace(self._job, job_id=f"{query}-b{batch}")


def checked_schema(schema: StructType, options: Options) -> pa.Schema:
    """The schema of a write, in Arrow; raises ConfigError where records or directories cannot hold its columns."""
    if len(options.urls) != 1:
        raise ConfigError(f"path: expected one directory to write to, got {len(options.urls)}")
    if not schema.fields:
        raise ConfigError("expected a DataFrame with columns, got one without: its rows would be lost")
    check_partition_columns(schema, options.partition_by)
    whole = arrow_schema(schema)
    Encoder(pa.schema([field for field in whole if field.name not in options.partition_by]), options.record_type)
    return whole


def plan_job(options: Options, overwrites: bool, job_id: str) -> WriteJob:
    """The job of a write.

    Raises:
        ConfigError: a path or mode that cannot be written to so.
        StagingError: a filesystem that does not answer.
    """
    (url,) = options.urls
    mode: SaveMode = options.save_mode or ("overwrite" if overwrites else "append")
    filesystem, path = open_filesystem(url, options.user, SETTING)
    present = attempt("look at", url, lambda: describe(filesystem, path), TRANSFER_DEADLINE_S, SETTING)
    if options.locality == "local":
        _check_local(url, is_local(filesystem), mode)
    if present is not None and present["type"] != "directory":
        raise ConfigError(f"path: expected {url!r} to be a directory or absent, but it is a file; choose another path")
    if present is not None and mode == "error":
        raise ConfigError(
            f"path: expected {url!r} to be absent, but it is there; remove it, choose another path, or set the mode to "
            "append, overwrite or ignore"
        )
    return WriteJob(
        # A relative path means another directory on an executor.
        url=path if is_local(filesystem) else url,
        job_id=job_id,
        mode=mode,
        # As in Spark's own sources: without partitions there is nothing to choose from.
        is_dynamic=options.overwrites_dynamically and bool(options.partition_by),
        locality=options.locality,
        existed=present is not None,
        user=options.user,
    )


def write_rows(batches: Iterator[pa.RecordBatch], job: WriteJob, schema: pa.Schema, options: Options) -> TaskFiles:
    """Writes one task's rows to files of its own; where that fails, they are removed.

    Raises:
        FeedError: a value that records cannot hold.
        StagingError: a filesystem that cannot be written to.
    """
    context = _task_context()
    # A task attempt's number is unlike that of any other, but a stage may be run again under another context.
    attempt_id = f"{context.taskAttemptId()}-{uuid.uuid4().hex[:12]}"
    output = TaskOutput(job, context.partitionId(), attempt_id)
    if not output.is_wanted():
        return TaskFiles("")
    writer = RowWriter(output, schema, options)
    try:
        for batch in batches:
            writer.write(batch)
        writer.close()
    except BaseException:
        writer.abandon()
        output.discard()
        raise
    return output.finish()


def _check_local(url: str, is_on_this_host: bool, mode: SaveMode) -> None:
    if not is_on_this_host:
        raise ConfigError(f"writeLocality local: expected a path on the executors' own disks, got {url!r}")
    if mode == "overwrite":
        raise ConfigError(
            "writeLocality local: expected the mode append, error or ignore, got overwrite, which no task can do "
            "alone; remove the directory on each host first"
        )


def _task_context() -> TaskContext:
    context = TaskContext.get()
    if context is None:
        raise RuntimeError("expected to run in a Spark task")
    return context


def _files(messages: Sequence[WriterCommitMessage | None]) -> list[TaskFiles]:
    return [message.files for message in messages if isinstance(message, Written)]


def _queries(messages: Sequence[WriterCommitMessage | None]) -> set[str]:
    return {message.query for message in messages if isinstance(message, Written)}
