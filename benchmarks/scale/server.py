"""A simulated parameter server, or one shard: its loop, its thread for arithmetic, its buffers and its gate.

It decides as `tensorspark.ps` does. The loop receives and sends, in chunks; folds of large weights go one by one to the
other thread and come back through the loop, where a push is accepted and those who wait for it are answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from benchmarks.scale.engine import Action, Clock, Cores, Link, Thread, Transfer
from benchmarks.scale.model import Cluster, Costs, Plan, at_size

# As `tensorspark.ps.rounds` and `tensorspark.ps.buffers` have them.
_INLINE_BYTES = 2**20
_NUM_RESERVED = 3


class Gate:
    """The rule of `tensorspark.ps.sync.Gate` where nobody comes, goes or dies; a step takes the same time for any
    number of workers."""

    def __init__(self, staleness: int | None, num_workers: int) -> None:
        self._staleness = staleness
        self._rounds = [0] * num_workers
        self._num_at = {0: num_workers}  # by round
        self.floor = 0

    def lead(self, worker: int) -> int:
        """Rounds that the worker is ahead of the slowest."""
        return self._rounds[worker] - self.floor

    def may_begin(self, worker: int) -> bool:
        return self._staleness is None or self.lead(worker) <= self._staleness

    def advance(self, worker: int) -> None:
        """The worker's push was published."""
        before = self._rounds[worker]
        self._rounds[worker] = before + 1
        self._num_at[before] -= 1
        self._num_at[before + 1] = self._num_at.get(before + 1, 0) + 1
        if not self._num_at[before]:
            del self._num_at[before]
            if before == self.floor:
                self.floor = min(self._num_at)


class Buffers:
    """The rule of `tensorspark.ps.buffers.BufferPool`, of which one buffer holds the weights already."""

    def __init__(self, limit_bytes: int, num_bytes: float) -> None:
        self._num_free = max(1, int(limit_bytes // max(1.0, num_bytes))) + _NUM_RESERVED - 1
        self._waiters: deque[tuple[Action, Callable[[], bool]]] = deque()

    def take(self, taken: Action, may_take_last: Callable[[], bool]) -> None:
        self._waiters.append((taken, may_take_last))
        self.serve()

    def put_back(self) -> None:
        self._num_free += 1
        self.serve()

    def serve(self) -> None:
        """Gives free buffers to those who wait."""
        # Most often nobody may take one, and a thousand may wait.
        if not self._num_free or not self._waiters:
            return
        waiting, self._waiters = self._waiters, deque()
        while waiting and self._num_free:
            taken, may_take_last = waiting.popleft()
            if self._num_free > 2 or may_take_last():
                self._num_free -= 1
                taken()
            else:
                self._waiters.append((taken, may_take_last))
        self._waiters.extend(waiting)


class Server:
    """One server process, or one shard of several.

    Args:
        cores: of its machine.
        inward, outward: its link.
        num_bytes: of the weights that it holds.
        on_published: told the number of pushes in each round that is published.
    """

    def __init__(
        self,
        clock: Clock,
        cores: Cores,
        inward: Link,
        outward: Link,
        num_bytes: float,
        costs: Costs,
        cluster: Cluster,
        plan: Plan,
        on_published: Callable[[int], None],
    ) -> None:
        self.loop, self.arithmetic = Thread(cores), Thread(cores)
        self.inward, self.outward = inward, outward
        self.gate = Gate(plan.staleness, plan.num_workers)
        self.max_lead = 0
        self.staleness_sum = 0
        self._num_bytes, self._costs, self._cluster, self._plan = num_bytes, costs, cluster, plan
        self._is_bulk = plan.staleness == 0
        self._buffers = Buffers(plan.receive_buffer_bytes, num_bytes)
        self._version = 0
        self._pins: dict[int, int] = {}  # by version
        self._based_on = [0] * plan.num_workers
        self._is_unread = [False] * plan.num_workers
        self._is_unpublished = [False] * plan.num_workers
        self._pulls: dict[int, Action] = {}  # by worker, called when the snapshot is there
        self._threads: dict[int, Thread] = {}
        self._asked: dict[int, Action] = {}  # by worker, a pull that is read when its push has been
        self._held: set[int] = set()  # bulk-synchronous: received, and not folded yet
        self._first_missing = 0
        self._is_closing = False
        self._queue: deque[int | None] = deque()  # a worker's push to fold; None: publish
        self._folded: list[int] = []
        self._is_working = False
        self._on_published = on_published
        self._prepare_costs()

    def _prepare_costs(self) -> None:
        costs, plan, num_bytes = self._costs, self._plan, self._num_bytes
        push, pull = plan.push_codec, plan.pull_codec
        self.push_bytes, self.pull_bytes = num_bytes * push.ratio, num_bytes * pull.ratio
        self.push_chunks = self._cluster.chunks(self.push_bytes)
        self.pull_chunks = self._cluster.chunks(self.pull_bytes)
        self._accept_s = costs.server_push[0][1] + costs.decide_s * plan.num_workers
        self.receive_s = at_size(costs.server_push, self.push_bytes) - costs.server_push[0][1]
        self._answer_s = costs.server_pull[0][1]
        self._send_s = at_size(costs.server_pull, self.pull_bytes) - self._answer_s
        self._take_s = at_size(costs.client_pull, self.pull_bytes) - costs.client_pull[0][1]
        self._is_inline = num_bytes <= _INLINE_BYTES
        decode_s = push.decode_s * num_bytes
        self._fold_s = decode_s + (0.0 if self._is_inline else max(0.0, at_size(costs.fold, num_bytes)))
        self._publish_s = pull.encode_s * num_bytes

    # What comes from workers

    def begin_push(self, worker: int) -> None:
        """The worker's push is under way: a pull of its is answered after it."""
        self._is_unread[worker] = self._is_unpublished[worker] = True

    def admit(self, worker: int, admitted: Action) -> None:
        """A push has begun to arrive: it is received when there is a buffer."""
        self._buffers.take(admitted, lambda: not self._is_bulk or worker <= self._first_missing)

    def on_push(self, worker: int) -> None:
        """A push has arrived whole."""
        self.loop.submit(self._accept_s, lambda: self._accept(worker))

    def on_pull(self, worker: int, thread: Thread, received: Action) -> None:
        """A worker asks for a snapshot, which its `thread` takes in."""
        self._threads[worker] = thread

        def ask() -> None:
            self._pulls[worker] = received
            self._answer_if_due(worker)

        if self._is_unread[worker]:
            self._asked[worker] = ask
        else:
            self.loop.submit(self._answer_s, ask)

    # Decisions

    def _accept(self, worker: int) -> None:
        if self._is_bulk:
            self._held.add(worker)
            while self._first_missing in self._held:
                self._held.remove(self._first_missing)
                self._queue.append(self._first_missing)
                self._first_missing += 1
            if self._first_missing == self._plan.num_workers:
                self._is_closing = True
                self._queue.append(None)
            self._buffers.serve()
        else:
            self._queue += (worker, None)
        self._work()
        self._is_unread[worker] = False
        if worker in self._asked:
            self.loop.submit_next(self._answer_s, self._asked.pop(worker))

    def _work(self) -> None:
        if self._is_working or not self._queue:
            return
        self._is_working = True
        worker = self._queue.popleft()
        seconds = self._publish_s if worker is None else self._fold_s

        def end() -> None:
            self._is_working = False
            if worker is None:
                self._publish()
            else:
                self._fold(worker)
            self._work()

        if self._is_inline:
            self.loop.submit_next(seconds, end)
        else:
            self.arithmetic.submit(seconds, lambda: self.loop.submit(0.0, end))

    def _fold(self, worker: int) -> None:
        self.staleness_sum += self._version - self._based_on[worker]
        if self._folded:
            self._buffers.put_back()  # what was folded before this push
        self._folded.append(worker)

    def _publish(self) -> None:
        if not self._pins.get(self._version):
            self._buffers.put_back()
        self._version += 1
        folded, self._folded = self._folded, []
        for worker in folded:
            self._is_unpublished[worker] = False
            self.gate.advance(worker)
        if self._is_bulk:
            self._is_closing = False
            self._first_missing = 0
        self._on_published(len(folded))
        for worker in list(self._pulls):
            self._answer_if_due(worker)
        self._buffers.serve()

    def _answer_if_due(self, worker: int) -> None:
        if self._is_closing or self._is_unpublished[worker] or not self.gate.may_begin(worker):
            return
        self.max_lead = max(self.max_lead, self.gate.lead(worker))
        received, version = self._pulls.pop(worker), self._version
        self._based_on[worker] = version
        self._pins[version] = self._pins.get(version, 0) + 1
        num_chunks, window = self.pull_chunks

        def taken() -> None:
            self._unpin(version)
            received()

        Transfer(
            self.loop,
            self.outward,
            self._threads[worker],
            num_bytes=self.pull_bytes,
            num_chunks=num_chunks,
            window=window,
            send_s=self._send_s,
            receive_s=self._take_s,
            sent=lambda: None,
            received=taken,
        ).start(at_once=True)

    def _unpin(self, version: int) -> None:
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]
            if version != self._version:
                self._buffers.put_back()
