"""A run's course in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Series(Generic[_T]):
    """Values in the order in which they came, at most `max_length`: when there are more, neighbours are merged, and
    from then on as many that follow each other become one.

    Args:
        merge: one value of two neighbours, the older one first.

    Attributes:
        generation: how often all that was there has been merged: who follows the series reads it anew then.

    >>> series = Series(4, lambda older, newer: newer, range(6))
    >>> list(series), series.generation
    ([1, 3, 5], 1)
    """

    def __init__(self, max_length: int, merge: Callable[[_T, _T], _T], values: Iterable[_T] = ()) -> None:
        self._max_length = max_length
        self._merge = merge
        self._values: list[_T] = []
        self._stride = 1
        self._num_in_last = 1
        self.generation = 0
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._values)

    def append(self, value: _T) -> None:
        if self._values and self._num_in_last < self._stride:
            self._values[-1] = self._merge(self._values[-1], value)
            self._num_in_last += 1
            return
        if len(self._values) >= self._max_length:
            self._halve()
        self._values.append(value)
        self._num_in_last = 1

    def since(self, index: int) -> list[_T]:
        """The values from `index` on; the last one may still grow while neighbours are being merged."""
        return self._values[index:]

    def last(self) -> _T | None:
        return self._values[-1] if self._values else None

    def _halve(self) -> None:
        pairs = zip(self._values[::2], self._values[1::2], strict=False)
        merged = [self._merge(older, newer) for older, newer in pairs]
        self._values = merged + self._values[2 * len(merged) :]
        self._stride *= 2
        self.generation += 1
