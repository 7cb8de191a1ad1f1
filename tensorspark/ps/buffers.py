"""The server's memory: a fixed number of buffers, each a push in arrival or a version of the weights.

A push is received into a free buffer and merged in place: the buffer becomes the newest snapshot, and the one that was
newest is free again as soon as nobody reads it. So no weights are copied, and a pull in progress is never torn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from tensorspark.weights.layout import Buffer, WeightLayout

# Beside those for receiving: the current snapshot, and an older one that a slow puller may still be reading.
_NUM_SNAPSHOTS = 2


@dataclass(eq=False)
class Snapshot:
    """One version of the weights. Nobody writes to `buffer` while the snapshot is current or pinned."""

    version: int
    buffer: Buffer
    num_pins: int = 0


class BufferPool:
    """Buffers of a layout's size, at most `limit_bytes` of them (and at least one) beside those of two snapshots.

    Whoever finds it empty waits, in turn: its connection is not read meanwhile, and TCP pushes back on the worker.
    Not thread-safe: the server's loop owns it.
    """

    def __init__(self, layout: WeightLayout, limit_bytes: int) -> None:
        self._layout = layout
        self._num_unallocated = max(1, limit_bytes // layout.num_bytes) + _NUM_SNAPSHOTS
        self._free: list[Buffer] = []
        self._waiters: deque[asyncio.Future[Buffer]] = deque()

    def take_now(self) -> Buffer | None:
        """A free buffer, its content undefined; None where there is none."""
        if self._free:
            return self._free.pop()
        if self._num_unallocated:
            self._num_unallocated -= 1
            return self._layout.allocate()
        return None

    async def take(self) -> Buffer:
        """A free buffer, its content undefined, when there is one."""
        buffer = self.take_now()
        if buffer is not None:
            return buffer
        waiter: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.put_back(waiter.result())
            raise

    def put_back(self, buffer: Buffer) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(buffer)
                return
        self._free.append(buffer)


class SnapshotStore:
    """Versions of the weights: the current one, and older ones as long as they are read. The server's loop owns it.

    Args:
        weights: the first version; copied.
    """

    def __init__(self, pool: BufferPool, weights: Buffer) -> None:
        self._pool = pool
        self._retired: set[Snapshot] = set()
        first = pool.take_now()
        assert first is not None
        first[:] = weights
        self.current = Snapshot(0, first)

    def pin(self) -> Snapshot:
        """The current snapshot, kept as it is until `unpin`."""
        self.current.num_pins += 1
        return self.current

    def unpin(self, snapshot: Snapshot) -> None:
        snapshot.num_pins -= 1
        if snapshot.num_pins == 0 and snapshot in self._retired:
            self._retired.remove(snapshot)
            self._pool.put_back(snapshot.buffer)

    def publish(self, buffer: Buffer) -> Snapshot:
        """Makes `buffer`, taken from the pool, the current snapshot, one version on."""
        retired = self.current
        self.current = Snapshot(retired.version + 1, buffer)
        if retired.num_pins:
            self._retired.add(retired)
        else:
            self._pool.put_back(retired.buffer)
        return self.current
