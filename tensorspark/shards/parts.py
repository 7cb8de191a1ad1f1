"""What a shard begins a run with, and what of the shards goes back to where it came from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorspark.errors import CheckpointError
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.shards.host import unpickled
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.ranges import Shard


@dataclass(frozen=True)
class Part:
    """What a shard begins a run with.

    Attributes:
        combiner: pickled, without the slots of `state`.
        state: of the combiner; its slots are views of the whole one's.
    """

    shard: Shard
    combiner: bytes
    state: CombinerState
    resume: RunCheckpoint | None

    def own_combiner(self) -> WeightCombiner:
        """The combiner of a shard in this process, in the state that it begins with."""
        rule = unpickled(self.combiner)
        if self.state.slots or self.state.values:
            rule.restore_state(self.shard.layout, self.state)
        return rule


def parts_of(
    layout: WeightLayout,
    shards: Sequence[Shard],
    combiner: WeightCombiner,
    resume: RunCheckpoint | None,
    dumps: Callable[[Any], bytes],
) -> list[Part]:
    """What each shard begins with."""
    with _without_slots(combiner, layout) as state:
        return [
            Part(
                shard,
                dumps(combiner.for_range(layout, shard.start, shard.stop)),
                _state_of(state, shard),
                _resume_of(resume, shards, index),
            )
            for index, shard in enumerate(shards)
        ]


def joined_slots(slots: Sequence[dict[str, Buffer]]) -> dict[str, Buffer]:
    """The slots of all shards, in their order, each as one; taken out of `slots`, so as not to be held twice."""
    names = dict.fromkeys(name for each in slots for name in each)
    return {name: np.concatenate([each.pop(name) for each in slots if name in each]) for name in names}


@contextlib.contextmanager
def _without_slots(combiner: WeightCombiner, layout: WeightLayout) -> Iterator[CombinerState]:
    """The combiner's state, whose slots it does not hold meanwhile: as large as the weights, they travel in parts."""
    state = combiner.state()
    if not state.slots:
        yield state
        return
    try:
        combiner.restore_state(layout, state)
    except CheckpointError:  # they are of another model: it begins anew, as it would on one server
        combiner.reset_value()
        yield CombinerState()
        return
    combiner.reset_value()
    try:
        yield state
    finally:
        combiner.restore_state(layout, state)


def _state_of(state: CombinerState, shard: Shard) -> CombinerState:
    """Slots may be shorter than the weights, where only the first tensors have any."""
    slots = {name: shard.of(slot) for name, slot in state.slots.items()}
    return CombinerState({name: slot for name, slot in slots.items() if slot.nbytes}, dict(state.values))


def _resume_of(resume: RunCheckpoint | None, shards: Sequence[Shard], index: int) -> RunCheckpoint | None:
    """Where a restored run's shard stood."""
    if resume is None:
        return None
    if [part.stop for part in resume.parts] == [shard.stop for shard in shards]:
        part = resume.parts[index]
        resume = replace(resume, version=part.version, partitions=part.partitions)
    else:
        resume = resume.without_parts()
    if not index:
        return resume
    partitions = [replace(p, epoch_totals=b"", evaluation_totals=b"") for p in resume.partitions]
    return replace(resume, partitions=tuple(partitions))
