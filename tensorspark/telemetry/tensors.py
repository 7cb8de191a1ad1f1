"""Norms and histograms of weights, and of how they change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.telemetry.records import TensorStats

_NUM_BINS = 30
_MAX_BINNED = 100_000  # of a tensor's values, evenly spread: what the shape of a histogram wants
_BLOCK = 2**18
_MIN_RANGE, _MAX_VALUE = 1e-300, 1e300  # within which thirty bins can be told apart, and none overflows

Named = Mapping[str, NDArray[Any]]


def tensor_stats(now: Named, before: Named | None) -> tuple[TensorStats, ...]:
    """Of each variable; a complex number counts as two.

    Args:
        now: by name, values of any shape, contiguous.
        before: the same an observation ago; None where there was none.
    """
    return tuple(
        _stats(name, _flat(values), None if before is None else _flat(before[name])) for name, values in now.items()
    )


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    values = values.reshape(-1)
    return values.view(values.real.dtype) if values.dtype.kind == "c" else values


def _stats(name: str, values: NDArray[Any], before: NDArray[Any] | None) -> TensorStats:
    edges, counts = _histogram(values[:: _stride(values)])
    if before is None:
        return TensorStats(name, _norm(_blocks(values)), None, edges, counts)
    changes = (new - old for new, old in zip(_blocks(values), _blocks(before), strict=True))
    update_norm = _norm(changes)
    stride = _stride(values)
    with np.errstate(invalid="ignore", over="ignore"):
        sampled = values[::stride].astype(np.float64) - before[::stride]
    return TensorStats(name, _norm(_blocks(values)), update_norm, edges, counts, *_histogram(sampled))


def _stride(values: NDArray[Any]) -> int:
    return max(1, -(-values.size // _MAX_BINNED))


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """As float64, piece by piece: an overflow of float16's squares would say infinity."""
    for start in range(0, values.size, _BLOCK):
        yield values[start : start + _BLOCK].astype(np.float64)


def _norm(blocks: Iterator[NDArray[np.float64]]) -> float | None:
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks:
            total += float(np.dot(block, block))
    return math.sqrt(total) if math.isfinite(total) else None


def _histogram(values: NDArray[Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return (), ()
    least, most = float(values.min()), float(values.max())
    if max(-least, most) > _MAX_VALUE:
        return (), ()
    if most - least <= max(1e-12 * max(abs(least), abs(most)), _MIN_RANGE):
        # All the same: bins about it, as wide as can be told apart.
        width = max(abs(least), 1e-12) * 1e-3
        least, most = least - width, most + width
    counts, edges = np.histogram(values, bins=_NUM_BINS, range=(least, most))
    return tuple(edges.tolist()), tuple(counts.tolist())
