"""Trains on a stream, batch by batch, and predicts on one: `foreachBatch` and `KerasModel.transform`.

From a shell, with two Spark workers on this machine::

    python -m examples.keras_streaming

Files of measurements arrive in a directory. Spark hands them to a function as DataFrames; the function first evaluates
the model on the rows that it has never seen, then trains it on them. What is measured drifts on the way, so that a
model that has learned once and for all would fail. Afterwards the model marks a stream of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorspark as ts
from examples.local import spark_session
from tensorspark.ml import KerasModel
from tensorspark.trainers.startup import importing

with importing():
    import keras

SCHEMA = "x array<float>, label bigint"
NUM_FEATURES = 8
STREAM_DEADLINE_S = 300


@dataclass(frozen=True)
class Result:
    """What came of the stream.

    Attributes:
        accuracies: of each micro-batch, before the model was trained on it.
        marked: rows that the model marked on the second stream, and the part of them that it marked rightly.
    """

    accuracies: list[float]
    num_trained: int
    marked: tuple[int, float]


def run(
    spark: SparkSession,
    directory: Path,
    *,
    files: int = 5,
    rows: int = 2000,
    workers: int = 2,
    seed: int = 0,
) -> Result:
    """Writes the files, trains on all but the last as a stream, and marks the last as another.

    Args:
        directory: an empty one, of which the stream's files and its checkpoint become part.
        files: at least 2. The stream gives one file at a time to the model.
        rows: of each file.
        seed: of the rows and weights.
    """
    past, future = directory / "past", directory / "future"
    for index in range(files):
        write_file(past if index < files - 1 else future, index, rows, seed)

    keras.utils.set_random_seed(seed)
    model = build()
    accuracies: list[float] = []
    num_trained = 0
    with ts.SparkSession(spark, model, name="keras_streaming", sync_interval=8, staleness=0, batch_size=32) as session:

        def learn(micro_batch: DataFrame, number: int) -> None:
            nonlocal num_trained
            # Read twice: once to evaluate, once to train.
            arrived = micro_batch.repartition(workers).cache()
            try:
                scores = session.evaluate(arrived, features="x", label="label")
                history = session.fit(arrived, features="x", label="label", epochs=2, progress=False)
            finally:
                arrived.unpersist()
            accuracies.append(scores["accuracy"])
            num_trained += history.num_samples
            print(
                f"micro-batch {number}: accuracy {scores['accuracy']:.4f} on rows it had never seen, then trained to "
                f"{history.history['accuracy'][-1]:.4f}",
                flush=True,
            )

        stream = spark.readStream.schema(SCHEMA).option("maxFilesPerTrigger", 1).parquet(str(past))
        query = (
            stream.writeStream.foreachBatch(learn)
            .option("checkpointLocation", str(directory / "checkpoint"))
            .trigger(availableNow=True)
            .start()
        )
        if not query.awaitTermination(STREAM_DEADLINE_S):
            query.stop()
            raise TimeoutError(f"the stream was not read after {STREAM_DEADLINE_S} s")
    return Result(accuracies, num_trained, mark(spark, model, future))


def mark(spark: SparkSession, model: keras.Model, directory: Path) -> tuple[int, float]:
    """Marks the files in `directory` as a stream; returns how many rows there were and the part that is right."""
    stream = spark.readStream.schema(SCHEMA).parquet(str(directory))
    marked = KerasModel(model=model, featuresCol="x").transform(stream)
    query = (
        marked.select("label", "prediction")
        .writeStream.format("memory")
        .queryName("marked")
        .trigger(availableNow=True)
        .start()
    )
    if not query.awaitTermination(STREAM_DEADLINE_S):
        query.stop()
        raise TimeoutError(f"the stream was not marked after {STREAM_DEADLINE_S} s")
    row = spark.table("marked").agg(sf.count("*"), sf.avg(sf.expr("int(label = prediction)"))).head()
    assert row is not None
    return int(row[0]), float(row[1])


def build() -> keras.Model:
    """A small classifier, compiled."""
    model = keras.Sequential(
        [
            keras.Input((NUM_FEATURES,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def write_file(directory: Path, index: int, num_rows: int, seed: int) -> None:
    """The measurements of one time: the border between the two labels turns a little from file to file."""
    random = np.random.default_rng([seed, index])
    x = random.normal(size=(num_rows, NUM_FEATURES)).astype(np.float32)
    angle = 0.15 * index
    label = (x[:, 0] * np.cos(angle) + x[:, 1] * np.sin(angle) + 0.5 * x[:, 2] ** 2 > 0.4).astype(np.int64)
    directory.mkdir(parents=True, exist_ok=True)
    table = pa.table({"x": pa.array(list(x), pa.list_(pa.float32())), "label": label})
    pq.write_table(table, directory / f"{index:03}.parquet")


def main(arguments: list[str] | None = None) -> int:
    """Runs on this machine, and prints what came of it."""
    options = _parse(arguments)
    with (
        spark_session("keras_streaming", options.workers) as spark,
        tempfile.TemporaryDirectory(prefix="keras_streaming-") as directory,
    ):
        result = run(spark, Path(directory), **vars(options))
    num_marked, right = result.marked
    print(
        f"\nfirst file     {result.accuracies[0]:.4f}, before any training\n"
        f"last file      {result.accuracies[-1]:.4f}, before it was trained on\n"
        f"trained        {result.num_trained:,} samples in {len(result.accuracies)} micro-batches\n"
        f"marked         {num_marked:,} rows of another stream, {right:.4f} of them rightly"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.keras_streaming",
        description="Trains a Keras model on a stream of files, micro-batch by micro-batch, and predicts on another.",
        epilog="The files are made up and lie in a temporary directory; workers and driver must see it.",
    )
    parser.add_argument(
        "--files", type=_several, default=5, help="of the stream; the last one is predicted (default: 5)"
    )
    parser.add_argument("--rows", type=int, default=2000, help="of each file (default: 2000)")
    parser.add_argument("--workers", type=int, default=2, help="Spark workers and partitions (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of rows and weights (default: 0)")
    return parser.parse_args(arguments)


def _several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError("at least 2: one to train on, one to predict")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
