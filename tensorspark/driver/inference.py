"""Predictions and evaluation on Spark: `predicted` appends columns to a DataFrame, `evaluated` adds up metrics."""

from __future__ import annotations

import hashlib
import secrets
import socket
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import RDD, Broadcast, SparkContext, TaskContext
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructField, StructType

from tensorspark.data.arrow import ArrowDecoder, check_schema
from tensorspark.data.arrow_schema import Source
from tensorspark.data.columns import Column
from tensorspark.data.decoders import Decoder, Place
from tensorspark.driver.feeding import require_whole_partitions
from tensorspark.driver.jobs import SparkJob, summary
from tensorspark.driver.prediction_schema import Appended
from tensorspark.errors import ConfigError, FeedLostError, WorkerFailedError
from tensorspark.trainers.base import Captured, Trainer, TrainerSpec, obtain

_POLL_S = 0.1

# Which weights a trainer of this process holds, by their hash. Only predictions load weights into theirs: their specs
# have no labels, so that no trainer is theirs and a training run's.
_loaded: weakref.WeakKeyDictionary[Trainer, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shipped:
    """A model on its way to the executors, once, as one broadcast. Whoever holds it keeps the broadcast."""

    spec: TrainerSpec
    weights_hash: str
    broadcast: Broadcast[tuple[bytes, bytes]]

    def trainer(self) -> Trainer:
        """The process's trainer, holding the weights."""
        trainer = obtain(self.spec, lambda: self.broadcast.value[0])
        trainer.reset(0, 0)
        weights = self.spec.layout.allocate()
        weights[:] = np.frombuffer(self.broadcast.value[1], np.uint8)
        trainer.load(weights)
        return trainer

    def predictor(self) -> Trainer:
        """As `trainer`, for predictions: where it holds the weights already, it is left as it is."""
        trainer = obtain(self.spec, lambda: self.broadcast.value[0])
        if _loaded.get(trainer) != self.weights_hash:
            trainer = self.trainer()
            _loaded[trainer] = self.weights_hash
        return trainer


def ship(spark_context: SparkContext, captured: Captured) -> Shipped:
    weights = captured.weights.tobytes()
    broadcast = spark_context.broadcast((captured.content, weights))
    return Shipped(captured.spec, hashlib.blake2b(weights, digest_size=16).hexdigest(), broadcast)


# Predictions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prediction:
    """What a task needs to know."""

    shipped: Shipped
    decoder: ArrowDecoder
    appended: Appended
    names: tuple[str, ...]
    batch_size: int


def predicted(
    df: DataFrame,
    captured: Captured,
    columns: Sequence[Column],
    sources: Sequence[Source],
    appended: Appended,
    batch_size: int,
) -> DataFrame:
    """The DataFrame with the model's predictions appended, computed where and when it is used, also a streaming one.

    It does not need the session any more: the model has been broadcast, and is kept as long as the DataFrame.

    Args:
        captured: the model, as `KerasDriverModel.capture` reads it off with the inputs' columns alone.
        columns: its inputs.
        sources: for each of `columns`, the DataFrame's columns that it is made of.
        batch_size: rows that the model computes at once.

    Raises:
        ConfigError: a column to be appended that is there already, or a DataFrame that Arrow cannot carry.
        FeedError: a column that is missing or of a type that the model cannot take.
    """
    schema = _announced(df, appended.fields)
    arrow_schema = _arrow_schema(df)
    check_schema(columns, sources, arrow_schema)
    spark_context = df.sparkSession.sparkContext
    job = _Prediction(
        shipped=ship(spark_context, captured),
        decoder=ArrowDecoder(tuple(columns), tuple(sources), arrow_schema.serialize().to_pybytes()),
        appended=appended,
        names=tuple(schema.names),
        batch_size=batch_size,
    )
    return df.mapInArrow(lambda batches: _predict(job, batches), schema)


def _predict(job: _Prediction, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    context = TaskContext.get()
    assert context is not None
    place = Place(context.partitionId())
    trainer: Trainer | None = None  # until there is a row: TensorFlow need not be loaded for none
    for batch in batches:
        check_schema(job.decoder.columns, job.decoder.sources, batch.schema)
        for part, inputs in job.decoder.decode(batch, place):
            trainer = trainer or job.shipped.predictor()
            outputs = trainer.predict(inputs, job.batch_size)
            arrays = [*part.columns, *job.appended.arrays(outputs)]
            yield pa.RecordBatch.from_arrays(arrays, names=list(job.names))


def _announced(df: DataFrame, fields: Sequence[StructField]) -> StructType:
    """The schema of `df` and `fields`, checked to have each name once."""
    is_case_sensitive = str(df.sparkSession.conf.get("spark.sql.caseSensitive", "false")).lower() == "true"

    def known(name: str) -> str:
        return name if is_case_sensitive else name.lower()

    counts = Counter(known(name) for name in df.columns)
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(f"the DataFrame has {count} columns {name!r}: rename or drop all but one of them")
    for field in fields:
        if known(field.name) in counts:
            raise ConfigError(
                f"the DataFrame has a column {field.name!r} already: choose another name for the prediction, or drop it"
            )
        counts[known(field.name)] += 1
    if len(counts) != len(df.columns) + len(fields):
        raise ConfigError(f"predictions need different names, got {', '.join(field.name for field in fields)}")
    return StructType([*df.schema.fields, *fields])


def _arrow_schema(df: DataFrame) -> pa.Schema:
    try:
        return to_arrow_schema(df.schema)
    except PySparkException as error:
        raise ConfigError(f"the DataFrame cannot go through Arrow, so drop or cast the column: {error}") from error


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """What a task needs to know."""

    shipped: Shipped
    decoder: Decoder
    batch_size: int


@dataclass(frozen=True)
class _Outcome:
    """What came of a partition: its totals, or what went wrong, as text."""

    partition: int
    host: str
    totals: bytes = b""
    num_samples: int = 0
    error: str = ""
    traceback: str = ""


def evaluated(
    rdd: RDD[Any], decoder: Decoder, captured: Captured, batch_size: int, *, name: str = ""
) -> tuple[NDArray[np.float64], int]:
    """Evaluates the model on an RDD, in one Spark job.

    Args:
        decoder: reads the elements of `rdd`.
        captured: the model, with the columns that `decoder` has.
        name: of the job, for Spark's web page.

    Returns:
        The totals of all partitions, added up in their order, as `KerasDriverModel.logs` takes them; and how many rows
        there were.

    Raises:
        WorkerFailedError: a task raised, or Spark gave it up.
    """
    shipped = ship(rdd.context, captured)
    job = _Evaluation(shipped, decoder, batch_size)
    try:
        outcomes = _outcomes(rdd, job, f"tensorspark {name}: evaluation")
    finally:
        shipped.broadcast.destroy()
    totals, num_samples = np.zeros(0), 0
    for outcome in outcomes:
        if outcome.error:
            raise WorkerFailedError(
                f"the evaluation of partition {outcome.partition} on {outcome.host} failed: {outcome.error}",
                partition=outcome.partition,
                host=outcome.host,
                worker_traceback=outcome.traceback,
            )
        if outcome.num_samples:
            partition_totals = np.frombuffer(outcome.totals, np.float64)
            totals = totals + partition_totals if len(totals) else partition_totals
            num_samples += outcome.num_samples
    return totals, num_samples


def _outcomes(rdd: RDD[Any], job: _Evaluation, description: str) -> list[_Outcome]:
    tasks = rdd.mapPartitionsWithIndex(_task(job))
    require_whole_partitions(tasks)
    group = f"tensorspark-evaluation-{secrets.token_hex(8)}"
    with SparkJob(rdd.context, tasks.collect, group=group, description=description) as spark_job:
        while not spark_job.wait(_POLL_S):
            pass
    if spark_job.error is not None:
        text = f"Spark gave the evaluation up: {summary(spark_job.error)}"
        raise WorkerFailedError(text) from spark_job.error
    outcomes: list[_Outcome] = spark_job.result
    return outcomes


def _task(job: _Evaluation) -> Callable[[int, Iterable[Any]], Iterator[_Outcome]]:
    def evaluate(partition: int, rows: Iterable[Any]) -> Iterator[_Outcome]:
        try:
            yield _evaluate(job, partition, iter(rows))
        except FeedLostError:  # Spark tries again
            raise
        except (Exception, SystemExit) as error:  # what rows and models raise comes again: no use in trying
            text = f"{type(error).__name__}: {error}"
            yield _Outcome(partition, socket.gethostname(), error=text, traceback=traceback.format_exc())

    return evaluate


def _evaluate(job: _Evaluation, partition: int, rows: Iterator[Any]) -> _Outcome:
    trainer: Trainer | None = None
    num_samples = 0
    for columns in job.decoder.blocks(rows, partition):
        if columns is None:
            continue
        if trainer is None:
            trainer = job.shipped.trainer()
        trainer.evaluate(columns, job.batch_size)
        num_samples += len(columns[0])
    if trainer is None:
        return _Outcome(partition, socket.gethostname())
    return _Outcome(partition, socket.gethostname(), trainer.take_totals().tobytes(), num_samples)
