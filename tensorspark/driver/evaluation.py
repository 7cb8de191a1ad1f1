"""Evaluation on Spark: `evaluated` adds up the metrics of all partitions."""

from __future__ import annotations

import secrets
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark import RDD

from tensorspark.data.decoders import Decoder
from tensorspark.driver.feeding import require_whole_partitions
from tensorspark.driver.jobs import SparkJob, summary
from tensorspark.driver.shipping import Shipped, ship
from tensorspark.errors import FeedLostError, WorkerFailedError
from tensorspark.trainers.base import Captured, Trainer

_POLL_S = 0.1


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
