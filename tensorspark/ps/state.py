"""The server's decisions, as a pure state machine: events in, decisions out; no sockets, no threads, no clock.

`RunState` knows one run. Its methods are the events (`register`, `pull`, `push`, ...); each returns the decisions that
the shell (`ps.run`) is to carry out, in order. Connections are numbers that the shell chose, never used twice; times
are seconds of its monotonic clock.

A partition has one *lease*. While its holder's connection lives, another attempt for the same partition (speculation)
waits as a standby; when it closes, the standby, or Spark's retry, is granted the partition with the *cursor* (epoch
and batch) up to which pushes are in the weights, and goes on there. The same attempt may come back on a new connection,
if nobody has taken its place. A push counts once: its sequence number says which one it is.

Pushes are folded in *rounds*: each is a round of its own, unless the run is bulk-synchronous. Then a round holds one
push of every worker that counts (`ps.sync.Gate`), folded in the order of their partitions, so that the sum is the same
bits whoever was faster. A pull waits for the gate, and until the partition's own pushes are published.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from tensorspark.errors import (
    ProtocolError,
    RefusedError,
    RunStoppedError,
    TensorsparkError,
    WorkerFailedError,
)
from tensorspark.history import Recorder, WorkerReport
from tensorspark.ps.messages import (
    Accept,
    Close,
    Decision,
    Fold,
    Grant,
    Keep,
    PartitionProgress,
    Publish,
    Push,
    Refuse,
    Registration,
    SendSnapshot,
    Status,
)
from tensorspark.ps.partition import Partition
from tensorspark.ps.sync import Gate, SyncPlan
from tensorspark.weights.layout import WeightLayout

logger = logging.getLogger(__name__)


class RunState:
    """One run's partitions, leases, rounds and records.

    Args:
        run: number of the run on this server; workers of another are refused.
        layout: what the workers' weights must look like.
        num_partitions: of the feed.
        sync: how workers are kept in step.
        partitions: where a restored run's partitions stood.
        version: of the weights that the run begins with.
        recorder: of a restored run.
    """

    def __init__(
        self,
        run: int,
        layout: WeightLayout,
        num_partitions: int,
        sync: SyncPlan | None = None,
        *,
        partitions: Sequence[PartitionProgress] = (),
        version: int = 0,
        recorder: Recorder | None = None,
    ) -> None:
        self.run = run
        self.layout = layout
        self.recorder = recorder or Recorder()
        self.failure: TensorsparkError | None = None
        self.stopped = False
        self._sync = sync or SyncPlan()
        self._partitions = [Partition(WorkerReport(index)) for index in range(num_partitions)]
        for partition, progress in zip(self._partitions, partitions, strict=False):
            partition.restore(progress)
        self._gate = Gate(
            self._sync,
            [progress.round for progress in partitions] or [0] * num_partitions,
            frozenset(p.index for p in self._partitions if p.report.finished),
        )
        self._version = version
        self._partition_of: dict[int, Partition] = {}
        self._pulls: dict[int, int] = {}  # connections whose pull waits, by partition
        self._held: dict[int, Fold] = {}  # this round's pushes that wait for their turn, by partition
        self._in_round: set[int] = set()  # partitions whose push is in this round, or waits to be
        self._is_closing = False  # the round's publication is decided
        self._first_missing = 0  # the first partition whose push the bulk-synchronous round waits for

    # Events from a connection

    def register(self, connection: int, registration: Registration, now: float) -> list[Decision]:
        """A task asks for its partition; the answer may come later, when the lease is free."""
        if self.stopped or registration.run != self.run:
            return [Refuse(connection, _stopped_error())]
        if not 0 <= registration.partition < len(self._partitions):
            raise ProtocolError(f"expected a partition from 0 to {len(self._partitions) - 1}, got {registration}")
        if connection in self._partition_of:
            raise ProtocolError("this connection has registered already")
        partition = self._partitions[registration.partition]
        try:
            self.layout.require_same(registration.fingerprint)
            partition.require_own_lease(registration)
        except RefusedError as error:
            return [Refuse(connection, error)]
        replaced = self._replace(partition, registration.attempt, now)
        if registration.is_resuming:
            partition.count("num_reconnects")
        self._partition_of[connection] = partition
        if registration.is_resuming:
            partition.standbys.appendleft((connection, registration))  # the lease is still its own
        else:
            partition.standbys.append((connection, registration))
        return [*replaced, *self._grant_next(partition, now)]

    def pull(self, connection: int) -> list[Decision]:
        """A worker asks for the newest weights."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        if not self._may_pull(held):
            self._pulls[held.index] = connection
            return []
        return [SendSnapshot(connection)]

    def push(self, connection: int, push: Push) -> list[Decision]:
        """A worker's weights or delta have arrived; `Keep` comes first where the payload is of use."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            self._count_refusal(connection)
            return [Refuse(connection, held)]
        held.count("num_pushed")
        if push.sequence <= held.folded:
            held.count("num_repeated")
            return [Accept(connection, push.sequence)]
        if push.sequence != held.received + 1 or push.cursor < held.cursor or push.version > self._version:
            raise ProtocolError(
                f"expected push {held.received + 1} from {held.cursor} on, of version {self._version} or before, "
                f"got {push}"
            )
        if self._sync.is_bulk and held.index in self._in_round:
            raise ProtocolError("expected a pull between two pushes: the run is bulk-synchronous")
        held.received = push.sequence
        held.num_unpublished += 1
        fold = Fold(connection, held.index, push)
        if self._sync.is_bulk:
            self._held[held.index] = fold
            self._in_round.add(held.index)
            return [Keep(), *self._advance_round()]
        return [Keep(), fold, Publish(max(1, self._gate.num_counted))]

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
        if held.num_unpublished:
            raise ProtocolError("a partition can finish only when its pushes are accepted")
        held.progress = 1.0
        held.update(
            finished=True, epoch_samples=epoch_samples, epoch_seconds=epoch_seconds, step_s=step_s, sync_s=sync_s
        )
        self._gate.end(held.index)
        return [Accept(connection, held.folded), *self._go_on()]

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
        return [Accept(connection, held.folded), *self.stop(error)]

    def disconnect(self, connection: int, now: float) -> list[Decision]:
        """A connection has closed, for whatever reason."""
        partition = self._partition_of.get(connection)
        if partition is None:
            return []
        self._release(partition, connection, now)
        return self._grant_next(partition, now)

    # Events from the shell and the driver

    def folded(self, fold: Fold, seconds: float) -> None:
        """A decided fold is in its round; `seconds` since the run began."""
        partition, push = self._partitions[fold.partition], fold.push
        partition.folded = push.sequence
        partition.cursor = push.cursor
        partition.progress = push.progress
        report = partition.report
        partition.update(
            num_steps=report.num_steps + push.num_steps,
            num_samples=report.num_samples + push.num_samples,
            num_applied=report.num_applied + 1,
        )
        self.recorder.record(seconds, push.num_steps, push.num_samples, push.sums)

    def is_next(self, fold: Fold) -> bool:
        """Whether the fold's turn has come, and no push before it was refused."""
        return fold.push.sequence == self._partitions[fold.partition].folded + 1

    def not_folded(self, fold: Fold, error: TensorsparkError, now: float) -> list[Decision]:
        """A decided fold was refused (NaN) or its combiner failed; a combiner's failure ends the run."""
        partition = self._partitions[fold.partition]
        partition.count("num_refused")
        if not isinstance(error, RefusedError):
            return self.stop(error)
        partition.num_unpublished -= 1
        partition.received -= 1
        self._in_round.discard(partition.index)
        return [Refuse(fold.connection, error), *self._go_on(), *self._grant_next(partition, now)]

    def published(self, folds: Sequence[Fold], now: float) -> list[Decision]:
        """A round is published; `folds` are those in it: none, where all were refused."""
        if self.stopped:
            return []
        self._version += bool(folds)
        accepted: list[Decision] = []
        for fold in folds:
            self._partitions[fold.partition].num_unpublished -= 1
            accepted.append(Accept(fold.connection, fold.push.sequence))
        if self._sync.is_bulk:
            self._in_round = set(self._held)  # of a worker whose push was refused, and who tried again at once
            self._is_closing = False
            self._gate.advance(self._gate.counted)
        else:
            self._gate.advance({fold.partition for fold in folds})
        granted = [self._grant_next(self._partitions[fold.partition], now) for fold in folds]
        return [*accepted, *self._go_on(), *(decision for decisions in granted for decision in decisions)]

    def tick(self, now: float) -> list[Decision]:
        """Lets deadlines pass. To be called every fraction of a second."""
        coming = (
            {p.index for p in self._partitions if p.holder is None and p.standbys} if self._gate.num_lost else set()
        )
        return self._go_on() if self._gate.tick(now, coming) else []

    def stop(self, failure: TensorsparkError | None = None) -> list[Decision]:
        """Ends the run: who waits is refused now, who comes later is refused then. The first failure is kept."""
        self.failure = self.failure or failure
        self.stopped = True
        waiting = [connection for partition in self._partitions for connection, _ in partition.standbys]
        for partition in self._partitions:
            partition.standbys.clear()
            if partition.holder is not None and (partition.num_unpublished or partition.index in self._pulls):
                waiting.append(partition.holder)
        self._pulls.clear()
        self._held.clear()
        return [Refuse(connection, _stopped_error()) for connection in waiting]

    # Questions

    def is_waiting(self, connection: int) -> bool:
        """Whether the server owes the connection an answer, so that it cannot be expected to say anything."""
        partition = self._partition_of.get(connection)
        if partition is None:
            return False
        is_holder = partition.holder == connection
        return not is_holder or partition.num_unpublished > 0 or self._pulls.get(partition.index) == connection

    def may_take_last_buffer(self, connection: int) -> bool:
        """Whether a push of this connection can be folded at once, so that its buffer is soon free again."""
        partition = self._partition_of.get(connection)
        if partition is None or not self._sync.is_bulk:
            return True
        return partition.index <= self._first_missing

    def export(self) -> tuple[PartitionProgress, ...]:
        """Where the partitions stand. Between rounds, this is exactly what is in the weights."""
        return tuple(
            PartitionProgress(p.folded, p.cursor, self._gate.round_of(p.index), p.progress, p.report)
            for p in self._partitions
        )

    @property
    def is_complete(self) -> bool:
        return all(partition.report.finished for partition in self._partitions)

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
            num_lost=self._gate.num_lost,
            num_standby=sum(len(partition.standbys) for partition in self._partitions),
            num_waiting=len(self._pulls),
            num_finished=sum(partition.report.finished for partition in self._partitions),
            progress=sum(begun) / len(shares) if begun else None,
            scalars=dict(last.scalars) if last else {},
        )

    def reports(self) -> tuple[WorkerReport, ...]:
        return tuple(partition.report for partition in self._partitions)

    # Helpers

    def _held_by(self, connection: int) -> Partition | RefusedError:
        if self.stopped:
            return _stopped_error()
        partition = self._partition_of.get(connection)
        if partition is None:
            raise ProtocolError("expected REGISTER as the first frame of a connection")
        if partition.holder != connection:
            return partition.lease_lost()
        return partition

    def _count_refusal(self, connection: int) -> None:
        partition = self._partition_of.get(connection)
        if partition is not None:
            partition.count("num_refused")

    def _may_pull(self, partition: Partition) -> bool:
        if self._is_closing or partition.num_unpublished:
            return False
        return self._gate.may_begin(partition.index)

    def _go_on(self) -> list[Decision]:
        """What somebody's progress, end or death allows the others."""
        decisions = self._advance_round()
        ready = [index for index in self._pulls if self._may_pull(self._partitions[index])]
        return [*decisions, *(SendSnapshot(self._pulls.pop(index)) for index in ready)]

    def _advance_round(self) -> list[Decision]:
        """Folds the bulk-synchronous round's pushes as far as none before them is missing, and closes it if none is."""
        missing = self._gate.counted - self._in_round if self._sync.is_bulk else set()
        self._first_missing = min(missing, default=len(self._partitions))  # kept: all that wait for a buffer ask for it
        if not self._in_round or self._is_closing or self.stopped or not self._gate.has_begun:
            return []
        ready = sorted(index for index in self._held if index < self._first_missing)
        decisions: list[Decision] = [self._held.pop(index) for index in ready]
        if not missing:
            self._is_closing = True
            decisions.append(Publish(None))
        return decisions

    def _release(self, partition: Partition, connection: int, now: float) -> None:
        """Forgets a connection and what it held."""
        del self._partition_of[connection]
        partition.standbys = deque(standby for standby in partition.standbys if standby[0] != connection)
        if partition.holder == connection:
            partition.holder = None
            self._pulls.pop(partition.index, None)
            self._gate.lose(partition.index, now)

    def _replace(self, partition: Partition, attempt: int, now: float) -> list[Decision]:
        """Closes an older connection of the attempt, which the server has not seen break yet."""
        old = [connection for connection, standby in partition.standbys if standby.attempt == attempt]
        if partition.holder is not None and partition.attempt == attempt:
            old.append(partition.holder)
        for connection in old:
            self._release(partition, connection, now)
        return [Close(connection) for connection in old]

    def _grant_next(self, partition: Partition, now: float) -> list[Decision]:
        if partition.holder is not None or partition.num_unpublished or not partition.standbys:
            return []
        connection, registration = partition.standbys.popleft()
        partition.holder = connection
        if partition.attempt != registration.attempt:
            partition.count("num_attempts")
        partition.attempt = registration.attempt
        partition.update(host=registration.host)
        logger.info("partition %d: attempt %d on %s", registration.partition, registration.attempt, registration.host)
        finished = partition.report.finished
        self._gate.join(partition.index, now, is_finished=finished)
        return [Grant(connection, partition.folded, partition.cursor, finished), *self._go_on()]


def _stopped_error() -> RunStoppedError:
    return RunStoppedError("the run has ended: no more weights are taken or given")
