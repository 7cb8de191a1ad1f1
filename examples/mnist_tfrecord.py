"""A Keras model trained from the TFRecords that `examples.mnist_prepare` writes, fed in one of two ways.

From a shell, with two Spark workers on this machine::

    python -m examples.mnist_prepare --format tfr --output mnist_tfr
    python -m examples.mnist_tfrecord --data mnist_tfr --output predictions

or on a cluster::

    spark-submit --master spark://host:7077 examples/mnist_tfrecord.py --workers 4 --input-mode files \\
        --data hdfs://namenode:8020/mnist/tfr --output hdfs://namenode:8020/mnist/predictions

Where Spark feeds the rows, it can filter and join them first. Where the workers read the files themselves, through
`tf.data`, no row goes from Spark to Python.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorspark as ts
from examples.local import spark_session
from examples.mnist_prepare import HADOOP_USER_VARIABLE, NUM_PIXELS, as_url, count, require_absent
from tensorspark.errors import TensorsparkError
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

INPUT_MODES = ("spark", "files")
SCHEMA = "image array<float>, label bigint"


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        scores: of the test images, by metric.
        output: URL of the directory with the predictions.
    """

    scores: dict[str, float]
    history: ts.History
    output: str


def train(
    spark: SparkSession,
    data: str,
    output: str,
    *,
    input_mode: str = "spark",
    epochs: int = 10,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Trains on ``train`` under a URL, evaluates on ``test``, and writes what it takes the test images for.

    Args:
        data: what `examples.mnist_prepare` wrote with ``--format tfr``; a bare path is a local one.
        output: a directory of text files is made here, whose lines are ``label prediction``.
        input_mode: one of `INPUT_MODES`.
        batch_size: of a worker's step.
        seed: of the weights to begin with, and of the shuffles.

    Raises:
        ConfigError: there is something at the output, or there are no files to read.
        WorkerFailedError: the files are no TFRecords of such images, or are damaged.
    """
    data, output = as_url(data), as_url(output)
    require_absent(output, "--output")
    readers = {part: files_reader(f"{data}/{part}") for part in ("train", "test")}
    for read in readers.values():
        read(ts.DatasetContext(0, 1))  # says what is missing, before anything is trained

    keras.utils.set_random_seed(seed)
    with ts.SparkSession(
        spark, build(), name="mnist_tfrecord", sync_interval=2, staleness=0, batch_size=batch_size
    ) as session:
        if input_mode == "files":
            history = session.fit(readers["train"], epochs=epochs, seed=seed)
        else:
            rows = as_dataframe(spark, f"{data}/train")
            history = session.fit(rows, features="image", label="label", epochs=epochs, seed=seed)
        test = as_dataframe(spark, f"{data}/test")
        scores = session.evaluate(test, features="image", label="label")
        predictions = session.predict(test, output="probabilities", features="image")
        predicted = sf.expr("array_position(probabilities, array_max(probabilities)) - 1")
        predictions.select(sf.concat_ws(" ", "label", predicted)).write.text(output)
    return Result(scores, history, output)


def build() -> keras.Model:
    """A network with one hidden layer, compiled."""
    model = keras.Sequential(
        [
            keras.Input((NUM_PIXELS,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def as_dataframe(spark: SparkSession, url: str) -> DataFrame:
    """The TFRecords' rows, read by Spark."""
    ts.register_tfrecord(spark)
    return spark.read.format("tfrecord").option("hdfsUser", _hdfs_user()).schema(SCHEMA).load(url)


def files_reader(url: str) -> Callable[[Any], tf.data.Dataset]:
    """What `fit` takes to have each worker read its own part of the files."""
    user = _hdfs_user()

    # Within a function, as executors have tensorspark installed, but not this repository's examples.
    def read(context: ts.DatasetContext) -> tf.data.Dataset:
        features = {
            "image": tf.io.FixedLenFeature([784], tf.float32),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
        rows = ts.tfrecord_dataset(context, url, features, hdfsUser=user)
        return rows.map(lambda row: (row["image"], row["label"]))

    return read


def _hdfs_user() -> str:
    """Executors' Python processes do not inherit the driver's environment."""
    return os.environ.get(HADOOP_USER_VARIABLE, "")


def main(arguments: list[str] | None = None) -> int:
    """Trains on this machine, or where spark-submit says, and prints what it came to."""
    options = _parse(arguments)
    given = {name: value for name, value in vars(options).items() if name != "workers"}
    try:
        with spark_session("mnist_tfrecord", options.workers) as spark:
            result = train(spark, **given)
    except TensorsparkError as error:
        sys.exit(f"mnist_tfrecord: {error}")
    print(
        f"\ntest accuracy  {result.scores['accuracy']:.4f}\n"
        f"test loss      {result.scores['loss']:.4f}\n"
        f"samples/s      {result.history.samples_per_s:,.0f} with start-up, {options.input_mode} reading\n"
        f"data           {as_url(options.data)}\n"
        f"predictions    {result.output}"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.mnist_tfrecord",
        description="Trains a Keras model from TFRecords of MNIST with Spark workers, and writes its predictions.",
        epilog="examples.mnist_prepare --format tfr writes the data. HADOOP_USER_NAME in the environment says who to "
        "be on HDFS. Give files mode as many files as there are workers, or more.",
    )
    parser.add_argument(
        "--data", required=True, metavar="URL", help="where train/ and test/ are, on any filesystem (default: none)"
    )
    parser.add_argument(
        "--output", required=True, metavar="URL", help="directory to make, of lines 'label prediction' (default: none)"
    )
    parser.add_argument(
        "--input-mode",
        choices=INPUT_MODES,
        default="spark",
        help="who reads the training files: spark, which feeds the workers; or the workers themselves (default: spark)",
    )
    parser.add_argument("--workers", type=count, default=2, help="slots of a local Spark (default: 2)")
    parser.add_argument("--epochs", type=count, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--batch-size", type=count, default=32, help="rows of a worker's step (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffles (default: 0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
