"""The server's decisions about epochs, where the order of events matters and real connections leave it to chance."""

from __future__ import annotations

import pytest

from tensorspark.ps.messages import (
    Accept,
    Asked,
    Cursor,
    EpochPlan,
    Fold,
    Grant,
    OrderKind,
    Push,
    Registration,
    SendSnapshot,
)
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])
RECOVERY_TIMEOUT_S = 20.0


def begun(staleness: int | None, *, validates: bool) -> RunState:
    """Two partitions, held by attempts and on connections 1 and 2."""
    plan = SyncPlan(staleness, 2, 10.0, RECOVERY_TIMEOUT_S)
    state = RunState(1, LAYOUT, 2, plan, epochs=EpochPlan(3, validates))
    for partition in range(2):
        state.register(1 + partition, registration(partition, 1 + partition), 0.0)
    return state


def registration(partition: int, attempt: int) -> Registration:
    return Registration(1, partition, attempt, LAYOUT.fingerprint, f"host{attempt}")


def fold_of(state: RunState, connection: int, sequence: int, cursor: Cursor) -> Fold:
    """An asynchronous push that has arrived, and that the test folds and publishes."""
    _, fold, _ = state.push(connection, Push(sequence, cursor, 5, 50))
    assert isinstance(fold, Fold)
    return fold


def merge(state: RunState, connection: int, sequence: int, cursor: Cursor) -> None:
    fold = fold_of(state, connection, sequence, cursor)
    state.folded(fold, 1.0)
    state.published([fold], 0.0)


def test_an_epoch_does_not_end_while_a_push_of_one_who_was_given_up_is_in_the_making() -> None:
    state = begun(None, validates=False)
    fold = fold_of(state, 1, 1, Cursor(0, 1))
    state.disconnect(1, 0.0)
    state.tick(RECOVERY_TIMEOUT_S)
    merge(state, 2, 1, Cursor(1))
    assert state.epoch_end(1.0) is None
    state.folded(fold, 1.0)
    state.published([fold], 0.0)
    end = state.epoch_end(1.0)
    assert end is not None
    assert end.num_samples == 100


def test_who_comes_back_late_neither_evaluates_nor_trains_while_the_others_evaluate() -> None:
    state = begun(None, validates=True)
    merge(state, 1, 1, Cursor(0, 1))
    state.disconnect(1, 0.0)
    state.tick(RECOVERY_TIMEOUT_S)
    merge(state, 2, 1, Cursor(1))
    assert state.pull(2) == [SendSnapshot(2, OrderKind.EVALUATE, 0)]
    assert state.register(3, registration(0, 9), 30.0) == [Grant(3, 1, Cursor(0, 1), finished=False)]
    assert state.pull(3) == []
    assert state.evaluate(2, 0, b"", 7) == [Accept(2, 1)]
    assert state.release_epoch(0, {}) == [SendSnapshot(3, OrderKind.TRAIN, 0)]


def test_a_shards_epoch_that_is_over_is_not_waited_for_by_who_evaluates_it_late() -> None:
    state = begun(None, validates=False)
    merge(state, 1, 1, Cursor(0, 1))
    state.disconnect(1, 0.0)
    state.tick(RECOVERY_TIMEOUT_S)
    merge(state, 2, 1, Cursor(1))
    state.register(3, registration(0, 9), 30.0)
    assert state.release_epoch(0, {}) == []
    # The shard that decides has an evaluation of epoch 0 due still; here the others train the next one.
    assert state.pull(3, Asked.EVALUATE, 0) == [SendSnapshot(3, OrderKind.EVALUATE, 0)]
    assert state.pull(3, Asked.EVALUATE, 1) == []


@pytest.mark.parametrize("epoch", [0, None])
def test_an_evaluation_waits_for_the_weights_of_its_epochs_end(epoch: int | None) -> None:
    state = begun(None, validates=False)
    merge(state, 1, 1, Cursor(1))
    assert state.pull(1, Asked.EVALUATE, epoch) == []
    fold = fold_of(state, 2, 1, Cursor(1))
    state.folded(fold, 1.0)
    assert SendSnapshot(1, OrderKind.EVALUATE, 0) in state.published([fold], 0.0)


def test_an_evaluation_that_comes_before_its_epoch_is_released_waits_for_its_end() -> None:
    state = begun(None, validates=False)
    for connection in (1, 2):
        merge(state, connection, 1, Cursor(1))
    assert state.pull(1, Asked.EVALUATE, 1) == []  # epoch 0 has ended here, and the driver's word is on its way
    assert state.release_epoch(0, {}) == []
    for connection in (1, 2):
        fold = fold_of(state, connection, 2, Cursor(2))
        state.folded(fold, 1.0)
        decisions = state.published([fold], 0.0)
    assert SendSnapshot(1, OrderKind.EVALUATE, 1) in decisions


def test_an_evaluation_that_comes_again_is_accepted_and_counts_once_also_when_all_have_gone_on() -> None:
    state = begun(None, validates=True)
    for connection in (1, 2):
        merge(state, connection, 1, Cursor(1))
    for _ in range(2):
        assert state.evaluate(1, 0, b"", 7) == [Accept(1, 1)]
    assert state.epoch_end(1.0) is None
    state.evaluate(2, 0, b"", 8)
    end = state.epoch_end(1.0)
    assert end is not None
    assert end.evaluation_samples == 15
    state.release_epoch(0, {})
    assert state.evaluate(1, 0, b"", 7) == [Accept(1, 1)]
    assert state.epoch_end(1.0) is None


def test_a_skip_that_comes_again_is_accepted_and_moves_nothing() -> None:
    state = begun(0, validates=False)
    for _ in range(2):
        assert state.skip(1, 0) == [Accept(1, 0)]
    assert state.export()[0][0].cursor == Cursor(1)
    assert state.overview.status().num_resting == 1


def test_a_partition_all_of_whose_workers_are_gone_ends_no_epoch_alone() -> None:
    state = begun(None, validates=False)
    for connection in (1, 2):
        merge(state, connection, 1, Cursor(1 if connection == 1 else 0, 2 * (connection - 1)))
        state.disconnect(connection, 0.0)
    state.tick(RECOVERY_TIMEOUT_S)
    assert state.epoch_end(1.0) is None
    state.register(3, registration(0, 9), 30.0)
    assert state.epoch_end(1.0) is not None
