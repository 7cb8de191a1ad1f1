"""One run on the driver, once the server has it: the Spark job, watched, and what came of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pyspark import RDD, TaskContext

from tensorspark.driver.feeding import require_whole_partitions
from tensorspark.driver.jobs import SparkJob, summary
from tensorspark.driver.progress import ProgressLine
from tensorspark.errors import ConfigError, FeedError, SessionClosedError, WorkerFailedError
from tensorspark.history import WorkerReport
from tensorspark.ps.messages import EpochEnd
from tensorspark.shards.sharded_server import AnyServer
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.worker import WorkerJob, run_partition

_POLL_S = 0.1
_BREATH_S = 0.005
_FAILED_JOB_GRACE_S = 1.0
_combiners_at_work: set[int] = set()  # by id, in this process


@contextlib.contextmanager
def exclusively(session: threading.Lock, combiner: WeightCombiner) -> Iterator[None]:
    """One run at a time for each session, and for each combiner, which may have state.

    Raises:
        ConfigError: another run is under way.
    """
    with contextlib.ExitStack() as stack:
        if not session.acquire(blocking=False):
            raise ConfigError("this SparkSession is training already: one feed at a time, or a session for each thread")
        stack.callback(session.release)
        if id(combiner) in _combiners_at_work:
            raise ConfigError(
                f"this {type(combiner).__name__} is at work in another session, and combiners may have state: pass "
                f"each session one of its own"
            )
        _combiners_at_work.add(id(combiner))
        stack.callback(_combiners_at_work.discard, id(combiner))
        yield


@dataclass(frozen=True)
class JobLabel:
    """A Spark job's group and what its web page says of it."""

    group: str
    description: str


class EpochDriver(Protocol):
    """What the driver does with a run that has epochs."""

    def end_epoch(self, server: AnyServer, end: EpochEnd) -> None:
        """All workers have ended an epoch: lets them go on, with `ParameterServer.release_epoch`."""

    @property
    def wants_stop(self) -> bool:
        """Whether the run is to end now, in the middle of an epoch; asked for again and again."""


def run_job(
    feed_rdd: RDD[Any],
    job: WorkerJob,
    server: AnyServer,
    line: ProgressLine,
    label: JobLabel,
    epochs: EpochDriver | None = None,
) -> None:
    """Trains the feed's partitions in one Spark job, to its end or the first failure, showing progress.

    Raises:
        WorkerFailedError, CombinerError: what a worker or the combiner reported, else what Spark says.
    """
    tasks = feed_rdd.mapPartitionsWithIndex(_task(job))
    require_whole_partitions(tasks)
    try:
        with SparkJob(tasks.context, tasks.count, group=label.group, description=label.description) as spark_job:
            while not _has_ended(spark_job, server, epochs):
                line.show(server.status())
                if server.failure() is not None:
                    spark_job.cancel()
                    spark_job.wait(_FAILED_JOB_GRACE_S)
                    break
        _raise_failure(server, spark_job.error)
    except BaseException:
        # No open round ends any more: a checkpoint that waits for one must not hold up whoever waits for its thread.
        with contextlib.suppress(SessionClosedError):
            server.stop_run()
        line.abandon()
        raise
    line.show(server.status(), last=True)


def _has_ended(spark_job: SparkJob, server: AnyServer, epochs: EpochDriver | None) -> bool:
    """Waits for a moment, and whether the job is over then."""
    if epochs is None:
        return spark_job.wait(_POLL_S)
    end = server.wait_epoch(_POLL_S)
    if end is not None:
        epochs.end_epoch(server, end)
        return spark_job.wait(0)
    if epochs.wants_stop:
        server.request_stop()
    return spark_job.wait(_BREATH_S)  # a run that is ending answers `wait_epoch` at once


def require_trained(workers: tuple[WorkerReport, ...], version: int, *, was_stopped: bool = False) -> None:
    """Checks a job that Spark calls done.

    Args:
        version: of the weights: over 0 where any push is in them, also one from before a restore.
        was_stopped: by the driver, which may be before any push.

    Raises:
        WorkerFailedError: every push was refused, or a partition was not trained to its end.
        FeedError: the feed has no rows.
    """
    unfinished = [worker.partition for worker in workers if not worker.finished]
    if unfinished:
        raise WorkerFailedError(
            f"Spark calls the job done, but no worker has trained partitions {unfinished} to their end: does the feed "
            f"end its rows early, with a limit for example?",
            partition=unfinished[0],
        )
    if version:
        return
    num_refused = sum(worker.num_refused for worker in workers)
    if num_refused:
        raise WorkerFailedError(f"nothing was trained: all {num_refused} pushes were refused")
    if not was_stopped:
        raise FeedError("the feed has no rows: nothing was trained; look at what filters it")


def _task(job: WorkerJob) -> Callable[[int, Iterable[Any]], Iterator[None]]:
    def train(partition: int, rows: Iterable[Any]) -> Iterator[None]:
        context = TaskContext.get()
        assert context is not None
        run_partition(job, partition, context.taskAttemptId(), rows)
        return iter(())

    return train


def _raise_failure(server: AnyServer, job_error: BaseException | None) -> None:
    reported = server.failure()
    if reported is not None:
        raise reported from job_error
    if job_error is not None:
        raise WorkerFailedError(f"Spark gave the training job up: {summary(job_error)}") from job_error
