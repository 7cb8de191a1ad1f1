"""A linear regression as programs train it, and the same in plain numpy, from weights that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tensorspark import DeltaWeightCombiner, History, SparkSession
from tensorspark.trainers.startup import importing

with importing():
    import tensorflow.compat.v1 as tf

RNG = np.random.default_rng(7)
TRUE_W = np.array([[1.0], [-2.0], [0.5]], np.float32)
W0, B0 = np.array([[0.3], [0.1], [-0.2]], np.float32), np.array([0.7], np.float32)
LEARNING_RATE = 0.1


class Regression(NamedTuple):
    """Linear regression with its own session; non-zero start."""

    session: Any
    x: Any
    y: Any
    W: Any
    b: Any
    loss: Any
    train: Any

    @property
    def feeds(self) -> list[str]:
        return [self.x.name, self.y.name]

    @property
    def weights(self) -> list[np.ndarray]:
        return list(self.session.run([self.W, self.b]))


def build(learning_rate: float = LEARNING_RATE, optimizer: Callable[[float], Any] | None = None) -> Regression:
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 3], name="x")
        y = tf.placeholder(tf.float32, [None, 1], name="y")
        W = tf.Variable(W0, name="W", use_resource=False)
        b = tf.Variable(B0, name="b", use_resource=True)
        loss = tf.reduce_mean(tf.square(tf.matmul(x, W) + b - y), name="loss")
        train = (optimizer or tf.train.GradientDescentOptimizer)(learning_rate).minimize(loss)
        session = tf.Session(graph=graph)
        session.run(tf.global_variables_initializer())
    return Regression(session, x, y, W, b, loss, train)


def rows_of(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    x = RNG.normal(size=(count, 3)).astype(np.float32)
    return list(zip(x, x @ TRUE_W + np.float32(3), strict=True))


def sgd(
    rows: list[tuple[np.ndarray, np.ndarray]], batch_size: int, epochs: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Plain SGD in numpy, float64: the independent calculation."""
    W, b = W0.astype(np.float64), B0.astype(np.float64)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            x, y = np.array([row[0] for row in batch], np.float64), np.array([row[1] for row in batch], np.float64)
            error = x @ W + b - y
            losses.append(float(np.mean(error**2)))
            W = W - LEARNING_RATE * 2 * x.T @ error / len(batch)
            b = b - LEARNING_RATE * 2 * error.mean(axis=0)
    return W, b, losses


def run(session: SparkSession, model: Regression, rdd: Any, **options: Any) -> History:
    arguments: dict[str, Any] = {
        "feed_rdd": rdd,
        "feed_name_list": model.feeds,
        "param_list": [model.W, model.b],
        "weight_combiner": DeltaWeightCombiner(),
        "progress": False,
    }
    history = session.run(**{"fetches": {"train": model.train, "loss": model.loss}, **arguments, **options})
    assert isinstance(history, History)
    return history
