"""What is told of a run while it goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tensorspark.history import Recorder, WorkerReport
from tensorspark.ps.epochs import Epochs
from tensorspark.ps.messages import Status
from tensorspark.ps.partition import Partition
from tensorspark.ps.sync import Gate
from tensorspark.telemetry.records import WorkerSample, WorkerState


class Overview:
    """A run's state, read; `pulls` are the partitions whose pull waits."""

    def __init__(
        self,
        run: int,
        partitions: Sequence[Partition],
        gate: Gate,
        epochs: Epochs,
        recorder: Recorder,
        pulls: Collection[int],
    ) -> None:
        self._run = run
        self._partitions = partitions
        self._gate = gate
        self._epochs = epochs
        self._recorder = recorder
        self._pulls = pulls

    def status(self) -> Status:
        """The run at this moment."""
        partitions, epochs, gate = self._partitions, self._epochs, self._gate
        last = self._recorder.last()
        shares = [1.0 if partition.report.finished else partition.progress for partition in partitions]
        begun = [share for share in shares if share is not None]
        return Status(
            run=self._run,
            num_steps=self._recorder.num_steps,
            num_samples=self._recorder.num_samples,
            num_partitions=len(partitions),
            num_live=sum(partition.holder is not None for partition in partitions),
            num_lost=gate.num_lost,
            num_standby=sum(len(partition.standbys) for partition in partitions),
            num_waiting=sum(not epochs.is_at_end(partitions[index]) for index in self._pulls),
            num_finished=sum(partition.report.finished for partition in partitions),
            progress=sum(begun) / len(shares) if begun else None,
            scalars=dict(last.scalars) if last else {},
            epoch=epochs.number if epochs.plan else None,
            num_epochs=epochs.plan.num_epochs if epochs.plan else None,
            num_resting=gate.num_resting,
        )

    def reports(self) -> tuple[WorkerReport, ...]:
        """What every partition's worker did."""
        return tuple(partition.report for partition in self._partitions)

    def is_needed(self, connection: int) -> bool:
        """Whether it has a partition that is not trained to its end."""
        return any(partition.holder == connection and not partition.report.finished for partition in self._partitions)

    def is_holder(self, connection: int) -> bool:
        """Whether it has a partition."""
        return any(partition.holder == connection for partition in self._partitions)

    def fastest_round(self) -> int:
        """That of the worker, of those that live, who is ahead of all."""
        return max((self._gate.round_of(p.index) for p in self._partitions if p.holder is not None), default=0)

    def worker(self, index: int, busy_s: Mapping[str, float], fastest: int) -> WorkerSample:
        """One partition's worker at this moment.

        Args:
            busy_s: by `telemetry.records.Activity`.
            fastest: as `fastest_round` says.
        """
        partition = self._partitions[index]
        report = partition.report
        return WorkerSample(
            partition=index,
            state=self._state_of(partition).value,
            host=report.host,
            attempt=-1 if partition.attempt is None else partition.attempt,
            num_attempts=report.num_attempts,
            num_steps=report.num_steps,
            num_samples=report.num_samples,
            num_applied=report.num_applied,
            num_refused=report.num_refused,
            num_reconnects=report.num_reconnects,
            num_bytes_pushed=report.num_bytes_pushed,
            num_bytes_pulled=report.num_bytes_pulled,
            progress=1.0 if report.finished else partition.progress,
            lag=max(0, fastest - self._gate.round_of(index)),
            busy_s=busy_s,
        )

    def _state_of(self, partition: Partition) -> WorkerState:
        if partition.report.finished:
            return WorkerState.FINISHED
        if partition.holder is not None:
            return WorkerState.WAITING if partition.index in self._pulls else WorkerState.LIVE
        return WorkerState.PENDING if partition.attempt is None else WorkerState.LOST
