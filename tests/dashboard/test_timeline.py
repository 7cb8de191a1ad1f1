"""Which partitions are shown, for whom a wait was, and how many spans become few."""

from __future__ import annotations

import pytest

from tensorspark.dashboard.timeline import Blame, most_telling, thinned, who_waits
from tensorspark.telemetry.records import Span
from tests.dashboard.test_frame import worker


def test_few_partitions_are_all_shown_in_order() -> None:
    assert most_telling({3: worker(3), 1: worker(1)}, 2) == [1, 3]


def test_of_many_the_lost_come_first_then_waiters_and_the_slow() -> None:
    workers = {i: worker(i, busy_s={"wait": 1.0}) for i in range(10)}
    workers[2] = worker(2, state="lost", busy_s={})
    workers[5] = worker(5, busy_s={"wait": 60.0})
    workers[8] = worker(8, lag=4, busy_s={})
    workers[9] = worker(9, state="finished", busy_s={}, progress=0.0)
    assert most_telling(workers, 3) == [2, 5, 8]


def test_those_who_wait_wait_for_the_ones_furthest_behind() -> None:
    workers = [
        worker(0, state="waiting"),
        worker(1, state="waiting"),
        worker(2, state="live", lag=1),
        worker(3, state="lost", lag=2),
        worker(4, state="finished", lag=9),
        worker(5, state="pending", lag=9),
    ]
    assert who_waits(workers) == ([0, 1], [3])
    assert who_waits(workers[:3]) == ([0, 1], [2])
    assert who_waits(workers[2:]) == ([], [])


def test_a_wait_was_for_the_one_who_came_last_before_its_end() -> None:
    blame = Blame()
    # Three come at 1.1, 2.1 and 3.1; the server merges until 3.15.
    blame.learn(
        [
            Span(0.0, 0, "compute", 1.0),
            Span(1.0, 0, "push", 0.1),
            Span(0.0, 1, "compute", 2.0),
            Span(2.0, 1, "push", 0.1),
            Span(0.0, 2, "compute", 3.0),
            Span(3.0, 2, "push", 0.1),
        ]
    )
    assert blame.of(Span(1.1, 0, "wait", 2.05)) == 2
    assert blame.of(Span(2.1, 1, "wait", 1.05)) == 2
    assert blame.of(Span(3.1, 2, "wait", 0.05)) == -1, "it waited for the server only"
    assert blame.of(Span(1.1, 0, "compute", 2.05)) == -1, "no wait"
    assert blame.of(Span(1.1, 0, "wait", 2.05, is_sum=True)) == -1, "many waits, for whomever"


def test_a_wait_that_nobody_ended_was_for_nobody() -> None:
    blame = Blame()
    blame.learn([Span(0.0, 1, "compute", 2.0)])
    assert blame.of(Span(1.0, 0, "wait", 60.0)) == -1
    assert Blame().of(Span(1.0, 0, "wait", 1.0)) == -1


def test_what_is_old_is_forgotten() -> None:
    blame = Blame()
    blame.learn([Span(0.0, 1, "compute", 2.0), Span(0.0, 1, "compute", 500.0)])
    blame.forget()
    assert blame.of(Span(1.0, 0, "wait", 1.0)) == -1


def test_few_spans_stay_as_they_are() -> None:
    spans = [Span(1.0, 0, "compute", 0.5), Span(1.5, 1, "push", 0.5)]
    assert thinned(spans, {0}, 10) == spans[:1]


def test_many_spans_become_sums_of_the_same_length_that_do_not_overlap() -> None:
    spans = [
        Span(10 + i * 0.01 + part, partition, activity, duration_s)
        for i in range(1000)
        for partition in range(3)
        for part, activity, duration_s in ((0.0, "compute", 0.006), (0.006, "wait", 0.003))
    ]
    spans.append(Span(20.0, 1, "evaluate", 5.0))
    few = thinned(spans, {0, 1, 2}, 300)
    assert len(few) <= 310
    assert Span(20.0, 1, "evaluate", 5.0) in few, "what is long enough to be seen stays"
    for partition in range(3):
        own = sorted((span for span in few if span.partition == partition), key=lambda span: span.seconds)
        for activity, total in (("compute", 6.0), ("wait", 3.0)):
            assert sum(span.duration_s for span in own if span.activity == activity) == pytest.approx(total)
        ends = [span.seconds + span.duration_s for span in own]
        assert all(later.seconds > end - 1e-6 for end, later in zip(ends, own[1:], strict=False))
