"""How fast a run goes, how stale its pushes are and how its workers stand: points of a curve by steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tensorspark.telemetry.records import Sample

_POINT_S = 2.0


@dataclass(frozen=True)
class PerformancePoint:
    """What has changed since the point before.

    Attributes:
        scalars: by tag, such as ``performance/samples_per_s``.
        staleness: how many pushes were based on weights so many versions old; empty where there were none.
    """

    seconds: float
    num_steps: int
    scalars: dict[str, float]
    staleness: tuple[int, ...] = ()


class Performance:
    """Makes points from samples: at most one in two seconds.

    Rates are between points with steps between them. So a pause shows in the point after it, as a low rate, and no two
    such points are at one step, of which TensorBoard would keep the last.
    """

    def __init__(self) -> None:
        self._before: Sample | None = None
        self._newest: Sample | None = None
        self._staleness: tuple[int, ...] = ()
        self._workers: dict[str, float] = {}
        self._workers_s = -math.inf

    def add(self, sample: Sample) -> PerformancePoint | None:
        """Takes the next sample; None where it is no time for a point, or nothing has changed."""
        self._newest = sample
        return self._point(_POINT_S)

    def rest(self) -> PerformancePoint | None:
        """The last point: what was too soon for one."""
        return self._point(0.0)

    def _point(self, interval_s: float) -> PerformancePoint | None:
        now = self._newest
        if now is None:
            return None
        before = self._before = self._before or now
        workers = {"workers/live": now.num_live, "workers/waiting": now.num_waiting, "workers/lost": now.num_lost}
        staleness: tuple[int, ...] = ()
        scalars: dict[str, float] = {}
        if now.num_steps > before.num_steps and now.seconds - before.seconds >= max(interval_s, 1e-3):
            staleness = self._take_staleness(now)
            scalars = {**_rates(before, now), **_mean(staleness), **workers}
            self._before = now
        elif workers != self._workers and now.seconds - self._workers_s >= interval_s:
            scalars = {**workers}
        if not scalars:
            return None
        self._workers, self._workers_s = {**workers}, now.seconds
        return PerformancePoint(now.seconds, now.num_steps, scalars, staleness)

    def _take_staleness(self, now: Sample) -> tuple[int, ...]:
        """Of the pushes since the last time, without the empty bins at the end."""
        pairs = itertools.zip_longest(now.staleness, self._staleness, fillvalue=0)
        counts = [count - before for count, before in pairs]
        self._staleness = now.staleness
        while counts and not counts[-1]:
            counts.pop()
        return tuple(counts)


def _rates(before: Sample, now: Sample) -> dict[str, float]:
    duration_s = now.seconds - before.seconds
    return {
        "performance/samples_per_s": (now.num_samples - before.num_samples) / duration_s,
        "performance/steps_per_s": (now.num_steps - before.num_steps) / duration_s,
        "performance/pushed_bytes_per_s": (now.num_bytes_pushed - before.num_bytes_pushed) / duration_s,
        "performance/pulled_bytes_per_s": (now.num_bytes_pulled - before.num_bytes_pulled) / duration_s,
    }


def _mean(staleness: tuple[int, ...]) -> dict[str, float]:
    if not staleness:
        return {}
    return {"staleness/mean": sum(version * count for version, count in enumerate(staleness)) / sum(staleness)}
