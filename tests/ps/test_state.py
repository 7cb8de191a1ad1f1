"""The server's decisions, without a socket."""

from __future__ import annotations

import pytest

from tensorspark.errors import (
    CombinerError,
    LayoutMismatchError,
    LeaseLostError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    RunStoppedError,
    WorkerFailedError,
)
from tensorspark.ps.messages import (
    Accept,
    Close,
    Cursor,
    Decision,
    Fold,
    Grant,
    Keep,
    Publish,
    Push,
    Refuse,
    Registration,
    SendSnapshot,
    TimeSpent,
)
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])


@pytest.fixture
def state() -> RunState:
    return RunState(1, LAYOUT, num_partitions=2)


def registration(
    partition: int = 0, attempt: int = 10, run: int = 1, fingerprint: str = "", *, is_resuming: bool = False
) -> Registration:
    return Registration(run, partition, attempt, fingerprint or LAYOUT.fingerprint, f"host{attempt}", is_resuming)


def push(sequence: int, epoch: int = 0, batch: int | None = None, **more: object) -> Push:
    cursor = Cursor(epoch, sequence if batch is None else batch)
    return Push(sequence, cursor, num_steps=5, num_samples=50, **more)  # type: ignore[arg-type]


def answers(state: RunState, decisions: list[Decision]) -> list[Decision]:
    """What workers are told when folds and publications are executed at once, as a quick shell does it."""
    told: list[Decision] = []
    folds: list[Fold] = []
    waiting = list(decisions)
    while waiting:
        decision = waiting.pop(0)
        if isinstance(decision, Fold):
            folds.append(decision)
            state.folded(decision, 1.0)
        elif isinstance(decision, Publish):
            waiting += state.published(folds, 0.0)
            folds = []
        elif decision != Keep():
            told.append(decision)
    return told


def merge(state: RunState, connection: int, push: Push) -> list[Decision]:
    return answers(state, state.push(connection, push))


def decided(state: RunState, connection: int, push: Push) -> tuple[Fold, Publish]:
    """The fold and the publication that an asynchronous push leads to, for the test to execute."""
    keep, fold, publish = state.push(connection, push)
    assert keep == Keep()
    assert isinstance(fold, Fold)
    assert isinstance(publish, Publish)
    return fold, publish


def bulk(num_partitions: int, **plan: float) -> RunState:
    """A bulk-synchronous run; connection and attempt i + 1 hold partition i."""
    state = RunState(1, LAYOUT, num_partitions, SyncPlan(0, num_partitions, **plan))
    for partition in range(num_partitions):
        state.register(partition + 1, registration(partition, attempt=partition + 1), 0.0)
    return state


def refusal(decisions: list[Decision]) -> type[Exception]:
    (decision,) = decisions
    assert isinstance(decision, Refuse)
    return type(decision.error)


def test_the_first_attempt_is_granted_its_partition_from_the_beginning(state: RunState) -> None:
    assert state.register(1, registration(), 0.0) == [Grant(1, sequence=0, cursor=Cursor(0, 0), finished=False)]


def test_a_worker_of_another_run_is_told_that_its_run_has_ended(state: RunState) -> None:
    assert refusal(state.register(1, registration(run=2), 0.0)) is RunStoppedError


def test_a_worker_with_other_variables_is_refused(state: RunState) -> None:
    assert refusal(state.register(1, registration(fingerprint="0" * 32), 0.0)) is LayoutMismatchError


@pytest.mark.parametrize("partition", [2, 10**6])
def test_a_partition_that_the_feed_does_not_have_is_a_protocol_error(state: RunState, partition: int) -> None:
    with pytest.raises(ProtocolError, match="from 0 to 1"):
        state.register(1, registration(partition), 0.0)


@pytest.mark.parametrize("event", ["pull", "push", "finish", "fail"])
def test_nothing_is_answered_before_registration(state: RunState, event: str) -> None:
    with pytest.raises(ProtocolError, match="REGISTER"):
        send(state, event, connection=1)


def send(state: RunState, event: str, connection: int) -> list[Decision]:
    if event == "push":
        return state.push(connection, push(1))
    if event == "pull":
        return state.pull(connection)
    if event == "fail":
        return state.fail(connection, "ValueError: no", "Traceback")
    return state.finish(connection, TimeSpent())


def test_a_connection_registers_once(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    with pytest.raises(ProtocolError, match="already"):
        state.register(1, registration(1), 0.0)


def test_a_pull_is_answered_at_once(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    assert state.pull(1) == [SendSnapshot(1)]


def test_a_pull_waits_until_all_the_workers_own_pushes_are_published(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    (first, _), (second, _) = decided(state, 1, push(1)), decided(state, 1, push(2))
    assert state.pull(1) == []
    state.folded(first, 1.0)
    assert state.published([first], 0.0) == [Accept(1, 1)]
    state.folded(second, 1.0)
    assert state.published([second], 0.0) == [Accept(1, 2), SendSnapshot(1)]


def test_another_workers_push_in_the_making_does_not_hold_up_a_pull(state: RunState) -> None:
    state.register(1, registration(0), 0.0)
    state.register(2, registration(1, attempt=11), 0.0)
    state.push(1, push(1))
    assert state.pull(2) == [SendSnapshot(2)]


def test_a_push_that_comes_again_is_accepted_and_not_merged_again(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    merge(state, 1, push(1))
    assert state.push(1, push(1)) == [Accept(1, 1)]
    assert state.overview.reports()[0].num_applied == 1


@pytest.mark.parametrize(("sequence", "batch"), [(3, 3), (2, 0)])
def test_a_push_out_of_order_is_a_protocol_error(state: RunState, sequence: int, batch: int) -> None:
    state.register(1, registration(), 0.0)
    merge(state, 1, push(1, batch=1))
    with pytest.raises(ProtocolError, match="expected push 2"):
        state.push(1, push(sequence, batch=batch))


def test_a_second_attempt_waits_while_the_first_lives_and_goes_on_where_it_was(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    assert state.register(2, registration(attempt=11), 0.0) == []
    merge(state, 1, push(1, epoch=3, batch=4))
    assert state.disconnect(1, 0.0) == [Grant(2, sequence=1, cursor=Cursor(3, 4), finished=False)]
    assert state.overview.reports()[0].num_attempts == 2
    assert state.overview.reports()[0].host == "host11"


def test_standbys_are_served_in_the_order_in_which_they_came(state: RunState) -> None:
    for connection in (1, 2, 3, 4):
        state.register(connection, registration(attempt=connection), 0.0)
    state.disconnect(2, 0.0)
    granted = [
        decision.connection for c in (1, 3) for decision in state.disconnect(c, 0.0) if isinstance(decision, Grant)
    ]
    assert granted == [3, 4]


def test_a_successor_is_granted_only_when_its_predecessors_push_is_in(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    fold, _ = decided(state, 1, push(1))
    assert state.disconnect(1, 0.0) == []
    assert state.register(2, registration(attempt=11), 0.0) == []
    state.folded(fold, 1.0)
    decisions = state.published([fold], 0.0)
    assert decisions == [Accept(1, 1), Grant(2, sequence=1, cursor=Cursor(0, 1), finished=False)]


def test_a_successor_of_a_folded_push_waits_until_it_is_published(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    fold, _ = decided(state, 1, push(1))
    state.folded(fold, 1.0)
    assert state.disconnect(1, 0.0) == []
    assert state.register(2, registration(attempt=11), 0.0) == []
    assert Grant(2, sequence=1, cursor=Cursor(0, 1), finished=False) in state.published([fold], 0.0)


@pytest.mark.parametrize("event", ["pull", "push", "finish", "fail"])
def test_a_standby_has_no_say(state: RunState, event: str) -> None:
    state.register(1, registration(attempt=10), 0.0)
    state.register(2, registration(attempt=11), 0.0)
    assert refusal(send(state, event, connection=2)) is LeaseLostError
    assert state.failure is None


def test_a_push_of_nan_is_refused_leaves_no_trace_and_can_be_followed_by_a_good_one(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    bad, _ = decided(state, 1, push(1))
    assert refusal(state.not_folded(bad, NonFiniteError("NaN in W:0"), 0.0)) is NonFiniteError
    assert state.published([], 0.0) == []
    assert (state.overview.status().num_steps, state.overview.reports()[0].num_refused) == (0, 1)
    assert merge(state, 1, push(1)) == [Accept(1, 1)]


def test_pushes_behind_a_refused_one_are_refused_too_and_can_come_again(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    (bad, _), (behind, _) = decided(state, 1, push(1)), decided(state, 1, push(2))
    assert state.is_next(bad)
    state.not_folded(bad, NonFiniteError("NaN in W:0"), 0.0)
    assert not state.is_next(behind)
    assert refusal(state.not_folded(behind, RefusedError("a push before this one was refused"), 0.0)) is RefusedError
    assert [merge(state, 1, push(sequence)) for sequence in (1, 2)] == [[Accept(1, 1)], [Accept(1, 2)]]
    assert state.overview.reports()[0].num_applied == 2


def test_a_pull_behind_a_refused_push_is_answered(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    bad, _ = decided(state, 1, push(1))
    state.pull(1)
    assert state.not_folded(bad, NonFiniteError("NaN"), 0.0)[1:] == [SendSnapshot(1)]


def test_a_combiner_that_fails_ends_the_run(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    fold, _ = decided(state, 1, push(1))
    failure = CombinerError("compute raised")
    assert refusal(state.not_folded(fold, failure, 0.0)) is RunStoppedError
    assert state.failure is failure


def test_the_first_failure_of_a_worker_is_the_runs_with_partition_host_and_traceback(state: RunState) -> None:
    state.register(1, registration(0), 0.0)
    state.register(2, registration(1, attempt=11), 0.0)
    decisions = state.fail(2, "ValueError: bad row", "Traceback: line 7")
    assert decisions == [Accept(2, 0)]
    assert refusal(state.fail(1, "RunStoppedError", "later")) is RunStoppedError
    assert isinstance(state.failure, WorkerFailedError)
    assert (state.failure.partition, state.failure.host) == (1, "host11")
    assert "ValueError: bad row" in str(state.failure)
    assert state.failure.worker_traceback == "Traceback: line 7"


def test_a_stopped_run_refuses_who_waits_and_who_comes_later(state: RunState) -> None:
    state.register(1, registration(0), 0.0)
    state.register(2, registration(0, attempt=11), 0.0)
    state.register(3, registration(1, attempt=12), 0.0)
    state.push(3, push(1))
    state.pull(3)
    refused = state.stop()
    assert {decision.connection for decision in refused if isinstance(decision, Refuse)} == {2, 3}
    assert refusal(state.pull(1)) is RunStoppedError
    assert refusal(state.register(4, registration(1), 0.0)) is RunStoppedError
    assert state.failure is None


def test_a_finished_partition_stays_finished_for_whoever_comes_again(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    merge(state, 1, push(1))
    assert send(state, "finish", 1) == [Accept(1, 1)]
    state.disconnect(1, 0.0)
    (grant,) = state.register(2, registration(attempt=11), 0.0)
    assert isinstance(grant, Grant)
    assert grant.finished


def test_a_partition_does_not_finish_with_a_push_in_the_making(state: RunState) -> None:
    state.register(1, registration(), 0.0)
    state.push(1, push(1))
    with pytest.raises(ProtocolError, match="accepted"):
        send(state, "finish", 1)


def test_status_counts_steps_samples_workers_and_the_share_that_is_done(state: RunState) -> None:
    state.register(1, registration(0), 0.0)
    state.register(2, registration(0, attempt=11), 0.0)
    state.register(3, registration(1, attempt=12), 0.0)
    assert state.overview.status().progress is None
    merge(state, 1, push(1, sums={"loss": 100.0}, progress=0.5))
    status = state.overview.status()
    assert (status.num_steps, status.num_samples) == (5, 50)
    assert (status.num_live, status.num_standby, status.num_finished) == (2, 1, 0)
    assert status.progress == 0.25
    assert status.scalars == {"loss": 2.0}
    send(state, "finish", 3)
    assert state.overview.status().progress == 0.75


def test_disconnecting_a_stranger_changes_nothing(state: RunState) -> None:
    assert state.disconnect(99, 0.0) == []


# One lease


def test_the_same_attempt_on_a_new_connection_takes_its_own_place_and_the_old_one_is_closed(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    merge(state, 1, push(1))
    decisions = state.register(2, registration(attempt=10, is_resuming=True), 5.0)
    assert decisions == [Close(1), Grant(2, sequence=1, cursor=Cursor(0, 1), finished=False)]
    assert state.disconnect(1, 5.0) == []
    assert state.pull(2) == [SendSnapshot(2)]
    report = state.overview.reports()[0]
    assert (report.num_attempts, report.num_reconnects) == (1, 1)


def test_an_attempt_that_comes_back_to_a_lease_that_has_passed_on_is_told_to_whom(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    state.disconnect(1, 0.0)
    state.register(2, registration(attempt=11), 0.0)
    (decision,) = state.register(3, registration(attempt=10, is_resuming=True), 0.0)
    assert isinstance(decision, Refuse)
    assert isinstance(decision.error, LeaseLostError)
    assert "partition 0 has passed to attempt 11 on host11" in str(decision.error)


def test_an_attempt_that_comes_back_in_time_goes_before_the_standbys(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    fold, _ = decided(state, 1, push(1))
    state.register(2, registration(attempt=11), 0.0)
    assert state.register(3, registration(attempt=10, is_resuming=True), 0.0) == [Close(1)]
    state.folded(fold, 1.0)
    granted = [decision for decision in state.published([fold], 0.0) if isinstance(decision, Grant)]
    assert granted == [Grant(3, sequence=1, cursor=Cursor(0, 1), finished=False)]


# In step


def test_a_bulk_synchronous_round_folds_in_the_order_of_partitions_whoever_pushes_first() -> None:
    state = bulk(3)
    assert [state.pull(connection) for connection in (3, 1, 2)] == [[SendSnapshot(c)] for c in (3, 1, 2)]
    assert state.push(3, push(1)) == [Keep()]
    keep, first = state.push(1, push(1))
    assert (keep, first) == (Keep(), Fold(1, 0, push(1)))
    decisions = state.push(2, push(1))
    assert decisions == [Keep(), Fold(2, 1, push(1)), Fold(3, 2, push(1)), Publish(None)]


def test_a_bulk_synchronous_worker_goes_on_when_the_round_is_published() -> None:
    state = bulk(2)
    first = state.push(1, push(1))[1]
    assert state.pull(1) == []
    assert isinstance(first, Fold)
    state.folded(first, 1.0)
    _, second, publish = state.push(2, push(1))
    assert publish == Publish(None)
    assert isinstance(second, Fold)
    state.folded(second, 1.0)
    assert state.published([first, second], 0.0) == [Accept(1, 1), Accept(2, 1), SendSnapshot(1)]


def test_a_bulk_synchronous_worker_that_ends_holds_up_nobody() -> None:
    state = bulk(2)
    (_, fold) = state.push(1, push(1))
    assert send(state, "finish", 2) == [Accept(2, 0), Publish(None)]
    assert fold == Fold(1, 0, push(1))


def test_a_lost_worker_holds_up_the_round_until_its_recovery_timeout() -> None:
    state = bulk(2, recovery_timeout_s=30.0)
    state.push(1, push(1))
    state.disconnect(2, 100.0)
    assert state.tick(129.0) == []
    assert state.overview.status().num_lost == 1
    assert state.tick(130.0) == [Publish(None)]


def test_a_push_that_comes_again_while_its_round_closes_belongs_to_the_next() -> None:
    state = bulk(1)
    _, fold, publish = state.push(1, push(1))
    assert publish == Publish(None)
    assert isinstance(fold, Fold)
    assert refusal(state.not_folded(fold, NonFiniteError("NaN"), 0.0)) is NonFiniteError
    assert state.push(1, push(1)) == [Keep()]
    assert state.published([], 0.0) == [Fold(1, 0, push(1)), Publish(None)]


def test_the_first_round_waits_for_its_workers_and_not_for_ever() -> None:
    state = RunState(1, LAYOUT, 3, SyncPlan(1, num_first=2, start_timeout_s=10.0))
    state.register(1, registration(0), 100.0)
    assert state.pull(1) == []
    assert state.tick(109.0) == []
    assert state.tick(110.0) == [SendSnapshot(1)]


def test_the_first_round_begins_with_the_last_worker_that_it_waits_for() -> None:
    state = RunState(1, LAYOUT, 3, SyncPlan(1, num_first=2))
    state.register(1, registration(0), 0.0)
    state.pull(1)
    grant, snapshot = state.register(2, registration(2, attempt=11), 1.0)
    assert isinstance(grant, Grant)
    assert snapshot == SendSnapshot(1)


# After a restore


@pytest.mark.parametrize("staleness", [0, 1, None])
def test_a_restored_run_goes_on_though_a_partition_that_is_behind_has_no_slot_yet(staleness: int | None) -> None:
    before = RunState(1, LAYOUT, 2, SyncPlan(staleness))
    before.register(1, registration(0), 0.0)
    for sequence in range(1, 6):
        merge(before, 1, push(sequence, version=sequence - 1))
    state = RunState(1, LAYOUT, 2, SyncPlan(staleness), partitions=before.export()[0], version=5)
    assert state.register(1, registration(0, attempt=20), 0.0) == [Grant(1, 5, Cursor(0, 5), finished=False)]
    assert state.pull(1) == [SendSnapshot(1)]


def test_a_restored_bulk_synchronous_run_has_all_its_workers_in_one_round() -> None:
    before = RunState(1, LAYOUT, 2, SyncPlan(0))
    before.register(1, registration(0), 0.0)
    merge(before, 1, push(1))
    state = RunState(1, LAYOUT, 2, SyncPlan(0, num_first=2), partitions=before.export()[0], version=1)
    state.register(1, registration(0, attempt=20), 0.0)
    state.register(2, registration(1, attempt=21), 0.0)
    assert [state.pull(1), state.pull(2)] == [[SendSnapshot(1)], [SendSnapshot(2)]]


# Who may be expected to speak


def test_a_worker_is_waited_for_while_it_computes_and_waits_while_it_is_owed_an_answer(state: RunState) -> None:
    state.register(1, registration(attempt=10), 0.0)
    state.register(2, registration(attempt=11), 0.0)
    assert [state.is_waiting(connection) for connection in (1, 2, 99)] == [False, True, False]
    fold, _ = decided(state, 1, push(1))
    assert state.is_waiting(1)
    state.folded(fold, 1.0)
    state.published([fold], 0.0)
    assert not state.is_waiting(1)


def test_the_last_buffers_are_for_the_push_that_is_folded_next() -> None:
    state = bulk(3)
    assert [state.may_take_last_buffer(connection) for connection in (1, 2, 3)] == [True, False, False]
    state.push(1, push(1))
    assert [state.may_take_last_buffer(connection) for connection in (2, 3)] == [True, False]
