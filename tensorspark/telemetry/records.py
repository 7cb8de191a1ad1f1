"""What is told of a run while it goes on: plain values, one after the other.

The live dashboard, ``/metrics``, TensorBoard's files, traces and a run's own file are all made of this one stream, so a
finished run that is read from its file looks as it did while it went on. Times are seconds since the run began, on
the driver's monotonic clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Activity(enum.StrEnum):
    """What a worker is at, as the server sees it.

    COMPUTE: from the weights' departure to the next push's arrival: local steps, and the rows for them. PUSH and PULL:
    a payload is on its way. WAIT: the server has it wait: for others, at the gate or at the end of an epoch, or for its
    push to be published. EVALUATE: held-out rows, at the end of an epoch. STANDBY: another attempt has its partition.
    """

    COMPUTE = "compute"
    PULL = "pull"
    PUSH = "push"
    WAIT = "wait"
    EVALUATE = "evaluate"
    STANDBY = "standby"


class WorkerState(enum.StrEnum):
    """How a partition stands: nobody has come for it yet, a worker has it, its worker waits for others at the gate or
    at the end of an epoch, it was lost and has no successor yet, or it is trained to its end."""

    PENDING = "pending"
    LIVE = "live"
    WAITING = "waiting"
    LOST = "lost"
    FINISHED = "finished"


@dataclass(frozen=True)
class Tensor:
    """A synchronized variable."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class RunBegan:
    """The first record of a run.

    Attributes:
        run: its number in its session, from 1.
        started_at: seconds since the epoch (UNIX time).
        mode: such as ``bulk-synchronous``; see `mode_of`.
        settings: the session's, as text, without secrets.
        model_bytes: of the weights, as they lie in memory.
        spark_url: of Spark's web page; None where there is none.
        resumed_steps: local steps that an interrupted run had made before.
    """

    seconds: float
    run: int
    name: str
    started_at: float
    mode: str
    num_partitions: int
    num_epochs: int
    combiner: str
    settings: Mapping[str, str]
    tensors: tuple[Tensor, ...]
    model_bytes: int
    tensorspark_version: str
    app_id: str = ""
    spark_url: str | None = None
    job_group: str = ""
    resumed_steps: int = 0


@dataclass(frozen=True)
class TrainingPoint:
    """Training since the point before, over all workers.

    Attributes:
        num_steps, num_samples: of all workers so far.
        scalars: means over the samples since the point before, by fetch name; None where one is not finite.
    """

    seconds: float
    num_steps: int
    num_samples: int
    scalars: Mapping[str, float | None]


@dataclass(frozen=True)
class WorkerSample:
    """One partition's worker at a moment.

    Attributes:
        lag: rounds that it is behind the fastest.
        busy_s: seconds that it has spent so far, by `Activity`.
    """

    partition: int
    state: str
    host: str
    attempt: int
    num_attempts: int
    num_steps: int
    num_samples: int
    num_applied: int
    num_refused: int
    num_reconnects: int
    num_bytes_pushed: int
    num_bytes_pulled: int
    progress: float | None
    lag: int
    busy_s: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """A run at a moment; comes about twice a second.

    Attributes:
        version: of the weights: how often they were published.
        num_bytes_pushed, num_bytes_pulled: of weights, on the wire, by all workers so far.
        num_raw_bytes_pushed, num_raw_bytes_pulled: what they would have been without codecs and patches.
        staleness: how many pushes were based on weights so many versions old, so far; the last bin is of all above it.
        workers: those of whom something has changed since the sample before.
    """

    seconds: float
    num_steps: int
    num_samples: int
    num_live: int
    num_lost: int
    num_standby: int
    num_waiting: int
    num_finished: int
    progress: float | None
    epoch: int | None
    version: int
    num_bytes_pushed: int
    num_bytes_pulled: int
    num_raw_bytes_pushed: int
    num_raw_bytes_pulled: int
    staleness: tuple[int, ...]
    workers: tuple[WorkerSample, ...]


@dataclass(frozen=True)
class Span:
    """Something that took a while.

    Attributes:
        seconds: when it began.
        activity: an `Activity`; of the server's own and of traces another word, such as ``merge``.
        is_sum: whether it stands for many brief ones, whose durations it adds up.
    """

    seconds: float
    partition: int
    activity: str
    duration_s: float
    is_sum: bool = False


@dataclass(frozen=True)
class Spans:
    """What workers were at since the record before; `seconds` is when they were gathered."""

    seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class WorkerEvent:
    """A worker has come or gone.

    Attributes:
        what: ``granted``, ``standby``, ``lost``, ``reconnected``, ``finished`` or ``failed``.
    """

    seconds: float
    partition: int
    what: str
    host: str
    attempt: int
    text: str = ""


@dataclass(frozen=True)
class TensorStats:
    """A variable's values, and how they changed since the record before.

    Attributes:
        norm: Euclidean.
        update_norm: of the change; None in the first record.
        histogram_edges, histogram_counts: of the values that are finite; one edge more than counts, or both empty.
        update_edges, update_counts: of the change.
    """

    name: str
    norm: float | None
    update_norm: float | None
    histogram_edges: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()
    update_edges: tuple[float, ...] = ()
    update_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightStats:
    """All variables at a moment.

    Attributes:
        num_steps: of all workers, about, that are in them.
    """

    seconds: float
    version: int
    num_steps: int
    tensors: tuple[TensorStats, ...]


@dataclass(frozen=True)
class EpochEnded:
    """An epoch of `fit`; `logs` are its metrics, those of held-out rows with ``val_`` before them."""

    seconds: float
    epoch: int
    num_steps: int
    logs: Mapping[str, float | None]


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint is where `SparkSession.restore` finds it; `duration_s` is from its beginning to that."""

    seconds: float
    version: int
    url: str
    num_bytes: int
    duration_s: float


@dataclass(frozen=True)
class LogLine:
    """A line of an executor's log; `level` as in `logging`, from WARNING on."""

    seconds: float
    partition: int
    host: str
    level: int
    logger: str
    message: str


@dataclass(frozen=True)
class RunEnded:
    """The last record of a run.

    Attributes:
        outcome: ``finished``, ``stopped`` (by a callback or Ctrl-C) or ``failed``; in a replay also ``unfinished``.
        message: what failed.
    """

    seconds: float
    outcome: str
    message: str = ""
    num_steps: int = 0
    num_samples: int = 0


Record = (
    RunBegan
    | TrainingPoint
    | Sample
    | Spans
    | WorkerEvent
    | WeightStats
    | EpochEnded
    | CheckpointWritten
    | LogLine
    | RunEnded
)


@dataclass(frozen=True)
class Observation:
    """What a server has gathered of its current run since it was asked last.

    Attributes:
        traced: spans that workers have timed themselves, for traces; `activity` is what they call them.
    """

    sample: Sample
    points: tuple[TrainingPoint, ...] = ()
    spans: tuple[Span, ...] = ()
    events: tuple[WorkerEvent, ...] = ()
    logs: tuple[LogLine, ...] = ()
    traced: tuple[Span, ...] = field(default=())


def mode_of(staleness: int | None) -> str:
    """What a mode is called.

    >>> mode_of(0), mode_of(2), mode_of(None)
    ('bulk-synchronous', 'stale-synchronous (2)', 'asynchronous')
    """
    if staleness is None:
        return "asynchronous"
    return f"stale-synchronous ({staleness})" if staleness else "bulk-synchronous"
