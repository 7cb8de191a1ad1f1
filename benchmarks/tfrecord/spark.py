"""Reading and writing on Spark, two tasks at once, against Parquet with Spark's defaults.

A round writes the same cached DataFrame as both, and reads what it wrote, which the page cache still holds. The times
are those of whole jobs, with planning: for a source in Python, Spark starts a process that lists the files. Rows of
few different values, as pixels are, favour Parquet, which stores each in about a byte (TFRecord in four).

Reading is compared in two ways:

to the rows
    TFRecord, from the file to rows in the JVM (the noop sink), against Parquet through a `mapInArrow` that counts.
    Either way all values pass once between the JVM and Python, which is what a format decoded in Python costs, and what
    it takes to have Parquet's rows in Python. The target is on this one.
to `mapInArrow`
    both through that `mapInArrow`: the rows of TFRecord travel from Python to the JVM and back again.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark
from pyspark.sql.types import ArrayType, FloatType, LongType, StructField, StructType

from benchmarks.clusters.local import local_spark
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.tfrecord.rows import images
from tensorspark.data.tfrecord.source.data_source import register_tfrecord

_NUM_TASKS = 2
_NUM_ROWS, _NUM_QUICK_ROWS = 60_000, 10_000
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 5, 1
_BATCH_ROWS = 5_000
# What checksums cost is less than what one round differs from the next by.
_NUM_CHECKSUM_PAIRS = 3
_FORMATS = ("Parquet", "TFRecord")
_SCHEMA = "image array<float>, label bigint"
# With it, Spark does not ask of each value whether it is null.
_SCHEMA_WITHOUT_NULLS = StructType(
    [StructField("image", ArrayType(FloatType(), containsNull=False)), StructField("label", LongType())]
)


def measure(report: Report, is_quick: bool) -> None:
    """Measures reads and writes, and adds their figures."""
    num_rows = _NUM_QUICK_ROWS if is_quick else _NUM_ROWS
    num_rounds = _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS
    with local_spark(_NUM_TASKS) as spark, tempfile.TemporaryDirectory(prefix="tensorspark-") as directory:
        register_tfrecord(spark)
        jobs = _Jobs(spark, _cached(spark, num_rows), num_rows, Path(directory))
        times: dict[str, list[float]] = defaultdict(list)
        for index in range(num_rounds + 1):
            say(f"Spark: round {index} of {num_rounds}" if index else "Spark: once before the first round")
            for name, seconds in jobs.run(is_reversed=index % 2 == 0):
                if index:
                    times[name].append(seconds)
    _add_rows(report, times, num_rows)


class _Jobs:
    """What a round measures.

    Args:
        df: the rows to write, in Spark's memory.
        directory: for what is written.
    """

    def __init__(self, spark: Spark, df: DataFrame, num_rows: int, directory: Path) -> None:
        self._spark, self._df, self._num_rows = spark, df, num_rows
        self._paths = {name: str(directory / name) for name in _FORMATS}

    def run(self, is_reversed: bool) -> Iterator[tuple[str, float]]:
        """The seconds of each job, by its name; one side first in one round, the other in the next."""
        for path in self._paths.values():
            shutil.rmtree(path, ignore_errors=True)
        writes: dict[str, Callable[[], object]] = {
            f"write {name}": partial(self._df.write.format(name.lower()).mode("append").save, path)
            for name, path in self._paths.items()
        }
        reads: dict[str, Callable[[], object]] = {
            "Parquet to mapInArrow": lambda: self._count(self._read("Parquet")),
            "TFRecord to rows": lambda: _to_rows(self._read("TFRecord")),
            "TFRecord to mapInArrow": lambda: self._count(self._read("TFRecord")),
            "TFRecord to rows, arrays without nulls": lambda: _to_rows(self._read("TFRecord", _SCHEMA_WITHOUT_NULLS)),
            "Parquet to rows": lambda: _to_rows(self._read("Parquet")),
        }
        checksums: dict[str, Callable[[], object]] = {
            "checksums": lambda: _to_rows(self._read("TFRecord")),
            "no checksums": lambda: _to_rows(self._read("TFRecord", verifyChecksum="false")),
        }
        for jobs in [writes, reads, *[checksums] * _NUM_CHECKSUM_PAIRS]:
            for name, job in reversed(jobs.items()) if is_reversed else jobs.items():
                start = time.perf_counter()
                job()
                yield name, time.perf_counter() - start
            is_reversed = not is_reversed if jobs is checksums else is_reversed

    def _read(self, name: str, schema: StructType | str = _SCHEMA, **options: str) -> DataFrame:
        return self._spark.read.format(name.lower()).options(**options).schema(schema).load(self._paths[name])

    def _count(self, df: DataFrame) -> None:
        """Has all rows come to a `mapInArrow`."""

        def count(batches: Iterator[Any]) -> Iterator[Any]:
            import pyarrow as pa

            for batch in batches:
                yield pa.RecordBatch.from_pydict({"num_rows": [batch.num_rows], "num_bytes": [batch.nbytes]})

        counts = df.mapInArrow(count, "num_rows bigint, num_bytes bigint").collect()
        found = sum(row.num_rows for row in counts)
        if found != self._num_rows:
            raise ValueError(f"expected {self._num_rows} rows, got {found}")


def _to_rows(df: DataFrame) -> None:
    """Has all rows made, and thrown away."""
    df.write.format("noop").mode("overwrite").save()


def _cached(spark: Spark, num_rows: int) -> DataFrame:
    """The rows, in Spark's memory: one partition a task."""
    num_each = num_rows // _NUM_TASKS

    def make(seeds: Iterator[Any]) -> Iterator[Any]:
        import numpy as np

        for seed in chain.from_iterable(batch.column(0).to_pylist() for batch in seeds):
            rng = np.random.default_rng(seed)
            for start in range(0, num_each, _BATCH_ROWS):
                yield images(rng, min(_BATCH_ROWS, num_each - start))

    df = spark.range(0, _NUM_TASKS, 1, _NUM_TASKS).mapInArrow(make, _SCHEMA).cache()
    df.count()
    return df


def _add_rows(report: Report, times: dict[str, list[float]], num_rows: int) -> None:
    for name, seconds in times.items():
        if not name.endswith("checksums"):
            report.add(f"Spark: {name}", num_rows / statistics.median(seconds), "rows/s")
    parquet = times["Parquet to mapInArrow"]
    report.add(
        "Spark: TFRecord to rows / Parquet to mapInArrow",
        median_ratio(parquet, times["TFRecord to rows"]),
        "x",
        at_least=0.8,
    )
    both = median_ratio(parquet, times["TFRecord to mapInArrow"])
    report.add("Spark: TFRecord to mapInArrow / Parquet to mapInArrow", both, "x")
    writes = median_ratio(times["write Parquet"], times["write TFRecord"])
    report.add("Spark: write TFRecord / Parquet", writes, "x", at_least=0.5)
    share = 1 - median_ratio(times["no checksums"], times["checksums"])
    report.add("Spark: checksums / time of TFRecord to rows", share, "x", below=0.05)
