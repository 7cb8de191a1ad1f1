"""The Spark that an example runs on: this machine's, unless spark-submit or a configuration file names another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyspark import SparkConf
from pyspark.sql import SparkSession


@contextlib.contextmanager
def spark_session(name: str, num_workers: int) -> Iterator[SparkSession]:
    """Starts Spark, with as many tasks at once as `num_workers` and little chatter, and stops it at the end.

    Args:
        name: of the application.
        num_workers: slots of a local Spark, and partitions of a shuffle; of any other Spark the latter only.
    """
    conf = (
        SparkConf()
        .setIfMissing("spark.master", f"local[{num_workers}]")
        .setIfMissing("spark.app.name", name)
        .setIfMissing("spark.sql.shuffle.partitions", str(num_workers))
        .setIfMissing("spark.executorEnv.TF_CPP_MIN_LOG_LEVEL", "3")
        .setIfMissing("spark.ui.showConsoleProgress", "false")
        .setIfMissing("spark.log.level", "ERROR")
    )
    spark = SparkSession.builder.config(conf=conf).getOrCreate()
    try:
        yield spark
    finally:
        spark.stop()
