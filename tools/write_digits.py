"""Writes the embedded digits of ``MNIST_data/``, from scikit-learn's copy of them.

Their source and licence are in ``MNIST_data/README.md``. Nothing else here needs scikit-learn: install it by hand::

    pip install scikit-learn
    python -m tools.write_digits
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from examples.mnist_data import DATA_DIR, encode

NUM_TRAIN = 1500


def write(directory: Path) -> None:
    """Writes four gzipped IDX files: the same bytes each time."""
    digits = load_digits()
    # The data set is ordered by writer. RandomState is the generator whose numbers numpy promises not to change.
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = digits.images.astype(np.uint8)[order]
    labels = digits.target.astype(np.uint8)[order]
    for split, part in (("train", slice(None, NUM_TRAIN)), ("t10k", slice(NUM_TRAIN, None))):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(encode(array[part]), compresslevel=9, mtime=0)
            (directory / f"digits-{split}-{kind}-ubyte.gz").write_bytes(content)


if __name__ == "__main__":
    write(DATA_DIR)
