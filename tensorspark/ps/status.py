"""What is told of a run while it goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tensorspark.history import Recorder
from tensorspark.ps.epochs import Epochs
from tensorspark.ps.messages import Status
from tensorspark.ps.partition import Partition
from tensorspark.ps.sync import Gate


def status_of(
    run: int,
    partitions: Sequence[Partition],
    gate: Gate,
    epochs: Epochs,
    recorder: Recorder,
    pulls: Collection[int],
) -> Status:
    """A run at this moment; `pulls` are the partitions whose pull waits."""
    last = recorder.last()
    shares = [1.0 if partition.report.finished else partition.progress for partition in partitions]
    begun = [share for share in shares if share is not None]
    return Status(
        run=run,
        num_steps=recorder.num_steps,
        num_samples=recorder.num_samples,
        num_partitions=len(partitions),
        num_live=sum(partition.holder is not None for partition in partitions),
        num_lost=gate.num_lost,
        num_standby=sum(len(partition.standbys) for partition in partitions),
        num_waiting=sum(not epochs.is_at_end(partitions[index]) for index in pulls),
        num_finished=sum(partition.report.finished for partition in partitions),
        progress=sum(begun) / len(shares) if begun else None,
        scalars=dict(last.scalars) if last else {},
        epoch=epochs.number if epochs.plan else None,
        num_epochs=epochs.plan.num_epochs if epochs.plan else None,
        num_resting=gate.num_resting,
    )
