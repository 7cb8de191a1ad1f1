"""What the server's state machine is told and what it decides: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensorspark.errors import RefusedError
from tensorspark.history import WorkerReport


@dataclass(frozen=True, order=True)
class Cursor:
    """How far a partition is trained: `batch` batches of epoch `epoch` (both from 0) are in the weights."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Registration:
    """A task that wants to train a partition.

    Attributes:
        attempt: Spark's ``taskAttemptId``, which no other task of the application has.
        is_resuming: the attempt held the partition already, lost its connection, and would go on where it was.
    """

    run: int
    partition: int
    attempt: int
    fingerprint: str
    host: str
    is_resuming: bool = False


@dataclass(frozen=True)
class Push:
    """What a worker says about the weights it pushes.

    Attributes:
        sequence: 1 for a partition's first push, then one more each.
        cursor: where a successor is to go on once this push is in.
        num_steps, num_samples: local steps since the last push, and their rows.
        version: of the snapshot that the worker pulled last, which the push is based on.
        sums: by fetch name, the sum over those rows of the step's value.
        progress: share of the partition's whole training that is done, 0 to 1; None where it is not known yet.
    """

    sequence: int
    cursor: Cursor
    num_steps: int
    num_samples: int
    version: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)
    progress: float | None = None


@dataclass(frozen=True)
class PartitionProgress:
    """Where a partition stands: what a successor needs to go on, and what was reported so far."""

    sequence: int
    cursor: Cursor
    round: int
    progress: float | None
    report: WorkerReport


@dataclass(frozen=True)
class Status:
    """A run at one moment, for progress and ``/status``.

    Attributes:
        num_live: partitions that a worker holds.
        num_lost: partitions whose worker died, and that have no successor yet.
        num_waiting: workers that the gate holds up.
        progress: share of the whole training that is done, 0 to 1; None where it is not known yet.
        scalars: the newest means, by fetch name.
    """

    run: int
    num_steps: int
    num_samples: int
    num_partitions: int
    num_live: int
    num_lost: int
    num_standby: int
    num_waiting: int
    num_finished: int
    progress: float | None
    scalars: Mapping[str, float]


# Decisions


@dataclass(frozen=True)
class Grant:
    """Tell the connection that the partition is its own, and where to begin."""

    connection: int
    sequence: int
    cursor: Cursor
    finished: bool


@dataclass(frozen=True)
class Refuse:
    """Tell the connection why not."""

    connection: int
    error: RefusedError


@dataclass(frozen=True)
class SendSnapshot:
    """Send the connection the current snapshot."""

    connection: int


@dataclass(frozen=True)
class Keep:
    """Keep the payload that has just come, until its `Fold` (or the end of the run)."""


@dataclass(frozen=True)
class Fold:
    """Fold the payload that came with `push` into the round, after all that was decided before; then call `folded` or
    `not_folded`."""

    connection: int
    partition: int
    push: Push


@dataclass(frozen=True)
class Publish:
    """Close the round after all folds decided before, publish what they left, and call `published`.

    Attributes:
        num_workers: whose pushes make up the run; None: those whose pushes are in the round.
    """

    num_workers: int | None


@dataclass(frozen=True)
class Accept:
    """Tell the connection that its push is in the weights, or that its partition is noted as finished."""

    connection: int
    sequence: int


@dataclass(frozen=True)
class Close:
    """Close the connection: another of the same attempt has taken its place."""

    connection: int


Decision = Grant | Refuse | SendSnapshot | Keep | Fold | Publish | Accept | Close
