"""What a training did, by worker and epoch, and the figures that follow from it. Needs numpy only: every peer's
environment has that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads.perceptron import NUM_CLASSES, NUM_HIDDEN, NUM_PIXELS, NUM_WEIGHTS


@dataclass(frozen=True)
class Course:
    """A training's course.

    Attributes:
        samples: `[workers, epochs] int64`, rows that each worker trained on.
        seconds: `[workers, epochs] float64`, each epoch from the end of the one before, so with waiting and exchange.
        weights: `[epochs, NUM_WEIGHTS] float32`, those that all share at each epoch's end; empty where nobody asks.
        moved_bytes: of weights, in both directions and in all epochs.
    """

    samples: NDArray[np.int64]
    seconds: NDArray[np.float64]
    weights: NDArray[np.float32]
    moved_bytes: int

    def __post_init__(self) -> None:
        if self.samples.shape != self.seconds.shape or self.samples.ndim != 2 or self.samples.shape[1] < 2:
            raise ValueError(
                f"expected samples and seconds of [workers, epochs], two epochs or more, got {self.samples.shape} "
                f"and {self.seconds.shape}"
            )

    @property
    def samples_per_s(self) -> float:
        """Of all workers together, from the second epoch on: the first one starts up."""
        return float(np.sum(self.samples[:, 1:].sum(axis=1) / self.seconds[:, 1:].sum(axis=1)))

    @property
    def bytes_per_sample(self) -> float:
        return self.moved_bytes / float(self.samples.sum())

    def seconds_to(self, accuracies: Sequence[float], target: float) -> float | None:
        """Training time until the test accuracy is reached, at the rate from the second epoch on; None: never.

        Args:
            accuracies: at the end of each epoch.
        """
        num_epochs = epochs_to(accuracies, target)
        if num_epochs is None:
            return None
        return float(num_epochs * self.samples.sum() / self.samples.shape[1] / self.samples_per_s)

    def save(self, path: Path) -> None:
        np.savez(
            path,
            samples=self.samples,
            seconds=self.seconds,
            weights=self.weights,
            moved_bytes=np.int64(self.moved_bytes),
        )

    @classmethod
    def load(cls, path: Path) -> Course:
        with np.load(path) as held:
            return cls(held["samples"], held["seconds"], held["weights"], int(held["moved_bytes"]))


def epochs_to(accuracies: Sequence[float], target: float) -> float | None:
    """Epochs until the accuracy is reached, between two ends of epochs on a straight line; None where it never is.

    >>> epochs_to([0.90, 0.96, 0.98], 0.97)
    2.5
    """
    for index, accuracy in enumerate(accuracies):
        if accuracy >= target:
            before = accuracies[index - 1] if index else target
            share = (target - before) / (accuracy - before) if index else 1.0
            return round(float(index + share), 9)
    return None


def flat(weights: Sequence[Any]) -> NDArray[np.float32]:
    """A model's weights, in Keras's order, as one row of `Course.weights`."""
    row = np.concatenate([np.ravel(np.asarray(array)) for array in weights]).astype(np.float32)
    if len(row) != NUM_WEIGHTS:
        raise ValueError(f"expected {NUM_WEIGHTS} weights of 784-128-10, got {len(row)}")
    return row


def accuracy(row: NDArray[np.float32], images: NDArray[np.float32], labels: NDArray[Any]) -> float:
    """The share of images that 784-128-10 with these weights, `[NUM_WEIGHTS] float32`, classifies as labelled."""
    ends = np.cumsum([NUM_PIXELS * NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN * NUM_CLASSES])
    first, first_bias, second, second_bias = np.split(row, ends)
    hidden = np.maximum(images @ first.reshape(NUM_PIXELS, NUM_HIDDEN) + first_bias, 0)
    scores = hidden @ second.reshape(NUM_HIDDEN, NUM_CLASSES) + second_bias
    return float(np.mean(scores.argmax(axis=1) == labels))


def epochs_from_marks(began: float, marks: Sequence[float], num_per_epoch: int, num_epochs: int) -> NDArray[np.float64]:
    """Seconds of each epoch, from when each of its steps ended.

    Args:
        began: when the first epoch did.
        marks: ends of the steps, `num_per_epoch * num_epochs` of them.

    >>> epochs_from_marks(1.0, [2.0, 4.0, 5.0, 9.0], num_per_epoch=2, num_epochs=2).tolist()
    [3.0, 5.0]
    """
    if len(marks) != num_per_epoch * num_epochs:
        raise ValueError(f"expected {num_epochs} epochs of {num_per_epoch} steps, got {len(marks)} steps")
    return np.diff(np.array([began, *marks[num_per_epoch - 1 :: num_per_epoch]], np.float64))
