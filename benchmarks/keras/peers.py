"""What tensorspark is compared with: processes that train and predict with Keras alone, or with our step alone.

Each has one TensorFlow thread, as a Spark worker has, and its share of the rows in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.measuring.epochs import Epochs
from benchmarks.measuring.processes import Span, wait_until
from benchmarks.workloads.digits import Digits, Images, Labels
from benchmarks.workloads.perceptron import make_model
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

    from tensorspark.trainers.keras_model import as_keras_model

BATCH_SIZE = 64


class KerasPeer:
    """A process with Keras and nothing else: `model.fit` and `model.predict`, as users write them."""

    def __init__(self, digits: Digits, index: int, num_shares: int) -> None:
        _use_one_thread()
        self._digits = digits
        self._images, self._labels = digits.share(index, num_shares)
        self._model = make_model()

    def fit(self, start_at: float, num_epochs: int) -> Epochs:
        """Trains on from where the call before ended."""
        clock = _EpochClock()
        wait_until(start_at)
        self._model.fit(
            self._images, self._labels, batch_size=BATCH_SIZE, epochs=num_epochs, callbacks=[clock], verbose=0
        )
        return Epochs((len(self._images),) * num_epochs, tuple(clock.seconds))

    def predict(self, start_at: float, batch_size: int) -> Span:
        wait_until(start_at)
        began = time.monotonic()
        self._model.predict(self._images, batch_size=batch_size, verbose=0)
        return began, time.monotonic()

    def accuracy(self, num_epochs: int, seed: int) -> float:
        """On the test set, after training anew."""
        model = make_model(seed)
        model.fit(self._images, self._labels, batch_size=BATCH_SIZE, epochs=num_epochs, verbose=0)
        return self._digits.test_accuracy(model)


class StepPeer:
    """A process with a trainer such as a Spark worker has, rows in memory, and no server."""

    def __init__(self, digits: Digits, index: int, num_shares: int) -> None:
        _use_one_thread()
        self._images, self._labels = digits.share(index, num_shares)
        self._index = index
        model = as_keras_model(make_model())
        columns = model.expected_columns(None, [((), "int64")])
        captured = model.capture(columns, model.structure(num_labels=1))
        self._trainer = captured.spec.build(captured.content)
        self._trainer.reset(index, seed=1)
        self._trainer.load(captured.weights)

    def train(self, start_at: float, num_epochs: int, num_batches: int) -> Epochs:
        """Trains on from where the call before ended, `num_batches` steps in a call of the trainer."""
        samples, seconds = [], []
        wait_until(start_at)
        for epoch in range(num_epochs):
            began = time.perf_counter()
            for columns in self._stretches(epoch, num_batches * BATCH_SIZE):
                self._trainer.train(columns, BATCH_SIZE)
            samples.append(len(self._images))
            seconds.append(time.perf_counter() - began)
        return Epochs(tuple(samples), tuple(seconds))

    def _stretches(self, epoch: int, num_rows: int) -> Iterator[tuple[Images, Labels]]:
        order = np.random.default_rng((epoch, self._index)).permutation(len(self._images))
        for start in range(0, len(order), num_rows):
            rows = order[start : start + num_rows]
            yield self._images.take(rows, axis=0), self._labels.take(rows, axis=0)

    def close(self) -> None:
        self._trainer.close()


class _EpochClock(keras.callbacks.Callback):  # type: ignore[misc]
    """How long each epoch took, from the end of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def _use_one_thread() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
