"""Values in bounded memory: what is kept, what is merged, and what who follows them sees."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tensorspark.telemetry.series import Series

Range = tuple[int, int]


def joined(older: Range, newer: Range) -> Range:
    """Merges neighbours alone: a range with a hole is an error of the series."""
    assert older[1] == newer[0]
    return older[0], newer[1]


def series_of(max_length: int, count: int) -> Series[Range]:
    return Series(max_length, joined, ((index, index + 1) for index in range(count)))


def test_as_many_as_fit_are_kept_as_they_came() -> None:
    series = series_of(5, 5)
    assert list(series) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert series.generation == 0


def test_one_more_merges_neighbours_and_begins_a_new_generation() -> None:
    series = series_of(5, 6)
    assert list(series) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert series.generation == 1


def test_an_empty_series_has_no_last_value() -> None:
    assert series_of(4, 0).last() is None
    assert len(series_of(4, 0)) == 0


@given(max_length=st.integers(2, 9), count=st.integers(1, 400))
def test_every_value_is_in_exactly_one_place_in_order_and_the_last_is_the_newest(max_length: int, count: int) -> None:
    series = series_of(max_length, count)
    values = list(series)
    assert values[0][0] == 0
    assert all(older[1] == newer[0] for older, newer in itertools.pairwise(values))
    assert values[-1][1] == count
    assert series.last() == values[-1]
    assert len(series) == len(values) <= max_length


@given(max_length=st.integers(2, 9), count=st.integers(1, 200))
def test_no_more_than_half_is_given_up_at_once(max_length: int, count: int) -> None:
    assert len(series_of(max_length, count)) >= min(count, max_length // 2)


@given(max_length=st.integers(2, 9), counts=st.lists(st.integers(1, 12), max_size=30))
def test_one_who_follows_from_the_last_value_on_has_the_whole_series(max_length: int, counts: list[int]) -> None:
    """Reads from the value that may still have grown; anew where all has been merged."""
    series = series_of(max_length, 0)
    seen: list[Range] = []
    generation, number = 0, 0
    for count in counts:
        for _ in range(count):
            series.append((number, number + 1))
            number += 1
        if series.generation != generation:
            seen, generation = [], series.generation
        first = max(0, len(seen) - 1)
        seen = seen[:first] + series.since(first)
        assert seen == list(series)
