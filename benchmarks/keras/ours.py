"""Our side of `benchmarks.keras`: fits and predictions of a DataFrame."""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark

from benchmarks.keras.peers import BATCH_SIZE
from benchmarks.measuring.epochs import Epochs, epochs_of
from benchmarks.workloads.digits import Digits
from benchmarks.workloads.perceptron import make_model
from tensorspark import SparkSession


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
        return epochs_of(history.workers)

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
        return digits.test_accuracy(model)

    def _session(self, model: Any, interval: int, staleness: int | None) -> SparkSession:
        return SparkSession(self._spark, model, name="bench", sync_interval=interval, staleness=staleness)


def predictions(spark: Spark, df: DataFrame, batch_size: int) -> DataFrame:
    """The rows with the model's output, not yet computed; the session may close before they are."""
    with SparkSession(spark, make_model(), name="bench") as session:
        return session.predict(df, features="image", output="probabilities", batch_size=batch_size)
