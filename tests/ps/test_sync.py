"""The gate: who counts, and who may begin a round."""

from __future__ import annotations

import logging

import pytest

from tensorspark.ps.sync import Gate, SyncPlan


def gate(staleness: int | None, num_partitions: int, *, joined: int | None = None, num_first: int = 1) -> Gate:
    """A gate at which the first `joined` partitions (all of them, without) have workers since second 0."""
    opened = Gate(SyncPlan(staleness, num_first, 10.0, 20.0), [0] * num_partitions)
    for partition in range(num_partitions if joined is None else joined):
        opened.join(partition, 0.0)
    return opened


def advance(opened: Gate, partition: int, num_rounds: int) -> None:
    for _ in range(num_rounds):
        opened.advance({partition})


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_fastest_leads_the_slowest_by_the_staleness_and_no_more(staleness: int) -> None:
    opened = gate(staleness, 2)
    for _ in range(staleness + 1):
        assert opened.may_begin(0)
        opened.advance({0})
    assert not opened.may_begin(0)
    assert opened.may_begin(1)
    opened.advance({1})
    assert opened.may_begin(0)
    opened.advance({0})
    assert not opened.may_begin(0)


def test_an_asynchronous_worker_never_waits() -> None:
    opened = gate(None, 2, num_first=2, joined=1)
    advance(opened, 0, 1000)
    assert opened.may_begin(0)


def test_a_partition_that_waits_for_a_slot_holds_up_nobody() -> None:
    opened = gate(0, 5, joined=2)
    opened.advance({0, 1})
    assert [opened.may_begin(0), opened.may_begin(1)] == [True, True]


def test_a_partition_that_ended_holds_up_nobody() -> None:
    opened = gate(1, 2)
    advance(opened, 0, 2)
    assert not opened.may_begin(0)
    opened.end(1)
    assert opened.may_begin(0)
    assert opened.counted == {0}


def test_a_partition_that_was_finished_before_its_worker_came_holds_up_nobody() -> None:
    opened = gate(0, 2, joined=1)
    opened.join(1, 1.0, is_finished=True)
    opened.advance({0})
    assert opened.may_begin(0)


def test_who_joins_late_joins_the_slowest() -> None:
    opened = gate(1, 3, joined=2)
    advance(opened, 0, 5)
    advance(opened, 1, 4)
    opened.join(2, 3.0)
    assert opened.round_of(2) == 4
    assert opened.may_begin(0)
    opened.advance({0})
    assert not opened.may_begin(0)  # one round ahead of both


def test_who_joins_when_all_others_have_ended_joins_where_they_were() -> None:
    opened = gate(0, 2, joined=1)
    advance(opened, 0, 7)
    opened.end(0)
    opened.join(1, 3.0)
    assert opened.round_of(1) == 7
    assert opened.may_begin(1)


def test_a_lost_worker_counts_until_its_recovery_timeout(caplog: pytest.LogCaptureFixture) -> None:
    opened = gate(0, 2)
    opened.lose(1, 100.0)
    opened.advance({0})
    assert not opened.tick(119.9)
    assert (opened.may_begin(0), opened.num_lost, opened.num_counted) == (False, 1, 2)
    with caplog.at_level(logging.WARNING):
        assert opened.tick(120.0)
    assert (opened.may_begin(0), opened.num_lost, opened.num_counted) == (True, 1, 1)
    assert "partition 1 within 20 s (spark.tensorspark.recovery.timeout)" in caplog.text


def test_a_successor_in_time_goes_on_in_the_round_of_the_lost_worker() -> None:
    opened = gate(3, 2)
    advance(opened, 0, 3)
    advance(opened, 1, 1)
    opened.lose(1, 100.0)
    opened.join(1, 110.0)
    assert opened.round_of(1) == 1
    assert not opened.tick(1000.0)
    assert opened.num_lost == 0


def test_who_comes_back_after_the_recovery_timeout_counts_again(caplog: pytest.LogCaptureFixture) -> None:
    opened = gate(0, 2)
    opened.lose(1, 0.0)
    opened.tick(20.0)
    advance(opened, 0, 3)
    with caplog.at_level(logging.WARNING):
        opened.join(1, 50.0)
    assert "partition 1 is back" in caplog.text
    assert (opened.round_of(1), opened.counted, opened.num_lost) == (3, {0, 1}, 0)
    opened.advance({0})
    assert not opened.may_begin(0)


def test_the_first_round_waits_for_its_workers() -> None:
    opened = gate(3, 4, joined=1, num_first=2)
    assert not opened.may_begin(0)
    opened.join(3, 5.0)
    assert opened.may_begin(0)


def test_one_that_comes_twice_is_one_worker() -> None:
    opened = gate(0, 4, joined=1, num_first=2)
    opened.lose(0, 1.0)
    opened.join(0, 2.0)
    assert not opened.may_begin(0)


def test_one_with_nothing_to_train_has_come_too() -> None:
    opened = gate(0, 2, joined=1, num_first=2)
    opened.join(1, 1.0)
    opened.end(1)
    assert opened.may_begin(0)


def test_the_first_round_begins_without_the_absent_after_the_start_timeout(caplog: pytest.LogCaptureFixture) -> None:
    opened = Gate(SyncPlan(0, 3, 10.0, 20.0), [0, 0, 0])
    assert not opened.tick(1000.0)  # the time runs from the first worker on
    opened.join(1, 1000.0)
    assert not opened.tick(1009.9)
    with caplog.at_level(logging.WARNING):
        assert opened.tick(1010.0)
    assert opened.may_begin(1)
    assert "with 1 of 3 workers" in caplog.text
    assert "spark.tensorspark.start.timeout" in caplog.text


def test_a_restored_run_goes_on_with_the_rounds_it_had() -> None:
    opened = Gate(SyncPlan(1, 2), [5, 4, 9, 0], frozenset({2, 3}))
    opened.join(0, 0.0)
    opened.join(1, 0.0)
    assert [opened.may_begin(0), opened.may_begin(1)] == [True, True]
    opened.advance({0})
    assert [opened.may_begin(0), opened.may_begin(1)] == [False, True]


def test_partitions_of_a_restored_run_that_have_no_slot_yet_hold_up_nobody() -> None:
    opened = Gate(SyncPlan(1, 1), [7, 0])
    opened.join(0, 0.0)
    assert opened.may_begin(0)
    opened.join(1, 1.0)
    assert opened.round_of(1) == 7


def test_a_restored_bulk_synchronous_run_goes_on_in_one_round() -> None:
    opened = Gate(SyncPlan(0, 2), [7, 2])
    opened.join(0, 0.0)
    opened.join(1, 0.0)
    assert [opened.may_begin(0), opened.may_begin(1)] == [True, True]


def test_a_restored_run_goes_on_with_those_that_came_though_the_last_of_them_had_ended() -> None:
    gate = Gate(SyncPlan(1, num_first=2), [3, 0, 9], ended=frozenset({2}))
    gate.join(0, 0.0)
    assert not gate.may_begin(0)
    gate.join(2, 1.0, is_finished=True)  # partition 1, three rounds behind, waits for a slot
    assert gate.may_begin(0)


def test_asynchronously_nobody_is_told_of_a_return_whose_absence_was_not_told(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(SyncPlan(None, recovery_timeout_s=1.0), [0, 0])
    gate.join(0, 0.0)
    gate.lose(0, 0.0)
    assert gate.tick(1.0)
    gate.join(0, 2.0)
    assert not caplog.records


# At the end of an epoch


def test_a_worker_that_rests_holds_up_nobody_and_comes_back_at_the_floor() -> None:
    opened = gate(1, 2)
    advance(opened, 0, 1)
    opened.rest(1)
    assert (opened.counted, opened.awaited, opened.num_counted, opened.num_resting) == ({0}, {0, 1}, 1, 1)
    advance(opened, 0, 6)
    assert opened.may_begin(0)
    opened.wake(1)
    assert (opened.round_of(1), opened.num_counted, opened.num_resting) == (7, 2, 0)
    advance(opened, 0, 2)
    assert not opened.may_begin(0)


def test_all_that_rest_come_back_in_one_round_whoever_rested_first() -> None:
    opened = gate(0, 2)
    opened.advance({0, 1})
    opened.rest(1)
    opened.advance({0})
    opened.rest(0)
    for partition in (1, 0):
        opened.wake(partition)
    assert [opened.round_of(0), opened.round_of(1)] == [2, 2]
    assert opened.may_begin(0)
    opened.advance({0})
    assert not opened.may_begin(0)


def test_a_worker_that_dies_while_it_rests_is_awaited_and_counts_once_it_is_woken() -> None:
    opened = gate(0, 2)
    opened.rest(1)
    opened.lose(1, 100.0)
    assert (opened.counted, opened.awaited, opened.num_resting) == ({0}, {0, 1}, 0)
    opened.wake(1)
    assert opened.counted == {0, 1}
    assert opened.tick(120.0)
    assert opened.awaited == {0}


def test_an_epochs_end_waits_for_the_first_workers_in_an_asynchronous_run_too() -> None:
    opened = gate(None, 2, num_first=2, joined=1)
    assert (opened.has_begun, opened.has_assembled) == (True, False)
    assert opened.tick(10.0)
    assert opened.has_assembled


def test_in_a_hurry_nobody_waits_for_the_lost_and_the_absent(caplog: pytest.LogCaptureFixture) -> None:
    opened = gate(0, 3, num_first=3, joined=2)
    opened.lose(1, 5.0)
    opened.hurry()
    assert opened.has_begun
    assert opened.tick(5.0)
    assert opened.counted == {0}
    assert not caplog.records
