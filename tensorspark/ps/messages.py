"""What the server's state machine is told and what it decides: plain values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import ConfigError, RefusedError
from tensorspark.history import WorkerReport

# Two areas under curves of 10,000 thresholds take 640 kB.
MAX_TOTALS_BYTES = 2**20
_MAX_VALUES_BYTES = 2**14  # of all names and numbers that the driver sets: they travel in a frame's header
_TOTAL_BYTES = 8


@dataclass(frozen=True)
class EpochPlan:
    """What a run does between epochs; a run without one never stops for anybody.

    Attributes:
        validates: whether workers evaluate held-out rows with the weights of every epoch's end.
        num_totals: length of the float64 vectors that workers report of an epoch; at most 131,072.
        values: what the driver sets for the first epoch (a learning rate, say), by name.

    Raises:
        ConfigError: no epochs, too many totals or values.
    """

    num_epochs: int
    validates: bool = False
    num_totals: int = 0
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"expected at least one epoch, got {self.num_epochs}")
        if self.num_totals < 0 or self.totals_bytes > MAX_TOTALS_BYTES:
            raise ConfigError(
                f"metrics may keep at most {MAX_TOTALS_BYTES // _TOTAL_BYTES:,} numbers in all, these keep "
                f"{self.num_totals:,}: use fewer metrics, or fewer thresholds"
            )
        require_few(self.values)

    @property
    def totals_bytes(self) -> int:
        return _TOTAL_BYTES * self.num_totals


def require_few(values: Mapping[str, float]) -> None:
    """Raises `ConfigError` where the driver's values would not fit into the header of a frame beside the rest."""
    num_bytes = sum(len(name.encode(errors="replace")) + 16 for name in values)
    if num_bytes > _MAX_VALUES_BYTES:
        raise ConfigError(f"expected values for an epoch of at most {_MAX_VALUES_BYTES} bytes, got {num_bytes}")


class OrderKind(enum.Enum):
    """What a worker that has pulled is to do: an interval, an evaluation of its held-out rows, or nothing more."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    FINISH = "finish"


class Asked(enum.Enum):
    """What a pull is for.

    NEXT: what is to be done next, when it may be. EVALUATE: of a shard that follows another, which has ordered an
    evaluation: the weights of the epoch's end. PEEK: the current weights, at once, as this shard has the push already
    that the worker repeats for others. REST: of a shard that follows another, which has the worker wait: the end of the
    epoch is not to wait for it; answered at once, with no weights, maybe before pushes that are not published yet.
    """

    NEXT = "next"
    EVALUATE = "evaluate"
    PEEK = "peek"
    REST = "rest"


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
        totals: in a run with an `EpochPlan`, what metrics add up over those rows: its `num_totals` numbers, float64,
            little-endian; or empty. All those rows are of one epoch: that before the cursor's step.
        sums: by fetch name, the sum over those rows of the step's value.
        progress: share of the partition's whole training that is done, 0 to 1; None where it is not known yet.
        encoded_bytes: how long the weights are, as the run's codec for pushes has written them; 0: they are raw.
        num_bytes: of weights and totals, on the wire.
    """

    sequence: int
    cursor: Cursor
    num_steps: int
    num_samples: int
    version: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)
    progress: float | None = None
    totals: bytes = field(default=b"", repr=False)
    encoded_bytes: int = 0
    num_bytes: int = 0

    @property
    def epoch(self) -> int:
        """Which its rows are of."""
        return max(0, self.cursor.epoch - (self.cursor.batch == 0))


@dataclass(frozen=True)
class TimeSpent:
    """What a worker's time went to; see `history.WorkerReport`."""

    epoch_samples: tuple[int, ...] = ()
    epoch_seconds: tuple[float, ...] = ()
    step_s: float = 0.0
    sync_s: float = 0.0
    hidden_s: float = 0.0


@dataclass(frozen=True)
class Order:
    """What a worker is told with a snapshot.

    Attributes:
        version: of the snapshot.
        epoch: that `kind` is about: the partition's own, which may be before the others'.
        num_steps: local steps of all workers that are in the snapshot.
        num_workers: whose pushes make up the run: those of the round where workers are bulk-synchronous, else all that
            have not ended.
        values: what the driver has set for the epoch that all are in, by name.
    """

    version: int
    kind: OrderKind = OrderKind.TRAIN
    epoch: int = 0
    num_steps: int = 0
    num_workers: int = 1
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PartitionProgress:
    """Where a partition stands: what a successor needs to go on, and what was reported so far.

    Attributes:
        epoch_totals, epoch_samples: of its pushes of the released epoch (`EpochProgress`); totals as in `Push`.
        evaluated_epoch: whose evaluation the partition reported last, if it is the released one.
        evaluation_totals, evaluation_samples: of that evaluation.
    """

    sequence: int
    cursor: Cursor
    round: int
    progress: float | None
    report: WorkerReport
    epoch_totals: bytes = field(default=b"", repr=False)
    epoch_samples: int = 0
    evaluated_epoch: int | None = None
    evaluation_totals: bytes = field(default=b"", repr=False)
    evaluation_samples: int = 0


@dataclass(frozen=True)
class EpochProgress:
    """Where a run with an `EpochPlan` stands.

    Attributes:
        epoch: the newest that was released to the workers.
        values: that the driver set for it.
        is_over: whether the driver has ended the run after it.
    """

    epoch: int
    values: Mapping[str, float]
    is_over: bool = False


@dataclass(frozen=True, eq=False)
class EpochEnd:
    """What came of an epoch that all have ended.

    Attributes:
        seconds: from its release to its end, the evaluation included.
        num_samples: rows trained.
        totals: of each partition that trained rows of it, in their order: its number, and the sum over its pushes,
            `[num_totals] float64`.
        evaluation: of each partition that evaluated, in their order.
        evaluation_samples: rows evaluated.
    """

    epoch: int
    seconds: float
    num_samples: int
    totals: tuple[tuple[int, NDArray[np.float64]], ...]
    evaluation: tuple[tuple[int, NDArray[np.float64]], ...]
    evaluation_samples: int


@dataclass(frozen=True)
class Status:
    """A run at one moment, for progress and ``/status``.

    Attributes:
        num_live: partitions that a worker holds.
        num_lost: partitions whose worker died, and that have no successor yet.
        num_waiting: workers that the gate holds up.
        progress: share of the whole training that is done, 0 to 1; None where it is not known yet.
        scalars: the newest means, by fetch name.
        epoch: the newest that workers may train; None, as `num_epochs`, in a run without an `EpochPlan`.
        num_resting: workers that wait at the epoch's end.
        staleness: versions that were published, on average of all pushes, since what a push is based on was pulled;
            None before the first.
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
    epoch: int | None = None
    num_epochs: int | None = None
    num_resting: int = 0
    staleness: float | None = None


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
    """Send the connection the current snapshot, and what it is to do with it.

    Attributes:
        has_weights: False where nobody wants them.
    """

    connection: int
    order: OrderKind = OrderKind.TRAIN
    epoch: int = 0
    has_weights: bool = True


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
    """Tell the connection that its push is in the weights, or that what else it reported is noted."""

    connection: int
    sequence: int


@dataclass(frozen=True)
class Close:
    """Close the connection: another of the same attempt has taken its place."""

    connection: int


Decision = Grant | Refuse | SendSnapshot | Keep | Fold | Publish | Accept | Close
