"""A clock of events, cores that threads share, and links that messages share: what the scale simulation is made of.

Nothing here waits or runs in parallel: an event is a moment and what is to be done then, and events are taken from a
heap in order. Two events of one moment are taken in the order in which they were made, so that a run repeats exactly.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

Action = Callable[[], None]

# A burst of work that is so short has ended: what is left is rounding.
_NOTHING_S = 1e-9
# Of a Linux that is built with CONFIG_HZ=250, as most are.
_TICK_S = 0.004
# `sysctl_sched_base_slice` of Linux, which is multiplied by 1 + log2 of the cores, of 8 at most.
_BASE_SLICE_S = 0.0007


class Clock:
    """Simulated seconds, and what is to be done when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._events: list[tuple[float, int, Action]] = []

    def after(self, delay_s: float, action: Action) -> None:
        self.num_events += 1
        heapq.heappush(self._events, (self.now + delay_s, self.num_events, action))

    def run(self) -> None:
        """Does what is due, until nothing is left."""
        events = self._events
        while events:
            self.now, _, action = heapq.heappop(events)
            action()


class Thread:
    """Works its jobs off in turn, on one of `cores`, when it gets one."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._jobs: deque[tuple[float, Action]] = deque()
        self._num_next = 0  # jobs that the one that is being done has put before the others
        self.remaining_s = 0.0
        """Of the job that is being done, seconds of a core."""
        self.used_s = 0.0
        """Seconds of a core so far, as the scheduler counts them."""
        self.busy_s = 0.0
        """Seconds of a core so far, of all jobs that have ended."""
        self.core: int | None = None
        """Index of the core that it was on last."""
        self.ran_at = -1.0
        """When it left a core last."""

    def submit(self, seconds: float, done: Action) -> None:
        """Adds a job of so many seconds of a core; `done` is called when it has ended."""
        self._jobs.append((seconds, done))
        if len(self._jobs) == 1:
            self.remaining_s = seconds
            self._cores.wake(self)

    def submit_next(self, seconds: float, done: Action) -> None:
        """Adds a job that goes on where the one that ends now does: before the others, and behind earlier such jobs."""
        if not self._jobs:
            self.submit(seconds, done)
            return
        self._num_next += 1
        self._jobs.insert(self._num_next, (seconds, done))

    def end_job(self) -> bool:
        """The job has ended; returns whether there is another."""
        # It stays in the queue while `done` is called, so that jobs submitted there find the thread awake.
        seconds, done = self._jobs[0]
        self.busy_s += seconds
        done()
        self._jobs.popleft()
        self._num_next = 0
        if not self._jobs:
            return False
        self.remaining_s = self._jobs[0][0]
        return True


class _Core:
    """One core: who is on it, and who waits for it."""

    __slots__ = ("number", "picked_at", "queue", "since", "thread")

    def __init__(self) -> None:
        self.thread: Thread | None = None
        self.queue: list[tuple[float, int, Thread]] = []
        self.picked_at = 0.0
        self.since = 0.0  # what went before is accounted
        self.number = 0  # of the event that counts: those scheduled before it are void


class Cores:
    """The cores of a machine, shared as Linux does it (EEVDF): each has a queue, and who has used least comes next.

    A thread that wakes gets the core that it was on, or one that is idle, or waits at the core of whoever has woken it
    where nobody else waits there, or else at its own; it counts as having used as much as those there on average. A
    core changes hands when a slice ends. One that gets idle takes over a thread that waits elsewhere, unless that has
    only just run: its data are in the other core's cache. So a thread may wait while another core is idle, until the
    next tick. Queues of busy cores are not made equal: Linux does so too seldom to matter here.

    Args:
        num_cores: that may work at a time.
        hot_s: for how long a thread that has run is not taken over.
    """

    def __init__(self, clock: Clock, num_cores: int, hot_s: float = 0.0005) -> None:
        if num_cores < 1:
            raise ValueError(f"expected at least one core, got {num_cores}")
        self._clock = clock
        self._slice_s = _BASE_SLICE_S * (1 + int(math.log2(min(num_cores, 8))))
        self._hot_s = hot_s
        self._cores = [_Core() for _ in range(num_cores)]
        self._num_waits = 0
        self._num_waiting = 0
        self._waking: _Core | None = None  # whose thread is doing what wakes others
        self._is_balancing = False

    def wake(self, thread: Thread) -> None:
        """A thread that slept has something to do."""
        core = self._core_for(thread)
        self._account(core)
        if core.thread is None:
            self._run(core, thread)
        else:
            used_s = [core.thread.used_s, *(entry[0] for entry in core.queue)]
            thread.used_s = sum(used_s) / len(used_s)
            thread.core = self._cores.index(core)
            self._wait(core, thread)
            self._schedule(core)

    def _core_for(self, thread: Thread) -> _Core:
        shortest = min(self._cores, key=lambda core: len(core.queue))
        own = shortest if thread.core is None else self._cores[thread.core]
        if own.thread is None:
            return own
        for core in self._cores:
            if core.thread is None:
                return core
        is_new = thread.core is None
        return own if is_new or self._waking is None or self._waking.queue else self._waking

    def _wait(self, core: _Core, thread: Thread) -> None:
        self._num_waits += 1
        self._num_waiting += 1
        heapq.heappush(core.queue, (thread.used_s, self._num_waits, thread))
        self._balance_later()

    def _run(self, core: _Core, thread: Thread) -> None:
        core.thread = thread
        thread.core = self._cores.index(core)
        core.picked_at = core.since = self._clock.now
        self._schedule(core)

    def _schedule(self, core: _Core) -> None:
        """Comes back when the job ends, or, where others wait, when the core may change hands."""
        assert core.thread is not None
        seconds = core.thread.remaining_s
        if core.queue:
            seconds = min(seconds, max(0.0, core.picked_at + self._slice_s - self._clock.now))
        core.number += 1
        number = core.number
        self._clock.after(seconds, lambda: self._come_back(core, number))

    def _come_back(self, core: _Core, number: int) -> None:
        if number != core.number:
            return
        self._account(core)
        thread = core.thread
        assert thread is not None
        if thread.remaining_s > _NOTHING_S:
            self._end_slice(core)
            return
        before, self._waking = self._waking, core
        has_more = thread.end_job()
        self._waking = before
        if has_more:
            self._schedule(core)
        else:
            self._leave(core)

    def _end_slice(self, core: _Core) -> None:
        thread = core.thread
        assert thread is not None
        if core.queue and core.queue[0][0] < thread.used_s:
            self._wait(core, thread)
            self._leave(core)
        else:
            core.picked_at = self._clock.now
            self._schedule(core)

    def _leave(self, core: _Core) -> None:
        assert core.thread is not None
        core.thread.ran_at = self._clock.now
        core.thread = None
        core.number += 1
        if not core.queue and self._num_waiting:
            self._take_over(core)
        if core.queue:
            self._num_waiting -= 1
            self._run(core, heapq.heappop(core.queue)[2])

    def _take_over(self, core: _Core) -> None:
        """Moves a thread to `core` from the longest queue."""
        longest = max(self._cores, key=lambda other: len(other.queue))
        cold_at = self._clock.now - self._hot_s + _NOTHING_S
        for entry in sorted(longest.queue):
            if entry[2].ran_at <= cold_at:
                longest.queue.remove(entry)
                heapq.heapify(longest.queue)
                heapq.heappush(core.queue, entry)
                return

    def _balance_later(self) -> None:
        """At the next tick, cores without work take threads over."""
        if not self._is_balancing and len(self._cores) > 1:
            self._is_balancing = True
            seconds = _TICK_S - self._clock.now % _TICK_S
            self._clock.after(seconds if seconds > _NOTHING_S else _TICK_S, self._balance)

    def _balance(self) -> None:
        self._is_balancing = False
        for core in self._cores:
            if core.thread is None and self._num_waiting:
                self._take_over(core)
                if core.queue:
                    self._num_waiting -= 1
                    self._run(core, heapq.heappop(core.queue)[2])
        if self._num_waiting:
            self._balance_later()

    def _account(self, core: _Core) -> None:
        if core.thread is not None:
            seconds = self._clock.now - core.since
            core.thread.remaining_s -= seconds
            core.thread.used_s += seconds
        core.since = self._clock.now


class Link:
    """One direction of a network link: messages go one after the other, each at full speed.

    Args:
        bytes_per_s: None for loopback, whose copying is the processors' work.
        latency_s: from the sender to the receiver, of all messages.
    """

    def __init__(self, clock: Clock, bytes_per_s: float | None, latency_s: float) -> None:
        self._clock = clock
        self._s_per_byte = 0.0 if bytes_per_s is None else 1 / bytes_per_s
        self._latency_s = latency_s
        self._free_at = 0.0
        self.busy_s = 0.0

    def send(self, num_bytes: float, arrived: Action) -> None:
        """Calls `arrived` when all the bytes are at the receiver."""
        if not self._s_per_byte and not self._latency_s:
            arrived()  # in the course of sending, as on loopback
            return
        seconds = num_bytes * self._s_per_byte
        self.busy_s += seconds
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self._clock.after(self._free_at - self._clock.now + self._latency_s, arrived)


class Transfer:
    """A message on its way from one thread to another, in chunks, of which at most `window` are under way.

    Sending a chunk takes the sender's time, then the link's, then the receiver's. The receiver takes none until it is
    admitted: it may be out of buffers.

    Args:
        num_chunks: at least 1.
        send_s, receive_s: seconds of a core for all chunks together.
        sent, received: called when the last chunk is.
    """

    def __init__(
        self,
        sender: Thread,
        link: Link,
        receiver: Thread,
        *,
        num_bytes: float,
        num_chunks: int,
        window: int,
        send_s: float,
        receive_s: float,
        sent: Action,
        received: Action,
        ask_to_admit: Callable[[Action], None] | None = None,
    ) -> None:
        self._sender, self._link, self._receiver = sender, link, receiver
        self._chunk_bytes = num_bytes / num_chunks
        self._send_s, self._receive_s = send_s / num_chunks, receive_s / num_chunks
        self._sent, self._received = sent, received
        self._ask_to_admit = ask_to_admit
        self._is_admitted = ask_to_admit is None
        self._num_unsent = self._num_unreceived = num_chunks
        self._num_arrived = 0  # and not admitted yet
        self._window = window
        self._is_sending = self._is_at_once = False

    def start(self, *, at_once: bool = False) -> None:
        """Begins; `at_once`: before what else the sender has to do, until the window is full for the first time."""
        self._is_at_once = at_once
        self._send_next()

    def _send_next(self) -> None:
        if not self._is_sending and self._num_unsent and self._num_unreceived - self._num_unsent < self._window:
            self._is_sending = True
            submit = self._sender.submit_next if self._is_at_once else self._sender.submit
            submit(self._send_s, self._on_sent)

    def _on_sent(self) -> None:
        self._is_sending = False
        self._num_unsent -= 1
        self._link.send(self._chunk_bytes, self._on_arrived)
        if self._num_unsent:
            self._send_next()
            self._is_at_once &= self._is_sending
        else:
            self._sent()

    def _on_arrived(self) -> None:
        if self._is_admitted:
            self._receiver.submit(self._receive_s, self._on_received)
            return
        self._num_arrived += 1
        if self._ask_to_admit is not None:
            ask, self._ask_to_admit = self._ask_to_admit, None
            ask(self._admit)

    def _admit(self) -> None:
        self._is_admitted = True
        for _ in range(self._num_arrived):
            self._receiver.submit(self._receive_s, self._on_received)

    def _on_received(self) -> None:
        self._num_unreceived -= 1
        if self._num_unreceived:
            self._send_next()
        else:
            self._received()
