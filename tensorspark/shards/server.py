"""The driver's side of shards: a parameter server like any other, of which parts are elsewhere."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from tensorspark.errors import SessionClosedError, ShardLostError, TensorsparkError
from tensorspark.history import Point, WorkerReport
from tensorspark.ps.checkpoint import CheckpointPart, RunCheckpoint
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import EpochEnd, EpochPlan, PartitionProgress, Status
from tensorspark.ps.records import build
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.shards.channel import Reply
from tensorspark.shards.fleet import Fleet, Hosts
from tensorspark.shards.host import ShardJob
from tensorspark.shards.places import ShardPlace
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.shards import Shard

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0
_ALIGN_TIMEOUT_S = 10.0
_ASYNCHRONOUS = SyncPlan()


class Endpoint(Protocol):
    """Where a server is: a `ParameterServer`, or what is known of another's."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def token(self) -> str: ...
    @property
    def certificate(self) -> str | None: ...


@dataclass(frozen=True)
class _OtherEndpoint:
    host: str
    port: int
    token: str = field(repr=False)
    certificate: str | None = field(repr=False)


class ShardedServer:
    """A `ParameterServer` for a part of the weights, and others for the rest, as one. Safe to call from any thread.

    The first shard is served here. It alone is told of metrics, and says what comes next; each of the others has
    its own gate, leases and rounds, as workers push to all and pull from all. Other shards are started for each run.

    Args:
        layout: of all weights.
        shards: at least two.
        primary: serves the first shard.
        start: starts the other shards' processes.
        dumps: pickles combiners, also those that are defined in ``__main__``.
        server: arguments of the other shards' `ParameterServer`, but for layout and host.
        address_of: what workers need to know of a server.
        listen_host: where the other shards find the driver.
        shards_host: where workers find the other shards; None: where each of them is.
    """

    def __init__(
        self,
        layout: WeightLayout,
        shards: Sequence[Shard],
        primary: ParameterServer,
        *,
        start: Callable[[Sequence[ShardJob]], Hosts],
        dumps: Callable[[Any], bytes],
        server: Mapping[str, Any],
        address_of: Callable[[Endpoint], ServerAddress],
        listen_host: str = "127.0.0.1",
        shards_host: str | None = None,
    ) -> None:
        self.layout = layout
        self.shards = tuple(shards)
        self.places: tuple[ShardPlace, ...] = ()
        self._primary = primary
        self._start = start
        self._dumps = dumps
        self._server = server
        self._address_of = address_of
        self._listen_host = listen_host
        self._shards_host = shards_host
        self._fleet: Fleet | None = None
        self._epoch_ended: int | None = None  # and not released
        self._combiner: WeightCombiner | None = None
        self._own_combiner: WeightCombiner | None = None  # the first shard's copy
        self._is_bulk = False
        self._capturing = threading.Lock()

    def __repr__(self) -> str:
        return f"ShardedServer(num_shards={len(self.shards)}, primary={self._primary!r})"

    @property
    def host(self) -> str:
        return self._primary.host

    @property
    def port(self) -> int:
        return self._primary.port

    @property
    def token(self) -> str:
        return self._primary.token

    @property
    def certificate(self) -> str | None:
        return self._primary.certificate

    def begin_run(
        self,
        weights: Buffer,
        combiner: WeightCombiner,
        num_partitions: int,
        *,
        sync: SyncPlan = _ASYNCHRONOUS,
        resume: RunCheckpoint | None = None,
        epochs: EpochPlan | None = None,
        compression: Compression = NO_COMPRESSION,
    ) -> int:
        """As `ParameterServer.begin_run`; `places` then says where the shards are.

        Raises:
            ShardLostError: a shard's process did not start.
        """
        self._end_fleet()
        self._combiner, self._is_bulk, self._epoch_ended = combiner, sync.is_bulk, None
        parts = [self._part(shard, combiner, resume, index) for index, shard in enumerate(self.shards)]
        jobs = [
            ShardJob(
                index=index,
                server_host=self._shards_host,
                server=self._server,
                layout=part.shard.layout,
                combiner=self._dumps(part.combiner),
                num_partitions=num_partitions,
                sync=sync,
                compression=compression,
                epochs=epochs and replace(epochs, validates=False, num_totals=0, values={}),
            )
            for index, part in enumerate(parts[1:], 1)
        ]
        self._fleet = fleet = Fleet(self._listen_host, jobs, self._start)
        begun = fleet.begin([(part.shard.of(weights), part.state, part.resume) for part in parts[1:]])
        own = parts[0]
        self._own_combiner = own.combiner
        if own.state.slots or own.state.values:
            own.combiner.restore_state(own.shard.layout, own.state)
        run = self._primary.begin_run(
            own.shard.of(weights),
            own.combiner,
            num_partitions,
            sync=sync,
            resume=own.resume,
            epochs=epochs,
            compression=compression,
        )
        endpoints: list[Endpoint] = [self._primary]
        endpoints += [_OtherEndpoint(it["host"], it["port"], it["token"], it["certificate"]) for it in begun]
        runs = [run, *(it["run"] for it in begun)]
        self.places = tuple(
            ShardPlace(shard, self._address_of(endpoint), number)
            for shard, endpoint, number in zip(self.shards, endpoints, runs, strict=True)
        )
        return run

    def stop_run(self, failure: TensorsparkError | None = None) -> None:
        self._tell("stop")
        self._primary.stop_run(failure)

    def request_stop(self) -> None:
        self._tell("request_stop")
        self._primary.request_stop()

    def wait_epoch(self, timeout_s: float) -> EpochEnd | None:
        """As `ParameterServer.wait_epoch`; other shards may still be folding what was pushed in it."""
        end = self._primary.wait_epoch(timeout_s)
        self._epoch_ended = None if end is None else end.epoch
        return end

    def release_epoch(self, epoch: int, values: Mapping[str, float], *, finish: bool = False) -> None:
        """As `ParameterServer.release_epoch`; not while a capture goes on, which would have it in a part of its cut."""
        with self._capturing:
            self._epoch_ended = None
            self._tell("release_epoch", {"epoch": epoch, "finish": finish})
            self._primary.release_epoch(epoch, values, finish=finish)

    def status(self) -> Status:
        return self._primary.status()

    def failure(self) -> TensorsparkError | None:
        """What went wrong first: in the run, as `ParameterServer.failure`, or with a shard."""
        failure = self._primary.failure()
        return failure if failure is not None or self._fleet is None else self._fleet.failure()

    def records(self) -> tuple[tuple[Point, ...], tuple[WorkerReport, ...]]:
        """As the first shard's, with the bytes of all."""
        points, reports = self._primary.records()
        num_bytes = np.zeros((len(reports), 2), np.int64)
        for values, _ in self._ask("count_bytes"):
            num_bytes += np.array(values["num_bytes"], np.int64).reshape(-1, 2)
        added = [
            replace(
                report,
                num_bytes_pushed=report.num_bytes_pushed + int(pushed),
                num_bytes_pulled=report.num_bytes_pulled + int(pulled),
            )
            for report, (pushed, pulled) in zip(reports, num_bytes, strict=True)
        ]
        return points, tuple(added)

    def read_weights(self, out: Buffer) -> int:
        """As `ParameterServer.read_weights`; the version is the first shard's. At the end of an epoch, its weights."""
        version = self._primary.read_weights(self.shards[0].of(out))
        for shard, (_, raw) in zip(self.shards[1:], self._ask("read", {"epoch": self._epoch_ended}), strict=True):
            shard.of(out)[:] = raw[0]
        return version

    def capture(self, timeout_s: float = _CALL_TIMEOUT_S) -> RunCheckpoint | None:
        """As `ParameterServer.capture`: one cut through all shards where the run is bulk-synchronous.

        Where the shards do not stand at the same pushes, `RunCheckpoint.parts` has each shard's cursors.
        """
        with self._capturing:
            deadline = time.monotonic() + timeout_s
            try:
                if not self._hold(deadline):
                    return None
                answers = self._request("capture", {"timeout_s": timeout_s})
                first = self._primary.capture(max(0.0, deadline - time.monotonic()))
                others = self._wait(answers, deadline)
            except (ShardLostError, SessionClosedError):
                return None  # `failure` says so
            finally:
                self._go_on()
            if first is None or any(values["version"] is None for values, _ in others):
                return None
            return self._joined(first, others)

    def end_run(self) -> None:
        """Ends the other shards, whose weights have been read; the combiner has what they have seen."""
        self.return_state()
        self._end_fleet()

    def return_state(self) -> None:
        """Gives the combiner that the run began with what the shards' copies have seen, for the next run."""
        first, combiner = self._own_combiner, self._combiner
        if first is None or combiner is None:
            return
        state = first.state()
        if not state.slots and not state.values:
            return
        slots = {name: [slot] for name, slot in state.slots.items()}
        for values, raw in self._ask("combiner_state"):
            for name, slot in zip(values["slots"], raw, strict=True):
                slots.setdefault(name, []).append(slot)
        joined = {name: np.concatenate(each) for name, each in slots.items()}
        combiner.restore_state(self.layout, CombinerState(joined, dict(state.values)))

    def close(self) -> None:
        """Ends all shards. Idempotent."""
        try:
            self._end_fleet()
        finally:
            self._primary.close()

    # One cut

    def _hold(self, deadline: float) -> bool:
        """Stops all shards between two rounds, in a bulk-synchronous run between the same two; whether in time."""
        versions = self._hold_at(0, deadline)
        if self._is_bulk and None not in versions and len(set(versions)) > 1:
            # Whoever pushed that round to one shard has pushed it to all. If a worker came between two rounds, that is
            # not so: then they stay apart, and the parts have cursors of their own.
            newest = max(version for version in versions if version is not None)
            if None in self._hold_at(newest, min(deadline, time.monotonic() + _ALIGN_TIMEOUT_S)):
                versions = self._hold_at(0, deadline)
        return None not in versions

    def _hold_at(self, version: int, deadline: float) -> list[int | None]:
        timeout_s = max(0.0, deadline - time.monotonic())
        answers = self._request("hold", {"at_version": version, "timeout_s": timeout_s})
        own = self._primary.hold(version, timeout_s)
        return [own, *(values["version"] for values, _ in self._wait(answers, deadline))]

    def _go_on(self) -> None:
        with contextlib.suppress(ShardLostError, SessionClosedError):
            answers = self._request("go_on")
            self._primary.go_on()
            self._wait(answers, time.monotonic() + _CALL_TIMEOUT_S)

    def _joined(self, first: RunCheckpoint, others: Sequence[Reply]) -> RunCheckpoint:
        assert self._combiner is not None
        weights = self.layout.allocate()
        self.shards[0].of(weights)[:] = first.weights
        slots = {name: [slot] for name, slot in first.combiner_state.slots.items()}
        parts = [CheckpointPart(self.shards[0].stop, first.version, first.partitions)]
        for shard, (values, (part, *part_slots)) in zip(self.shards[1:], others, strict=True):
            shard.of(weights)[:] = part
            for name, slot in zip(values["slots"], part_slots, strict=True):
                slots.setdefault(name, []).append(slot)
            partitions = build(tuple[PartitionProgress, ...], values["partitions"], "a shard's partitions")
            parts.append(CheckpointPart(shard.stop, values["version"], partitions))
        return replace(
            first,
            layout=self.layout,
            weights=weights,
            combiner=type(self._combiner).__name__,
            combiner_settings=self._combiner.settings,
            combiner_state=CombinerState(
                {name: np.concatenate(each) for name, each in slots.items()}, first.combiner_state.values
            ),
            parts=() if len({_pushes(part) for part in parts}) == 1 else tuple(parts),
        )

    # The other shards

    def _request(self, name: str, values: Mapping[str, Any] | None = None) -> list[Future[Reply]]:
        return [] if self._fleet is None else self._fleet.request(name, values)

    def _wait(self, answers: Sequence[Future[Reply]], deadline: float) -> list[Reply]:
        try:
            return [answer.result(max(0.0, deadline - time.monotonic()) + 1.0) for answer in answers]
        except FutureTimeoutError as error:
            raise ShardLostError("a shard did not answer in time") from error

    def _ask(self, name: str, values: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._wait(self._request(name, values), time.monotonic() + _CALL_TIMEOUT_S)

    def _tell(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """Calls without waiting: a shard that is gone is found by `failure`."""
        self._request(name, values)

    def _end_fleet(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.close()

    def _part(self, shard: Shard, combiner: WeightCombiner, resume: RunCheckpoint | None, index: int) -> _Part:
        rule = pickle.loads(self._dumps(combiner.for_range(self.layout, shard.start, shard.stop)))
        return _Part(shard, rule, _part_of(combiner.state(), shard), _resume_of(resume, self.shards, index))


@dataclass(frozen=True)
class _Part:
    """What a shard begins a run with."""

    shard: Shard
    combiner: WeightCombiner
    state: CombinerState
    resume: RunCheckpoint | None


AnyServer = ParameterServer | ShardedServer
"""What serves a session's weights."""


def _pushes(part: CheckpointPart) -> tuple[int, ...]:
    return tuple(progress.sequence for progress in part.partitions)


def _part_of(state: CombinerState, shard: Shard) -> CombinerState:
    """A combiner's state for a shard; slots may be shorter than the weights, where only the first tensors have any."""
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
