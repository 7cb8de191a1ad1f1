"""Which parts of the weights changed since a version, and *patches*, which hold nothing but those parts.

The parts (*units*) are blocks of 4 KiB or, where asked for, the rows of tensors that are looked up by row: embeddings.
A patch is, all numbers little-endian::

    u32 for each group of equal units   how many of them changed
    u32 for each of those               its index in its group; ascending
    the units' bytes, in the same order

Patches pay where most weights stay as they are: rows that no batch has looked up, layers that are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import ProtocolError
from tensorspark.weights.layout import Buffer, WeightLayout

_BLOCK_BYTES = 2**12
_WORD_BYTES = 8
# One unit in so many is looked at first: where most of those have changed, so have the others.
_SAMPLED_EVERY = 32
_COMPARED_BYTES = 2**18  # at once, so that what is compared stays in a core's cache
_SCATTERED_BYTES = 2**18  # of a patch's units, received at once
_INDEX = np.dtype("<u4")


@dataclass(frozen=True)
class _Group:
    """Equal units, one behind the other."""

    start: int
    num_units: int
    unit_bytes: int

    def of(self, buffer: Buffer) -> NDArray[np.uint8]:
        """`[num_units, unit_bytes] uint8`, a view."""
        return buffer[self.start : self.start + self.num_units * self.unit_bytes].reshape(self.num_units, -1)

    def differ(self, old: Buffer, new: Buffer, every: int = 1) -> NDArray[np.bool_]:
        """Which of the group's units differ, every so many of them: `[num_units / every, rounded up] bool`."""
        word = np.uint64 if self.unit_bytes % _WORD_BYTES == 0 and self.start % _WORD_BYTES == 0 else np.uint8
        ours, theirs = self.of(old)[::every].view(word), self.of(new)[::every].view(word)
        step = max(1, _COMPARED_BYTES // self.unit_bytes)
        differing = np.empty(len(ours), np.bool_)
        for start in range(0, len(ours), step):
            part = slice(start, start + step)
            np.any(ours[part] != theirs[part], axis=1, out=differing[part])
        return differing


class Units:
    """The parts of a layout's buffers that are told apart.

    Args:
        by_row: tables (`TensorSpec.is_table`) by row; all else by blocks of 4 KiB.

    >>> from tensorspark.weights.layout import TensorSpec
    >>> layout = WeightLayout([TensorSpec("embedding", (1000, 4), "float32"), TensorSpec("b", (4,), "float32")])
    >>> Units(layout, by_row=True).num_units, Units(layout, by_row=False).num_units
    (1001, 4)
    """

    def __init__(self, layout: WeightLayout, *, by_row: bool) -> None:
        self._groups = tuple(_groups(layout, by_row))
        self.num_units = sum(group.num_units for group in self._groups)

    def changed(self, old: Buffer, new: Buffer) -> NDArray[np.bool_] | None:
        """Which units differ, `[num_units] bool`; None where a sample shows that most do."""
        sample = np.concatenate([group.differ(old, new, _SAMPLED_EVERY) for group in self._groups])
        if 2 * np.count_nonzero(sample) > len(sample):
            return None
        return np.concatenate([group.differ(old, new) for group in self._groups])

    def patch_bytes(self, chosen: NDArray[np.bool_]) -> int:
        """How long a patch of the chosen units (`[num_units] bool`) is."""
        counts = [np.count_nonzero(part) for part in self._split(chosen)]
        sizes = [
            count * (_INDEX.itemsize + group.unit_bytes) for count, group in zip(counts, self._groups, strict=True)
        ]
        return _INDEX.itemsize * len(self._groups) + int(sum(sizes))

    def write(self, buffer: Buffer, chosen: NDArray[np.bool_]) -> Buffer:
        """A patch of the chosen units (`[num_units] bool`)."""
        indices = [np.flatnonzero(part).astype(_INDEX) for part in self._split(chosen)]
        sizes = [len(index) * group.unit_bytes for index, group in zip(indices, self._groups, strict=True)]
        patch = np.empty(self.patch_bytes(chosen), np.uint8)
        head = np.concatenate([np.array([len(index) for index in indices], _INDEX), *indices]).view(np.uint8)
        patch[: len(head)] = head
        at = len(head)
        for index, size, group in zip(indices, sizes, self._groups, strict=True):
            np.take(group.of(buffer), index, axis=0, out=patch[at : at + size].reshape(len(index), group.unit_bytes))
            at += size
        return patch

    def receive(self, fill: Callable[[Buffer], None], num_bytes: int, buffer: Buffer) -> None:
        """Writes a patch of so many bytes over the units of `buffer` as it comes, so that it is nowhere whole.

        Args:
            fill: fills what it is given with the patch's next bytes; what it raises leaves `buffer` torn.

        Raises:
            ProtocolError: it is no patch of this layout; `buffer` is as it was.
        """
        indices = self._receive_indices(fill, num_bytes)
        scratch = np.empty(min(num_bytes, _SCATTERED_BYTES), np.uint8)
        for group, index in zip(self._groups, indices, strict=True):
            units = group.of(buffer)
            step = max(1, _SCATTERED_BYTES // group.unit_bytes)
            for start in range(0, len(index), step):
                some = index[start : start + step]
                part_bytes = len(some) * group.unit_bytes
                part = scratch[:part_bytes] if part_bytes <= len(scratch) else np.empty(part_bytes, np.uint8)
                fill(part)
                units[some] = part.reshape(len(some), group.unit_bytes)

    def _receive_indices(self, fill: Callable[[Buffer], None], num_bytes: int) -> list[NDArray[np.uint32]]:
        """Of each group's units in a patch; with the sum of their sizes, all that can be wrong with one."""
        head = np.empty(_INDEX.itemsize * len(self._groups), np.uint8)
        if num_bytes < len(head):
            raise ProtocolError(f"expected a patch of at least {len(head)} bytes, got {num_bytes}")
        fill(head)
        counts = head.view(_INDEX).tolist()
        expected = sum(n * (_INDEX.itemsize + g.unit_bytes) for n, g in zip(counts, self._groups, strict=True))
        if num_bytes != len(head) + expected:
            raise ProtocolError(f"expected a patch of {len(head) + expected} bytes, got {num_bytes}")
        indices = []
        for count, group in zip(counts, self._groups, strict=True):
            index = np.empty(count, _INDEX)
            fill(index.view(np.uint8))
            if count and not (index[-1] < group.num_units and np.all(index[1:] > index[:-1])):
                raise ProtocolError(f"expected ascending indices under {group.num_units} in a patch, got others")
            indices.append(index)
        return indices

    def _split(self, chosen: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        return np.split(chosen, np.cumsum([group.num_units for group in self._groups])[:-1])


def _groups(layout: WeightLayout, by_row: bool) -> Iterator[_Group]:
    """Groups that cover a buffer."""
    at = 0
    tables = [spec for spec in layout.specs if spec.is_table] if by_row else []
    for spec in sorted(tables, key=lambda spec: layout.offsets[spec.name]):
        yield from _block_groups(at, layout.offsets[spec.name])
        yield _Group(layout.offsets[spec.name], spec.shape[0], spec.num_bytes // spec.shape[0])
        at = layout.offsets[spec.name] + spec.num_bytes
    yield from _block_groups(at, layout.num_bytes)


def _block_groups(start: int, stop: int) -> Iterator[_Group]:
    num_blocks, rest = divmod(stop - start, _BLOCK_BYTES)
    if num_blocks:
        yield _Group(start, num_blocks, _BLOCK_BYTES)
    if rest:
        yield _Group(stop - rest, 1, rest)
