"""The driver's side of shards: a parameter server like any other, of which parts are elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from tensorspark.errors import ShardLostError, TensorsparkError
from tensorspark.history import Point, WorkerReport
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import EpochEnd, EpochPlan, Status
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.shards.channel import Reply
from tensorspark.shards.cuts import Cuts
from tensorspark.shards.fleet import Fleet, Hosts
from tensorspark.shards.host import ShardJob
from tensorspark.shards.parts import joined_slots, parts_of
from tensorspark.shards.places import ShardPlace
from tensorspark.telemetry.records import Observation
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.ranges import Shard

_CAPTURE_TIMEOUT_S = 60.0
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
        self._cuts: Cuts | None = None
        self._epoch_ended: int | None = None  # and not released
        self._recovery_timeout_s = 0.0
        self._combiner: WeightCombiner | None = None
        self._own_combiner: WeightCombiner | None = None  # the first shard's copy

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
        keeps_spans: bool = False,
        traces: bool = False,
    ) -> int:
        """As `ParameterServer.begin_run`; `places` then says where the shards are.

        Raises:
            ShardLostError: a shard's process did not start.
        """
        self._end_fleet()
        self._combiner, self._epoch_ended, self._recovery_timeout_s = combiner, None, sync.recovery_timeout_s
        parts = parts_of(self.layout, self.shards, combiner, resume, self._dumps)
        jobs = [
            ShardJob(
                index=index,
                server_host=self._shards_host,
                server=self._server,
                layout=part.shard.layout,
                combiner=part.combiner,
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
        self._own_combiner = own_combiner = own.own_combiner()
        run = self._primary.begin_run(
            own.shard.of(weights),
            own_combiner,
            num_partitions,
            sync=sync,
            resume=own.resume,
            epochs=epochs,
            compression=compression,
            keeps_spans=keeps_spans,
            traces=traces,
        )
        self._cuts = Cuts(self.layout, self.shards, combiner, self._primary, fleet, is_bulk=sync.is_bulk)
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
        """As `ParameterServer.release_epoch`; not while the shards stand for a cut, of which some would have it."""
        cuts = self._cuts
        with contextlib.nullcontext() if cuts is None else cuts.standing:
            self._epoch_ended = None
            self._tell("release_epoch", {"epoch": epoch, "finish": finish})
            self._primary.release_epoch(epoch, values, finish=finish)

    def status(self) -> Status:
        return self._primary.status()

    def observe(self) -> Observation:
        """As `ParameterServer.observe`, of the first shard: bytes and times are its own."""
        return self._primary.observe()

    def failure(self) -> TensorsparkError | None:
        """What went wrong first: in the run, as `ParameterServer.failure`, or with a shard."""
        failure, fleet = self._primary.failure(), self._fleet
        return failure if failure is not None or fleet is None else fleet.failure()

    def lost_shard(self) -> ShardLostError | None:
        """The shard that is gone, which workers may notice before the driver does.

        Waits until every shard has given a sign of life, or has not for too long: seconds.
        """
        fleet = self._fleet
        return None if fleet is None else fleet.lost()

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
        if self._epoch_ended is not None:
            # A worker that died between its pushes to two shards leaves one that waits for its successor.
            self._ask("await_epoch", {"epoch": self._epoch_ended}, waits_s=self._recovery_timeout_s)
        answers = self._ask("read", num_bytes=self.layout.num_bytes)
        for shard, (_, raw) in zip(self.shards[1:], answers, strict=True):
            shard.of(out)[:] = raw[0]
        return version

    def capture(self, timeout_s: float = _CAPTURE_TIMEOUT_S) -> RunCheckpoint | None:
        """As `ParameterServer.capture`: one cut through all shards where the run is bulk-synchronous.

        Shards stand until each has copied its part; these are fetched while they go on. Where the shards do not stand
        at the same pushes, `RunCheckpoint.parts` has each shard's cursors.
        """
        cuts = self._cuts
        return None if cuts is None else cuts.capture(timeout_s)

    def end_run(self) -> None:
        """Ends the other shards, whose weights have been read; the combiner has what they have seen."""
        self.return_state()
        self._end_fleet()

    def retire(self) -> None:
        """As `ParameterServer.retire`; the other shards end."""
        self._end_fleet()
        self._combiner = self._own_combiner = None
        self.places = ()
        self._primary.retire()

    @property
    def began_at(self) -> float:
        """As `ParameterServer.began_at`."""
        return self._primary.began_at

    @property
    def has_run(self) -> bool:
        """As `ParameterServer.has_run`."""
        return self._primary.has_run

    def return_state(self) -> None:
        """Gives the combiner that the run began with what the shards' copies have seen, for the next run."""
        first, combiner = self._own_combiner, self._combiner
        if first is None or combiner is None:
            return
        state = first.state()
        if not state.slots and not state.values:
            return
        num_bytes = len(state.slots) * self.layout.num_bytes
        slots = [dict(state.slots)]
        for values, raw in self._ask("combiner_state", num_bytes=num_bytes):
            slots.append(dict(zip(values["slots"], raw, strict=True)))
        combiner.restore_state(self.layout, CombinerState(joined_slots(slots), dict(state.values)))

    def close(self) -> None:
        """Ends all shards. Idempotent."""
        try:
            self._end_fleet()
        finally:
            self._primary.close()

    # The other shards

    def _ask(
        self, name: str, values: Mapping[str, Any] | None = None, num_bytes: int = 0, waits_s: float = 0.0
    ) -> list[Reply]:
        fleet = self._fleet  # which `close` may take away meanwhile
        return [] if fleet is None else fleet.ask(name, values, num_bytes, waits_s=waits_s)

    def _tell(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """Calls without waiting: a shard that is gone is found by `failure`."""
        fleet = self._fleet
        if fleet is not None:
            fleet.request(name, values)

    def _end_fleet(self) -> None:
        self._cuts = None
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.close()


AnyServer = ParameterServer | ShardedServer
"""What serves a session's weights."""
