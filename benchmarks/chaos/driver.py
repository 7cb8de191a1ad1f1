"""The driver program that chaos is made with: softmax regression trained by plain SGD on a Spark cluster.

It is a program of its own, so that it can be killed: ``python -m benchmarks.chaos.driver JSON``, where JSON holds the
fields of an `Application`. It reads a `Training` from each line of its input, and prints one JSON object a line:
``{"event": "begun", ...}``, then ``"status"`` whenever the run's status has changed, and in the end ``"done"`` or
``"failed"``. See `benchmarks.chaos.driver_process` for the other end of the pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pyspark import RDD, SparkConf, SparkContext

from benchmarks.clusters.local import QUIET
from examples import mnist_data
from tensorspark import DeltaWeightCombiner, History, SparkSession
from tensorspark.config import Config
from tensorspark.driver import engine, resources
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.server import ParameterServer
from tensorspark.trainers.startup import importing

NUM_PARTITIONS = 2
BATCH_SIZE = 50
MAX_ROWS = 4000  # of MNIST; the digits are fewer
_LEARNING_RATE = 0.01  # the workers' deltas are added up
_POLL_S = 0.005
_SLOW_FROM_ROW, _SLOW_ROW_S = 4 * BATCH_SIZE, 0.2


@dataclass(frozen=True)
class Application:
    """What a driver keeps for all its trainings.

    Attributes:
        master: Spark's URL.
        spark: entries of the Spark configuration.
    """

    master: str
    spark: dict[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """Starts the driver, from the repository's root."""
        return [sys.executable, "-m", "benchmarks.chaos.driver", json.dumps(asdict(self))]


@dataclass(frozen=True)
class Training:
    """One training; its fields are plain values, to travel as JSON.

    Attributes:
        weights_path: where the final weights are written: the bytes of all variables, one after the other.
        settings: arguments of `tensorspark.SparkSession`.
        restore_url: checkpoints to go on from.
        advertised_port: which port the workers are told instead of the server's: somebody between them listens there.
        slow_marker: the first attempt of partition 0 writes its process id here, and from its fourth batch on takes
            0.2 s a row; None: nobody is slow.
    """

    weights_path: str
    num_epochs: int
    shuffle: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    restore_url: str | None = None
    advertised_port: int | None = None
    slow_marker: str | None = None


def main() -> int:
    with importing():
        from tensorflow.compat import v1 as tf
    tf.disable_eager_execution()
    with _spark(Application(**json.loads(sys.argv[1]))) as spark_context:
        for line in sys.stdin:
            with tf.Graph().as_default(), tf.Session() as session:
                try:
                    _Program(tf, session).train(spark_context, Training(**json.loads(line)))
                except Exception:
                    _tell("failed", traceback=traceback.format_exc())
    return 0


class _Program:
    """The graph, in the default graph: 784 pixels to 10 classes, and a counter of steps."""

    def __init__(self, tf: Any, session: Any) -> None:
        self._session = session
        self._x = tf.placeholder(tf.float32, [None, 784], name="x")
        self._y_ = tf.placeholder(tf.float32, [None, 10], name="y_")
        # Not zeros: a base that is forgotten or counted twice would not show.
        start = np.random.default_rng(7).normal(scale=0.1, size=(784, 10)).astype(np.float32)
        weights = tf.Variable(start, name="W")
        biases = tf.Variable(tf.ones([10]), name="b")
        # Synchronized like the weights, and every step adds 1: in the end it says how many steps are in them.
        self._counter = tf.Variable(0, name="num_steps", dtype=tf.int64)
        logits = tf.matmul(self._x, weights) + biases
        loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(labels=self._y_, logits=logits))
        optimizer = tf.train.GradientDescentOptimizer(_LEARNING_RATE)
        self._step = optimizer.minimize(loss, global_step=self._counter)
        self._params = [weights, biases, self._counter]
        session.run(tf.global_variables_initializer())

    def train(self, spark_context: SparkContext, training: Training) -> None:
        """Trains and tells of it."""
        with self._open(spark_context, training) as session:
            _tell("begun", application=spark_context.applicationId, checkpoint_dir=session.checkpoint_dir)
            with _advertised(training.advertised_port), _told_status(session):
                history = session.run(
                    self._step,
                    feed_rdd=_rows(spark_context, training.slow_marker),
                    feed_name_list=[self._x.name, self._y_.name],
                    param_list=self._params,
                    weight_combiner=DeltaWeightCombiner(),
                    shuffle_within_partition=training.shuffle,
                    num_epochs=training.num_epochs,
                    seed=11,
                    progress=False,
                )
        values = self._session.run(self._params)
        Path(training.weights_path).write_bytes(b"".join(value.tobytes() for value in values))
        _tell_done(history, int(values[-1]))

    def _open(self, spark_context: SparkContext, training: Training) -> SparkSession:
        arguments = {"name": "chaos", "batch_size": BATCH_SIZE, "sync_interval": 1, "staleness": 0, **training.settings}
        if training.restore_url is None:
            return SparkSession(spark_context, self._session, **arguments)
        return SparkSession.restore(spark_context, training.restore_url, self._session, **arguments)


@contextlib.contextmanager
def _spark(application: Application) -> Iterator[SparkContext]:
    conf = SparkConf().setMaster(application.master).setAppName("tensorspark chaos")
    conf.setAll(list(QUIET.items()))
    conf.set("spark.driver.host", "127.0.0.1").set("spark.driver.bindAddress", "127.0.0.1")
    # One executor a host, of one slot.
    conf.set("spark.executor.cores", "1").set("spark.cores.max", "2").set("spark.executor.memory", "512m")
    conf.setAll(list(application.spark.items()))
    spark_context = SparkContext(conf=conf)
    try:
        spark_context.parallelize(range(NUM_PARTITIONS), NUM_PARTITIONS).count()  # waits for the executors
        yield spark_context
    finally:
        spark_context.stop()


def _rows(spark_context: SparkContext, slow_marker: str | None) -> RDD[Any]:
    images, labels, _, _ = mnist_data.load(mnist_data.find(download=False))
    images, labels = images[:MAX_ROWS], mnist_data.one_hot(labels[:MAX_ROWS])
    blocks = [(images[index::NUM_PARTITIONS], labels[index::NUM_PARTITIONS]) for index in range(NUM_PARTITIONS)]
    # What travels by value needs no benchmarks on the executors: it is of this program's __main__.
    read = _make_reader(slow_marker)
    return spark_context.parallelize(blocks, NUM_PARTITIONS).mapPartitionsWithIndex(read)


def _make_reader(slow_marker: str | None) -> Callable[[int, Any], Iterator[Any]]:
    slow_from, slow_row_s = _SLOW_FROM_ROW, _SLOW_ROW_S

    def is_first(partition: int) -> bool:
        if slow_marker is None or partition != 0:
            return False
        try:
            with open(slow_marker, "x") as marker:
                marker.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def read(partition: int, blocks: Any) -> Iterator[Any]:
        is_slow = is_first(partition)
        for images, labels in blocks:
            for index, row in enumerate(zip(images, labels, strict=True)):
                if is_slow and index >= slow_from:
                    time.sleep(slow_row_s)
                yield row

    return read


def _advertised(port: int | None) -> contextlib.AbstractContextManager[object]:
    """Tells workers another port than the server's: no setting does, as the server listens where it says it does."""
    if port is None:
        return contextlib.nullcontext()

    def advertised(server: ParameterServer, config: Config) -> ServerAddress:
        return replace(resources.address_of(server, config), port=port)

    return mock.patch.object(engine, "address_of", advertised)


@contextlib.contextmanager
def _told_status(session: SparkSession) -> Iterator[None]:
    """Tells the status whenever it has changed, from a thread of its own."""
    over = threading.Event()

    def watch() -> None:
        told = None
        while not over.wait(_POLL_S):
            try:
                status = session.status()
            except Exception:  # the server ends with the run, perhaps at this moment
                return
            if status is not None and status != told:
                told = status
                _tell("status", **asdict(replace(status, scalars={})))

    thread = threading.Thread(target=watch, name="status")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell_done(history: History, num_steps: int) -> None:
    workers = [asdict(replace(worker, epoch_samples=(), epoch_seconds=())) for worker in history.workers]
    _tell("done", num_steps_in_weights=num_steps, num_samples=history.num_samples, workers=workers)


def _tell(event: str, **values: object) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **values}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
