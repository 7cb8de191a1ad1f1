"""Weights that travel and train nothing: two tensors of whole numbers, or of noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

# Whole numbers below this keep float32 sums exact for as many pushes as a benchmark makes.
_NUM_VALUES = 31


def layout_of(num_bytes: int) -> WeightLayout:
    """Two float32 tensors that fill `num_bytes`, a multiple of 128, without gaps."""
    half = (num_bytes // 8,)
    return WeightLayout([TensorSpec("first", half, "float32"), TensorSpec("second", half, "float32")])


def initial_weights(num_bytes: int) -> Buffer:
    """Weights to begin with, of which one in 31 is zero."""
    return whole_numbers(layout_of(num_bytes), 0)


def whole_numbers(layout: WeightLayout, start: int, first: int = 0) -> Buffer:
    """`first` to `first + 30`, over and over, from another of them for another `start`."""
    buffer = layout.allocate()
    _repeat(np.roll(np.arange(_NUM_VALUES, dtype=np.float32), -start) + np.float32(first), buffer)
    return buffer


def noise(layout: WeightLayout, seed: int) -> Buffer:
    """Normally distributed around 0 with a deviation of 1."""
    buffer = layout.allocate()
    np.random.default_rng(seed).standard_normal(out=buffer.view(np.float32), dtype=np.float32)
    return buffer


def _repeat(values: NDArray[np.float32], buffer: Buffer) -> None:
    """In place: sixty-four clients that make a few copies each would not fit the memory."""
    filled = buffer.view(np.float32)
    whole = filled[: len(filled) // len(values) * len(values)]
    whole.reshape(-1, len(values))[:] = values
    filled[len(whole) :] = values[: len(filled) - len(whole)]
