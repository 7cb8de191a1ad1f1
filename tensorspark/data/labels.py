"""Labels that a loss takes, looked at while rows come in their own order: later nobody knows which one is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.data.decoders import Decoder, Place
from tensorspark.errors import FeedError


@dataclass(frozen=True)
class Labels:
    """A column of class numbers, of which TensorFlow says at most that a loss is NaN.

    Attributes:
        column: its position.
        num_classes: None for probabilities, from 0 to 1.
        ignored: a number that stands for no class.
    """

    column: int
    num_classes: int | None
    ignored: int | None = None

    def require(self, column: Column, values: NDArray[Any], place: Place) -> None:
        """Raises `FeedError` for the first of the rows, which begin at `place`, whose label is none."""
        highest = 1 if self.num_classes is None else self.num_classes - 1
        is_good = (values >= 0) & (values <= highest)
        if self.num_classes is not None and values.dtype.kind == "f":
            is_good &= values == np.floor(values)
        if self.ignored is not None:
            is_good |= values == self.ignored
        if not is_good.all():
            first = tuple(np.argwhere(~is_good)[0])
            raise FeedError(
                f"{place.row(int(first[0]))}: label {column.name} is {values[first]}, but {self._expected(highest)}"
            )

    def _expected(self, highest: int) -> str:
        if self.num_classes is None:
            return "the loss takes 0, 1 and what is between: number the two classes 0 and 1, or choose another loss"
        return (
            f"the model's output has {self.num_classes} classes: expected a whole number from 0 to {highest}; number "
            f"the labels from 0, or give the last layer more units"
        )


@dataclass(frozen=True)
class CheckedDecoder:
    """A decoder whose labels are looked at.

    Raises:
        FeedError: (while iterating) a label that the loss does not take; says which.
    """

    decoder: Decoder
    labels: tuple[Labels, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.decoder.columns

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        place = Place(partition)
        for block in self.decoder.blocks(rows, partition):
            if block is None:
                place.pass_marker()
            else:
                for labels in self.labels:
                    labels.require(self.columns[labels.column], block[labels.column], place)
                place.num_rows += len(block[0])
            yield block
