"""The server's memory: a fixed number of buffers, each a push in arrival or a version of the weights.

A push is received into a free buffer and merged in place: the buffer becomes the newest snapshot, and the one that was
newest is free again as soon as nobody reads it. So no weights are copied, and a pull in progress is never torn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tensorspark.weights.layout import Buffer, WeightLayout

# Beside those for receiving: the current snapshot, an older one that a slow puller may still be reading, and what has
# been folded of a bulk-synchronous round.
_NUM_RESERVED = 3


class BufferPool:
    """Buffers of a layout's size, at most `limit_bytes` of them (and at least one) beside those that the weights need.

    Whoever finds it empty waits, in turn: its connection is not read meanwhile, and TCP pushes back on the worker.
    The last two free buffers go only to pushes that can be folded at once: in a bulk-synchronous round the others wait
    for these, and would wait for ever if they held all the buffers. Two, as the round's first push keeps its buffer for
    what is folded, and the next one needs another. Not thread-safe: the server's loop owns it.
    """

    def __init__(self, layout: WeightLayout, limit_bytes: int) -> None:
        self._layout = layout
        self._num_unallocated = max(1, limit_bytes // layout.num_bytes) + _NUM_RESERVED
        self._free: list[Buffer] = []
        self._waiters: deque[tuple[asyncio.Future[Buffer], Callable[[], bool]]] = deque()

    def take_now(self) -> Buffer | None:
        """A free buffer, its content undefined; None where there is none."""
        if self._free:
            return self._free.pop()
        if self._num_unallocated:
            self._num_unallocated -= 1
            return self._layout.allocate()
        return None

    async def take(self, may_take_last: Callable[[], bool] = lambda: True) -> Buffer:
        """A free buffer, its content undefined, when there is one; `may_take_last` is asked when there are just two."""
        if not self._waiters and self._may_take(may_take_last):
            buffer = self.take_now()
            assert buffer is not None
            return buffer
        waiter: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()
        self._waiters.append((waiter, may_take_last))
        self.serve_waiters()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.put_back(waiter.result())
            raise

    def put_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)
        self.serve_waiters()

    def serve_waiters(self) -> None:
        """Gives free buffers to those who wait; to be called too when somebody's `may_take_last` may have changed."""
        waiting, self._waiters = self._waiters, deque()
        for waiter, may_take_last in waiting:
            if waiter.done():
                continue
            if not self._may_take(may_take_last):
                self._waiters.append((waiter, may_take_last))
                continue
            buffer = self.take_now()
            assert buffer is not None
            waiter.set_result(buffer)

    def _may_take(self, may_take_last: Callable[[], bool]) -> bool:
        num_free = len(self._free) + self._num_unallocated
        return num_free > 2 or (num_free > 0 and may_take_last())
