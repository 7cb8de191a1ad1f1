"""A convolutional network on MNIST, trained by Spark workers on a DataFrame with one call of `fit`.

From a shell, with two Spark workers on this machine::

    python -m examples.keras_mnist

or on a cluster::

    spark-submit --master spark://host:7077 examples/keras_mnist.py --workers 4

Without MNIST and without a network it trains on the 1,797 handwritten digits in ``MNIST_data/``, and says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorspark as ts
from examples import mnist_data
from examples.local import spark_session
from tensorspark.trainers.startup import importing

with importing():
    import keras


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        scores: of the test images, by metric.
        reloaded_accuracy: of the saved model, loaded and evaluated on the driver.
    """

    source: str
    scores: dict[str, float]
    reloaded_accuracy: float
    history: ts.History
    saved: Path


def train(
    spark: SparkSession,
    *,
    data_dir: str | None = None,
    workers: int = 2,
    epochs: int = 10,
    sync_interval: int = 2,
    staleness: int | None = 0,
    batch_size: int = 32,
    seed: int = 0,
    output: str | None = None,
) -> Result:
    """Trains, evaluates, predicts and saves.

    Args:
        data_dir: a local directory of the four IDX files; None looks where `examples.mnist_data.find` looks.
        workers: partitions of the DataFrame: at most as many as Spark has slots train at once.
        sync_interval, staleness, batch_size: see `tensorspark.SparkSession`.
        seed: of the weights to begin with, and of the shuffles.
        output: an existing directory for the trained model; None makes a temporary one.
    """
    files = mnist_data.find(data_dir)
    x_train, y_train, x_test, y_test = mnist_data.load(files)
    train_df = as_dataframe(spark, x_train, y_train).repartition(workers).cache()
    test_df = as_dataframe(spark, x_test, y_test).repartition(workers).cache()
    print(f"Training on {files.source}: {train_df.count():,} images in {workers} partitions", flush=True)

    keras.utils.set_random_seed(seed)
    model = build()
    with ts.SparkSession(
        spark, model, name="keras_mnist", sync_interval=sync_interval, staleness=staleness, batch_size=batch_size
    ) as session:
        history = session.fit(
            train_df,
            features="image",
            label="label",
            epochs=epochs,
            validation_data=test_df,
            callbacks=[PrintEpoch(), keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)],
            seed=seed,
        )
        scores = session.evaluate(test_df)
        predictions = session.predict(test_df, output="probabilities")
        _print_confusions(predictions)
        saved = Path(output or tempfile.mkdtemp(prefix="keras_mnist-")) / "digits.keras"
        session.save(saved.absolute().as_uri())
    reloaded = keras.saving.load_model(saved)
    _, reloaded_accuracy = reloaded.evaluate(_as_pixels(x_test), y_test, verbose=0)
    return Result(files.source, scores, float(reloaded_accuracy), history, saved)


def build() -> keras.Model:
    """A small convolutional network over bytes of pixels, compiled."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class PrintEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """A callback of one's own: it runs on the driver, at the end of each epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Prints the epoch's metrics, over all workers."""
        print(f"epoch {epoch + 1:2}  " + "  ".join(f"{k} {v:.4f}" for k, v in (logs or {}).items()), flush=True)


def as_dataframe(spark: SparkSession, images: np.ndarray, labels: np.ndarray) -> DataFrame:
    """A DataFrame of ``image``, 784 bytes of pixels, and ``label``, 0 to 9.

    Args:
        images: ``[n, 784] float32`` in [0, 1].
        labels: ``[n]`` class numbers.
    """
    pixels = _as_pixels(images)
    rows = pa.array([image.tobytes() for image in pixels], pa.binary())
    return spark.createDataFrame(pa.table({"image": rows, "label": labels.astype(np.int64)}))


def _as_pixels(images: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = np.rint(images * 255).astype(np.uint8).reshape(-1, 28, 28, 1)
    return pixels


def _print_confusions(predictions: DataFrame) -> None:
    """Says which digits are taken for which, with Spark's own functions on the column of probabilities."""
    predicted = sf.expr("array_position(probabilities, array_max(probabilities)) - 1")
    confused = (
        predictions.select("label", predicted.alias("predicted"))
        .where("label != predicted")
        .groupBy("label", "predicted")
        .count()
        .orderBy(sf.desc("count"), "label", "predicted")
    )
    pairs = [f"{row['label']} for {row['predicted']} ({row['count']})" for row in confused.take(3)]
    print(f"most often mistaken: {', '.join(pairs) or 'none'}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Trains on this machine, or where spark-submit says, and prints what it came to."""
    options = _parse(arguments)
    with spark_session("keras_mnist", options.workers) as spark:
        result = train(spark, **vars(options))
    _report(result)
    return 0


def _report(result: Result) -> None:
    history = result.history
    best = int(np.argmin(history.history["val_loss"]))
    print(
        f"\ntest accuracy  {result.scores['accuracy']:.4f}\n"
        f"test loss      {result.scores['loss']:.4f}\n"
        f"saved model    {result.reloaded_accuracy:.4f} when loaded on the driver\n"
        f"best epoch     {best + 1} of {len(history.epoch)}\n"
        f"samples/s      {samples_per_s(history):,.0f} from the second epoch on; "
        f"{history.samples_per_s:,.0f} with start-up and evaluation\n"
        f"seconds        {history.seconds:.1f}\n"
        f"model          {result.saved}\n\n"
        f"Trained on {result.source}."
    )


def samples_per_s(history: ts.History) -> float:
    """Rows a second over all workers, without each worker's first epoch, which compiles the step."""
    rates = [sum(w.epoch_samples[1:]) / sum(w.epoch_seconds[1:]) for w in history.workers if w.epoch_seconds[1:]]
    return float(sum(rates))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.keras_mnist",
        description="Trains a convolutional network on MNIST with Spark workers, from a DataFrame.",
        epilog="To see what synchronization costs, compare --sync-interval 1 and 50; to see workers that wait for "
        "nobody, pass --staleness async. See docs/choosing.md.",
    )
    parser.add_argument("--data-dir", help="local directory of the IDX files (default: found, or downloaded)")
    parser.add_argument("--workers", type=int, default=2, help="Spark workers and partitions (default: 2)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data, at most (default: 10)")
    parser.add_argument("--sync-interval", type=int, default=2, help="steps between synchronizations (default: 2)")
    parser.add_argument(
        "--staleness",
        type=_staleness,
        default=0,
        metavar="N|async",
        help="synchronizations that a worker may lead the slowest by; 0: all wait for all; async: nobody (default: 0)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a worker's step (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffles (default: 0)")
    parser.add_argument("--output", help="existing directory for the model (default: a temporary one)")
    return parser.parse_args(arguments)


def _staleness(text: str) -> int | None:
    return None if text == "async" else int(text)


if __name__ == "__main__":
    sys.exit(main())
