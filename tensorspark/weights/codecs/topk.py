"""Codec that sends the largest numbers only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import ConfigError
from tensorspark.weights.blocks import BLOCK_BYTES
from tensorspark.weights.codecs.base import Scratch
from tensorspark.weights.codecs.blockwise import Block, BlockCodec, is_float
from tensorspark.weights.codecs.casts import widen
from tensorspark.weights.layout import Buffer

_SAMPLE_STRIDE = 17  # shares no divisor with the usual sizes of tensors, so that no row or column is left out
_MIN_SAMPLED = 4096  # a block of fewer numbers is searched whole


class TopKCodec(BlockCodec):
    """Of each block, the share `ratio` of the numbers that are largest in magnitude; the others count as zero.

    For changes of weights with error feedback, which sends the others when they have grown (Stich et al., "Sparsified
    SGD with Memory", 2018; Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", 2017). The
    papers choose from a tensor or from all; here it is from each block of 256 KiB, at least one number, rounded up.
    That needs one pass and no memory, its indices fit 16 bits, and no tensor is silenced by another with larger
    numbers in some other block. Of equal magnitudes the first are sent; zeros never are.

    Numbers of 32 bits and less are sent as they are, float64 ones as float32.

    Args:
        ratio: share of the numbers, more than 0 and less than 1.

    Raises:
        ConfigError: another ratio.
    """

    mark = b"top\x01"
    is_lossy = True
    is_sparse = True

    def __init__(self, ratio: float) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise ConfigError(
                f"expected a share of the numbers between 0 and 1 for 'topk', such as 0.01, got {ratio!r}"
            )
        self.ratio = float(ratio)
        self.spec = f"topk:{self.ratio!r}"

    def to_json(self) -> dict[str, Any]:
        return {"codec": "topk", "ratio": self.ratio}

    def encodes(self, dtype: np.dtype[Any]) -> bool:
        if not is_float(dtype, "float32", "float64", "float16", "bfloat16"):
            return False
        number, index = _sent_dtypes(dtype, BLOCK_BYTES // dtype.itemsize)
        return self.ratio * (number.itemsize + index.itemsize) < dtype.itemsize

    def encode_block(self, block: Block, out: Buffer, scratch: Scratch) -> int | None:
        number, index = _sent_dtypes(block.dtype, len(block))
        exact = block if block.dtype.itemsize >= 4 else widen(block, scratch)
        magnitudes = np.abs(exact, out=scratch.array("magnitudes", exact.dtype, len(block)))
        chosen = _largest(magnitudes, math.ceil(self.ratio * len(block)))
        if not np.isfinite(magnitudes[chosen]).all():
            return None
        numbers = block[chosen].astype(number)
        if number != block.dtype and not np.isfinite(numbers).all():  # too large for float32
            return None
        num_bytes = numbers.nbytes + index.itemsize * len(chosen)
        if num_bytes >= block.nbytes:
            return None
        out[: numbers.nbytes].view(number)[...] = numbers
        out[numbers.nbytes : num_bytes].view(index)[...] = chosen
        return num_bytes

    def decode_block(self, section: Buffer, block: Block, scratch: Scratch) -> None:
        number, index = _sent_dtypes(block.dtype, len(block))
        num_sent, rest = divmod(len(section), number.itemsize + index.itemsize)
        if rest:
            raise self.broken(f"{len(section)} bytes, of {number.itemsize + index.itemsize} for each number")
        numbers = section[: num_sent * number.itemsize].view(number)
        indices = section[num_sent * number.itemsize :].view(index)
        if num_sent and (indices[-1] >= len(block) or not (indices[1:] > indices[:-1]).all()):
            raise self.broken(f"indices that do not ascend, or reach {len(block)}")
        block[...] = 0
        block[indices] = numbers


def _sent_dtypes(dtype: np.dtype[Any], num_numbers: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of the numbers sent and of their indices in a block of so many."""
    number = dtype if dtype.itemsize < 4 else np.dtype("<f4")
    return number, np.dtype("<u2" if num_numbers <= 2**16 else "<u4")


def _largest(magnitudes: NDArray[Any], num: int) -> NDArray[np.intp]:
    """Ascending indices of the `num` largest, or of all that are not zero where there are fewer.

    NaN and infinity are among them. A sample tells a threshold that few numbers pass, more than are wanted in all
    likelihood; where it was wrong all are looked at. So the sample decides about the time, but not what comes out.
    """
    candidates = np.flatnonzero(~(magnitudes < _low_threshold(magnitudes, num)))
    if len(candidates) < num or len(candidates) == len(magnitudes):
        candidates = np.flatnonzero(magnitudes)
    if len(candidates) <= num:
        return candidates
    among = magnitudes[candidates]
    threshold = np.partition(among, len(among) - num)[len(among) - num]  # NaN counts as the largest
    is_chosen = ~(among <= threshold)
    num_equal = num - int(np.count_nonzero(is_chosen))
    is_chosen[np.flatnonzero(among == threshold)[:num_equal]] = True
    chosen: NDArray[np.intp] = candidates[is_chosen]
    return chosen


def _low_threshold(magnitudes: NDArray[Any], num: int) -> Any:
    sample = magnitudes[::_SAMPLE_STRIDE]
    rank = 3 * num // (2 * _SAMPLE_STRIDE) + 8
    if len(magnitudes) < _MIN_SAMPLED or rank >= len(sample):
        return magnitudes.dtype.type(0)
    return np.partition(sample, len(sample) - rank)[len(sample) - rank]
