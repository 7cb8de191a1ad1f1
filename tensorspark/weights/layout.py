"""How a model's tensors lie in one contiguous buffer.

A `WeightLayout` gives every tensor an offset in a flat buffer of bytes; tensors of one dtype lie next to each other
(a *segment*), so that arithmetic over all weights is one numpy call per dtype. Offsets are multiples of 64 bytes. The
gaps between tensors are zero in every buffer that `allocate` makes, and arithmetic keeps them so.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import LayoutMismatchError

ALIGNMENT_BYTES = 64
_MIN_TABLE_ROWS = 64
_MAX_TABLE_ROWS = 2**32 - 2  # indices are of 32 bits
_MAX_ROW_BYTES = 2**18

Buffer = NDArray[np.uint8]
"""All weights of a model: `[layout.num_bytes] uint8`, 64-byte aligned."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, shape and numpy dtype name (``"float32"``; ``"bfloat16"`` where ml_dtypes is installed)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * np.dtype(self.dtype).itemsize

    @property
    def is_table(self) -> bool:
        """Whether it may be looked up by row, as an embedding is: two dimensions or more, 64 rows or more, of at
        most 256 KiB."""
        if len(self.shape) < 2 or not _MIN_TABLE_ROWS <= self.shape[0] <= _MAX_TABLE_ROWS:
            return False
        return 0 < self.num_bytes // self.shape[0] <= _MAX_ROW_BYTES

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Segment:
    """Neighbouring tensors of one dtype: `buffer[start:stop].view(dtype)` holds them and the gaps between them."""

    dtype: np.dtype[Any]
    start: int
    stop: int

    def of(self, buffer: Buffer) -> NDArray[Any]:
        """A flat view of this segment in `buffer`."""
        return buffer[self.start : self.stop].view(self.dtype)


class WeightLayout:
    """Names, shapes, dtypes and offsets of a model's tensors.

    Tensors are laid out by dtype and, within one, in the order given; `specs` keeps the order given. Immutable and
    safe to share between threads.

    >>> layout = WeightLayout([TensorSpec("W", (2, 3), "float32"), TensorSpec("b", (3,), "float32")])
    >>> buffer = layout.pack({"W": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)})
    >>> layout.views(buffer)["W"].sum().item(), layout.num_bytes
    (6.0, 128)

    Raises:
        ValueError: no tensors, a name that stands twice, or a dtype that has no arithmetic (strings).
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self.specs = tuple(specs)
        if not self.specs:
            raise ValueError("a layout needs at least one tensor")
        repeated = [name for name, count in Counter(spec.name for spec in self.specs).items() if count > 1]
        if repeated:
            raise ValueError(f"tensor {repeated[0]!r} stands twice in the layout")
        self.offsets, self.segments, self.num_bytes = _place(self.specs)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of names, shapes, dtypes and offsets: equal on both sides of a connection, or no training."""
        described = [(s.name, s.shape, s.dtype, self.offsets[s.name]) for s in self.specs]
        packed: bytes = msgpack.packb(described)
        return hashlib.sha256(packed).hexdigest()[:32]

    def allocate(self) -> Buffer:
        """A zeroed, 64-byte-aligned buffer."""
        raw = np.zeros(self.num_bytes + ALIGNMENT_BYTES, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        return raw[start : start + self.num_bytes]

    def views(self, buffer: Buffer) -> dict[str, NDArray[Any]]:
        """The tensors as views of `buffer`, by name: who writes to a view writes to the buffer."""
        return {spec.name: self._view(buffer, spec) for spec in self.specs}

    def _view(self, buffer: Buffer, spec: TensorSpec) -> NDArray[Any]:
        start = self.offsets[spec.name]
        return buffer[start : start + spec.num_bytes].view(np.dtype(spec.dtype)).reshape(spec.shape)

    def pack(self, tensors: Mapping[str, NDArray[Any]]) -> Buffer:
        """A new buffer with the tensors' values; names that the layout does not hold are ignored.

        Raises:
            ValueError: a tensor that is missing or has another shape or dtype.
        """
        buffer = self.allocate()
        views = self.views(buffer)
        for spec in self.specs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise ValueError(f"expected a value for {spec}, got none")
            if tensor.shape != spec.shape or tensor.dtype != np.dtype(spec.dtype):
                raise ValueError(f"expected {spec}, got {tensor.dtype}{list(tensor.shape)}")
            views[spec.name][...] = tensor
        return buffer

    def find_non_finite(self, buffer: Buffer) -> str | None:
        """Name of the first tensor that holds NaN or infinity, else None."""
        for spec in self.specs:
            view = self._view(buffer, spec)
            if _can_be_non_finite(view.dtype) and not np.isfinite(view).all():
                return spec.name
        return None

    def difference(self, other: WeightLayout) -> str:
        """Says which tensors differ from `other`'s, as expected and got; empty if none do.

        >>> ours = WeightLayout([TensorSpec("W", (2,), "float32"), TensorSpec("b", (2,), "float32")])
        >>> ours.difference(WeightLayout([TensorSpec("W", (3,), "float32")]))
        'expected W float32[2], got W float32[3]; expected b float32[2], got none'
        """
        mine = {spec.name: spec for spec in self.specs}
        theirs = {spec.name: spec for spec in other.specs}
        names = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
        if not names and self.fingerprint != other.fingerprint:
            return f"expected the order {', '.join(mine)}, got {', '.join(theirs)}"
        return "; ".join(f"expected {mine.get(name, 'none')}, got {theirs.get(name, 'none')}" for name in names)

    def split(self, num_first: int) -> tuple[WeightLayout, WeightLayout]:
        """Layouts of the first tensors and of the others: a buffer of this one is theirs, one after the other.

        Raises:
            ValueError: the tensors are of several dtypes, by which they lie together, in both parts.
        """
        first, others = WeightLayout(self.specs[:num_first]), WeightLayout(self.specs[num_first:])
        moved = [s.name for s in others.specs if self.offsets[s.name] != first.num_bytes + others.offsets[s.name]]
        if moved:
            raise ValueError(f"expected tensors of one dtype in either part, but {', '.join(moved)} lie elsewhere")
        return first, others

    def require_same(self, fingerprint: str) -> None:
        """Raises `LayoutMismatchError` where another side's fingerprint differs."""
        if fingerprint != self.fingerprint:
            tensors = ", ".join(str(spec) for spec in self.specs[:20])
            raise LayoutMismatchError(
                f"the worker's variables are not the server's: expected fingerprint {self.fingerprint}, got "
                f"{fingerprint}; the server holds {tensors}"
            )


def _can_be_non_finite(dtype: np.dtype[Any]) -> bool:
    # ml_dtypes' bfloat16 and float8 have numpy kind 'V', yet know isfinite.
    return dtype.kind in "fcV"


def _place(specs: Sequence[TensorSpec]) -> tuple[dict[str, int], tuple[Segment, ...], int]:
    offsets: dict[str, int] = {}
    segments: list[Segment] = []
    offset = 0
    dtypes = list(dict.fromkeys(spec.dtype for spec in specs))
    ordered = sorted(specs, key=lambda spec: dtypes.index(spec.dtype))
    for name, members in groupby(ordered, key=lambda spec: spec.dtype):
        dtype = _numeric_dtype(name)
        start = offset
        for spec in members:
            offsets[spec.name] = offset
            offset += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        segments.append(Segment(dtype, start, offset))
    return offsets, tuple(segments), offset


def _numeric_dtype(name: str) -> np.dtype[Any]:
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with numpy
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise ValueError(f"unknown dtype {name!r}") from error
    is_number = dtype.kind in "iufc" or (dtype.kind == "V" and dtype.type is not np.void)
    if not is_number or dtype.itemsize == 0:
        raise ValueError(f"expected a number type, got {name!r}: only numbers can be synchronized")
    return dtype
