"""What the server gathers: spans, points, staleness, lines; bounded, and with nothing counted twice."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.telemetry.clocks import ClockBounds
from tensorspark.telemetry.collector import MAX_STALENESS, Collector, Timeline
from tensorspark.telemetry.notes import Line, Note, Timing
from tensorspark.telemetry.records import Activity, LogLine, Span, TrainingPoint, WorkerEvent

BEGAN_AT = 1000.0


def collector(num_partitions: int = 3, *, keeps_spans: bool = True) -> Collector:
    return Collector(BEGAN_AT, num_partitions, keeps_spans=keeps_spans)


# Time


def test_spans_are_told_once_in_seconds_since_the_run_began() -> None:
    gathered = collector()
    gathered.spent(2, Activity.COMPUTE, 1001.5, 1002.0)
    gathered.spent(0, Activity.WAIT, 1001.0, 1004.0)
    assert gathered.take_spans() == (Span(1.0, 0, "wait", 3.0), Span(1.5, 2, "compute", 0.5))
    assert gathered.take_spans() == ()
    assert gathered.busy_s(2) == {"compute": 0.5}


def test_time_is_added_up_where_nobody_asks_for_spans() -> None:
    gathered = collector(keeps_spans=False)
    gathered.spent(1, Activity.PUSH, 1001.0, 1001.25)
    gathered.spent(1, Activity.PUSH, 1002.0, 1002.5)
    gathered.timed("merge", 1002.0, 1002.5)
    assert gathered.busy_s(1) == {"push": 0.75}
    assert gathered.take_spans() == gathered.take_traced() == ()


def test_spans_over_the_limit_become_one_a_kind_that_is_as_long_as_all_of_them() -> None:
    gathered = collector(1000)  # four for each partition
    for index in range(20):
        gathered.spent(7, Activity.COMPUTE, 1000.0 + index, 1000.75 + index)
        gathered.spent(7, Activity.PULL, 1000.75 + index, 1001.0 + index)
    spans = gathered.take_spans()
    assert spans[:4] == (
        *(Span(0.0, 7, "compute", 0.75), Span(0.75, 7, "pull", 0.25)),
        *(Span(1.0, 7, "compute", 0.75), Span(1.75, 7, "pull", 0.25)),
    )
    assert spans[4:] == (Span(2.0, 7, "compute", 13.5, is_sum=True), Span(15.5, 7, "pull", 4.5, is_sum=True))
    assert gathered.take_spans() == ()


def test_a_run_of_many_partitions_keeps_no_more_spans_than_one_of_few() -> None:
    few, many = collector(2), collector(1000)
    for index in range(100):
        for partition in range(2):
            few.spent(partition, Activity.COMPUTE, 1000.0 + index, 1000.5 + index)
        for partition in range(1000):
            many.spent(partition, Activity.COMPUTE, 1000.0 + index, 1000.5 + index)
    assert len(few.take_spans()) == 2 * 61
    assert len(many.take_spans()) == 1000 * 5


steps = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["compute", "pull", "push", "wait", "evaluate", "settle", "late", "take"]),
        st.integers(0, 1000),
    ),
    max_size=150,
)


@given(steps, st.integers(4, 2000))
def test_busy_seconds_are_the_sum_of_spans_whatever_the_order_of_events(
    steps: list[tuple[int, str, int]], num_partitions: int
) -> None:
    gathered = collector(num_partitions)
    timelines = [Timeline(gathered) for _ in range(4)]
    now = BEGAN_AT + 0.5
    for partition, timeline in enumerate(timelines):
        timeline.begin(partition, "here", 1, now)
    spans: list[Span] = []
    for partition, what, milliseconds in steps:
        now += milliseconds / 1000
        if what == "settle":
            for timeline in timelines:
                timeline.settle(now)
        elif what == "late":  # as the observer does for a push that began to arrive a while ago
            timelines[partition].switch(Activity.PUSH, max(now - 0.25, timelines[partition].since))
            timelines[partition].switch(Activity.WAIT, now)
        elif what == "take":
            spans += gathered.take_spans()
        else:
            timelines[partition].switch(Activity(what), now)
    for timeline in timelines:
        timeline.switch(None, now)
    spans += gathered.take_spans()

    sums: dict[int, Counter[str]] = defaultdict(Counter)
    for span in spans:
        sums[span.partition][span.activity] += span.duration_s  # type: ignore[assignment]
    for partition in range(4):
        busy = gathered.busy_s(partition)
        assert sum(busy.values()) == pytest.approx(now - BEGAN_AT - 0.5, abs=1e-9)
        assert {name: s for name, s in busy.items() if s > 0} == pytest.approx(dict(sums[partition]), abs=1e-9)
        own = sorted((span for span in spans if span.partition == partition), key=lambda span: span.seconds)
        for earlier, later in itertools.pairwise(own):
            assert earlier.seconds + earlier.duration_s <= later.seconds + 1e-9


def test_a_worker_that_is_gone_is_at_nothing() -> None:
    gathered = collector()
    timeline = Timeline(gathered)
    timeline.switch(Activity.COMPUTE, 1001.0)  # before it has registered
    assert timeline.activity is None
    timeline.begin(1, "here", 4, 1001.0)
    timeline.switch(None, 1003.0)
    timeline.switch(Activity.COMPUTE, 1004.0)
    timeline.settle(1009.0)
    assert gathered.busy_s(1) == {"standby": 2.0}


# Points


def test_pushes_within_a_twentieth_of_a_second_are_one_point_with_their_mean_by_rows() -> None:
    gathered = collector()
    gathered.folded(1001.0, 10, 40, 30, {"loss": 60.0}, 0)
    gathered.folded(1001.04, 12, 50, 10, {"loss": 10.0, "other": 5.0}, 3)
    gathered.folded(1001.06, 13, 60, 10, {"loss": 20.0}, 3)
    first, second = gathered.take_points()
    assert first == TrainingPoint(pytest.approx(1.04), 12, 50, {"loss": 70 / 40, "other": 5 / 40})
    assert second == TrainingPoint(pytest.approx(1.06), 13, 60, {"loss": 2.0})
    assert gathered.take_points() == ()


def test_a_loss_that_is_not_finite_is_none_and_a_push_without_rows_has_no_means() -> None:
    gathered = collector()
    gathered.folded(1001.0, 1, 5, 5, {"loss": math.nan, "norm": math.inf, "error": 10.0}, 0)
    gathered.folded(1002.0, 1, 5, 0, {"loss": 3.0}, 0)
    first, second = gathered.take_points()
    assert first.scalars == {"loss": None, "norm": None, "error": 2.0}
    assert second.scalars == {}


def test_points_that_nobody_takes_grow_no_further_and_the_last_holds_the_newest() -> None:
    gathered = collector()
    for index in range(5000):
        gathered.folded(1001.0 + index, index, 10 * index, 10, {"loss": 10.0 * index}, 0)
    points = gathered.take_points()
    assert len(points) == 2000
    assert points[-1].num_steps == 4999
    assert points[-1].scalars["loss"] == pytest.approx(sum(range(1999, 5000)) / 3001)


def test_staleness_is_counted_by_version_and_what_is_staler_than_all_shares_a_bin() -> None:
    gathered = collector()
    for staleness in (0, 0, 3, MAX_STALENESS - 1, MAX_STALENESS, 10**9, -2):
        gathered.folded(1001.0, 1, 1, 1, {}, staleness)
    assert len(gathered.staleness) == MAX_STALENESS + 1
    assert {bin: count for bin, count in enumerate(gathered.staleness) if count} == {0: 3, 3: 1, 63: 1, 64: 2}


# What workers say


def test_lines_have_the_servers_time_and_timings_the_workers_own_on_the_servers_clock() -> None:
    gathered, clock = collector(), ClockBounds()
    clock.arrived(sent=50.0, received=1051.0)
    clock.departed(1000.0)  # so that the clocks are 1000.5 apart
    note = Note(
        52.0,
        (Line(logging.ERROR, "fsspec", "no answer"),),
        (Timing("train", 50.25, 0.5), Timing("encode", 50.75, 0.125)),
    )
    gathered.noted(1060.0, 2, "node-7", note, clock)
    assert gathered.take_logs() == (LogLine(60.0, 2, "node-7", logging.ERROR, "fsspec", "no answer"),)
    assert gathered.take_traced() == (Span(50.75, 2, "train", 0.5), Span(51.25, 2, "encode", 0.125))
    assert gathered.take_logs() == gathered.take_traced() == ()


def test_the_servers_own_times_are_those_of_no_partition() -> None:
    gathered, untraced = Collector(1000.0, 4, traces=True), collector()
    for each in (gathered, untraced):
        each.timed("merge", 1003.0, 1003.5)
    assert gathered.take_traced() == (Span(3.0, -1, "merge", 0.5),)
    assert untraced.take_traced() == ()


def test_events_are_told_once_and_make_their_partition_one_of_whom_something_changed() -> None:
    gathered = collector()
    gathered.event(1004.0, 2, "lost", "node-7", 3)
    gathered.event(1005.0, 0, "granted", "node-1", 9, "why")
    assert gathered.take_dirty() == {0, 2}
    assert gathered.take_dirty() == set()
    assert gathered.take_events() == (
        WorkerEvent(4.0, 2, "lost", "node-7", 3),
        WorkerEvent(5.0, 0, "granted", "node-1", 9, "why"),
    )
    assert gathered.take_events() == ()


def test_what_nobody_takes_is_bounded() -> None:
    gathered, clock = collector(), ClockBounds()
    note = Note(0.0, (Line(logging.WARNING, "a", "b"),) * 10, (Timing("train", 0.0, 1.0),) * 500)
    for index in range(500):
        gathered.event(1000.0 + index, 0, "lost", "here", index)
        gathered.noted(1000.0 + index, 0, "here", note, clock)
    for _ in range(2000):
        gathered.event(1600.0, 0, "lost", "here", 1)
    assert len(gathered.take_events()) == 2000
    logs = gathered.take_logs()
    assert len(logs) == 501
    assert logs[-1].message == "4500 more lines of all workers were dropped"
    assert gathered.take_logs() == ()
    assert 100_000 <= len(gathered.take_traced()) < 100_500
