"""A shard's process: a `ParameterServer` for a part of the weights, told by the driver what to do.

``python -m tensorspark.shards.host`` reads a pickled `ShardJob` from its standard input, which its parent writes; on an
executor, `serve` runs in a Spark task. It ends when the driver says so or is gone.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorspark.errors import ShardLostError
from tensorspark.history import Recorder
from tensorspark.plain import as_plain, build
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.messages import EpochPlan, EpochProgress, PartitionProgress
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.shards.channel import Channel, Reply, dial
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer, WeightLayout

_POLL_S = 0.25
_EPOCH_POLL_S = 1.0


@dataclass(frozen=True)
class Driver:
    """Where the driver listens to its shards, and the key that opens it."""

    host: str
    port: int
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class ShardJob:
    """All that a shard's process needs to know to begin; picklable.

    Attributes:
        index: of the shard; 0 is the driver's.
        server_host: advertised to workers; None: the address by which this machine reaches the driver.
        server: arguments of `ParameterServer`, but for layout and host.
        combiner: pickled, as it may be defined in ``__main__``.
        epochs: without metrics, which are the driver's shard's.
    """

    index: int
    server_host: str | None
    server: Mapping[str, Any]
    layout: WeightLayout
    combiner: bytes = field(repr=False)
    num_partitions: int
    sync: SyncPlan
    compression: Compression
    epochs: EpochPlan | None
    driver: Driver | None = None


def serve(job: ShardJob) -> None:
    """Serves the shard until the driver says that it is over, or is gone.

    Raises:
        OSError, AuthenticationError: the driver cannot be reached, or its key is another.
    """
    assert job.driver is not None
    over = threading.Event()
    host = _Host(job, over)  # before the driver looks for signs of life: a combiner may import a lot
    plain = dial(job.driver.host, job.driver.port, job.driver.key)
    host.address = job.server_host or plain.getsockname()[0]
    channel = Channel(plain, "the driver", host.handlers, on_lost=lambda why: over.set())
    try:
        channel.call("hello", {"index": job.index, "pid": os.getpid(), "host": socket.gethostname()})
        host.tell_failures(channel)
    finally:
        channel.close()
        host.close()


class _Host:
    """Does what the driver calls for.

    Args:
        over: set when the driver is done with it.

    Attributes:
        address: where workers find the shard.
    """

    def __init__(self, job: ShardJob, over: threading.Event) -> None:
        self._job = job
        self.address = ""
        self._over = over
        self._combiner = unpickled(job.combiner)
        self._server: ParameterServer | None = None
        self._cut: RunCheckpoint | None = None  # until it is fetched
        self.handlers = {
            "begin": self._begin,
            "request_stop": self._request_stop,
            "stop": self._stop,
            "release_epoch": self._release_epoch,
            "await_epoch": self._come_to_epoch,
            "read": self._read,
            "count_bytes": self._count_bytes,
            "combiner_state": self._combiner_state,
            "hold": self._hold,
            "cut": self._make_cut,
            "fetch": self._fetch,
            "go_on": self._go_on,
            "answer": lambda values, raw: ({}, ()),
            "end": self._end,
        }

    def tell_failures(self, channel: Channel) -> None:
        """Returns when it is over; a failure of the run is told once."""
        is_told = False
        while not self._over.wait(_POLL_S):
            failure = self._server.failure() if self._server is not None and not is_told else None
            if failure is not None:
                is_told = True
                channel.call("failed", {"message": str(failure), "kind": type(failure).__name__})

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _begin(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        """The weights come as the first buffer; of a restored run, the combiner's slots behind them."""
        job = self._job
        weights, *slots = raw
        if values["has_state"]:
            kept = dict(zip(values["slots"], slots, strict=True))
            self._combiner.restore_state(job.layout, CombinerState(kept, dict(values["combiner_values"])))
        self._server = ParameterServer(job.layout, self.address, **job.server)
        run = self._server.begin_run(
            weights,
            self._combiner,
            job.num_partitions,
            sync=job.sync,
            resume=_resumed(job.layout, weights, values["resume"]) if values["resume"] else None,
            epochs=job.epochs,
            compression=job.compression,
            follows=True,
        )
        server = self._server
        place = {"host": server.host, "port": server.port}
        return {**place, "token": server.token, "certificate": server.certificate, "run": run}, ()

    def _request_stop(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        self._running().request_stop()
        return {}, ()

    def _stop(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        self._running().stop_run()
        return {}, ()

    def _release_epoch(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        if self._await_epoch(values["epoch"]):
            self._running().release_epoch(values["epoch"], {}, finish=values["finish"])
        return {}, ()

    def _come_to_epoch(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        return {"has_ended": self._await_epoch(values["epoch"])}, ()

    def _await_epoch(self, epoch: int) -> bool:
        """The driver's shard has ended the epoch; here the last pushes of it may still be on their way."""
        server = self._running()
        while not self._over.is_set():
            end = server.wait_epoch(_EPOCH_POLL_S)
            if end is not None and end.epoch == epoch:
                return True
            if server.is_ending:
                break
            if end is not None:  # an earlier release of it is on its way
                self._over.wait(_POLL_S)
        return False

    def _read(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        out = self._job.layout.allocate()
        return {"version": self._running().read_weights(out)}, (out,)

    def _count_bytes(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        _, reports = self._running().records()
        return {"num_bytes": [[report.num_bytes_pushed, report.num_bytes_pulled] for report in reports]}, ()

    def _combiner_state(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        state = self._combiner.state()
        return {"slots": list(state.slots)}, tuple(state.slots.values())

    def _hold(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        return {"version": self._running().hold(values["at_version"], values["timeout_s"])}, ()

    def _make_cut(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        """Keeps a copy of the shard as it is, so that the run can go on before it is fetched."""
        self._cut = None  # one that nobody fetched
        self._cut = cut = self._running().capture(values["timeout_s"])
        if cut is None:
            return {"version": None}, ()
        num_bytes = cut.weights.nbytes + sum(slot.nbytes for slot in cut.combiner_state.slots.values())
        return {"version": cut.version, "partitions": as_plain(cut.partitions), "num_bytes": num_bytes}, ()

    def _fetch(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        """The weights of the cut, and the combiner's slots behind them."""
        cut, self._cut = self._cut, None
        if cut is None:
            raise ShardLostError("there is no cut to fetch")
        slots = cut.combiner_state.slots
        return {"slots": list(slots)}, (cut.weights, *slots.values())

    def _go_on(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        self._running().go_on()
        return {}, ()

    def _end(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        self._over.set()
        return {}, ()

    def _running(self) -> ParameterServer:
        if self._server is None:
            raise ShardLostError("the shard has not begun")
        return self._server


def unpickled(combiner: bytes) -> WeightCombiner:
    """A combiner that the driver has pickled; never anything that came over a network unasked."""
    rule: WeightCombiner = pickle.loads(combiner)
    return rule


def _resumed(layout: WeightLayout, weights: Buffer, resume: Mapping[str, Any]) -> RunCheckpoint:
    """What a server goes on from; what it does not ask for is left empty."""
    return RunCheckpoint(
        layout=layout,
        weights=weights,
        version=resume["version"],
        seconds=0.0,
        partitions=build(tuple[PartitionProgress, ...], resume["partitions"], "the partitions"),
        points=Recorder().export(),
        plan={},
        combiner="",
        combiner_settings={},
        combiner_state=CombinerState(),
        is_complete=resume["is_complete"],
        epochs=build(EpochProgress | None, resume["epochs"], "the epochs"),
    )


def main() -> int:
    """Runs the job that comes on the standard input."""
    serve(pickle.load(sys.stdin.buffer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
