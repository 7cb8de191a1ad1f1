"""Arithmetic over whole buffers of weights, in blocks of one dtype that stay in a core's cache.

Complex tensors count as pairs of real numbers. Floats of less than 32 bits (float16, bfloat16) are kept as they are
and computed in float32, so that each result is rounded once. Integers (a step counter, say) wrap around when they
overflow, as numpy's do, and an unsigned difference is read as the signed number that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.layout import Buffer, WeightLayout

BLOCK_BYTES = 2**18  # stays in a core's second-level cache between the merge and the check for NaN


def blocks(layout: WeightLayout) -> Iterator[tuple[np.dtype[Any], slice]]:
    """All blocks of a buffer: what to view one as, never complex, and where it lies."""
    for segment in layout.segments:
        dtype = segment.dtype
        if dtype.kind == "c":
            dtype = np.dtype(f"f{dtype.itemsize // 2}")
        for start in range(segment.start, segment.stop, BLOCK_BYTES):
            yield dtype, slice(start, min(start + BLOCK_BYTES, segment.stop))


def is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu"


def is_finite(block: NDArray[Any]) -> bool:
    """Whether a flat block holds neither NaN nor infinity."""
    return is_integer(block.dtype) or bool(np.isfinite(block).all())


def widened(block: NDArray[Any]) -> NDArray[Any]:
    """The block to compute with: itself, or a float32 copy of floats of less than 32 bits."""
    return block.astype(np.float32) if block.dtype.itemsize < 4 else block


def add_scaled(layout: WeightLayout, base: Buffer | None, pushed: Buffer, scale: float) -> bool:
    """Writes base + scale * pushed over `pushed`; integers are added whole, as counts have no scale.

    Args:
        base: what to add to; None stands for zeros.

    Returns:
        Whether every number written is finite. If not, it stopped in the middle.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype, block in blocks(layout):
            result = pushed[block].view(dtype)
            if scale != 1 and not is_integer(dtype):
                wide = widened(result)
                np.multiply(wide, scale, out=wide)
                if base is not None:
                    np.add(wide, widened(base[block].view(dtype)), out=wide)
                _write_back(wide, result)
            elif base is not None:
                np.add(base[block].view(dtype), result, out=result)
            if not is_finite(result):
                return False
    return True


def add_mean(layout: WeightLayout, current: Buffer, total: Buffer, divisor: float, num_pushes: int) -> bool:
    """Writes current + total / divisor over `total`; integers are divided by `num_pushes`, towards zero.

    Returns:
        Whether every number written is finite. If not, it stopped in the middle.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype, block in blocks(layout):
            weights, result = current[block].view(dtype), total[block].view(dtype)
            if is_integer(dtype):
                add_integer_mean(weights, result, num_pushes)
                continue
            wide = widened(result)
            if divisor != 1:
                np.divide(wide, divisor, out=wide)
            np.add(wide, widened(weights), out=wide)
            _write_back(wide, result)
            if not is_finite(result):
                return False
    return True


def add_integer_mean(current: NDArray[Any], total: NDArray[Any], num_pushes: int) -> None:
    """Writes current + total / num_pushes, the quotient rounded towards zero, over `total`."""
    if num_pushes == 1:
        np.add(current, total, out=total)
        return
    # Unsigned, what a worker took off has wrapped around: -1 is 255.
    mean = total.view(f"i{total.dtype.itemsize}").astype(np.int64)
    mean -= np.fmod(mean, num_pushes)
    mean //= num_pushes
    np.add(current, mean.astype(total.dtype), out=total)


def _write_back(wide: NDArray[Any], block: NDArray[Any]) -> None:
    if wide is not block:
        block[...] = wide
