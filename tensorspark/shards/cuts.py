"""Checkpoints of all shards as one: a cut through them, made while they are held and fetched while they go on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensorspark.errors import SessionClosedError, ShardLostError
from tensorspark.plain import build
from tensorspark.ps.checkpoint import CheckpointPart, RunCheckpoint
from tensorspark.ps.messages import PartitionProgress
from tensorspark.ps.server import ParameterServer
from tensorspark.shards.fleet import Fleet, deadline_after
from tensorspark.shards.parts import joined_slots
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.ranges import Shard

logger = logging.getLogger(__name__)

_ALIGN_TIMEOUT_S = 10.0


class _NotCutError(Exception):
    """No cut came about; says why, for the log."""


@dataclass(frozen=True)
class _Cut:
    """The first shard's part, and what the others say of theirs, which they keep until it is fetched."""

    first: RunCheckpoint
    others: Sequence[Mapping[str, Any]]


class Cuts:
    """Makes checkpoints of one run. Its methods may be called from any thread.

    Args:
        layout: of all weights.
        combiner: of all weights; its name and settings are the checkpoint's.
        primary: serves the first of the shards.
        is_bulk: whether the run is bulk-synchronous: then all shards are cut between the same two rounds.

    Attributes:
        standing: held while the shards stand. Whoever releases an epoch takes it, too: that must not come to one shard
            before the cut and to another behind it.
    """

    def __init__(
        self,
        layout: WeightLayout,
        shards: Sequence[Shard],
        combiner: WeightCombiner,
        primary: ParameterServer,
        fleet: Fleet,
        *,
        is_bulk: bool,
    ) -> None:
        self.standing = threading.Lock()
        self._layout = layout
        self._shards = shards
        self._combiner = combiner
        self._primary = primary
        self._fleet = fleet
        self._is_bulk = is_bulk
        self._capturing = threading.Lock()  # a shard keeps one cut

    def capture(self, timeout_s: float) -> RunCheckpoint | None:
        """A checkpoint; None, and a warning in the log, where none came about.

        Args:
            timeout_s: how long to wait until all shards stand between two rounds.
        """
        with self._capturing:
            try:
                with self.standing:
                    cut = self._cut(timeout_s)
                return self._fetched(cut)
            except (_NotCutError, ShardLostError) as error:
                if not self._is_ending:
                    logger.warning("no checkpoint was made: %s", error)
            except SessionClosedError:
                pass
        return None

    @property
    def _is_ending(self) -> bool:
        """Whether the run is over, or soon will be, so that nobody wants its checkpoints."""
        try:
            return self._fleet.is_closing or self._primary.is_ending
        except SessionClosedError:
            return True

    # While the shards stand

    def _cut(self, timeout_s: float) -> _Cut:
        deadline = time.monotonic() + timeout_s
        try:
            self._hold(deadline, timeout_s)
            # Standing shards have only to copy their weights.
            answers = self._fleet.request("cut", {"timeout_s": timeout_s})
            first = self._primary.capture(timeout_s)
            others = [values for values, _ in self._fleet.wait("cut", answers, deadline_after(self._layout.num_bytes))]
        finally:
            self._go_on()
        not_cut = [0] * (first is None) + [i for i, values in enumerate(others, 1) if values["version"] is None]
        if first is None or not_cut:
            raise _NotCutError(f"{_named(not_cut)} could not copy its weights within {timeout_s:g} s")
        return _Cut(first, others)

    def _hold(self, deadline: float, timeout_s: float) -> None:
        """Stops all shards between two rounds, in a bulk-synchronous run between the same two."""
        versions = self._hold_at(0, deadline)
        if self._is_bulk and None not in versions and len(set(versions)) > 1:
            # Whoever pushed that round to one shard has pushed it to all. If a worker came between two rounds, that is
            # not so: then they stay apart, and the parts have cursors of their own.
            newest = max(version for version in versions if version is not None)
            if None in self._hold_at(newest, min(deadline, time.monotonic() + _ALIGN_TIMEOUT_S)):
                versions = self._hold_at(0, deadline)
        if None in versions:
            late = [index for index, version in enumerate(versions) if version is None]
            raise _NotCutError(
                f"{_named(late)} did not come to the end of a round within {timeout_s:g} s; where no worker hangs, but "
                f"its intervals take so long, lower spark.tensorspark.sync.interval, or give checkpoints more time "
                f"with a longer spark.tensorspark.checkpoint.interval"
            )

    def _hold_at(self, version: int, deadline: float) -> list[int | None]:
        timeout_s = max(0.0, deadline - time.monotonic())
        answers = self._fleet.request("hold", {"at_version": version, "timeout_s": timeout_s})
        own = self._primary.hold(version, timeout_s)
        others = self._fleet.wait("hold", answers, deadline_after() + timeout_s)
        return [own, *(values["version"] for values, _ in others)]

    def _go_on(self) -> None:
        with contextlib.suppress(ShardLostError, SessionClosedError):
            answers = self._fleet.request("go_on")
            self._primary.go_on()
            self._fleet.wait("go_on", answers, deadline_after())

    # While they go on

    def _fetched(self, cut: _Cut) -> RunCheckpoint:
        """One shard after the other, so that the driver holds no more of their weights than one part beside the whole,
        and their slots once, but for one that is being joined."""
        first = cut.first
        weights = self._layout.allocate()
        self._shards[0].of(weights)[:] = first.weights
        slots = [dict(first.combiner_state.slots)]
        parts = [CheckpointPart(self._shards[0].stop, first.version, first.partitions)]
        for position, (shard, described) in enumerate(zip(self._shards[1:], cut.others, strict=True)):
            part_slots = self._fetch(position, described, shard.of(weights))
            slots.append(part_slots)
            partitions = build(tuple[PartitionProgress, ...], described["partitions"], "a shard's partitions")
            parts.append(CheckpointPart(shard.stop, described["version"], partitions))
        return replace(
            first,
            layout=self._layout,
            weights=weights,
            combiner=type(self._combiner).__name__,
            combiner_settings=self._combiner.settings,
            combiner_state=CombinerState(joined_slots(slots), first.combiner_state.values),
            parts=() if len({_pushes(part) for part in parts}) == 1 else tuple(parts),
        )

    def _fetch(self, position: int, described: Mapping[str, Any], out: Buffer) -> dict[str, Buffer]:
        """Puts a shard's weights into `out`, and returns its slots."""
        values, (weights, *slots) = self._fleet.ask_one(position, "fetch", described["num_bytes"])
        out[:] = weights
        return dict(zip(values["slots"], slots, strict=True))


def _named(indices: Sequence[int]) -> str:
    return f"shard {', '.join(map(str, indices))}"


def _pushes(part: CheckpointPart) -> tuple[int, ...]:
    return tuple(progress.sequence for progress in part.partitions)
