"""Columns: what a fed tensor expects of a row, how values are converted without loss, in which order rows come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = tuple[NDArray[Any], ...]
"""One array per fed tensor, `[rows, ...]` each."""

VALIDATION_MARKER = b"tensorspark:validation"
"""The element of a feed between a partition's training rows and its held-out ones."""


@dataclass(frozen=True)
class Column:
    """What one fed tensor expects of a row: `shape` without the batch dimension (None: any size, or any shape)."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else f"shape {shape_text(self.shape)}"
        return f"{self.dtype} of {shape}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, shape, strict=True)
        )


def is_marker(row: Any) -> bool:
    """Whether an element of a feed is `VALIDATION_MARKER`."""
    return isinstance(row, bytes) and row == VALIDATION_MARKER


def permutation(seed: int, epoch: int, partition: int, num_rows: int) -> NDArray[np.int64]:
    """The order of an epoch's rows: `[num_rows] int64`, the same for the same arguments, on every machine."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, partition))))
    return generator.permutation(num_rows)


def is_convertible(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether numbers of one dtype may become another's at all; `convert` looks at the numbers themselves."""
    both_integers = source.kind in "iu" and target.kind in "iu"
    return both_integers or np.can_cast(source, target, "same_kind")


def convert(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """`array` as a column of `dtype` holds it: itself where that is its dtype, otherwise a copy.

    Floats may lose digits; nothing else may change.

    Raises:
        TypeError: the dtypes do not go together; in a column of dtype object, something that is not a string.
        ValueError: a number that `dtype` cannot hold.
    """
    target = np.dtype(dtype)
    if target.kind == "O":
        return _as_strings(array)
    if not is_convertible(array.dtype, target):
        raise TypeError(f"got {array.dtype}, which does not convert to {dtype} without loss")
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(target, copy=False)
    if array.dtype.kind in "iu" and target.kind in "iu" and not np.can_cast(array.dtype, target) and array.size:
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"got a number out of {dtype}'s range [{limits.min}, {limits.max}]")
    # Of floats, float16 alone has integers out of its range.
    if target == np.float16 or (array.dtype.kind == "f" and target.itemsize < array.itemsize):
        is_finite = np.isfinite(converted)
        if not is_finite.all() and not (is_finite == np.isfinite(array)).all():
            raise ValueError(f"got a number that is too large for {dtype}")
    return converted


def shape_text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def num_bytes(columns: Columns) -> int:
    """Memory that the rows take, strings included."""
    return sum(column.nbytes + (_string_bytes(column) if column.dtype.kind == "O" else 0) for column in columns)


def _string_bytes(column: NDArray[Any]) -> int:
    return sum(value.__sizeof__() for value in column.flat)


def _as_strings(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind in "SU":
        return array.astype(object)
    for value in array.flat:
        if not isinstance(value, str | bytes):
            raise TypeError(f"got a {type(value).__name__}, not a string")
    return array
