"""Our side of `benchmarks.keras`: a Spark session with two slots, the rows as a cached DataFrame, and what is timed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark

from benchmarks.keras_digits import Digits, make_model
from benchmarks.keras_peers import BATCH_SIZE, test_accuracy
from benchmarks.softmax import Epochs
from tensorspark import SparkSession

_SCHEMA = "image array<float>, label bigint"


@contextmanager
def spark_session(num_slots: int) -> Iterator[Spark]:
    """A Spark of this machine; its Python workers are new ones."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    settings: dict[str, bool | float | int | str | None] = {
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.memory": "4g",
    }
    spark = Spark.builder.master(f"local[{num_slots}]").appName("tensorspark benchmark").config(map=settings)
    session = spark.getOrCreate()
    try:
        yield session
    finally:
        session.stop()


def cached_rows(spark: Spark, digits: Digits, num_partitions: int) -> DataFrame:
    """The rows to train on, in Spark's memory: a partition for each of the shares that the others have."""

    def read(ids: Iterator[Any]) -> Iterator[Any]:
        for batch in ids:
            for index in batch.column(0).to_pylist():
                yield from digits.batches(index, num_partitions)

    df = spark.range(0, num_partitions, 1, num_partitions).mapInArrow(read, _SCHEMA).cache()
    df.count()
    return df


class Fits:
    """Trainings of one DataFrame, each from initial weights."""

    def __init__(self, spark: Spark, df: DataFrame) -> None:
        self._spark = spark
        self._df = df

    def epochs(self, interval: int, num_epochs: int) -> list[Epochs]:
        """Every worker's epochs, bulk-synchronous."""
        with self._session(make_model(), interval, 0) as session:
            history = session.fit(
                self._df, features="image", label="label", batch_size=BATCH_SIZE, epochs=num_epochs, progress=False
            )
        return [Epochs(worker.epoch_samples, worker.epoch_seconds) for worker in history.workers]

    def accuracy(self, digits: Digits, staleness: int | None, num_epochs: int, seed: int, scales: bool) -> float:
        """On the test set."""
        model = make_model(seed)
        with self._session(model, 16, staleness) as session:
            session.fit(
                self._df,
                features="image",
                label="label",
                batch_size=BATCH_SIZE,
                epochs=num_epochs,
                seed=seed,
                scale_learning_rate=scales,
                progress=False,
            )
        return test_accuracy(model, *digits.test())

    def _session(self, model: Any, interval: int, staleness: int | None) -> SparkSession:
        return SparkSession(self._spark, model, name="bench", sync_interval=interval, staleness=staleness)


def predictions(spark: Spark, df: DataFrame, batch_size: int) -> DataFrame:
    """The rows with the model's output, not yet computed; the session may close before they are."""
    with SparkSession(spark, make_model(), name="bench") as session:
        return session.predict(df, features="image", output="probabilities", batch_size=batch_size)
