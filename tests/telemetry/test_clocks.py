"""The offset of two clocks, from messages both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.telemetry.clocks import ClockBounds

times = st.floats(-1e6, 1e6)
delays = st.floats(1e-6, 10.0)


def test_without_a_message_clocks_are_taken_to_agree() -> None:
    assert ClockBounds().offset == 0.0


def test_messages_one_way_alone_bound_the_offset_from_their_side() -> None:
    arriving, departing = ClockBounds(), ClockBounds()
    arriving.arrived(sent=5.0, received=105.5)
    arriving.arrived(sent=6.0, received=106.25)  # the quicker one
    departing.departed(99.5)
    departing.departed(99.75)
    assert arriving.offset == 100.25
    assert departing.offset == 99.75


def test_one_slow_message_does_not_spoil_what_a_quick_one_told() -> None:
    bounds = ClockBounds()
    bounds.arrived(sent=0.0, received=50.25)
    bounds.departed(49.75)
    bounds.arrived(sent=10.0, received=90.0)
    bounds.departed(10.0)
    assert bounds.offset == 50.0


def test_clocks_that_run_at_another_pace_leave_the_newest_of_the_arrivals() -> None:
    bounds = ClockBounds()
    bounds.arrived(sent=1.0, received=4.0)
    bounds.departed(3.5)
    assert bounds.offset == 3.0


@given(
    offset=times,
    there=st.lists(st.tuples(times, delays), min_size=1),
    back=st.lists(st.tuples(times, delays), min_size=1),
)
def test_the_offset_is_within_half_the_quickest_round_trip(
    offset: float, there: list[tuple[float, float]], back: list[tuple[float, float]]
) -> None:
    bounds = ClockBounds()
    for left_at, delay in there:  # ours is theirs plus the offset
        bounds.arrived(sent=left_at - offset, received=left_at + delay)
    for left_at, delay in back:
        bounds.departed(left_at - (left_at + delay - offset))
    quickest = min(delay for _, delay in there) + min(delay for _, delay in back)
    assert bounds.offset == pytest.approx(offset, abs=quickest / 2 + 1e-6)
