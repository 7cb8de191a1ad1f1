"""The rows to train on as a DataFrame, which every benchmark of Keras on Spark begins with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark

from benchmarks.workloads.digits import Digits

_SCHEMA = "image array<float>, label bigint"


def cached_rows(spark: Spark, digits: Digits, num_partitions: int) -> DataFrame:
    """The rows to train on, in Spark's memory: a partition for each of the shares that the others have."""

    def read(ids: Iterator[Any]) -> Iterator[Any]:
        for batch in ids:
            for index in batch.column(0).to_pylist():
                yield from digits.batches(index, num_partitions)

    df = spark.range(0, num_partitions, 1, num_partitions).mapInArrow(read, _SCHEMA).cache()
    df.count()
    return df
