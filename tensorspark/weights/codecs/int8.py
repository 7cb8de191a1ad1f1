"""Codec that quantizes to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.codecs.base import Scratch
from tensorspark.weights.codecs.blockwise import Block, BlockCodec, is_float
from tensorspark.weights.codecs.casts import narrow, widen
from tensorspark.weights.layout import Buffer

RUN = 256
"""Numbers that share a scale. What is lost grows with the largest of them: of normally distributed ones, that is 3.0
standard deviations on average among 256, 4.4 in a block of 65,536, so that errors are two thirds as large for 1.6% more
bytes. Runs of 64 would take off another 15%, for 4.7% more bytes and twice the time to find their largest."""

_LEVELS = np.float32(127)
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / _LEVELS, np.float32(0))  # 127 times as much is finite
_MIN_SCALE = np.float32(2.0**-126)  # below, float32 has not the digits for a quotient of at most 127


class Int8Codec(BlockCodec):
    """Floating numbers as integers from -127 to 127 times a float32 scale that each run of 256 has for itself.

    The scale is the run's largest magnitude / 127, and rounding is to nearest, so that a number's error is at most
    half a scale. Runs whose scale would be below 2⁻¹²⁶ become zeros.
    """

    spec = "int8"
    mark = b"int\x01"
    is_lossy = True
    is_sparse = False

    def encodes(self, dtype: np.dtype[Any]) -> bool:
        return is_float(dtype, "float32", "float64", "float16", "bfloat16")

    def encode_block(self, block: Block, out: Buffer, scratch: Scratch) -> int | None:
        runs = _in_runs(widen(block, scratch), scratch)
        scaled = scratch.array("scaled", np.float32, runs.size).reshape(runs.shape)
        scales = np.abs(runs, out=scaled).max(axis=1) / _LEVELS
        if not np.isfinite(scales).all():  # also where a float64 is too large for float32
            return None
        np.minimum(scales, _MAX_SCALE, out=scales)
        scales[scales < _MIN_SCALE] = 0
        inverses = np.where(scales > 0, 1 / scales, np.float32(0))
        np.multiply(runs, inverses[:, np.newaxis], out=scaled)
        np.rint(scaled, out=scaled)
        num_bytes = int(scales.nbytes) + len(block)
        out[: scales.nbytes].view("<f4")[...] = scales
        np.copyto(out[scales.nbytes : num_bytes].view(np.int8), scaled.reshape(-1)[: len(block)], casting="unsafe")
        return num_bytes

    def decode_block(self, section: Buffer, block: Block, scratch: Scratch) -> None:
        num_runs = -(-len(block) // RUN)
        if len(section) != 4 * num_runs + len(block):
            raise self.broken(f"{len(section)} bytes for {len(block)} numbers")
        is_direct = block.dtype == np.float32 and len(block) % RUN == 0
        wide = block if is_direct else scratch.array("wide", np.float32, num_runs * RUN)
        np.copyto(wide[: len(block)], section[4 * num_runs :].view(np.int8))
        wide[len(block) :] = 0
        runs = wide.reshape(num_runs, RUN)
        np.multiply(runs, section[: 4 * num_runs].view("<f4")[:, np.newaxis], out=runs)
        if not is_direct:
            narrow(wide[: len(block)], block, scratch)


def _in_runs(wide: NDArray[np.float32], scratch: Scratch) -> NDArray[np.float32]:
    """`[runs, RUN]`: the numbers, with zeros after them where they end in the middle of a run."""
    num_runs = -(-len(wide) // RUN)
    if len(wide) == num_runs * RUN:
        return wide.reshape(num_runs, RUN)
    padded = scratch.array("padded", np.float32, num_runs * RUN)
    padded[: len(wide)] = wide
    padded[len(wide) :] = 0
    return padded.reshape(num_runs, RUN)
