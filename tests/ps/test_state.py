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
from tensorspark.ps.state import (
    Accept,
    Cursor,
    Decision,
    Grant,
    Merge,
    Push,
    Refuse,
    Registration,
    RunState,
    SendSnapshot,
)
from tensorspark.weights.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])


@pytest.fixture
def state() -> RunState:
    return RunState(1, LAYOUT, num_partitions=2)


def registration(partition: int = 0, attempt: int = 10, run: int = 1, fingerprint: str = "") -> Registration:
    return Registration(run, partition, attempt, fingerprint or LAYOUT.fingerprint, f"host{attempt}")


def push(sequence: int, epoch: int = 0, batch: int | None = None, **more: object) -> Push:
    cursor = Cursor(epoch, sequence if batch is None else batch)
    return Push(sequence, cursor, num_steps=5, num_samples=50, **more)  # type: ignore[arg-type]


def merge(state: RunState, connection: int, push: Push) -> list[Decision]:
    (decision,) = state.push(connection, push)
    assert isinstance(decision, Merge)
    return state.merged(decision, seconds=1.0)


def refusal(decisions: list[Decision]) -> type[Exception]:
    (decision,) = decisions
    assert isinstance(decision, Refuse)
    return type(decision.error)


def test_the_first_attempt_is_granted_its_partition_from_the_beginning(state: RunState) -> None:
    assert state.register(1, registration()) == [Grant(1, sequence=0, cursor=Cursor(0, 0), finished=False)]


def test_a_worker_of_another_run_is_told_that_its_run_has_ended(state: RunState) -> None:
    assert refusal(state.register(1, registration(run=2))) is RunStoppedError


def test_a_worker_with_other_variables_is_refused(state: RunState) -> None:
    assert refusal(state.register(1, registration(fingerprint="0" * 32))) is LayoutMismatchError


@pytest.mark.parametrize("partition", [2, 10**6])
def test_a_partition_that_the_feed_does_not_have_is_a_protocol_error(state: RunState, partition: int) -> None:
    with pytest.raises(ProtocolError, match="from 0 to 1"):
        state.register(1, registration(partition))


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
    return state.finish(connection, epoch_samples=(), epoch_seconds=(), step_s=0.0, sync_s=0.0)


def test_a_connection_registers_once(state: RunState) -> None:
    state.register(1, registration())
    with pytest.raises(ProtocolError, match="already"):
        state.register(1, registration(1))


def test_a_pull_is_answered_at_once(state: RunState) -> None:
    state.register(1, registration())
    assert state.pull(1) == [SendSnapshot(1)]


def test_a_pull_waits_until_all_the_workers_own_pushes_are_merged(state: RunState) -> None:
    state.register(1, registration())
    (first,), (second,) = state.push(1, push(1)), state.push(1, push(2))
    assert state.pull(1) == []
    assert isinstance(first, Merge)
    assert state.merged(first, 1.0) == [Accept(1, 1)]
    assert isinstance(second, Merge)
    assert state.merged(second, 1.0) == [Accept(1, 2), SendSnapshot(1)]


def test_another_workers_push_in_the_making_does_not_hold_up_a_pull(state: RunState) -> None:
    state.register(1, registration(0))
    state.register(2, registration(1, attempt=11))
    state.push(1, push(1))
    assert state.pull(2) == [SendSnapshot(2)]


def test_a_push_that_comes_again_is_accepted_and_not_merged_again(state: RunState) -> None:
    state.register(1, registration())
    merge(state, 1, push(1))
    assert state.push(1, push(1)) == [Accept(1, 1)]
    assert state.reports()[0].num_applied == 1


@pytest.mark.parametrize(("sequence", "batch"), [(3, 3), (2, 0)])
def test_a_push_out_of_order_is_a_protocol_error(state: RunState, sequence: int, batch: int) -> None:
    state.register(1, registration())
    merge(state, 1, push(1, batch=1))
    with pytest.raises(ProtocolError, match="expected push 2"):
        state.push(1, push(sequence, batch=batch))


def test_a_second_attempt_waits_while_the_first_lives_and_goes_on_where_it_was(state: RunState) -> None:
    state.register(1, registration(attempt=10))
    assert state.register(2, registration(attempt=11)) == []
    merge(state, 1, push(1, epoch=3, batch=4))
    assert state.disconnect(1) == [Grant(2, sequence=1, cursor=Cursor(3, 4), finished=False)]
    assert state.reports()[0].num_attempts == 2
    assert state.reports()[0].host == "host11"


def test_standbys_are_served_in_the_order_in_which_they_came(state: RunState) -> None:
    for connection in (1, 2, 3, 4):
        state.register(connection, registration(attempt=connection))
    state.disconnect(2)
    granted = [decision.connection for c in (1, 3) for decision in state.disconnect(c) if isinstance(decision, Grant)]
    assert granted == [3, 4]


def test_a_successor_is_granted_only_when_its_predecessors_push_is_in(state: RunState) -> None:
    state.register(1, registration(attempt=10))
    (pending,) = state.push(1, push(1))
    assert state.disconnect(1) == []
    assert state.register(2, registration(attempt=11)) == []
    assert isinstance(pending, Merge)
    decisions = state.merged(pending, 1.0)
    assert decisions == [Accept(1, 1), Grant(2, sequence=1, cursor=Cursor(0, 1), finished=False)]


@pytest.mark.parametrize("event", ["pull", "push", "finish", "fail"])
def test_a_standby_has_no_say(state: RunState, event: str) -> None:
    state.register(1, registration(attempt=10))
    state.register(2, registration(attempt=11))
    assert refusal(send(state, event, connection=2)) is LeaseLostError
    assert state.failure is None


def test_a_push_of_nan_is_refused_leaves_no_trace_and_can_be_followed_by_a_good_one(state: RunState) -> None:
    state.register(1, registration())
    (bad,) = state.push(1, push(1))
    assert isinstance(bad, Merge)
    assert refusal(state.not_merged(bad, NonFiniteError("NaN in W:0"))) is NonFiniteError
    assert (state.status().num_steps, state.reports()[0].num_refused) == (0, 1)
    assert merge(state, 1, push(1)) == [Accept(1, 1)]


def test_pushes_behind_a_refused_one_are_refused_too_and_can_come_again(state: RunState) -> None:
    state.register(1, registration())
    (bad,), (behind,) = state.push(1, push(1)), state.push(1, push(2))
    assert isinstance(bad, Merge)
    assert isinstance(behind, Merge)
    assert state.is_next(bad)
    state.not_merged(bad, NonFiniteError("NaN in W:0"))
    assert not state.is_next(behind)
    assert refusal(state.not_merged(behind, RefusedError("a push before this one was refused"))) is RefusedError
    assert [merge(state, 1, push(sequence)) for sequence in (1, 2)] == [[Accept(1, 1)], [Accept(1, 2)]]
    assert state.reports()[0].num_applied == 2


def test_a_pull_behind_a_refused_push_is_answered(state: RunState) -> None:
    state.register(1, registration())
    (bad,) = state.push(1, push(1))
    state.pull(1)
    assert isinstance(bad, Merge)
    assert state.not_merged(bad, NonFiniteError("NaN"))[1:] == [SendSnapshot(1)]


def test_a_combiner_that_fails_ends_the_run(state: RunState) -> None:
    state.register(1, registration())
    (pending,) = state.push(1, push(1))
    assert isinstance(pending, Merge)
    failure = CombinerError("compute raised")
    assert refusal(state.not_merged(pending, failure)) is RunStoppedError
    assert state.failure is failure


def test_the_first_failure_of_a_worker_is_the_runs_with_partition_host_and_traceback(state: RunState) -> None:
    state.register(1, registration(0))
    state.register(2, registration(1, attempt=11))
    decisions = state.fail(2, "ValueError: bad row", "Traceback: line 7")
    assert decisions == [Accept(2, 0)]
    assert refusal(state.fail(1, "RunStoppedError", "later")) is RunStoppedError
    assert isinstance(state.failure, WorkerFailedError)
    assert (state.failure.partition, state.failure.host) == (1, "host11")
    assert "ValueError: bad row" in str(state.failure)
    assert state.failure.worker_traceback == "Traceback: line 7"


def test_a_stopped_run_refuses_who_waits_and_who_comes_later(state: RunState) -> None:
    state.register(1, registration(0))
    state.register(2, registration(0, attempt=11))
    state.register(3, registration(1, attempt=12))
    state.push(3, push(1))
    state.pull(3)
    refused = state.stop()
    assert {decision.connection for decision in refused if isinstance(decision, Refuse)} == {2, 3}
    assert refusal(state.pull(1)) is RunStoppedError
    assert refusal(state.register(4, registration(1))) is RunStoppedError
    assert state.failure is None


def test_a_finished_partition_stays_finished_for_whoever_comes_again(state: RunState) -> None:
    state.register(1, registration())
    merge(state, 1, push(1))
    assert send(state, "finish", 1) == [Accept(1, 1)]
    state.disconnect(1)
    (grant,) = state.register(2, registration(attempt=11))
    assert isinstance(grant, Grant)
    assert grant.finished


def test_a_partition_does_not_finish_with_a_push_in_the_making(state: RunState) -> None:
    state.register(1, registration())
    state.push(1, push(1))
    with pytest.raises(ProtocolError, match="accepted"):
        send(state, "finish", 1)


def test_status_counts_steps_samples_workers_and_the_share_that_is_done(state: RunState) -> None:
    state.register(1, registration(0))
    state.register(2, registration(0, attempt=11))
    state.register(3, registration(1, attempt=12))
    assert state.status().progress is None
    merge(state, 1, push(1, sums={"loss": 100.0}, progress=0.5))
    status = state.status()
    assert (status.num_steps, status.num_samples) == (5, 50)
    assert (status.num_live, status.num_standby, status.num_finished) == (2, 1, 0)
    assert status.progress == 0.25
    assert status.scalars == {"loss": 2.0}
    send(state, "finish", 3)
    assert state.status().progress == 0.75


def test_disconnecting_a_stranger_changes_nothing(state: RunState) -> None:
    assert state.disconnect(99) == []
