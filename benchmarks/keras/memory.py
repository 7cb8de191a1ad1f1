"""The anonymous memory of a worker that trains a partition of 1 GB, and of one that has only loaded TensorFlow."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from pyspark.sql import DataFrame, functions
from pyspark.sql import SparkSession as Spark

from benchmarks.keras.peers import BATCH_SIZE
from benchmarks.measuring import procfs
from benchmarks.workloads.perceptron import NUM_CLASSES, NUM_PIXELS, make_model
from tensorspark import SparkSession

PARTITION_BYTES = 10**9
_POLL_S = 0.02
_END_DEADLINE_S = 10.0


def large_partition(spark: Spark, num_bytes: int) -> DataFrame:
    """Rows of 784 floats and a label, in one partition, computed by Spark when they are read."""
    num_rows = num_bytes // (4 * NUM_PIXELS)
    ids = spark.range(0, num_rows, 1, 1)
    pixel = ((ids.id % 256) / 255).cast("float")
    return ids.select(functions.array_repeat(pixel, NUM_PIXELS).alias("image"), (ids.id % NUM_CLASSES).alias("label"))


def idle_bytes(spark: Spark) -> int:
    """Of a worker that has imported TensorFlow and Keras, and waits."""

    def load(_: Any) -> Iterator[int]:
        from tensorspark.trainers.startup import importing

        with importing():
            import keras
        assert keras.config.backend() == "tensorflow"
        yield procfs.status_bytes("RssAnon")

    (idle,) = spark.sparkContext.parallelize([0], 1).mapPartitions(load).collect()
    return int(idle)


def training_bytes(spark: Spark, df: DataFrame) -> int:
    """The most that a worker had in two epochs on the only partition of `df`."""
    with SparkSession(spark, make_model(), name="bench", sync_interval=100) as session, PeakOfWorkers() as peak:
        session.fit(df, features="image", label="label", batch_size=BATCH_SIZE, epochs=2, progress=False)
    return peak.num_bytes


class PeakOfWorkers:
    """Watches the Python workers, which are descendants of this process.

    Attributes:
        num_bytes: the most anonymous memory that one of them had.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory of workers")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_ended.set()
        self._thread.join(_END_DEADLINE_S)

    def _watch(self) -> None:
        while not self._has_ended.wait(_POLL_S):
            peak = max((procfs.status_bytes("RssAnon", pid) for pid in _workers_of(os.getpid())), default=0)
            self.num_bytes = max(self.num_bytes, peak)


def _workers_of(pid: int) -> list[int]:
    """Descendants that run pyspark's daemon or are forked from it."""
    return [member for member in procfs.family(pid) if procfs.is_python_daemon(member)]
