"""How a run goes on from a checkpoint: what must be the same, and what becomes of the cursors where it is not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from tensorspark.config import Config
from tensorspark.driver.arguments import RunPlan
from tensorspark.errors import CheckpointError, ConfigError
from tensorspark.history import WorkerReport
from tensorspark.ps.checkpoint import Plain, RunCheckpoint
from tensorspark.ps.messages import Cursor, PartitionProgress
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import WeightLayout

logger = logging.getLogger(__name__)


def planned_values(plan: RunPlan, config: Config) -> dict[str, Plain]:
    """What a checkpoint says of its run; `_MUST_STAY` names what of it stays the same."""
    return {
        "batch_size": plan.batch_size,
        "num_epochs": plan.num_epochs,
        "shuffle_within_partition": plan.shuffle,
        "seed": plan.seed,
        "sync_interval": config.sync_interval,
        "staleness": config.staleness,
        "validation_split": plan.validation_split,
    }


# Cursors count batches of what these make of the rows.
_MUST_STAY = ("batch_size", "num_epochs", "shuffle_within_partition", "seed", "validation_split")


def continued(checkpoint: RunCheckpoint, plan: RunPlan, config: Config, layout: WeightLayout) -> RunCheckpoint:
    """The checkpoint as the new run is to begin with it.

    With another number of partitions the cursors stand for rows that lie elsewhere now. Then every partition begins at
    the earliest epoch that some partition had not finished: rows of it may be trained twice, none is left out.

    Raises:
        CheckpointError: other variables are synchronized.
        ConfigError: what must stay the same does not: names it.
    """
    difference = checkpoint.layout.difference(layout)
    if difference:
        raise CheckpointError(
            f"the checkpoint is of another param_list: {difference}; pass the variables it was made of"
        )
    planned = planned_values(plan, config)
    for name in _MUST_STAY:
        if checkpoint.plan.get(name) != planned[name]:
            raise ConfigError(
                f"{name} must be {checkpoint.plan.get(name)!r} as in the checkpoint that this run goes on from, got "
                f"{planned[name]!r}"
            )
    if checkpoint.plan.get("sync_interval") != config.sync_interval:
        checkpoint = checkpoint.without_parts()  # a push of another length is no repetition of one that a shard has
    _require_same_combiner(checkpoint, plan)
    plan.combiner.restore_state(layout, _copied(checkpoint.combiner_state))
    if len(checkpoint.partitions) == plan.num_partitions:
        return checkpoint
    epoch = min(_epoch(progress, plan.num_epochs) for progress in checkpoint.partitions)
    logger.warning(
        "the feed has %d partitions, and %d in the checkpoint: all partitions begin at epoch %d, of which rows may be "
        "trained twice",
        plan.num_partitions,
        len(checkpoint.partitions),
        epoch,
    )
    begin = [PartitionProgress(0, Cursor(epoch), 0, None, WorkerReport(index)) for index in range(plan.num_partitions)]
    epochs = checkpoint.epochs and replace(checkpoint.epochs, epoch=epoch)
    return replace(checkpoint, partitions=tuple(begin), epochs=epochs)


def _copied(state: CombinerState) -> CombinerState:
    """A combiner changes the slots that it takes over, and a run that fails is begun again from the same checkpoint."""
    return CombinerState({name: slot.copy() for name, slot in state.slots.items()}, dict(state.values))


def _epoch(progress: PartitionProgress, num_epochs: int) -> int:
    return num_epochs if progress.report.finished else progress.cursor.epoch


def _require_same_combiner(checkpoint: RunCheckpoint, plan: RunPlan) -> None:
    name, settings = type(plan.combiner).__name__, plan.combiner.settings
    if (name, dict(settings)) != (checkpoint.combiner, dict(checkpoint.combiner_settings)):
        raise ConfigError(
            f"weight_combiner must be {_call(checkpoint.combiner, checkpoint.combiner_settings)} as in the checkpoint "
            f"that this run goes on from, got {_call(name, settings)}"
        )


def _call(name: str, settings: Mapping[str, Plain]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
