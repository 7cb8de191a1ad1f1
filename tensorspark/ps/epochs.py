"""Where a run's workers stop for each other and for the driver: its epochs, pure.

One epoch at a time is *released*. A partition whose cursor is at the end of it *rests*: its pull waits, and the
staleness gate does not count it, so that partitions with more batches go on. Who rests depends on the data only. When
everybody who is awaited (a worker, or a lost one's successor) rests, or has trained its partition to the end, the
epoch is *complete*: its weights are final, and nobody trains. If the run validates, each then evaluates its held-out
rows with them. Then the epoch is *ready* for the driver, who releases the next one or ends the run.

What a partition pushes of the epoch before that is complete counts, even if its worker is given up later. One that
comes back with an older cursor trains its older epochs first; what it reports of them comes too late, and is dropped.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import CheckpointError, ProtocolError
from tensorspark.ps.messages import (
    Asked,
    Cursor,
    EpochEnd,
    EpochPlan,
    EpochProgress,
    OrderKind,
    PartitionProgress,
    Push,
    require_few,
)
from tensorspark.ps.partition import Partition
from tensorspark.ps.sync import Gate

logger = logging.getLogger(__name__)


class _Phase(enum.Enum):
    TRAINING = enum.auto()
    EVALUATING = enum.auto()
    READY = enum.auto()
    OVER = enum.auto()


@dataclass(frozen=True)
class _Report:
    """What one partition reported of an epoch; replaced, never changed: a checkpoint may be reading it."""

    totals: NDArray[np.float64]
    num_samples: int


@dataclass
class _Epoch:
    """One epoch, from its release to the next one's. Reports are by partition.

    Attributes:
        evaluators: partitions that had come to its end when it was complete.
        excused: partitions that its end does not wait for, as another shard, which this one follows, has them wait.
    """

    number: int
    values: Mapping[str, float]
    phase: _Phase = _Phase.TRAINING
    evaluators: frozenset[int] = frozenset()
    excused: set[int] = field(default_factory=set)
    trained: dict[int, _Report] = field(default_factory=dict)
    evaluated: dict[int, _Report] = field(default_factory=dict)


class Epochs:
    """The epochs of a run. Without a plan there are none: everybody is to train whenever the gate lets them.

    Args:
        progress: where a restored run stood; None begins with the earliest epoch of a partition.
        partitions: where a restored run's partitions stood.

    Raises:
        CheckpointError: its totals are of other metrics than the plan's.
    """

    def __init__(
        self,
        plan: EpochPlan | None,
        progress: EpochProgress | None = None,
        partitions: Sequence[PartitionProgress] = (),
    ) -> None:
        self.plan = plan
        self.is_stopping = False
        at = [partition.cursor.epoch for partition in partitions if not partition.report.finished]
        if progress is None:
            self._released = _Epoch(min(at, default=0), dict(plan.values) if plan else {})
            return
        # Partitions that were dealt anew may all begin before the epoch that the run was in.
        self._released = _Epoch(min(progress.epoch, max(at, default=progress.epoch)), dict(progress.values))
        if progress.is_over:
            self._released.phase = _Phase.OVER
        if self._released.number == progress.epoch:
            self._restore_reports(partitions)

    def _restore_reports(self, partitions: Sequence[PartitionProgress]) -> None:
        epoch = self._released
        for index, partition in enumerate(partitions):
            if partition.epoch_samples or partition.epoch_totals:
                epoch.trained[index] = _Report(self._restored(partition.epoch_totals), partition.epoch_samples)
            if partition.evaluated_epoch == epoch.number:
                totals = self._restored(partition.evaluation_totals)
                epoch.evaluated[index] = _Report(totals, partition.evaluation_samples)

    def _restored(self, data: bytes) -> NDArray[np.float64]:
        if self.plan is None or len(data) != self.plan.totals_bytes:
            expected = self.plan.num_totals if self.plan else 0
            raise CheckpointError(
                f"the checkpoint holds totals of {len(data) // 8} numbers for an epoch, these metrics keep {expected}: "
                f"compile the model with the metrics of the run that it was made of"
            )
        return np.frombuffer(data, "<f8").astype(np.float64)

    # Questions

    @property
    def number(self) -> int:
        """The released epoch."""
        return self._released.number

    @property
    def values(self) -> Mapping[str, float]:
        return self._released.values

    @property
    def is_ready(self) -> bool:
        """Whether the released epoch waits for the driver."""
        return self._released.phase is _Phase.READY and not self.is_stopping

    @property
    def is_finishing(self) -> bool:
        """Whether every worker is to finish."""
        return self._released.phase is _Phase.OVER or self.is_stopping

    def is_at_end(self, partition: Partition) -> bool:
        """Whether the partition has trained its rows of all that is released."""
        return self.plan is not None and partition.cursor.epoch > self.number

    def may_evaluate(self, epoch: int | None) -> bool:
        """Whether one who was ordered to by another shard has the weights for it now; None: of the epoch that is."""
        if epoch is not None and epoch < self.number:  # too late to count: any weights will do
            return True
        return self.is_complete and epoch in (None, self.number)

    def order_for(self, partition: Partition) -> OrderKind | None:
        """What the partition's worker is to do, if the gate lets it; None: to wait."""
        if self.is_finishing:
            return OrderKind.FINISH
        if self.plan is None:
            return OrderKind.TRAIN
        epoch = self._released
        if epoch.phase is _Phase.TRAINING:
            return None if self.is_at_end(partition) else OrderKind.TRAIN
        # Nor does who comes back late train now: the weights are evaluated, or with the driver.
        is_due = epoch.phase is _Phase.EVALUATING and partition.index in epoch.evaluators
        return OrderKind.EVALUATE if is_due and partition.index not in epoch.evaluated else None

    @property
    def is_complete(self) -> bool:
        """Whether the released epoch's weights are final."""
        return self.plan is not None and self._released.phase is not _Phase.TRAINING

    def epoch_of(self, partition: Partition) -> int:
        """Which epoch an order for the partition is about."""
        return min(partition.cursor.epoch, self.number) if self.plan else partition.cursor.epoch

    # Events

    def require_due(self, partition: Partition, push: Push) -> None:
        """Raises `ProtocolError` for a push with totals of another length, or of an epoch that is not released."""
        expected_bytes = self.plan.totals_bytes if self.plan else 0
        if push.totals and len(push.totals) != expected_bytes:
            raise ProtocolError(f"expected totals of {expected_bytes} bytes, got {len(push.totals)}")
        if self.plan and (self.is_at_end(partition) or push.cursor > Cursor(self.number + 1)):
            raise ProtocolError(f"expected a push of epoch {self.number}, the newest that is released, got {push}")

    def follow(self, partition: Partition, asked: Asked) -> None:
        """Takes note of what the shard that this one follows has said to the partition's worker, by what that asks."""
        epoch = self._released
        if asked is Asked.REST:
            epoch.excused.add(partition.index)
        elif asked is Asked.NEXT and not self.is_at_end(partition):
            epoch.excused.discard(partition.index)
            if epoch.phase is _Phase.READY:  # too early: it came between the ends of this shard's epoch and the other's
                epoch.phase = _Phase.TRAINING

    def fold(self, partition: int, push: Push) -> None:
        """A push is in its round."""
        if self.plan is None:
            return
        epoch = self._released
        if push.epoch != epoch.number or epoch.phase is not _Phase.TRAINING:
            logger.info(
                "partition %d: a push of epoch %d comes after the epoch's end: it trains, but its %d samples are not "
                "in the epoch's figures",
                partition,
                push.epoch,
                push.num_samples,
            )
            return
        before = epoch.trained.get(partition, _Report(np.zeros(self.plan.num_totals), 0))
        totals = before.totals + np.frombuffer(push.totals, "<f8") if push.totals else before.totals
        epoch.trained[partition] = _Report(totals, before.num_samples + push.num_samples)

    def skip(self, partition: Partition, epoch: int) -> None:
        """A partition has no rows to train in `epoch`: it is at its end. Again, it changes nothing."""
        if self.plan is None:
            raise ProtocolError("expected no SKIP: the run has no epochs")
        if epoch < partition.cursor.epoch:
            return
        if partition.cursor != Cursor(epoch) or epoch > self.number or partition.num_unpublished:
            raise ProtocolError(
                f"expected SKIP of epoch {self.number} or before, at its beginning, got epoch {epoch} at "
                f"{partition.cursor}"
            )
        partition.cursor = Cursor(epoch + 1)
        partition.progress = min(1.0, (epoch + 1) / self.plan.num_epochs)

    def evaluate(self, partition: int, epoch: int, totals: bytes, num_samples: int) -> None:
        """A partition's held-out rows are evaluated with the weights of the epoch's end; counts once."""
        released = self._released
        if self.plan is None or len(totals) != self.plan.totals_bytes:
            expected = (
                f"{self.plan.totals_bytes} bytes of totals" if self.plan else "no EVALUATION: there are no epochs"
            )
            raise ProtocolError(f"expected {expected}, got {len(totals)} bytes")
        if epoch < released.number or (epoch == released.number and partition in released.evaluated):
            return
        if epoch > released.number or partition not in released.evaluators:
            raise ProtocolError(f"expected no EVALUATION of epoch {epoch} from partition {partition}: none is due")
        if released.phase is not _Phase.EVALUATING:
            logger.info("partition %d: its evaluation of epoch %d comes after the epoch's end", partition, epoch)
            return
        released.evaluated[partition] = _Report(np.frombuffer(totals, "<f8").astype(np.float64), num_samples)

    def advance(self, partitions: Sequence[Partition], gate: Gate) -> None:
        """Takes note of what somebody's progress, end or death means for the released epoch."""
        epoch = self._released
        if self.plan is None or self.is_finishing or epoch.phase is _Phase.READY:
            return
        awaited = gate.awaited
        if not awaited and not all(partition.report.finished for partition in partitions):
            return
        if epoch.phase is _Phase.TRAINING:
            if not self._is_complete(partitions, awaited) or not gate.has_assembled:
                return
            epoch.evaluators = frozenset(partition.index for partition in partitions if self.is_at_end(partition))
            epoch.phase = _Phase.EVALUATING if self.plan.validates else _Phase.READY
        if epoch.phase is _Phase.EVALUATING and epoch.evaluated.keys() >= awaited & epoch.evaluators:
            epoch.phase = _Phase.READY

    def _is_complete(self, partitions: Sequence[Partition], awaited: set[int]) -> bool:
        excused = self._released.excused
        due = [partitions[index] for index in awaited if self.is_at_end(partitions[index]) or index not in excused]
        if not all(map(self.is_at_end, due)) or (awaited and not due):
            return False
        # One who was given up may have left a push, which is in the making.
        return not any(partition.num_unpublished for partition in partitions)

    def release(self, epoch: int, values: Mapping[str, float], *, finish: bool) -> None:
        """The driver lets the epoch after `epoch` begin, or has the run end; after a stop, it changes nothing.

        Raises:
            ValueError: `epoch` is not the one that is ready.
            ConfigError: the values would not fit into a frame's header.
        """
        require_few(values)
        if self.plan is None:
            raise ValueError("expected a run with an EpochPlan")
        if self.is_finishing:
            return
        if epoch != self.number or not self.is_ready:
            raise ValueError(f"expected the epoch that wait_epoch has returned last, got {epoch}: it is not ready")
        if finish or epoch + 1 == self.plan.num_epochs:
            self._released.values = dict(values)
            self._released.phase = _Phase.OVER
        else:
            self._released = _Epoch(epoch + 1, dict(values))

    # What the driver and checkpoints are given

    def end(self, seconds: float) -> EpochEnd | None:
        """The epoch that is ready, if one is."""
        if not self.is_ready:
            return None
        trained, evaluated = sorted(self._released.trained.items()), sorted(self._released.evaluated.items())
        return EpochEnd(
            epoch=self.number,
            seconds=seconds,
            num_samples=sum(report.num_samples for _, report in trained),
            totals=tuple((partition, report.totals.copy()) for partition, report in trained),
            evaluation=tuple((partition, report.totals.copy()) for partition, report in evaluated),
            evaluation_samples=sum(report.num_samples for _, report in evaluated),
        )

    def export(
        self, partitions: Sequence[Partition], gate: Gate
    ) -> tuple[tuple[PartitionProgress, ...], EpochProgress | None]:
        """Where partitions and epochs stand. A release in between, on another thread, does not tear them apart."""
        epoch = self._released
        exported = tuple(_exported(partition, gate.round_of(partition.index), epoch) for partition in partitions)
        if self.plan is None:
            return exported, None
        return exported, EpochProgress(epoch.number, dict(epoch.values), epoch.phase is _Phase.OVER)


def _exported(partition: Partition, round_number: int, epoch: _Epoch) -> PartitionProgress:
    trained, evaluated = epoch.trained.get(partition.index), epoch.evaluated.get(partition.index)
    return PartitionProgress(
        partition.folded,
        partition.cursor,
        round_number,
        partition.progress,
        partition.report,
        epoch_totals=_packed(trained),
        epoch_samples=trained.num_samples if trained else 0,
        evaluated_epoch=epoch.number if evaluated else None,
        evaluation_totals=_packed(evaluated),
        evaluation_samples=evaluated.num_samples if evaluated else 0,
    )


def _packed(report: _Report | None) -> bytes:
    return report.totals.astype("<f8").tobytes() if report else b""
