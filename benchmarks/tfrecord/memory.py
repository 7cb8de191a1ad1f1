"""Whether the memory of a task depends on its file: the most that its Python process had, for a large and a small one.

Each job has a new Python process. What it writes, Spark computes row by row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from benchmarks.clusters.local import local_spark
from benchmarks.keras.memory import PeakOfWorkers, large_partition
from benchmarks.measuring.report import Report, say
from tensorspark.data.tfrecord.format.framing import BATCH_BYTES
from tensorspark.data.tfrecord.source.data_source import register_tfrecord

_SMALL_BYTES, _LARGE_BYTES, _QUICK_BYTES = 64 * 10**6, 512 * 10**6, 128 * 10**6
_MAX_BATCHES = 4


def measure(report: Report, is_quick: bool) -> None:
    """Measures a write and a read of two files, and adds their figures."""
    sizes = (_SMALL_BYTES, _QUICK_BYTES if is_quick else _LARGE_BYTES)
    peaks: dict[str, list[int]] = {"write": [], "read": []}
    settings = {"spark.python.worker.reuse": "false"}
    with local_spark(1, settings=settings) as spark, tempfile.TemporaryDirectory(prefix="tensorspark-") as directory:
        register_tfrecord(spark)
        for num_bytes in sizes:
            say(f"memory: a file of {num_bytes / 1e6:g} MB")
            df, path = large_partition(spark, num_bytes), f"{directory}/{num_bytes}"
            peaks["write"].append(_peak(df.write.format("tfrecord").mode("append").option("path", path).save))
            read = spark.read.format("tfrecord").schema(df.schema).load(path)
            peaks["read"].append(_peak(read.write.format("noop").mode("overwrite").save))
    for name, (small, large) in peaks.items():
        report.add(f"memory: {name}, peak of the task's Python process", large / 1e6, "MB")
        report.add(
            f"memory: {name}, file of {sizes[1] / 1e6:g} MB over one of {sizes[0] / 1e6:g} MB",
            (large - small) / BATCH_BYTES,
            "batches",
            below=_MAX_BATCHES,
        )


def _peak(job: Callable[[], object]) -> int:
    """The most anonymous memory, in bytes, that a Python worker had while the job ran."""
    with PeakOfWorkers() as peak:
        job()
    return peak.num_bytes
