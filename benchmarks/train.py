"""Training through the parameter server, against the same loops without one.

``python -m benchmarks.train [--json FILE] [--quick]`` trains the original program's softmax regression (784 to 10,
batch 100, SGD 0.5, shuffled) with two Spark workers, and in turn with two independent processes that run the same
TensorFlow 1 loop from memory. Figures are samples/s of both workers together, from the second epoch on, medians of
the rounds.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from typing import Any

import numpy as np

from benchmarks.processes import Peer
from benchmarks.report import Report, argument_parser, median_ratio, say
from examples import mnist_data, spark_mnist

NUM_WORKERS = 2
BATCH_SIZE = 100
PACKAGES = ["tensorflow", "pyspark", "numpy", "tornado"]
PLAIN, CALLABLE = "plain loop", "make_callable loop"


class Loop:
    """A process that trains one half of the data on its own: the baseline."""

    def __init__(self, half: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow.compat.v1 as tf

        images, labels, _ = read_data()
        self._images, self._labels = images[half::NUM_WORKERS].copy(), labels[half::NUM_WORKERS].copy()
        threads = tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        with tf.Graph().as_default():
            self._model: Any = spark_mnist.build()
            self._session = tf.Session(config=threads)
            self._session.run(tf.global_variables_initializer())

    def train(self, kind: str, num_epochs: int) -> float:
        """Samples/s from the second epoch on."""
        step = self._step(kind)
        num_rows = len(self._images)
        generator = np.random.default_rng(0)
        began = 0.0
        for epoch in range(num_epochs):
            if epoch == 1:
                began = time.perf_counter()
            order = generator.permutation(num_rows)
            for start in range(0, num_rows, BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                step(self._images[rows], self._labels[rows])
        return num_rows * (num_epochs - 1) / (time.perf_counter() - began)

    def _step(self, kind: str) -> Any:
        model, session = self._model, self._session
        if kind == CALLABLE:
            return session.make_callable(model.train_step, [model.x, model.y_])
        return lambda images, labels: session.run(model.train_step, feed_dict={model.x: images, model.y_: labels})

    def close(self) -> None:
        self._session.close()


def read_data() -> tuple[np.ndarray, np.ndarray, str]:
    """Images ``[n, 784] float32``, one-hot labels, and what they are: MNIST, or random numbers of its shape."""
    files = mnist_data.find(download=False)
    if files.source == "MNIST":
        images, labels, _, _ = mnist_data.load(files)
        return images, mnist_data.one_hot(labels), "MNIST"
    generator = np.random.default_rng(0)
    images = generator.random((60_000, 784), np.float32)
    return images, mnist_data.one_hot(generator.integers(0, 10, 60_000)), "60,000 random rows of MNIST's shape"


class Training:
    """Our side: a Spark context, its cached feed, and runs through the parameter server."""

    def __init__(self) -> None:
        from pyspark import SparkConf, SparkContext

        conf = SparkConf().setMaster(f"local[{NUM_WORKERS}]").setAppName("benchmarks.train")
        conf.set("spark.ui.enabled", "false").set("spark.ui.showConsoleProgress", "false").set("spark.log.level", "OFF")
        conf.set("spark.driver.host", "127.0.0.1").set("spark.driver.bindAddress", "127.0.0.1")
        self._spark_context = SparkContext(conf=conf)
        images, labels, self.source = read_data()
        blocks = [(images[half::NUM_WORKERS].copy(), labels[half::NUM_WORKERS].copy()) for half in range(NUM_WORKERS)]
        rows = self._spark_context.parallelize(blocks, NUM_WORKERS).flatMap(lambda block: zip(*block, strict=True))
        self._rows = rows.cache()
        self._rows.count()

    def train(self, sync_interval: int, num_epochs: int) -> float:
        """Samples/s of all workers from the second epoch on."""
        import tensorflow.compat.v1 as tf

        from tensorspark import DeltaWeightCombiner, SparkSession

        with tf.Graph().as_default(), tf.Session() as session:
            model: Any = spark_mnist.build()
            session.run(tf.global_variables_initializer())
            with SparkSession(
                self._spark_context, session, sync_interval=sync_interval, batch_size=BATCH_SIZE
            ) as spark_session:
                history = spark_session.run(
                    model.train_step,
                    feed_rdd=self._rows,
                    feed_name_list=[model.x.name, model.y_.name],
                    param_list=[model.W, model.b],
                    weight_combiner=DeltaWeightCombiner(),
                    shuffle_within_partition=True,
                    num_epochs=num_epochs,
                    seed=0,
                    progress=False,
                )
        return float(sum(sum(w.epoch_samples[1:]) / sum(w.epoch_seconds[1:]) for w in history.workers))

    def close(self) -> None:
        self._spark_context.stop()


def main(arguments: list[str] | None = None) -> int:
    """Measures and reports."""
    options = argument_parser((__doc__ or "").split("\n", 1)[0]).parse_args(arguments)
    num_rounds, num_epochs = (1, 5) if options.quick else (5, 20)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    figures = _measure(num_rounds, num_epochs)
    return _report(figures).conclude(options.json)


def _measure(num_rounds: int, num_epochs: int) -> dict[str, list[float]]:
    training = Training()
    say(f"data: {training.source}; {num_rounds} rounds of {num_epochs} epochs")
    figures: dict[str, list[float]] = {}
    try:
        with Peer("loop 0", Loop, 0) as first, Peer("loop 1", Loop, 1) as second:
            for peer in (first, second):
                peer.call("train", PLAIN, 2)
            training.train(100, 2)  # starts the workers, which stay
            for number in range(num_rounds):
                say(f"round {number + 1} of {num_rounds}")
                for interval in (100, 10, 1):
                    figures.setdefault(f"sync_interval {interval}", []).append(training.train(interval, num_epochs))
                    if interval == 100:
                        for kind in (PLAIN, CALLABLE):
                            figures.setdefault(kind, []).append(_together([first, second], kind, num_epochs))
    finally:
        training.close()
    return figures


def _together(peers: list[Peer], kind: str, num_epochs: int) -> float:
    for peer in peers:
        peer.begin("train", kind, num_epochs)
    return float(sum(peer.end() for peer in peers))


def _report(figures: dict[str, list[float]]) -> Report:
    report = Report("Training softmax regression with 2 workers, samples/s from the second epoch on", PACKAGES)
    for name, values in figures.items():
        report.add(name, statistics.median(values), "samples/s")
    ours = figures["sync_interval 100"]
    report.add("sync_interval 100 / plain loop", median_ratio(ours, figures[PLAIN]), "x", at_least=0.90)
    report.add("sync_interval 100 / make_callable loop", median_ratio(ours, figures[CALLABLE]), "x")
    for interval in (10, 1):
        name = f"sync_interval {interval}"
        report.add(f"{name} / plain loop", median_ratio(figures[name], figures[PLAIN]), "x")
    return report


if __name__ == "__main__":
    sys.exit(main())
