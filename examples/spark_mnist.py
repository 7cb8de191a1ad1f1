"""Softmax regression on MNIST, trained on Spark through the parameter server: the original Tensorspark's example.

From a shell, with two Spark workers on this machine (`make mnist` does this)::

    python -m examples.spark_mnist

From ``pyspark --properties-file conf/spark-defaults.conf``::

    import examples.spark_mnist as mnist
    mnist.train(sc=sc, user='me', name='mnist_try', server_host='localhost', server_port=10080, sync_interval=100,
                batch_size=100, num_partition=1, num_epoch=2)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyspark import RDD, SparkConf, SparkContext, cloudpickle

from examples import mnist_data, report
from tensorspark import DeltaWeightCombiner, History, WeightCombiner
from tensorspark.core.spark_session import SparkSession
from tensorspark.trainers.startup import importing

with importing():
    import tensorflow.compat.v1 as tf

TRAIN_IMAGES, TRAIN_LABELS = "train-images?idx3-ubyte*", "train-labels?idx1-ubyte*"
TEST_IMAGES, TEST_LABELS = "t10k-images?idx3-ubyte*", "t10k-labels?idx1-ubyte*"
# The original's, for MNIST's 300 steps of an epoch and worker. The digits have 8: there it overshoots, and what comes
# of it depends on the order of the rows (simulated, 200 runs: 0.63 to 0.99; at the lower rate 0.93 to 0.95).
LEARNING_RATE, DIGITS_LEARNING_RATE = 0.5, 0.05


@dataclass(frozen=True)
class DataSet:
    """Where the four IDX files are, as Hadoop paths or globs, and what they are."""

    source: str
    train_images: str
    train_labels: str
    test_images: str
    test_labels: str


@dataclass(frozen=True)
class Result:
    """What a training came to; `weights` by variable name."""

    source: str
    test_accuracy: float
    history: History
    weights: dict[str, np.ndarray]


def train(
    sc: SparkContext | None = None,
    user: str | None = None,
    name: str = "spark_mnist",
    server_host: str | None = "localhost",
    server_port: int | None = 10080,
    sync_interval: int = 100,
    batch_size: int = 100,
    num_partition: int = 1,
    num_epoch: int = 1,
    server_reusable: bool = True,
    *,
    learning_rate: float | None = None,
    data_dir: str | None = None,
    weight_combiner: WeightCombiner | None = None,
    seed: int | None = None,
    conf: SparkConf | None = None,
) -> Result:
    """Trains, prints the accuracy on the test images, and returns what came of it.

    Args:
        sc: None makes a SparkContext, with `conf`, and stops it at the end.
        user: who to write to HDFS as, where spark.hdfs.dir is set.
        learning_rate: None takes 0.5, as the original did, and 0.05 for the embedded digits.
        data_dir: a directory of the four IDX files, gzipped or not: a local path, or a URL that Spark reads
            (``hdfs://host:8020/mnist``). None looks where `examples.mnist_data.find` looks.
        weight_combiner: None takes `DeltaWeightCombiner`, as the original did.
        seed: of the shuffles.
    """
    data = locate(data_dir)
    print(f"Training on {data.source}", flush=True)
    context = sc or SparkContext(conf=conf or SparkConf())
    try:
        rows = read_rows(context, data.train_images, data.train_labels, num_partition).cache()
        with tf.Graph().as_default(), tf.Session() as sess:
            model = build(learning_rate or _default_learning_rate(data.source))
            sess.run(tf.global_variables_initializer())
            with SparkSession(
                context,
                sess,
                user=user,
                name=name,
                server_host=server_host,
                server_port=server_port,
                sync_interval=sync_interval,
                batch_size=batch_size,
            ) as spark_sess:
                history = spark_sess.run(
                    {"train": model.train_step, "loss": model.loss, "accuracy": model.accuracy},
                    feed_rdd=rows,
                    feed_name_list=[model.x.name, model.y_.name],
                    param_list=[model.W, model.b],
                    weight_combiner=weight_combiner or DeltaWeightCombiner(),
                    shuffle_within_partition=True,
                    server_reusable=server_reusable,
                    num_epochs=num_epoch,
                    seed=seed,
                )
            images, labels = read_arrays(context, data.test_images, data.test_labels)
            accuracy = float(sess.run(model.accuracy, {model.x: images, model.y_: labels}))
            weights = {variable.op.name: sess.run(variable) for variable in (model.W, model.b)}
        rows.unpersist()
    finally:
        if sc is None:
            context.stop()
    print(f"Test accuracy {accuracy:.4f}, trained on {data.source}")
    return Result(data.source, accuracy, history, weights)


@dataclass(frozen=True)
class Softmax:
    """The graph's tensors and operations."""

    x: Any
    y_: Any
    W: Any
    b: Any
    loss: Any
    accuracy: Any
    train_step: Any


def build(learning_rate: float = LEARNING_RATE) -> Softmax:
    """Softmax regression, 784 pixels to 10 classes, in the default graph."""
    x = tf.placeholder(tf.float32, [None, 784], name="x")
    y_ = tf.placeholder(tf.float32, [None, 10], name="y_")
    W = tf.Variable(tf.zeros([784, 10]), name="W")
    b = tf.Variable(tf.zeros([10]), name="b")
    logits = tf.matmul(x, W) + b
    loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(labels=y_, logits=logits))
    correct = tf.equal(tf.argmax(logits, 1), tf.argmax(y_, 1))
    accuracy = tf.reduce_mean(tf.cast(correct, tf.float32))
    train_step = tf.train.GradientDescentOptimizer(learning_rate).minimize(loss)
    return Softmax(x, y_, W, b, loss, accuracy, train_step)


def locate(data_dir: str | None) -> DataSet:
    """The files to train on: see `train`."""
    if data_dir is not None and "://" in data_dir:
        base = data_dir.rstrip("/")
        names = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
        return DataSet(f"the IDX files in {base}", *[f"{base}/{name}" for name in names])
    files = mnist_data.find(data_dir)
    paths = (files.train_images, files.train_labels, files.test_images, files.test_labels)
    return DataSet(files.source, *[path.absolute().as_uri() for path in paths])


def _default_learning_rate(source: str) -> float:
    return DIGITS_LEARNING_RATE if source == mnist_data.DIGITS else LEARNING_RATE


def read_rows(sc: SparkContext, images_path: str, labels_path: str, num_partition: int) -> RDD[Any]:
    """Rows of ``(image [784] float32, label [10] float32)``, cut evenly into `num_partition` partitions."""

    # Executors have tensorspark installed, but not this repository's examples.
    cloudpickle.register_pickle_by_value(mnist_data)  # type: ignore[no-untyped-call]

    def cut(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        return enumerate(np.array_split(array, num_partition))

    images = sc.binaryFiles(images_path).flatMap(lambda file: cut(mnist_data.decode_images(file[1], file[0])))
    labels = sc.binaryFiles(labels_path).flatMap(
        lambda file: cut(mnist_data.one_hot(mnist_data.decode_labels(file[1], file[0])))
    )
    return images.join(labels, num_partition).flatMap(lambda item: zip(*item[1], strict=True))


def read_arrays(sc: SparkContext, images_path: str, labels_path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 784] float32`` and labels ``[n, 10] float32`` on the driver."""
    ((image_name, images),) = sc.binaryFiles(images_path).collect()
    ((label_name, labels),) = sc.binaryFiles(labels_path).collect()
    return (
        mnist_data.decode_images(images, image_name),
        mnist_data.one_hot(mnist_data.decode_labels(labels, label_name)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains on this machine and writes weights, a plot, and what the dashboard and TensorBoard show."""
    options = _parse(arguments)
    tf.logging.set_verbosity(tf.logging.ERROR)
    conf = (
        SparkConf()
        .setIfMissing("spark.master", f"local[{options.workers}]")
        .setIfMissing("spark.app.name", "spark_mnist")
        .setIfMissing("spark.executorEnv.TF_CPP_MIN_LOG_LEVEL", "3")
        .setIfMissing("spark.ui.showConsoleProgress", "false")
        .setIfMissing("spark.log.level", "ERROR")
        .set("spark.tensorspark.log.dir", str(Path(options.output).absolute()))
    )
    result = train(
        server_host=None,
        server_port=0,
        sync_interval=options.sync_interval,
        batch_size=options.batch_size,
        num_partition=options.workers,
        num_epoch=options.epochs,
        learning_rate=options.learning_rate,
        data_dir=options.data_dir,
        seed=options.seed,
        conf=conf,
    )
    report.write(result)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.spark_mnist", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", help="directory or URL of the IDX files (default: found, or downloaded)")
    parser.add_argument("--workers", type=int, default=2, help="Spark workers and partitions (default: 2)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--sync-interval", type=int, default=10, help="steps between synchronizations (default: 10)")
    parser.add_argument("--batch-size", type=int, default=100, help="rows of a step (default: 100)")
    parser.add_argument("--learning-rate", type=float, help="(default: 0.5; 0.05 for the embedded digits)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles (default: 0)")
    parser.add_argument("--output", default="runs", help="directory to write to (default: runs)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
