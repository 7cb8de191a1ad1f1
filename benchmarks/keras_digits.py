"""The rows and the model that `benchmarks.keras` measures with: digits, and 784-128-10."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples import mnist_data

NUM_ROWS = 60_000
NUM_PIXELS = 784
_NUM_CLASSES = 10
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


def make_model(seed: int = 1) -> Any:
    """784-128-10, compiled as the documentation's first example has it."""
    import keras

    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((NUM_PIXELS,), name="image"),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(_NUM_CLASSES, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
