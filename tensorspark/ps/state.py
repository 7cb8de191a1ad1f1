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
bits whoever was faster. A pull waits for the gate, and until the partition's own pushes are published. In a run with
epochs (`ps.epochs`) it also waits at the end of each, and is answered with what the worker is to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorspark.errors import ProtocolError, RefusedError, RunStoppedError, TensorsparkError
from tensorspark.history import Recorder, WorkerReport
from tensorspark.ps.epochs import Epochs
from tensorspark.ps.leases import Leases
from tensorspark.ps.messages import (
    Accept,
    Asked,
    Decision,
    EpochEnd,
    EpochPlan,
    EpochProgress,
    Fold,
    Keep,
    Order,
    OrderKind,
    PartitionProgress,
    Publish,
    Push,
    Refuse,
    Registration,
    SendSnapshot,
    TimeSpent,
)
from tensorspark.ps.partition import Partition
from tensorspark.ps.status import Overview
from tensorspark.ps.sync import Gate, SyncPlan
from tensorspark.weights.layout import WeightLayout


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
        epochs: what is done between epochs; None: nothing.
        epoch_progress: where a restored run's epochs stood.
        follows: whether this is a shard whose workers train and evaluate when another shard says so.

    Attributes:
        overview: what is told of the run.
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
        epochs: EpochPlan | None = None,
        epoch_progress: EpochProgress | None = None,
        follows: bool = False,
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
        self._epochs = Epochs(epochs, epoch_progress, partitions)
        self._version = version
        self._num_steps = self.recorder.num_steps  # in the published weights
        self._num_in_round = 0  # workers that a bulk-synchronous round began with
        self._follows = follows
        self._leases = Leases(layout, self._partitions, self._gate)
        self._asked: dict[int, tuple[Asked, int | None]] = {}  # by partition, what its newest pull is for
        self._pulls = self._leases.pulls
        self._held: dict[int, Fold] = {}  # this round's pushes that wait for their turn, by partition
        self._in_round: set[int] = set()  # partitions whose push is in this round, or waits to be
        self._is_closing = False  # the round's publication is decided
        self._first_missing = 0  # whose push, first of all, the bulk-synchronous round waits for
        self.overview = Overview(run, self._partitions, self._gate, self._epochs, self.recorder, self._pulls)

    # Events from a connection

    def register(self, connection: int, registration: Registration, now: float) -> list[Decision]:
        """A task asks for its partition; the answer may come later, when the lease is free."""
        if self.stopped or registration.run != self.run:
            return [Refuse(connection, _stopped_error())]
        try:
            partition, replaced = self._leases.ask(connection, registration, now)
        except RefusedError as error:
            return [Refuse(connection, error)]
        return [*replaced, *self._grant_next(partition, now)]

    def pull(self, connection: int, asked: Asked = Asked.NEXT, epoch: int | None = None) -> list[Decision]:
        """A worker asks for the newest weights; `epoch` is which `Asked.EVALUATE` is about."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        self._asked[held.index] = asked, epoch
        if self._follows:
            self._epochs.follow(held, asked)
        if asked is Asked.REST:
            answer = SendSnapshot(connection, epoch=self._epochs.epoch_of(held), has_weights=False)
            return [answer, *self._go_on()]
        order = OrderKind.TRAIN if asked is Asked.PEEK else self._order_for(held)
        if order is None:
            self._pulls[held.index] = connection
            return []
        return [SendSnapshot(connection, order, self._epochs.epoch_of(held))]

    def push(self, connection: int, push: Push) -> list[Decision]:
        """A worker's weights or delta have arrived; `Keep` comes first where the payload is of use."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            self._leases.count(connection, "num_refused")
            return [Refuse(connection, held)]
        report = held.report
        held.update(num_pushed=report.num_pushed + 1, num_bytes_pushed=report.num_bytes_pushed + push.num_bytes)
        if push.sequence <= held.folded:
            held.count("num_repeated")
            return [Accept(connection, push.sequence)]
        if push.sequence != held.received + 1 or push.cursor < held.cursor or push.version > self._version:
            raise ProtocolError(
                f"expected push {held.received + 1} from {held.cursor} on, of version {self._version} or before, "
                f"got {push}"
            )
        self._epochs.require_due(held, push)
        if self._sync.is_bulk and held.index in self._in_round:
            raise ProtocolError("expected a pull between two pushes: the run is bulk-synchronous")
        held.received = push.sequence
        held.num_unpublished += 1
        fold = Fold(connection, held.index, push)
        if self._sync.is_bulk:
            self._held[held.index] = fold
            self._in_round.add(held.index)
            return [Keep(), *self._advance_round()]
        # Who rests is back in the next epoch: left out here, the epoch's last pushes would weigh a multiple.
        return [Keep(), fold, Publish(max(1, self._gate.num_awaited))]

    def sent(self, connection: int, num_bytes: int) -> None:
        """A worker is sent a snapshot of so many bytes."""
        self._leases.count(connection, "num_bytes_pulled", num_bytes)

    def finish(self, connection: int, spent: TimeSpent) -> list[Decision]:
        """A worker has trained its partition to the end."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        if held.num_unpublished:
            raise ProtocolError("a partition can finish only when its pushes are accepted")
        held.progress = 1.0
        held.update(finished=True, **vars(spent))
        self._gate.end(held.index)
        return [Accept(connection, held.folded), *self._go_on()]

    def skip(self, connection: int, epoch: int) -> list[Decision]:
        """A worker has no rows to train in the epoch."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        self._epochs.skip(held, epoch)
        self._rest_at_end(held)
        return [Accept(connection, held.folded), *self._go_on()]

    def evaluate(self, connection: int, epoch: int, totals: bytes, num_samples: int) -> list[Decision]:
        """A worker has evaluated its held-out rows; `totals` as in `Push`."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        self._epochs.evaluate(held.index, epoch, totals, num_samples)
        return [Accept(connection, held.folded), *self._go_on()]

    def fail(self, connection: int, message: str, worker_traceback: str) -> list[Decision]:
        """A worker raised: the run fails. A standby's or a former holder's failure says nothing about the run."""
        held = self._held_by(connection)
        if isinstance(held, RefusedError):
            return [Refuse(connection, held)]
        return [Accept(connection, held.folded), *self.stop(held.failed(message, worker_traceback))]

    def disconnect(self, connection: int, now: float) -> list[Decision]:
        """A connection has closed, for whatever reason."""
        partition = self._leases.release(connection, now)
        return self._grant_next(partition, now) if partition else []

    # Events from the shell and the driver

    def folded(self, fold: Fold, seconds: float) -> None:
        """A decided fold is in its round; `seconds` since the run began."""
        partition, push = self._partitions[fold.partition], fold.push
        self._epochs.fold(fold.partition, push)
        partition.folded, partition.cursor, partition.progress = push.sequence, push.cursor, push.progress
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
        granted = self._grant_next(partition, now)
        return [Refuse(fold.connection, error), *self._go_on(), *granted]

    def published(self, folds: Sequence[Fold], now: float) -> list[Decision]:
        """A round is published; `folds` are those in it: none, where all were refused."""
        if self.stopped:
            return []
        self._version += bool(folds)
        accepted = [Accept(fold.connection, fold.push.sequence) for fold in folds]
        for fold in folds:
            self._num_steps += fold.push.num_steps
            self._partitions[fold.partition].num_unpublished -= 1
        if self._sync.is_bulk:
            self._in_round = set(self._held)  # of a worker whose push was refused, and who tried again at once
            self._is_closing = False
            self._gate.advance(self._gate.counted)
        else:
            self._gate.advance({fold.partition for fold in folds})
        for fold in folds:
            self._rest_at_end(self._partitions[fold.partition])
        self._num_in_round = self._gate.num_counted
        granted = [self._grant_next(self._partitions[fold.partition], now) for fold in folds]
        return [*accepted, *self._go_on(), *(decision for decisions in granted for decision in decisions)]

    def tick(self, now: float) -> list[Decision]:
        """Lets deadlines pass. To be called every fraction of a second."""
        if not self._gate.tick(now, self._leases.coming() if self._gate.num_lost else frozenset()):
            return []
        self._num_in_round = self._gate.num_counted
        return self._go_on()

    def release_epoch(self, epoch: int, values: Mapping[str, float], *, finish: bool = False) -> list[Decision]:
        """The driver has done what it does after `epoch`: the next may begin, or all are to finish."""
        if self.stopped:
            return []
        self._epochs.release(epoch, values, finish=finish)
        if self._epochs.is_finishing:
            self._gate.hurry()
        for partition in self._partitions:
            if not self._epochs.is_at_end(partition):
                self._gate.wake(partition.index)
        self._num_in_round = self._gate.num_counted
        return self._go_on()

    def request_stop(self) -> list[Decision]:
        """The driver wants the run to end: every pull is answered so. What is on its way is still taken.

        An open bulk-synchronous round closes: who counts still pushes, or finishes instead. Again, it changes nothing.
        """
        if self._epochs.is_finishing:
            return []
        self._epochs.is_stopping = True
        self._gate.hurry()
        return self._go_on()

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

    def is_waiting(self, connection: int) -> bool:
        """Whether the server owes the connection an answer, so that it cannot be expected to say anything."""
        return self._leases.is_waiting(connection)

    def may_take_last_buffer(self, connection: int) -> bool:
        """Whether a push of this connection can be folded at once, so that its buffer is soon free again."""
        partition = self._leases.of(connection)
        if partition is None or not self._sync.is_bulk:
            return True
        return partition.index <= self._first_missing

    def export(self) -> tuple[tuple[PartitionProgress, ...], EpochProgress | None]:
        """Where partitions and epochs stand. Between rounds, this is exactly what is in the weights."""
        return self._epochs.export(self._partitions, self._gate)

    def order(self, decision: SendSnapshot, version: int) -> Order:
        """What goes with the snapshot; to be asked when it is sent, as it is the current one then."""
        num_workers = self._num_in_round if self._sync.is_bulk else self._gate.num_awaited
        return Order(version, decision.order, decision.epoch, self._num_steps, num_workers, self._epochs.values)

    def epoch_end(self, seconds: float) -> EpochEnd | None:
        """What came of the epoch that waits for the driver, if one does."""
        return None if self.stopped else self._epochs.end(seconds)

    @property
    def is_epoch_ready(self) -> bool:
        """Whether an epoch waits for the driver."""
        return self._epochs.is_ready

    @property
    def is_finishing(self) -> bool:
        """Whether every worker is to finish, and no more epoch will be for the driver."""
        return self._epochs.is_finishing

    # Helpers

    def _held_by(self, connection: int) -> Partition | RefusedError:
        return _stopped_error() if self.stopped else self._leases.held_by(connection)

    def _order_for(self, partition: Partition) -> OrderKind | None:
        """What the partition's pull is answered now; None: it waits."""
        if self._is_closing or partition.num_unpublished:
            return None
        asked, epoch = self._asked.get(partition.index, (Asked.NEXT, None))
        if asked is Asked.EVALUATE and not self._epochs.is_finishing:
            return OrderKind.EVALUATE if self._epochs.may_evaluate(epoch) else None
        order = self._epochs.order_for(partition)
        return None if order is OrderKind.TRAIN and not self._gate.may_begin(partition.index) else order

    def _go_on(self) -> list[Decision]:
        """What somebody's progress, end or death allows the others."""
        decisions = self._advance_round()
        self._epochs.advance(self._partitions, self._gate)
        for index in list(self._pulls):
            partition = self._partitions[index]
            if order := self._order_for(partition):
                decisions.append(SendSnapshot(self._pulls.pop(index), order, self._epochs.epoch_of(partition)))
        return decisions

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

    def _grant_next(self, partition: Partition, now: float) -> list[Decision]:
        grant = self._leases.grant_next(partition, now)
        if grant is None:
            return []
        self._rest_at_end(partition)
        self._num_in_round = max(self._num_in_round, self._gate.num_counted)
        return [grant, *self._go_on()]

    def _rest_at_end(self, partition: Partition) -> None:
        if self._epochs.is_at_end(partition):
            self._gate.rest(partition.index)


def _stopped_error() -> RunStoppedError:
    return RunStoppedError("the run has ended: no more weights are taken or given")
