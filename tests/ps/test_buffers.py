"""Snapshots are never torn and their number is fixed; receive buffers are bounded."""

from __future__ import annotations

import asyncio

import numpy as np

from tensorspark.ps.buffers import ReceivePool, SnapshotStore
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (16,), "float32")])


def taken(store: SnapshotStore) -> Buffer:
    buffer = store.take_free()
    assert buffer is not None
    return buffer


def test_a_pinned_snapshot_keeps_its_bytes_through_any_number_of_versions() -> None:
    store = SnapshotStore(LAYOUT)
    store.current.buffer[:] = 1
    pinned = store.pin()
    for value in range(2, 20):
        buffer = taken(store)
        buffer[:] = value
        store.publish(buffer)
    assert (pinned.version, set(pinned.buffer.tolist())) == (0, {1})
    assert (store.current.version, set(store.current.buffer.tolist())) == (18, {19})


def test_there_is_no_free_buffer_while_readers_hold_two_old_versions() -> None:
    store = SnapshotStore(LAYOUT)
    first = store.pin()
    store.publish(taken(store))
    store.pin()
    store.publish(taken(store))
    assert store.take_free() is None
    store.unpin(first)
    assert store.take_free() is first.buffer


def test_a_snapshot_pinned_twice_is_recycled_after_both_readers_are_done() -> None:
    store = SnapshotStore(LAYOUT)
    pinned = store.pin()
    assert store.pin() is pinned
    store.publish(taken(store))
    store.unpin(pinned)
    assert pinned.buffer is not taken(store)
    store.unpin(pinned)
    assert store.take_free() is pinned.buffer


def test_a_buffer_that_was_not_published_can_be_taken_again() -> None:
    store = SnapshotStore(LAYOUT)
    buffer = taken(store)
    store.put_back(buffer)
    assert store.take_free() is buffer
    assert store.current.version == 0


def test_the_pool_hands_out_no_more_than_its_bytes_and_serves_waiters_in_turn() -> None:
    async def scenario() -> None:
        pool = ReceivePool(LAYOUT, limit_bytes=2 * LAYOUT.num_bytes + 1)
        held = [await pool.take(), await pool.take()]
        waiting = [asyncio.ensure_future(pool.take()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        pool.put_back(held[0])
        assert await asyncio.wait_for(waiting[0], 5) is held[0]
        assert not waiting[1].done()
        pool.put_back(held[1])
        assert await asyncio.wait_for(waiting[1], 5) is held[1]

    asyncio.run(scenario())


def test_a_pool_smaller_than_one_push_still_takes_one() -> None:
    async def scenario() -> None:
        pool = ReceivePool(LAYOUT, limit_bytes=0)
        assert (await pool.take()).nbytes == LAYOUT.num_bytes

    asyncio.run(scenario())


def test_a_waiter_that_gives_up_loses_no_buffer() -> None:
    async def scenario() -> None:
        pool = ReceivePool(LAYOUT, limit_bytes=0)
        buffer = await pool.take()
        before, at_once = asyncio.ensure_future(pool.take()), asyncio.ensure_future(pool.take())
        await asyncio.sleep(0)
        before.cancel()
        await asyncio.gather(before, return_exceptions=True)
        pool.put_back(buffer)
        at_once.cancel()
        await asyncio.gather(at_once, return_exceptions=True)
        assert await asyncio.wait_for(pool.take(), 5) is buffer

    asyncio.run(scenario())


def test_pooled_buffers_are_aligned() -> None:
    async def scenario() -> None:
        assert (await ReceivePool(LAYOUT, 0).take()).ctypes.data % 64 == 0

    asyncio.run(scenario())
    assert np.all(SnapshotStore(LAYOUT).current.buffer == 0)
