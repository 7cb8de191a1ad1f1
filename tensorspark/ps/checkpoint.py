"""Checkpoints of a run: what they hold, and how they are written as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensorspark.history import Point
from tensorspark.ps.state import PartitionProgress
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import Buffer, WeightLayout

Plain = int | float | str | bool | None


@dataclass(frozen=True)
class RunCheckpoint:
    """A run at one moment: exactly those pushes are in `weights` that the partitions' cursors stand for.

    Attributes:
        version: of the weights.
        seconds: since the run began, those before a restore included.
        plan: what must stay the same for the run to be continued (seed, batch size, ...), by name.
        combiner: class name of the combiner.
        points: the run's course so far.
        is_complete: whether every partition was trained to its end.
    """

    layout: WeightLayout
    weights: Buffer
    version: int
    seconds: float
    partitions: tuple[PartitionProgress, ...]
    points: tuple[Point, ...]
    plan: Mapping[str, Plain]
    combiner: str
    combiner_settings: Mapping[str, Plain]
    combiner_state: CombinerState
    is_complete: bool
