"""How a buffer of weights is split over several servers.

A *shard* is a range of the flat buffer with a layout of its own, so that whoever has the whole buffer has every
shard's, as a view. Ranges are cut where the bytes say, through tensors if need be, unless a combiner wants them whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer, TensorSpec, WeightLayout

# A shard of less is not worth a process.
_MIN_BYTES = 2**12


@dataclass(frozen=True)
class Shard:
    """A range of a buffer.

    Attributes:
        layout: of the range alone. A tensor that is cut is there in pieces, ``name[first:behind]``: by row where the
            cut is between rows, else flat.
    """

    start: int
    stop: int
    layout: WeightLayout

    def of(self, buffer: Buffer) -> Buffer:
        """The range of a whole buffer, a view."""
        return buffer[self.start : self.stop]


def split(layout: WeightLayout, num_shards: int, *, whole_tensors: bool = False) -> tuple[Shard, ...]:
    """Shards of about equal size; fewer than `num_shards` where the weights are too few for as many.

    Args:
        whole_tensors: cuts between tensors only.

    >>> layout = WeightLayout([TensorSpec("W", (2048, 4), "float32"), TensorSpec("b", (4,), "float32")])
    >>> [str(spec) for shard in split(layout, 2) for spec in shard.layout.specs]
    ['W[0:1024] float32[1024, 4]', 'W[1024:2048] float32[1024, 4]', 'b float32[4]']
    >>> len(split(layout, 2, whole_tensors=True))
    2
    """
    num_shards = max(1, min(num_shards, layout.num_bytes // _MIN_BYTES))
    placed = sorted((layout.offsets[spec.name], spec) for spec in layout.specs if spec.num_bytes)
    starts = [start for start, _ in placed[1:]]
    cuts = {0, layout.num_bytes}
    for index in range(1, num_shards):
        target = layout.num_bytes * index // num_shards
        if whole_tensors:
            cuts.update(sorted(starts, key=lambda start: abs(start - target))[:1])
        else:
            cuts.add(_cut_near(target, placed))
    ordered = sorted(cuts) if layout.num_bytes else [0, 0]
    return tuple(
        Shard(start, stop, WeightLayout(_pieces(layout, start, stop))) for start, stop in itertools.pairwise(ordered)
    )


def _cut_near(target: int, placed: Sequence[tuple[int, TensorSpec]]) -> int:
    """An aligned place: between two rows of a tensor, where that is near."""
    offset, spec = max((at, spec) for at, spec in placed if at <= target)
    step = ALIGNMENT_BYTES
    if len(spec.shape) > 1:
        by_row = math.lcm(ALIGNMENT_BYTES, spec.num_bytes // spec.shape[0])
        step = by_row if by_row * 16 <= spec.num_bytes else step
    return offset + (target - offset) // step * step


def _pieces(layout: WeightLayout, start: int, stop: int) -> Iterator[TensorSpec]:
    for spec in sorted(layout.specs, key=lambda spec: layout.offsets[spec.name]):
        offset = layout.offsets[spec.name]
        first, behind = max(start, offset), min(stop, offset + spec.num_bytes)
        if first < behind:
            yield _piece(spec, first - offset, behind - offset)


def _piece(spec: TensorSpec, first: int, behind: int) -> TensorSpec:
    if (first, behind) == (0, spec.num_bytes):
        return spec
    row_bytes = spec.num_bytes // spec.shape[0]
    if first % row_bytes == 0 and behind % row_bytes == 0:
        first, behind, shape = first // row_bytes, behind // row_bytes, spec.shape[1:]
    else:
        itemsize = spec.num_bytes // spec.num_elements
        first, behind, shape = first // itemsize, behind // itemsize, ()
    return TensorSpec(f"{spec.name}[{first}:{behind}]", (behind - first, *shape), spec.dtype)
