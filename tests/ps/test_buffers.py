"""Snapshots are never torn and their number is bounded; so are the buffers for pushes in arrival."""

from __future__ import annotations

import asyncio

import pytest

from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.messages import Cursor, Fold, Push, Registration
from tensorspark.ps.snapshots import Derived, SnapshotStore
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (16,), "float32")])


# Of `limit_bytes` for receiving, and three beside them: two versions of the weights, and what is folded of a round.
@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(LAYOUT, limit_bytes=LAYOUT.num_bytes)


@pytest.fixture
def store(pool: BufferPool) -> SnapshotStore:
    return SnapshotStore(LAYOUT, pool, filled(1))


def filled(value: int) -> Buffer:
    buffer = LAYOUT.allocate()
    buffer[:] = value
    return buffer


def publish(pool: BufferPool, store: SnapshotStore, value: int) -> None:
    buffer = pool.take_now()
    assert buffer is not None
    buffer[:] = value
    store.publish(buffer, Derived())


def test_a_pinned_snapshot_keeps_its_bytes_through_any_number_of_versions(
    pool: BufferPool, store: SnapshotStore
) -> None:
    pinned = store.pin()
    for value in range(2, 20):
        publish(pool, store, value)
    assert (pinned.version, set(pinned.buffer.tolist())) == (0, {1})
    assert (store.current.version, set(store.current.buffer.tolist())) == (18, {19})


def test_there_is_no_buffer_to_receive_into_while_readers_hold_old_versions_beyond_the_bound(
    pool: BufferPool, store: SnapshotStore
) -> None:
    first = store.pin()
    for value in (2, 3, 4):
        publish(pool, store, value)
        store.pin()
    assert pool.take_now() is None
    store.unpin(first)
    assert pool.take_now() is first.buffer


def test_a_snapshot_pinned_twice_is_recycled_after_both_readers_are_done(
    pool: BufferPool, store: SnapshotStore
) -> None:
    pinned = store.pin()
    assert store.pin() is pinned
    publish(pool, store, 2)
    store.unpin(pinned)
    free = [pool.take_now(), pool.take_now()]
    assert pool.take_now() is None
    assert not any(buffer is pinned.buffer for buffer in free)
    store.unpin(pinned)
    assert pool.take_now() is pinned.buffer


def test_the_first_snapshot_is_a_copy(pool: BufferPool) -> None:
    weights = filled(7)
    store = SnapshotStore(LAYOUT, pool, weights)
    weights[:] = 0
    assert set(store.current.buffer.tolist()) == {7}


def test_the_pool_hands_out_no_more_than_its_bytes_and_serves_waiters_in_turn() -> None:
    async def scenario() -> None:
        pool = BufferPool(LAYOUT, limit_bytes=2 * LAYOUT.num_bytes + 1)
        held = [await pool.take() for _ in range(2 + 3)]
        waiting = [asyncio.ensure_future(pool.take()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        pool.put_back(held[0])
        assert await asyncio.wait_for(waiting[0], 5) is held[0]
        assert not waiting[1].done()
        pool.put_back(held[1])
        assert await asyncio.wait_for(waiting[1], 5) is held[1]

    asyncio.run(scenario())


def test_a_pool_smaller_than_one_push_still_takes_one_beside_two_snapshots_and_a_round() -> None:
    pool = BufferPool(LAYOUT, limit_bytes=0)
    assert [pool.take_now() is None for _ in range(5)] == [False, False, False, False, True]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [3, 4, 0, 2, 1]])
@pytest.mark.parametrize("limit_bytes", [0, 2 * LAYOUT.num_bytes])
@pytest.mark.parametrize("reads_old_version", [False, True])
def test_a_bulk_synchronous_round_ends_in_any_order_of_arrival_with_few_buffers(
    order: list[int], limit_bytes: int, reads_old_version: bool
) -> None:
    plan = SyncPlan(0, len(order))
    state = RunState(1, LAYOUT, len(order), plan)
    for partition in range(len(order)):
        state.register(partition, Registration(1, partition, partition, LAYOUT.fingerprint, "here"), 0.0)

    async def scenario() -> None:
        pool = BufferPool(LAYOUT, limit_bytes)
        store = SnapshotStore(LAYOUT, pool, filled(1))
        if reads_old_version:
            store.pin()
            publish(pool, store, 2)
        kept: dict[int, Buffer] = {}
        folded: list[Buffer] = []  # what is folded lies in the last push's buffer

        async def arrive(partition: int) -> None:
            kept[partition] = await pool.take(lambda: state.may_take_last_buffer(partition))
            for decision in state.push(partition, Push(1, Cursor(0, 1), num_steps=1, num_samples=1)):
                if isinstance(decision, Fold):
                    if folded:
                        pool.put_back(folded.pop())
                    folded.append(kept.pop(decision.partition))
                    state.folded(decision, 0.0)
            pool.serve_waiters()

        await asyncio.wait_for(asyncio.gather(*map(arrive, order)), 5)
        assert not kept

    asyncio.run(scenario())


def test_a_waiter_whose_turn_has_come_passes_those_whose_turn_has_not() -> None:
    async def scenario() -> None:
        pool = BufferPool(LAYOUT, limit_bytes=0)
        held = [await pool.take() for _ in range(4)]
        is_next = False
        early = asyncio.ensure_future(pool.take(lambda: is_next))
        due = asyncio.ensure_future(pool.take())
        await asyncio.sleep(0)
        pool.put_back(held[0])
        assert await asyncio.wait_for(due, 5) is held[0]
        pool.put_back(held[1])
        await asyncio.sleep(0)
        assert not early.done()
        is_next = True
        pool.serve_waiters()
        assert await asyncio.wait_for(early, 5) is held[1]

    asyncio.run(scenario())


def test_a_waiter_that_gives_up_loses_no_buffer() -> None:
    async def scenario() -> None:
        pool = BufferPool(LAYOUT, limit_bytes=0)
        buffer, *_ = [await pool.take() for _ in range(4)]
        before, at_once = asyncio.ensure_future(pool.take()), asyncio.ensure_future(pool.take())
        await asyncio.sleep(0)
        before.cancel()
        await asyncio.gather(before, return_exceptions=True)
        pool.put_back(buffer)
        at_once.cancel()
        await asyncio.gather(at_once, return_exceptions=True)
        assert await asyncio.wait_for(pool.take(), 5) is buffer

    asyncio.run(scenario())


def test_buffers_are_aligned(pool: BufferPool) -> None:
    buffer = pool.take_now()
    assert buffer is not None
    assert buffer.ctypes.data % 64 == 0
