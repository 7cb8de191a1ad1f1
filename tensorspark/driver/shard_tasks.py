"""Shards as long-running Spark tasks on executors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from pyspark import SparkContext

from tensorspark.driver.jobs import SparkJob, summary
from tensorspark.shards.host import ShardJob, serve

_END_TIMEOUT_S = 10.0


class ShardTasks:
    """A Spark task each for the jobs, until `close`. They take as many of the application's slots.

    Args:
        group: the Spark job's.
    """

    def __init__(self, spark_context: SparkContext, group: str, jobs: Sequence[ShardJob]) -> None:
        tasks = spark_context.parallelize(range(len(jobs)), len(jobs)).mapPartitionsWithIndex(_task(tuple(jobs)))
        description = f"tensorspark: {len(jobs)} shard(s) of the weights"
        self._job = SparkJob(spark_context, tasks.count, group=group, description=description)
        self._job.__enter__()

    def failure(self) -> str | None:
        """How the tasks ended that should not have."""
        if not self._job.wait(0):
            return None
        error = self._job.error
        return f"the Spark tasks of the shards ended{'' if error is None else ': ' + summary(error)}"

    def close(self, lost: Collection[int] = ()) -> None:
        """Waits for the tasks, which end when the driver's channel does, and ends those that do not.

        Args:
            lost: shards that give no sign of life; then it waits for none.
        """
        if not lost:
            self._job.wait(_END_TIMEOUT_S)
        self._job.__exit__()


def _task(jobs: tuple[ShardJob, ...]) -> Callable[[int, Iterable[int]], Iterator[None]]:
    def run(index: int, rows: Iterable[int]) -> Iterator[None]:
        serve(jobs[index])
        for _ in rows:
            pass
        return iter(())

    return run
