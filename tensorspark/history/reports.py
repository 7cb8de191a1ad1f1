"""What a `History` is made of: the points of a run's course, and its workers' reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
