"""The server's memory: snapshots that are never torn, and receive buffers that never outgrow their bound."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from tensorspark.weights.layout import Buffer, WeightLayout

# One that is current, one being written, one that a slow puller may still be reading.
_NUM_SNAPSHOTS = 3


@dataclass(eq=False)
class Snapshot:
    """One version of the weights. Nobody writes to `buffer` while the snapshot is current or pinned."""

    version: int
    buffer: Buffer
    num_pins: int = 0


class SnapshotStore:
    """Versions of the weights in a fixed number of recycled buffers. Not thread-safe: the server's loop owns it."""

    def __init__(self, layout: WeightLayout) -> None:
        self._free = [layout.allocate() for _ in range(_NUM_SNAPSHOTS - 1)]
        self._retired: list[Snapshot] = []
        self.current = Snapshot(0, layout.allocate())

    def pin(self) -> Snapshot:
        """The current snapshot, kept as it is until `unpin`."""
        self.current.num_pins += 1
        return self.current

    def unpin(self, snapshot: Snapshot) -> None:
        snapshot.num_pins -= 1
        if snapshot.num_pins == 0 and snapshot in self._retired:
            self._retired.remove(snapshot)
            self._free.append(snapshot.buffer)

    def take_free(self) -> Buffer | None:
        """A buffer for the next version, or None while readers hold them all."""
        return self._free.pop() if self._free else None

    def put_back(self, buffer: Buffer) -> None:
        """Returns a buffer of `take_free` that was not published."""
        self._free.append(buffer)

    def publish(self, buffer: Buffer) -> Snapshot:
        """Makes `buffer`, from `take_free`, the current snapshot, one version on."""
        retired = self.current
        self.current = Snapshot(retired.version + 1, buffer)
        if retired.num_pins:
            self._retired.append(retired)
        else:
            self._free.append(retired.buffer)
        return self.current


class ReceivePool:
    """Buffers for pushes in arrival, at most `limit_bytes` of them (and at least one).

    Whoever finds it empty waits, in turn: its connection is not read meanwhile, and TCP pushes back on the worker.
    """

    def __init__(self, layout: WeightLayout, limit_bytes: int) -> None:
        self._layout = layout
        self._num_unallocated = max(1, limit_bytes // max(1, layout.num_bytes))
        self._free: list[Buffer] = []
        self._waiters: deque[asyncio.Future[Buffer]] = deque()

    async def take(self) -> Buffer:
        if self._free:
            return self._free.pop()
        if self._num_unallocated:
            self._num_unallocated -= 1
            return self._layout.allocate()
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
