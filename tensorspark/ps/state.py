"""The server's decisions, as a pure state machine: events in, decisions out; no sockets, no threads, no clock.

`RunState` knows one run. Its methods are the events (`register`, `pull`, `push`, ...); each returns the decisions that
the shell (`ps.server`) is to carry out, in order. Connections are numbers that the shell chose, never used twice.

A partition has one *lease*. While its holder's connection lives, another attempt for the same partition (speculation)
waits as a standby; when it closes, the standby, or Spark's retry, is granted the partition with the *cursor* (epoch
and batch) up to which pushes are in the weights, and goes on there. A push counts when it was merged, once: its
sequence number says which one it is. A pull waits until the partition's own pushes are merged, so that a worker
always reads its own writes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tensorspark.errors import (
    CombinerError,
    LeaseLostError,
    ProtocolError,
    RefusedError,
    RunStoppedError,
    TensorsparkError,
    WorkerFailedError,
)
from tensorspark.history import Recorder, WorkerReport
from tensorspark.weights.layout import WeightLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Cursor:
    """How far a partition is trained: `batch` batches of epoch `epoch` (both from 0) are in the weights."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Registration:
    """A task that wants to train a partition."""

    run: int
    partition: int
    attempt: int
    fingerprint: str
    host: str


@dataclass(frozen=True)
class Push:
    """What a worker says about the weights it pushes.

    Attributes:
        sequence: 1 for a partition's first push, then one more each.
        cursor: where a successor is to go on once this push is in.
        num_steps, num_samples: local steps since the last push, and their rows.
        sums: by fetch name, the sum over those rows of the step's value.
        progress: share of the partition's whole training that is done, 0 to 1; None where it is not known yet.
    """

    sequence: int
    cursor: Cursor
    num_steps: int
    num_samples: int
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
class Merge:
    """Merge the payload that came with `push`, after all merges decided before; then call `merged` or `not_merged`."""

    connection: int
    partition: int
    push: Push


@dataclass(frozen=True)
class Accept:
    """Tell the connection that its push is in the weights, or that its partition is noted as finished."""

    connection: int
    sequence: int


Decision = Grant | Refuse | SendSnapshot | Merge | Accept


@dataclass
class _Partition:
    report: WorkerReport
    holder: int | None = None
    received: int = 0  # sequence number of the newest push that arrived
    merged: int = 0  # and of the newest that is in the weights
    cursor: Cursor = Cursor()
    progress: float | None = None
    num_merging: int = 0
    pull_waiting: bool = False
    standbys: deque[tuple[int, Registration]] = field(default_factory=deque)

    def update(self, **changes: object) -> None:
        self.report = replace(self.report, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Status:
    """A run at one moment, for progress and ``/status``.

    Attributes:
        progress: share of the whole training that is done, 0 to 1; None where it is not known yet.
        scalars: the newest means, by fetch name.
    """

    run: int
    num_steps: int
    num_samples: int
    num_partitions: int
    num_live: int
    num_standby: int
    num_finished: int
    progress: float | None
    scalars: Mapping[str, float]


class RunState:
    """One run's partitions, leases and records.

    Args:
        run: number of the run on this server; workers of another are refused.
        layout: what the workers' weights must look like.
        num_partitions: of the feed.
    """

    def __init__(self, run: int, layout: WeightLayout, num_partitions: int) -> None:
        self.run = run
        self.layout = layout
        self.recorder = Recorder()
        self.failure: TensorsparkError | None = None
        self.stopped = False
        self._partitions = [_Partition(WorkerReport(index)) for index in range(num_partitions)]
        self._partition_of: dict[int, _Partition] = {}

    # Events from a connection

    def register(self, connection: int, registration: Registration) -> list[Decision]:
        """A task asks for its partition; the answer may come later, when the lease is free."""
        if self.stopped or registration.run != self.run:
            return [Refuse(connection, _stopped_error())]
        if not 0 <= registration.partition < len(self._partitions):
            raise ProtocolError(f"expected a partition from 0 to {len(self._partitions) - 1}, got {registration}")
        if connection in self._partition_of:
            raise ProtocolError("this connection has registered already")
        try:
            self.layout.require_same(registration.fingerprint)
        except RefusedError as error:
            return [Refuse(connection, error)]
        partition = self._partitions[registration.partition]
        self._partition_of[connection] = partition
        partition.standbys.append((connection, registration))
        return self._grant_next(partition)

    def pull(self, connection: int) -> list[Decision]:
        """A worker asks for the newest weights."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        if held.num_merging:
            held.pull_waiting = True
            return []
        return [SendSnapshot(connection)]

    def push(self, connection: int, push: Push) -> list[Decision]:
        """A worker's weights or delta have arrived."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            self._count_refusal(connection)
            return [Refuse(connection, held)]
        if push.sequence <= held.merged:
            return [Accept(connection, push.sequence)]
        if push.sequence != held.received + 1 or push.cursor < held.cursor:
            raise ProtocolError(f"expected push {held.received + 1} from {held.cursor} on, got {push}")
        held.received = push.sequence
        held.num_merging += 1
        return [Merge(connection, held.report.partition, push)]

    def finish(
        self,
        connection: int,
        *,
        epoch_samples: tuple[int, ...],
        epoch_seconds: tuple[float, ...],
        step_s: float,
        sync_s: float,
    ) -> list[Decision]:
        """A worker has trained its partition to the end."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        if held.num_merging:
            raise ProtocolError("a partition can finish only when its pushes are accepted")
        held.progress = 1.0
        held.update(
            finished=True, epoch_samples=epoch_samples, epoch_seconds=epoch_seconds, step_s=step_s, sync_s=sync_s
        )
        return [Accept(connection, held.merged)]

    def fail(self, connection: int, message: str, worker_traceback: str) -> list[Decision]:
        """A worker raised: the run fails. A standby's or a former holder's failure says nothing about the run."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        report = held.report
        error = WorkerFailedError(
            f"the worker of partition {report.partition} on {report.host} raised {message}\n\n{worker_traceback}",
            partition=report.partition,
            host=report.host,
            worker_traceback=worker_traceback,
        )
        return [Accept(connection, held.merged), *self.stop(error)]

    def disconnect(self, connection: int) -> list[Decision]:
        """A connection has closed, for whatever reason."""
        partition = self._partition_of.pop(connection, None)
        if partition is None:
            return []
        partition.standbys = deque(standby for standby in partition.standbys if standby[0] != connection)
        if partition.holder == connection:
            partition.holder = None
            partition.pull_waiting = False
        return self._grant_next(partition)

    # Events from the shell and the driver

    def merged(self, merge: Merge, seconds: float) -> list[Decision]:
        """A decided merge is in the current snapshot; `seconds` since the run began."""
        partition, push = self._partitions[merge.partition], merge.push
        partition.num_merging -= 1
        partition.merged = push.sequence
        partition.cursor = push.cursor
        partition.progress = push.progress
        report = partition.report
        partition.update(
            num_steps=report.num_steps + push.num_steps,
            num_samples=report.num_samples + push.num_samples,
            num_applied=report.num_applied + 1,
        )
        self.recorder.record(seconds, push.num_steps, push.num_samples, push.sums)
        return [Accept(merge.connection, push.sequence), *self._after_merge(partition)]

    def is_next(self, merge: Merge) -> bool:
        """Whether the merge's turn has come, and no push before it was refused."""
        return merge.push.sequence == self._partitions[merge.partition].merged + 1

    def not_merged(self, merge: Merge, error: RefusedError | CombinerError) -> list[Decision]:
        """A decided merge was refused (NaN) or its combiner failed; a combiner's failure ends the run."""
        partition = self._partitions[merge.partition]
        partition.num_merging -= 1
        if not partition.num_merging:
            partition.received = partition.merged
        partition.update(num_refused=partition.report.num_refused + 1)
        if isinstance(error, RefusedError):
            return [Refuse(merge.connection, error), *self._after_merge(partition)]
        return [*self.stop(error), Refuse(merge.connection, _stopped_error())]

    def stop(self, failure: TensorsparkError | None = None) -> list[Decision]:
        """Ends the run: who waits is refused now, who comes later is refused then. The first failure is kept."""
        self.failure = self.failure or failure
        self.stopped = True
        waiting = [connection for partition in self._partitions for connection, _ in partition.standbys]
        waiting += [p.holder for p in self._partitions if p.pull_waiting and p.holder is not None]
        for partition in self._partitions:
            partition.standbys.clear()
            partition.pull_waiting = False
        return [Refuse(connection, _stopped_error()) for connection in waiting]

    # Questions

    def status(self) -> Status:
        last = self.recorder.last()
        shares = [1.0 if partition.report.finished else partition.progress for partition in self._partitions]
        begun = [share for share in shares if share is not None]
        return Status(
            run=self.run,
            num_steps=self.recorder.num_steps,
            num_samples=self.recorder.num_samples,
            num_partitions=len(self._partitions),
            num_live=sum(partition.holder is not None for partition in self._partitions),
            num_standby=sum(len(partition.standbys) for partition in self._partitions),
            num_finished=sum(partition.report.finished for partition in self._partitions),
            progress=sum(begun) / len(shares) if begun else None,
            scalars=dict(last.scalars) if last else {},
        )

    def reports(self) -> tuple[WorkerReport, ...]:
        return tuple(partition.report for partition in self._partitions)

    # Helpers

    def _held_by(self, connection: int) -> _Partition | RefusedError:
        if self.stopped:
            return _stopped_error()
        partition = self._partition_of.get(connection)
        if partition is None:
            raise ProtocolError("expected REGISTER as the first frame of a connection")
        if partition.holder != connection:
            return LeaseLostError(f"another attempt holds partition {partition.report.partition}")
        return partition

    def _count_refusal(self, connection: int) -> None:
        partition = self._partition_of.get(connection)
        if partition is not None:
            partition.update(num_refused=partition.report.num_refused + 1)

    def _after_merge(self, partition: _Partition) -> list[Decision]:
        if partition.num_merging:
            return []
        if partition.holder is None:
            return self._grant_next(partition)
        if partition.pull_waiting:
            partition.pull_waiting = False
            return [SendSnapshot(partition.holder)]
        return []

    def _grant_next(self, partition: _Partition) -> list[Decision]:
        if partition.holder is not None or partition.num_merging or not partition.standbys:
            return []
        connection, registration = partition.standbys.popleft()
        partition.holder = connection
        partition.update(host=registration.host, num_attempts=partition.report.num_attempts + 1)
        logger.info("partition %d: attempt %d on %s", registration.partition, registration.attempt, registration.host)
        finished = partition.report.finished
        return [Grant(connection, partition.merged, partition.cursor, finished)]


def _stopped_error() -> RunStoppedError:
    return RunStoppedError("the run has ended: no more weights are taken or given")
