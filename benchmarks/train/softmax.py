"""The original's program: softmax regression as a TensorFlow 1 graph; and the loop that trains it without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.measuring.epochs import Epochs
from benchmarks.measuring.processes import wait_until
from benchmarks.train.mnist_rows import Images, Labels, Rows
from tensorspark.trainers.startup import importing

with importing():
    import tensorflow.compat.v1 as tf

LEARNING_RATE = 0.5
BATCH_SIZE = 100


class Program:
    """The graph and a session on it, as the README's program has them."""

    def __init__(self, config: tf.ConfigProto | None = None) -> None:
        with tf.Graph().as_default() as graph:
            self.x = tf.placeholder(tf.float32, [None, 784])
            weights = tf.Variable(tf.zeros([784, 10]))
            biases = tf.Variable(tf.zeros([10]))
            y = tf.nn.softmax(tf.matmul(self.x, weights) + biases)
            self.y_ = tf.placeholder(tf.float32, [None, 10])
            cross_entropy = tf.reduce_mean(-tf.reduce_sum(self.y_ * tf.log(y), reduction_indices=[1]))
            self.train_step = tf.train.GradientDescentOptimizer(LEARNING_RATE).minimize(cross_entropy)
            self.params = [weights, biases]
            self._init = tf.global_variables_initializer()
            is_correct = tf.equal(tf.argmax(y, 1), tf.argmax(self.y_, 1))
            self._accuracy = tf.reduce_mean(tf.cast(is_correct, tf.float32))
            self.session = tf.Session(graph=graph, config=config)
        self.reset()

    def reset(self) -> None:
        """Starts again from the initial weights."""
        self.session.run(self._init)

    def accuracy(self, images: Images, labels: Labels) -> float:
        return float(self.session.run(self._accuracy, {self.x: images, self.y_: labels}))


class PlainLoop:
    """A process that trains one partition from memory with no server, in a session configured like a Spark worker's."""

    def __init__(self, rows: Rows, partition: int) -> None:
        self._images, self._labels = rows.partition(partition)
        self._partition = partition
        self._program = Program(tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1))

    def train(self, start_at: float, num_epochs: int) -> Epochs:
        """With ``session.run`` and a ``feed_dict``, as a user writes it."""
        program = self._program
        x, y_, train_step, session = program.x, program.y_, program.train_step, program.session
        return self._train(
            start_at, num_epochs, lambda images, labels: session.run(train_step, {x: images, y_: labels})
        )

    def train_callable(self, start_at: float, num_epochs: int) -> Epochs:
        """With ``session.make_callable``, the fastest way to run a step."""
        program = self._program
        step = program.session.make_callable(program.train_step, [program.x, program.y_])
        return self._train(start_at, num_epochs, step)

    def _train(self, start_at: float, num_epochs: int, step: Callable[[Images, Labels], Any]) -> Epochs:
        self._program.reset()
        samples, seconds = [], []
        wait_until(start_at)
        for epoch in range(num_epochs):
            began = time.perf_counter()
            for images, labels in self._batches(epoch):
                step(images, labels)
            samples.append(len(self._images))
            seconds.append(time.perf_counter() - began)
        return Epochs(tuple(samples), tuple(seconds))

    def _batches(self, epoch: int) -> Iterator[tuple[Images, Labels]]:
        order = np.random.default_rng((epoch, self._partition)).permutation(len(self._images))
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            yield self._images.take(rows, axis=0), self._labels.take(rows, axis=0)

    def close(self) -> None:
        self._program.session.close()
