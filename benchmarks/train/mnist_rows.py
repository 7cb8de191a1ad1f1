"""The rows that training is measured on: MNIST, or random ones of its shape where there is no MNIST."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples import mnist_data

_NUM_RANDOM_ROWS = 60_000
_NUM_PIXELS = 784
# Small enough for softmax regression at a learning rate of 0.5 not to run into log(0).
_RANDOM_SCALE = np.float32(0.1)

Images = NDArray[np.float32]
"""``[rows, 784] float32``."""
Labels = NDArray[np.float32]
"""``[rows, 10] float32``, one-hot."""


@dataclass(frozen=True)
class Rows:
    """Where the rows come from. Picklable and small: every process reads or makes them itself."""

    files: mnist_data.MnistFiles | None
    num_partitions: int

    def __str__(self) -> str:
        return "MNIST" if self.files else f"{_NUM_RANDOM_ROWS:,} random rows of MNIST's shape (no MNIST here)"

    def partition(self, index: int) -> tuple[Images, Labels]:
        """Every `num_partitions`-th row, from `index` on."""
        images, labels = self._train()
        rows = slice(index, None, self.num_partitions)
        return np.ascontiguousarray(images[rows]), np.ascontiguousarray(labels[rows])

    def tuples(self, index: int) -> Iterator[tuple[Images, Labels]]:
        """The same rows one by one, as a feed RDD has them."""
        return zip(*self.partition(index), strict=True)

    def test(self) -> tuple[Images, Labels] | None:
        """The test set; None for random rows."""
        if self.files is None:
            return None
        _, _, images, labels = mnist_data.load(self.files)
        return images, mnist_data.one_hot(labels)

    def _train(self) -> tuple[Images, Labels]:
        if self.files is not None:
            images, labels, _, _ = mnist_data.load(self.files)
            return images, mnist_data.one_hot(labels)
        generator = np.random.default_rng(0)
        images = generator.random((_NUM_RANDOM_ROWS, _NUM_PIXELS), np.float32) * _RANDOM_SCALE
        return images, mnist_data.one_hot(generator.integers(10, size=_NUM_RANDOM_ROWS))


def find(num_partitions: int) -> Rows:
    """MNIST where it is on this machine already; nothing is downloaded."""
    try:
        files = mnist_data.find(download=False)
    except FileNotFoundError:
        return Rows(None, num_partitions)
    return Rows(files if files.source == "MNIST" else None, num_partitions)
