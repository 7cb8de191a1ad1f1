"""Conversions between floats of 16 bits and float32, for the codecs.

numpy's own conversion to float16 goes number by number, with branches: 1.4 GB/s of float32 at best, and 0.06 GB/s where
most results are subnormal (below 6e-5, as changes of weights are). What is below has no branches, and takes as long
whatever the numbers are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.codecs.base import Scratch

Block = NDArray[Any]

MAX_FLOAT16 = 65504.0

_EXPONENT = np.uint32(0x7F800000)  # of a float32; with the other bits zero, that of infinity
_MIN_NORMAL_16 = np.uint32(113 << 23)  # bits of 2**-14 as float32: the smallest normal float16
_13_BINADES = np.uint32(13 << 23)  # float32 has 13 more bits of mantissa than float16
_REBIAS = np.uint32(126 << 10)
_SIGN_16 = np.uint32(0x8000)


def widen(block: Block, scratch: Scratch) -> NDArray[np.float32]:
    """The block's numbers as float32: itself, or a rounded or exact copy. What float32 cannot hold is infinite."""
    if block.dtype == np.float32:
        return block
    wide = scratch.array("wide", np.float32, len(block))
    if block.dtype == np.float16:
        return read_float16(block.view("<u2"), wide)
    np.copyto(wide, block, casting="same_kind")
    return wide


def narrow(wide: NDArray[np.float32], block: Block, scratch: Scratch) -> None:
    """Writes float32 numbers to a block of any floating dtype, rounded to nearest."""
    if block.dtype != np.float16 or not write_float16(wide, wide, block.view("<u2"), scratch):
        np.copyto(block, wide, casting="same_kind")


def write_float16(wide: NDArray[np.float32], exact: Block, bits: NDArray[np.uint16], scratch: Scratch) -> bool:
    """Writes the float16 nearest to each number, within ±65504, as its bits.

    With 2^E at most |x| (at least 2⁻¹⁴), the sum |x| + 2^(E+13) is rounded by the processor to multiples of 2^(E-10),
    the distance between float16 numbers there. What stands in its mantissa are those multiples: 1024 to 2048 of them,
    or fewer where the result is subnormal. A float16's bits, read as an integer, are this plus 1024 (E + 14).

    Returns:
        False, and anything in `bits`, where one of `exact` (the numbers before they were rounded to float32) is NaN
        or infinite.
    """
    magnitudes = np.abs(wide, out=scratch.array("magnitudes", np.float32, len(wide)))
    result = magnitudes.view(np.uint32)
    largest = result.max()
    if largest >= _EXPONENT and not np.isfinite(exact).all():
        return False
    if largest > np.float32(MAX_FLOAT16).view(np.uint32):
        np.minimum(magnitudes, np.float32(MAX_FLOAT16), out=magnitudes)
    added = np.maximum(result, _MIN_NORMAL_16, out=scratch.array("added", np.uint32, len(wide)))
    np.bitwise_and(added, _EXPONENT, out=added)
    np.add(added, _13_BINADES, out=added)
    np.add(magnitudes, added.view(np.float32), out=magnitudes)
    exponents = np.right_shift(result, 13, out=added)
    np.add(result, exponents, out=result)  # of which 16 bits are taken: those of the mantissa, and the exponent's
    signs = np.right_shift(wide.view(np.uint32), 16, out=added)
    np.bitwise_and(signs, _SIGN_16, out=signs)
    np.add(result, signs, out=result)
    np.subtract(result, _REBIAS, out=bits, casting="unsafe")
    return True


def read_float16(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.take(_float16_numbers(), bits, out=out, mode="clip")


@cache
def _float16_numbers() -> NDArray[np.float32]:
    """All float16 numbers, in the order of their bits: 256 KiB, twice as fast as converting them, or 9 times."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        table = numbers.astype(np.float32)
    table.flags.writeable = False
    return table
