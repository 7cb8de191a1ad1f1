"""The rows that the perceptron is trained and tested on: MNIST, or the digits that come with the repository."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads.perceptron import NUM_PIXELS
from examples import mnist_data

NUM_ROWS = 60_000
_BATCH_ROWS = 1000

Images = NDArray[np.float32]
"""``[rows, 784] float32``, from 0 to 1."""
Labels = NDArray[np.int64]
"""``[rows] int64``, from 0 to 9."""


@dataclass(frozen=True)
class Digits:
    """Where the rows come from. Picklable and small: every process reads them itself."""

    files: mnist_data.MnistFiles

    def __str__(self) -> str:
        return self.files.source

    def train(self) -> tuple[Images, Labels]:
        """60,000 rows; of fewer digits, over and over again."""
        images, labels, _, _ = mnist_data.load(self.files)
        rows = np.arange(NUM_ROWS) % len(images)
        return images[rows], labels[rows].astype(np.int64)

    def test(self) -> tuple[Images, Labels]:
        _, _, images, labels = mnist_data.load(self.files)
        return images, labels.astype(np.int64)

    def test_accuracy(self, model: Any) -> float:
        """The share of the images to test with that a Keras model classifies as their labels say."""
        images, labels = self.test()
        probabilities = model.predict(images, batch_size=_BATCH_ROWS, verbose=0)
        return float(np.mean(probabilities.argmax(axis=1) == labels))

    def share(self, index: int, num_shares: int) -> tuple[Images, Labels]:
        """Every `num_shares`-th row to train on, from `index` on."""
        images, labels = self.train()
        rows = slice(index, None, num_shares)
        return np.ascontiguousarray(images[rows]), np.ascontiguousarray(labels[rows])

    def batches(self, index: int, num_shares: int) -> Iterator[Any]:
        """The same rows as Arrow record batches, as a DataFrame has them."""
        import pyarrow as pa

        images, labels = self.share(index, num_shares)
        for start in range(0, len(images), _BATCH_ROWS):
            part = images[start : start + _BATCH_ROWS]
            offsets = np.arange(len(part) + 1, dtype=np.int32) * NUM_PIXELS
            values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.ravel()))
            yield pa.RecordBatch.from_arrays(
                [values, pa.array(labels[start : start + _BATCH_ROWS])], names=["image", "label"]
            )


def find() -> Digits:
    """MNIST where it is on this machine already, else the digits that come with the repository."""
    return Digits(mnist_data.find(download=False))
