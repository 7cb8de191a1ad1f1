"""Memory: a server's at its peak, whatever the number of workers, and a worker's with and without a codec.

What counts is the most that was resident while weights travelled, over what was resident before there were any. A
worker is the library's client and exchange, with a trainer that trains nothing: a model's own variables do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring.processes import Peer
from benchmarks.measuring.procfs import forget_peak, status_bytes
from benchmarks.measuring.report import Report, say
from benchmarks.wire.fleet import DEADLINE_S, serving, traffic_of
from benchmarks.wire.parameter_server import RECEIVE_BUFFER_BYTES, Server, Traffic, Where
from tensorspark.data.columns import Columns
from tensorspark.data.feed import Stretch
from tensorspark.exchange import exchange_for
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Registration
from tensorspark.steps import EpochClock, Steps
from tensorspark.trainers.base import Trainer
from tensorspark.weights.layout import Buffer, WeightLayout

_SIZE_MB = 100.0
_MAX_MODELS = 3
_NUM_TURNS, _NUM_QUICK_TURNS = 8, 3
_NOISE_VALUES = 2**16


class ServerCase(NamedTuple):
    num_clients: int
    push: str = "none"
    pull: str = "none"


class WorkerCase(NamedTuple):
    push: str = "none"
    pull: str = "none"
    overlap: bool = False

    @property
    def name(self) -> str:
        codec = "raw" if (self.push, self.pull) == ("none", "none") else f"{self.push} pushed, {self.pull} pulled"
        return f"{codec}, overlap" if self.overlap else codec


_SERVERS = (ServerCase(4), ServerCase(16), ServerCase(4, "int8", "bfloat16"))
_WORKERS = (
    WorkerCase(),
    WorkerCase("bfloat16", "bfloat16"),
    WorkerCase("int8", "bfloat16"),
    WorkerCase("topk:0.01"),
    WorkerCase(overlap=True),
)


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of servers and of workers."""
    num_turns = _NUM_QUICK_TURNS if is_quick else _NUM_TURNS
    measure_servers(report, _SIZE_MB, _SERVERS, num_turns)
    measure_workers(report, _SIZE_MB, _WORKERS, num_turns)


def measure_servers(report: Report, size_mb: float, cases: Iterable[ServerCase], num_turns: int) -> None:
    """Adds rows: the peak where each client pushes and pulls so often, all at once."""
    pool_models = RECEIVE_BUFFER_BYTES / traffic_of(size_mb).num_bytes
    report.add(f"server's pool for pushes in arrival, {size_mb:g} MB", pool_models, "models")
    for case in cases:
        traffic = traffic_of(size_mb, push=case.push, pull=case.pull)
        codec = "" if traffic.is_exact else f", {case.push} pushed, {case.pull} pulled"
        say(f"{size_mb:g} MB: a server's memory, {case.num_clients} clients{codec}")
        with serving(traffic, case.num_clients) as fleet:
            fleet.together(case.num_clients, "alternate", num_turns)
            peak_models = fleet.server.call("peak_memory_bytes") / traffic.num_bytes
            fleet.check()
        name = f"server's peak, {size_mb:g} MB, {case.num_clients} clients{codec}"
        report.add(name, peak_models, "models", below=_MAX_MODELS + pool_models)


def measure_workers(report: Report, size_mb: float, cases: Iterable[WorkerCase], num_turns: int) -> None:
    """Adds rows: the peak of a worker that pulls and pushes so often."""
    for case in cases:
        traffic = traffic_of(size_mb, push=case.push, pull=case.pull)
        say(f"{size_mb:g} MB: a worker's memory, {case.name}")
        with (
            Peer("parameter server", Server, traffic, 1) as server,
            Peer("worker", Worker, server.call("where"), traffic, case.overlap) as worker,
        ):
            peak_models = worker.call("peak_memory_bytes", num_turns, deadline_s=DEADLINE_S) / traffic.num_bytes
        report.add(f"worker's peak, {size_mb:g} MB, {case.name}", peak_models, "models", below=_MAX_MODELS)


class Worker:
    """A worker without a model, for one server."""

    def __init__(self, where: Where, traffic: Traffic, overlap: bool) -> None:
        assert isinstance(where, ServerAddress)
        self._where = where
        self._traffic = traffic
        self._overlap = overlap

    def peak_memory_bytes(self, num_turns: int) -> int:
        """The most that was resident in this process while it pulled and pushed so often, over what was before."""
        trainer = _NoTrainer(self._traffic.layout())
        forget_peak()
        idle_bytes = status_bytes("VmRSS")
        travels = self._traffic.compression
        compression = replace(travels, leaves_error=travels.is_push_lossy)  # as `worker.run_partition` has it
        with ParameterClient(self._where, trainer.layout, compression) as client:
            granted = client.register(Registration(1, 0, 0, trainer.layout.fingerprint, "127.0.0.1"))
            exchange = exchange_for(
                "delta",
                0.0,
                client,
                trainer,
                granted.sequence,
                has_epochs=False,
                overlap=self._overlap,
                accumulates=compression.leaves_error,
            )
            try:
                for turn in range(num_turns):
                    exchange.before()
                    exchange.after(_steps(trainer, turn))
                exchange.end()
            finally:
                exchange.close()
        return status_bytes("VmHWM") - idle_bytes


def _steps(trainer: Trainer, turn: int) -> Steps:
    steps = Steps(trainer, 1, EpochClock())
    steps.run(Stretch(0, turn, 1, 1, (np.zeros(1, np.float32),), None, is_last_of_epoch=False))
    return steps


class _NoTrainer(Trainer):
    """Forgets the weights that it is given, and always has others: the same noise, of some other size."""

    columns = ()
    scalar_names = ()

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout
        self._noise = np.random.default_rng(1).standard_normal(_NOISE_VALUES, np.float32)
        self._num_read = 0

    def reset(self, partition: int, seed: int) -> None:
        pass

    def load(self, weights: Buffer) -> None:
        pass

    def read(self, out: Buffer) -> None:
        for start in range(0, len(out), self._noise.nbytes):
            some = slice(start, min(start + self._noise.nbytes, len(out)))
            (out[some],) = self.read_blocks([some])

    def read_blocks(self, wanted: Sequence[slice]) -> Iterator[Buffer]:
        self._num_read += 1
        for block in wanted:
            num_values = (block.stop - block.start) // self._noise.itemsize
            yield (self._noise[:num_values] * np.float32(self._num_read)).view(np.uint8)

    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        return np.zeros(0)

    def close(self) -> None:
        pass
