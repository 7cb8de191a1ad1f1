"""What happened in a run: `History`, which `SparkSession.run` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_POINTS = 2000


@dataclass(frozen=True)
class Point:
    """Training between two points in time, over all workers.

    Attributes:
        seconds: since the run began.
        num_steps: local steps of all workers so far.
        num_samples: rows trained on so far.
        scalars: means over the samples since the point before, by fetch name.
    """

    seconds: float
    num_steps: int
    num_samples: int
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class WorkerReport:
    """What one partition's worker did.

    Attributes:
        host: where the partition's last attempt ran; empty where none came.
        num_attempts: tasks that held the partition, one after the other.
        num_reconnects: times that an attempt lost its connection and came back.
        num_pushed: pushes that arrived whole.
        num_applied: pushes that are in the weights.
        num_refused: pushes that the server refused.
        num_repeated: pushes that came again after a reconnect and were in the weights already.
        num_bytes_pushed, num_bytes_pulled: of weights and of metrics' totals, on the wire, headers not counted.
        epoch_samples, epoch_seconds: rows and duration of the last attempt's finished epochs (of the last 1,000).
        step_s, sync_s: time in local steps, and in pushing, pulling and waiting; reading rows is in neither.
        hidden_s: time that pushing, pulling and waiting took while local steps went on (``overlap``).
        finished: whether the partition was trained to its end.
    """

    partition: int
    host: str = ""
    num_attempts: int = 0
    num_steps: int = 0
    num_samples: int = 0
    num_reconnects: int = 0
    num_pushed: int = 0
    num_applied: int = 0
    num_refused: int = 0
    num_repeated: int = 0
    num_bytes_pushed: int = 0
    num_bytes_pulled: int = 0
    epoch_samples: tuple[int, ...] = ()
    epoch_seconds: tuple[float, ...] = ()
    step_s: float = 0.0
    sync_s: float = 0.0
    hidden_s: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class History:
    """What a run did.

    Attributes:
        name: the session's name.
        num_steps: local steps, over all workers.
        num_samples: rows trained on, over all workers and epochs.
        seconds: from the start of the Spark job to its end.
        seed: of the shuffles: with it the same batches come again.
        points: the run's course, at most 2,000 points; a longer run's neighbours are merged.
        workers: one report a partition.
        history: of `SparkSession.fit`: each metric's values by epoch, as `keras.callbacks.History` has them; metrics of
            held-out rows begin with ``val_``. Those of training are over the epoch's steps of all workers, by samples.
        epoch: the epochs' numbers, from 0.
    """

    name: str
    num_steps: int
    num_samples: int
    seconds: float
    seed: int
    points: tuple[Point, ...] = field(repr=False)
    workers: tuple[WorkerReport, ...] = field(repr=False)
    history: Mapping[str, list[Any]] = field(default_factory=dict)
    epoch: tuple[int, ...] = ()

    @property
    def samples_per_s(self) -> float:
        """Rows trained on in a second, start-up of the workers included."""
        return self.num_samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def scalars(self) -> dict[str, NDArray[np.float64]]:
        """The fetched scalars, one `[len(points)] float64` a fetch; NaN where a point has no value."""
        names = dict.fromkeys(name for point in self.points for name in point.scalars)
        return {name: np.array([point.scalars.get(name, np.nan) for point in self.points]) for name in names}

    @property
    def steps(self) -> NDArray[np.int64]:
        """The points' steps, `[len(points)] int64`: the x axis to `scalars`."""
        return np.array([point.num_steps for point in self.points], np.int64)


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
        self._points = [_Sums.of(sums) for sums in points.points] if points else []
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
            self._points.append(_Sums())
            self._num_in_last = 0
        self._num_in_last += 1
        self._points[-1].add(seconds, self.num_steps, self.num_samples, num_samples, dict(sums))

    def points(self) -> tuple[Point, ...]:
        return tuple(sums.point() for sums in self._points)

    def export(self) -> RecorderState:
        """All that is known so far, for a checkpoint; what is recorded later does not change it."""
        return RecorderState(self._stride, self._num_in_last, tuple(sums.export() for sums in self._points))

    def last(self) -> Point | None:
        return self._points[-1].point() if self._points else None

    def _halve_if_full(self) -> None:
        if len(self._points) < self._max_points:
            return
        for left, right in zip(self._points[::2], self._points[1::2], strict=False):
            left.add(right.seconds, right.num_steps, right.num_samples, right.weight, right.sums)
        self._points = self._points[::2]
        self._stride *= 2


@dataclass
class _Sums:
    """A point in the making: sums weighted by samples."""

    seconds: float = 0.0
    num_steps: int = 0
    num_samples: int = 0
    weight: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, exported: PointSums) -> _Sums:
        return cls(**{**vars(exported), "sums": dict(exported.sums)})

    def export(self) -> PointSums:
        return PointSums(**{**vars(self), "sums": dict(self.sums)})

    def add(self, seconds: float, num_steps: int, num_samples: int, weight: int, sums: dict[str, Any]) -> None:
        self.seconds, self.num_steps, self.num_samples = seconds, num_steps, num_samples
        self.weight += weight
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def point(self) -> Point:
        means = {name: total / self.weight for name, total in self.sums.items()} if self.weight else {}
        return Point(self.seconds, self.num_steps, self.num_samples, means)
