"""Codecs that work block by block: the loops over the blocks, and what becomes of the error.

No section is longer than its block, which is what makes decoding in place possible: while block i is written, the
unread sections i+1, i+2, ... end where the buffer ends and are together no longer than the blocks i+1, i+2, ...,
so that they begin no earlier than block i+1 does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.blocks import BLOCK_BYTES
from tensorspark.weights.codecs.base import Codec, Scratch, head_bytes, zero_gaps
from tensorspark.weights.codecs.casts import narrow, widen
from tensorspark.weights.layout import Buffer, WeightLayout

Block = NDArray[Any]


class _Section(NamedTuple):
    dtype: np.dtype[Any]
    block: slice  # of the values
    position: int  # in the encoded bytes
    size: int


class BlockCodec(Codec):
    """Base of the codecs that turn each block of floating numbers into a section; other blocks are sent as they are."""

    @abstractmethod
    def encodes(self, dtype: np.dtype[Any]) -> bool:
        """Whether blocks of this dtype are encoded, as it pays."""

    @abstractmethod
    def encode_block(self, block: Block, out: Buffer, scratch: Scratch) -> int | None:
        """Writes a block's section to the front of `out`, which holds as many bytes as the block.

        Returns:
            The section's bytes, fewer than the block's; None where the block is to be sent as it is, because it holds
            NaN or infinity (which the server must see) or because that is shorter.
        """

    @abstractmethod
    def decode_block(self, section: Buffer, block: Block, scratch: Scratch) -> None:
        """Writes the numbers of a section that is shorter than the block; the two do not overlap.

        Raises:
            ProtocolError: the section is none of such a block.
        """

    def encode(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        return self._encode(layout, values, out, keeps_error=False)

    def encode_keeping_error(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        return self._encode(layout, values, out, keeps_error=True)

    def decode(self, layout: WeightLayout, buffer: Buffer, num_bytes: int) -> None:
        parts = list(_blocks(layout))
        sizes = self.read_head(layout, buffer, num_bytes, len(parts))
        if sizes.sum() != num_bytes - head_bytes(len(parts)):
            raise self.broken(f"sections of {sizes.sum()} bytes in all, of {num_bytes}")
        position = layout.num_bytes - int(sizes.sum())
        scratch = Scratch()
        with np.errstate(all="ignore"):  # signaling NaN and such, from whoever sent them
            for (dtype, block), size in zip(parts, sizes.tolist(), strict=True):
                num_block_bytes = block.stop - block.start
                if size > num_block_bytes or (size < num_block_bytes and not self.encodes(dtype)):
                    raise self.broken(f"a section of {size} bytes for {num_block_bytes} bytes of {dtype}")
                section = scratch.copy("section", buffer[position : position + size])
                position += size
                if size == num_block_bytes:
                    np.copyto(buffer[block], section)
                else:
                    self.decode_block(section, buffer[block].view(dtype), scratch)
        zero_gaps(layout, buffer)

    def _encode(self, layout: WeightLayout, values: Buffer, out: Buffer, *, keeps_error: bool) -> int:
        self.require_buffers(layout, values, out)
        if not any(self.encodes(segment.dtype) for segment in layout.segments):
            return 0
        parts = list(_blocks(layout))
        num_head_bytes = position = head_bytes(len(parts))
        num_saved = 0
        sizes: list[int] = []
        unkept: list[_Section] = []  # sections whose error is not in the values yet
        scratch = Scratch()
        with np.errstate(all="ignore"):
            for dtype, block in parts:
                size = self._write_section(values[block], dtype, out[position : layout.num_bytes], scratch)
                if size is None:
                    return 0
                sizes.append(size)
                num_saved += block.stop - block.start - size
                if keeps_error:
                    unkept.append(_Section(dtype, block, position, size))
                    # Sections are never longer than their blocks: from here on it is certain that it pays, and the
                    # values may change.
                    if num_saved > num_head_bytes:
                        self._keep_errors(unkept, values, out, scratch)
                position += size
        if num_saved <= num_head_bytes:
            return 0
        self.write_head(out, sizes)
        return position

    def _write_section(self, raw: Buffer, dtype: np.dtype[Any], room: Buffer, scratch: Scratch) -> int | None:
        """The section's size; None: there is no room for it."""
        fits = len(raw) <= len(room)
        target = room[: len(raw)] if fits else scratch.array("target", np.uint8, len(raw))
        size = self.encode_block(raw.view(dtype), target, scratch) if self.encodes(dtype) else None
        if size is None:
            size = len(raw)
            target = raw
        if size > len(room):
            return None
        if target is raw or not fits:
            np.copyto(room[:size], target[:size])
        return size

    def _keep_errors(self, sections: list[_Section], values: Buffer, out: Buffer, scratch: Scratch) -> None:
        for section in sections:
            block = values[section.block].view(section.dtype)
            if section.size == block.nbytes:
                values[section.block] = 0
                continue
            decoded = scratch.array("decoded", section.dtype, len(block))
            self.decode_block(out[section.position : section.position + section.size], decoded, scratch)
            if block.dtype.itemsize >= 4:
                np.subtract(block, decoded, out=block)
            else:
                lost = widen(block, scratch).copy()
                lost -= widen(decoded, scratch)
                narrow(lost, block, scratch)
        sections.clear()


def _blocks(layout: WeightLayout) -> Iterator[tuple[np.dtype[Any], slice]]:
    """As `weights.blocks.blocks`, but complex numbers are left complex."""
    for segment in layout.segments:
        for start in range(segment.start, segment.stop, BLOCK_BYTES):
            yield segment.dtype, slice(start, min(start + BLOCK_BYTES, segment.stop))


def is_float(dtype: np.dtype[Any], *names: str) -> bool:
    """Whether numbers are of one of these dtypes, in the machine's byte order."""
    return dtype.name in names and dtype.isnative
