"""Codecs that round to 16 bits: float16 and bfloat16."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tensorspark.errors import ConfigError
from tensorspark.weights.codecs.base import Scratch
from tensorspark.weights.codecs.blockwise import Block, BlockCodec, is_float
from tensorspark.weights.codecs.casts import read_float16, widen, write_float16
from tensorspark.weights.layout import Buffer

MAX_BFLOAT16 = float.fromhex("0x1.fep127")


class Float16Codec(BlockCodec):
    """Float32 and float64 numbers as float16, rounded to nearest, ties to even; beyond ±65504 they become that.

    So the error feedback keeps what does not fit. The error of a number x is at most max(|x| 2⁻¹¹, 2⁻²⁵) within that
    range. Float64 numbers are rounded to float32 first, which adds at most half the distance of float32 numbers there.
    """

    spec = "float16"
    mark = b"f16\x01"
    is_lossy = True
    is_sparse = False

    def encodes(self, dtype: np.dtype[Any]) -> bool:
        return is_float(dtype, "float32", "float64")

    def encode_block(self, block: Block, out: Buffer, scratch: Scratch) -> int | None:
        wide = widen(block, scratch)
        num_bytes = 2 * len(block)
        return num_bytes if write_float16(wide, block, out[:num_bytes].view("<u2"), scratch) else None

    def decode_block(self, section: Buffer, block: Block, scratch: Scratch) -> None:
        if len(section) != 2 * len(block):
            raise self.broken(f"{len(section)} bytes for {len(block)} numbers")
        if block.dtype == np.float32:
            read_float16(section.view("<u2"), block)
        else:
            np.copyto(block, read_float16(section.view("<u2"), scratch.array("wide", np.float32, len(block))))


class BFloat16Codec(BlockCodec):
    """Float32 and float64 numbers as bfloat16, rounded to nearest, ties to even; beyond ±3.39e38 they become that.

    The error of a number x is at most max(|x| 2⁻⁸, 2⁻¹³⁴): the range is float32's. Float64 numbers are rounded to
    float32 first, which adds at most half the distance of float32 numbers there.

    Raises:
        ConfigError: the package ml_dtypes is not installed.
    """

    spec = "bfloat16"
    mark = b"b16\x01"
    is_lossy = True
    is_sparse = False

    def __init__(self) -> None:
        _bfloat16()

    def encodes(self, dtype: np.dtype[Any]) -> bool:
        return is_float(dtype, "float32", "float64")

    def encode_block(self, block: Block, out: Buffer, scratch: Scratch) -> int | None:
        wide = widen(block, scratch)
        rounded = out[: 2 * len(block)].view(_bfloat16())
        np.copyto(rounded, wide, casting="same_kind")
        magnitudes = np.bitwise_and(rounded.view("<u2"), 0x7FFF, out=scratch.array("magnitudes", np.uint16, len(block)))
        if magnitudes.max() >= 0x7F80:  # infinity or NaN
            if not np.isfinite(block).all():
                return None
            clipped = np.clip(wide, -MAX_BFLOAT16, MAX_BFLOAT16, out=scratch.array("wide", np.float32, len(block)))
            np.copyto(rounded, clipped, casting="same_kind")
        return rounded.nbytes

    def decode_block(self, section: Buffer, block: Block, scratch: Scratch) -> None:
        if len(section) != 2 * len(block):
            raise self.broken(f"{len(section)} bytes for {len(block)} numbers")
        np.copyto(block, section.view(_bfloat16()))


@cache
def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ConfigError(
            "expected the package ml_dtypes for 'bfloat16', found none: install it (TensorFlow brings it along), or "
            "take 'float16'"
        ) from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
