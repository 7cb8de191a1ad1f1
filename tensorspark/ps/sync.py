"""Who may go on: the staleness gate, pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SyncPlan:
    """How a run's workers are kept in step.

    Attributes:
        staleness: rounds that the fastest worker may lead the slowest that runs: 0 is bulk-synchronous, more is
            stale-synchronous (SSP, Ho et al. 2013), None asynchronous.
        num_first: workers that the first round waits for.
        start_timeout_s: how long it waits for them, from the first one on.
        recovery_timeout_s: how long a partition whose worker died holds up the others.
    """

    staleness: int | None = None
    num_first: int = 1
    start_timeout_s: float = 60.0
    recovery_timeout_s: float = 120.0
