"""Who may go on: the staleness gate, pure.

A *round* of a worker is a pull, its local steps and a push. With staleness k, a worker may begin a round only while it
is at most k rounds ahead of the slowest worker that counts (the *floor*). These count: workers that hold a partition,
and partitions whose worker died unfinished, until `recovery_timeout_s` after the death. A partition that ended, or that
waits for a slot, or *rests* at the end of an epoch, holds nobody up; one that comes late, or back from its rest, joins
at the floor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncPlan:
    """How a run's workers are kept in step.

    Attributes:
        staleness: rounds that the fastest worker may lead the slowest that runs: 0 is bulk-synchronous, more is
            stale-synchronous (SSP, Ho et al. 2013), None asynchronous (Downpour, Dean et al. 2012).
        num_first: workers that the first round waits for, unless it is asynchronous, and that an epoch's end waits for.
        start_timeout_s: how long it waits for them, from the first one on.
        recovery_timeout_s: how long a partition whose worker died holds up the others.
    """

    staleness: int | None = None
    num_first: int = 1
    start_timeout_s: float = 60.0
    recovery_timeout_s: float = 120.0

    @property
    def is_bulk(self) -> bool:
        return self.staleness == 0


class Gate:
    """Rounds of the workers that count.

    Times are seconds of the caller's monotonic clock.

    Args:
        rounds: by partition, the round to begin with: zeros, or those of a restored run.
        ended: partitions that a restored run has trained to their end.
    """

    def __init__(self, plan: SyncPlan, rounds: Sequence[int], ended: frozenset[int] = frozenset()) -> None:
        self._plan = plan
        # In a bulk-synchronous run all go on together: no round of a restored run is behind another.
        self._rounds = [max(rounds, default=0)] * len(rounds) if plan.is_bulk else list(rounds)
        self._running: set[int] = set()
        self._lost_at: dict[int, float] = {}
        self._given_up: set[int] = set()
        self._resting: set[int] = set()  # at the end of their epoch, whether somebody holds them or not
        self._came: set[int] = set()
        self._first_came_at: float | None = None
        self._recovery_timeout_s = plan.recovery_timeout_s
        self._floor = min((count for index, count in enumerate(self._rounds) if index not in ended), default=0)
        self.has_assembled = False  # whoever the first round and the first epoch's end wait for

    @property
    def has_begun(self) -> bool:
        return self.has_assembled or self._plan.staleness is None

    @property
    def awaited(self) -> set[int]:
        """Partitions that an epoch's end waits for: those that count, and those that rest."""
        return self._running | self._lost_at.keys()

    @property
    def num_awaited(self) -> int:
        return len(self._running) + len(self._lost_at)

    @property
    def counted(self) -> set[int]:
        """Partitions that count."""
        return self.awaited - self._resting

    @property
    def num_counted(self) -> int:
        return len(self.counted) if self._resting else self.num_awaited

    @property
    def num_lost(self) -> int:
        return len(self._lost_at) + len(self._given_up)

    @property
    def num_resting(self) -> int:
        """Workers that rest."""
        return len(self._running & self._resting)

    def round_of(self, partition: int) -> int:
        return self._rounds[partition]

    def may_begin(self, partition: int) -> bool:
        """Whether the partition's worker may begin its round."""
        if self._plan.staleness is None:
            return True
        return self.has_begun and self._rounds[partition] - self._floor <= self._plan.staleness

    def join(self, partition: int, now: float, *, is_finished: bool = False) -> None:
        """A worker holds the partition: its first, a successor, or one that comes to a partition already finished."""
        self._came.add(partition)
        if self._first_came_at is None:
            self._first_came_at = now
        if len(self._came) >= self._plan.num_first:
            self.has_assembled = True
        if is_finished:
            if self.has_begun:  # by this one, maybe
                self._raise_floor()
            return
        if partition not in self._lost_at:
            self._rounds[partition] = max(self._rounds[partition], self._floor)
        if partition in self._given_up and self._plan.staleness is not None:  # else its absence was not told either
            logger.warning("partition %d is back after its recovery timeout, and counts again", partition)
        self._lost_at.pop(partition, None)
        self._given_up.discard(partition)
        self._running.add(partition)
        if self.has_begun:  # of a restored run, those that are behind may not have come
            self._raise_floor()

    def lose(self, partition: int, now: float) -> None:
        """The worker died before the partition's end."""
        if partition in self._running:
            self._running.remove(partition)
            self._lost_at[partition] = now

    def end(self, partition: int) -> None:
        """The partition is trained to its end."""
        self._running.discard(partition)
        self._raise_floor()

    def rest(self, partition: int) -> None:
        """The partition is at the end of its epoch, and does not count until it is woken."""
        self._resting.add(partition)
        if self.has_begun:
            self._raise_floor()

    def wake(self, partition: int) -> None:
        """The next epoch begins: the partition counts again, from the floor on."""
        if partition in self._resting:
            self._resting.remove(partition)
            self._rounds[partition] = max(self._rounds[partition], self._floor)

    def hurry(self) -> None:
        """The run is about to end: from now on nobody waits for workers that have not come, or whose worker died."""
        self.has_assembled = True
        self._recovery_timeout_s = 0.0

    def advance(self, partitions: set[int]) -> None:
        """Pushes of these partitions were published: their next round is due."""
        for partition in partitions:
            self._rounds[partition] += 1
        self._raise_floor()

    def tick(self, now: float, coming: Set[int] = frozenset()) -> bool:
        """Lets deadlines pass; returns whether one did, so that somebody may go on.

        Args:
            coming: partitions whose successor is there, and waits for its predecessor's push to be published.
        """
        has_passed = self._begin_without_absent(now) | self._give_up_lost(now, coming)
        if has_passed:
            self._raise_floor()
        return has_passed

    def _begin_without_absent(self, now: float) -> bool:
        if self.has_assembled or self._first_came_at is None:
            return False
        if now - self._first_came_at < self._plan.start_timeout_s:
            return False
        self.has_assembled = True
        if self._plan.staleness is not None:
            logger.warning(
                "the first round begins with %d of %d workers: the others did not come within %g s of the first "
                "(spark.tensorspark.start.timeout) and will join later",
                len(self._came),
                self._plan.num_first,
                self._plan.start_timeout_s,
            )
        return True

    def _give_up_lost(self, now: float, coming: Set[int]) -> bool:
        deadline = now - self._recovery_timeout_s
        overdue = [partition for partition, at in self._lost_at.items() if at <= deadline and partition not in coming]
        for partition in overdue:
            del self._lost_at[partition]
            self._given_up.add(partition)
            if self._recovery_timeout_s and (self._plan.staleness is not None or self._resting):
                logger.warning(
                    "no successor came for the lost worker of partition %d within %g s "
                    "(spark.tensorspark.recovery.timeout): the others go on without it until one comes",
                    partition,
                    self._plan.recovery_timeout_s,
                )
        return bool(overdue)

    def _raise_floor(self) -> None:
        if self._plan.staleness is not None and self.num_counted:
            rounds = [self._rounds[partition] for partition in self._running if partition not in self._resting]
            rounds += [self._rounds[partition] for partition in self._lost_at if partition not in self._resting]
            self._floor = max(self._floor, min(rounds))
