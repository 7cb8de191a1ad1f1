"""Builds a run's points as pushes arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensorspark.history.reports import Point

_MAX_POINTS = 2000


@dataclass(frozen=True)
class PointSums:
    """A `Point` before the division: means times weights would not give these sums back to the last bit.

    Attributes:
        weight: rows since the point before.
        sums: by fetch name, over those rows.
    """

    seconds: float
    num_steps: int
    num_samples: int
    weight: int
    sums: Mapping[str, float]


@dataclass(frozen=True)
class RecorderState:
    """What a `Recorder` must know to go on as another would have: its points from then on are equal, bit for bit.

    Attributes:
        stride: pushes that make up a point.
        num_in_last: pushes in the last point.
    """

    stride: int
    num_in_last: int
    points: tuple[PointSums, ...]


class Recorder:
    """Builds a run's points as pushes arrive; when there are too many, merges them pairwise.

    Args:
        points: what another recorder exported; this one goes on there.
    """

    def __init__(self, max_points: int = _MAX_POINTS, points: RecorderState | None = None) -> None:
        self._max_points = max_points
        self._stride = points.stride if points else 1
        self._num_in_last = points.num_in_last if points else 0
        self._points = [Sums.of(sums) for sums in points.points] if points else []
        self.num_steps = self._points[-1].num_steps if self._points else 0
        self.num_samples = self._points[-1].num_samples if self._points else 0

    def record(self, seconds: float, num_steps: int, num_samples: int, sums: Mapping[str, float]) -> None:
        """Adds a push.

        Args:
            seconds: since the run began.
            num_steps: local steps that the push stands for.
            num_samples: their rows.
            sums: by fetch name, the sum over those rows of the step's value.
        """
        self.num_steps += num_steps
        self.num_samples += num_samples
        if self._num_in_last % self._stride == 0:
            self._halve_if_full()
            self._points.append(Sums())
            self._num_in_last = 0
        self._num_in_last += 1
        self._points[-1].add(seconds, self.num_steps, self.num_samples, num_samples, sums)

    def points(self) -> tuple[Point, ...]:
        """The course so far."""
        return tuple(sums.point() for sums in self._points)

    def export(self) -> RecorderState:
        """All that is known so far, for a checkpoint; what is recorded later does not change it."""
        return RecorderState(self._stride, self._num_in_last, tuple(sums.export() for sums in self._points))

    def last(self) -> Point | None:
        """The newest point; None before the first push."""
        return self._points[-1].point() if self._points else None

    def _halve_if_full(self) -> None:
        if len(self._points) < self._max_points:
            return
        for left, right in zip(self._points[::2], self._points[1::2], strict=False):
            left.add(right.seconds, right.num_steps, right.num_samples, right.weight, right.sums)
        self._points = self._points[::2]
        self._stride *= 2


@dataclass
class Sums:
    """A point in the making.

    Attributes:
        weight: rows added.
        sums: by fetch name, over those rows.
    """

    seconds: float = 0.0
    num_steps: int = 0
    num_samples: int = 0
    weight: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, exported: PointSums) -> Sums:
        return cls(**{**vars(exported), "sums": dict(exported.sums)})

    def export(self) -> PointSums:
        return PointSums(**{**vars(self), "sums": dict(self.sums)})

    def add(self, seconds: float, num_steps: int, num_samples: int, weight: int, sums: Mapping[str, float]) -> None:
        """Adds a push; `num_steps` and `num_samples` are the run's so far."""
        self.seconds, self.num_steps, self.num_samples = seconds, num_steps, num_samples
        self.weight += weight
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def point(self) -> Point:
        """The means over the rows; none where there are no rows."""
        means = {name: total / self.weight for name, total in self.sums.items()} if self.weight else {}
        return Point(self.seconds, self.num_steps, self.num_samples, means)
