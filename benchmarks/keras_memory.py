"""The anonymous memory of a worker that trains a partition of 1 GB, and of one that has only loaded TensorFlow."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyspark.sql import DataFrame, functions
from pyspark.sql import SparkSession as Spark

from benchmarks.keras_digits import NUM_PIXELS, make_model
from benchmarks.keras_peers import BATCH_SIZE
from tensorspark import SparkSession

PARTITION_BYTES = 10**9
_POLL_S = 0.02
_END_DEADLINE_S = 10.0
_NUM_CLASSES = 10


def large_partition(spark: Spark, num_bytes: int) -> DataFrame:
    """Rows of 784 floats and a label, in one partition, computed by Spark when they are read."""
    num_rows = num_bytes // (4 * NUM_PIXELS)
    ids = spark.range(0, num_rows, 1, 1)
    pixel = ((ids.id % 256) / 255).cast("float")
    return ids.select(functions.array_repeat(pixel, NUM_PIXELS).alias("image"), (ids.id % _NUM_CLASSES).alias("label"))


def idle_bytes(spark: Spark) -> int:
    """Of a worker that has imported TensorFlow and Keras, and waits."""

    def load(_: Any) -> Iterator[int]:
        from tensorspark.trainers.startup import quiet

        with quiet():
            import keras
        assert keras.config.backend() == "tensorflow"
        yield anonymous_bytes(os.getpid())

    (idle,) = spark.sparkContext.parallelize([0], 1).mapPartitions(load).collect()
    return int(idle)


def training_bytes(spark: Spark, df: DataFrame) -> int:
    """The most that a worker had in two epochs on the only partition of `df`."""
    with SparkSession(spark, make_model(), name="bench", sync_interval=100) as session, PeakOfWorkers() as peak:
        session.fit(df, features="image", label="label", batch_size=BATCH_SIZE, epochs=2, progress=False)
    return peak.num_bytes


def anonymous_bytes(pid: int) -> int:
    """What a process holds in memory that no file stands for; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


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
            peak = max((anonymous_bytes(pid) for pid in _workers_of(os.getpid())), default=0)
            self.num_bytes = max(self.num_bytes, peak)


def _workers_of(pid: int) -> list[int]:
    """Descendants that run pyspark's daemon or are forked from it."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (parent := _parent_of(entry)):
            children[parent].append(int(entry.name))
    descendants, new = [], [pid]
    while new:
        new = [child for parent in new for child in children[parent]]
        descendants += new
    return [pid for pid in descendants if _runs_daemon(pid)]


def _parent_of(process: Path) -> int:
    """0 where the process has ended."""
    try:
        # The command's name, in parentheses, may hold anything.
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _runs_daemon(pid: int) -> bool:
    try:
        return b"pyspark.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
