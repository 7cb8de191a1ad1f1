"""Rows of MNIST's form: 784 floats, four fifths of them black, and a label."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

NUM_PIXELS = 784


def images(rng: np.random.Generator, num_rows: int, num_labels: int = 10) -> pa.RecordBatch:
    """`num_rows` rows: ``image``, 784 float32 of 256 different values, and ``label``, int64 below `num_labels`."""
    pixels = rng.integers(0, 256, num_rows * NUM_PIXELS) * (rng.random(num_rows * NUM_PIXELS) < 0.2)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * NUM_PIXELS
    lists = pa.ListArray.from_arrays(offsets, pa.array((pixels / 255).astype(np.float32)))
    return pa.RecordBatch.from_arrays(
        [lists, pa.array(rng.integers(0, num_labels, num_rows))], names=["image", "label"]
    )
