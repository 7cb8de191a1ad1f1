"""The real `ParameterServer` and real workers, each in a process of its own, that the scale benchmark measures.

A worker's step is arithmetic that lasts until its thread has used so many seconds of a core, drawn anew for each step:
as much work whatever else the cores have to do, and the simulation can be told exactly how much.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.processes import wait_until
from benchmarks.scale.model import Steps
from benchmarks.workloads.weights import initial_weights, layout_of
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import DeltaWeightCombiner

_HOST = "127.0.0.1"
# Small enough for the nearest cache, and done in about a microsecond, so that a step ends when it should.
_SPIN_VALUES = 4096


class Server:
    """A parameter server with one run, which adds up deltas."""

    def __init__(self, num_bytes: int, num_workers: int, staleness: int | None) -> None:
        self._server = ParameterServer(layout_of(num_bytes), _HOST)
        sync = SyncPlan(staleness, num_first=num_workers)
        self._server.begin_run(initial_weights(num_bytes), DeltaWeightCombiner(), num_workers, sync=sync)
        self._weights = layout_of(num_bytes).allocate()

    def address(self) -> ServerAddress:
        return ServerAddress(_HOST, self._server.port, self._server.token)

    def version(self) -> int:
        return self._server.read_weights(self._weights)

    def processor_s(self) -> dict[str, float]:
        """Seconds of a core that the loop's thread, and that for arithmetic, have used so far."""
        used = {"tensorspark-server": 0.0, "tensorspark-merge": 0.0}
        for thread in threading.enumerate():
            for name in used:
                if thread.name.startswith(name) and thread.ident is not None:
                    used[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return {"loop": used["tensorspark-server"], "arithmetic": used["tensorspark-merge"]}

    def process_s(self) -> float:
        """Seconds of a core that this process has used so far."""
        return time.process_time()

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True)
class Trained:
    """What a worker tells of its rounds, in seconds of the clock, and in those of a core that its process has used."""

    began: float
    ended: float
    steps_s: float
    process_s: float
    num_rounds: int


class Worker:
    """A worker that holds a partition and trains nothing: its steps only take time."""

    def __init__(self, address: ServerAddress, partition: int, num_bytes: int) -> None:
        layout = layout_of(num_bytes)
        self._pulled, self._local, self._delta = (layout.allocate() for _ in range(3))
        self._random = random.Random(partition)
        self._spun = np.ones(_SPIN_VALUES, np.float32)
        self._version = self._sequence = 0
        self._client = ParameterClient(address)
        self._client.register(Registration(1, partition, partition, layout.fingerprint, _HOST))

    def train(self, start_at: float, num_rounds: int, sync_interval: int, steps: Steps) -> Trained:
        """So many rounds; the first begins with weights that are there already."""
        self._pull()
        wait_until(start_at)
        began, process_began = time.monotonic(), time.process_time()
        steps_s = 0.0
        for _ in range(num_rounds):
            clock = time.monotonic()
            # To the moment when all are done: what each takes too long adds up otherwise.
            end = time.thread_time()
            for _ in range(sync_interval):
                end += steps.draw(self._random, 1)
                self._spin(end)
            steps_s += time.monotonic() - clock
            self._prepare()
            self._push()
            self._pull()
        return Trained(began, time.monotonic(), steps_s, time.process_time() - process_began, num_rounds)

    def repeat(self, operation: str, count: int) -> None:
        """Does "pull" or "push" (waiting until it is accepted) so many times, and nothing else."""
        for _ in range(count):
            self._pull() if operation == "pull" else self._push_and_flush()

    def cycle(self, start_at: float, count: int, step_s: float) -> dict[str, float]:
        """So many rounds; returns the seconds of a core that a round took of this thread, by what it did."""
        self._pull()
        wait_until(start_at)
        used = {"step": 0.0, "prepare": 0.0, "push": 0.0, "pull": 0.0}
        before = time.thread_time()
        for _ in range(count):
            self._spin(before + step_s)
            for name, action in zip(used, (None, self._prepare, self._push, self._pull), strict=True):
                if action is not None:
                    action()
                after = time.thread_time()
                used[name] += after - before
                before = after
        return {name: seconds / count for name, seconds in used.items()}

    def close(self) -> None:
        self._client.close()

    def _spin(self, end: float) -> None:
        """Until the thread has used so many seconds of a core since it began."""
        while time.thread_time() < end:
            np.multiply(self._spun, self._spun, out=self._spun)

    def _prepare(self) -> None:
        """What an exchange of deltas does, see `tensorspark.exchange`: weights are loaded, and their change made out.

        The change is zero, so that the weights stay finite whatever the number of rounds.
        """
        self._local[:] = self._pulled
        np.subtract(self._local.view(np.float32), self._pulled.view(np.float32), out=self._delta.view(np.float32))

    def _push(self) -> None:
        self._sequence += 1
        push = Push(
            self._sequence, Cursor(0, self._sequence), num_steps=1, num_samples=1, version=self._version, sums={}
        )
        self._client.push(self._delta, push)

    def _push_and_flush(self) -> None:
        self._push()
        self._client.flush()

    def _pull(self) -> None:
        self._version = self._client.pull(self._pulled).version


class Step:
    """A perceptron's step, 784-128-10, forwards and backwards in numpy."""

    def __init__(self, batch_size: int = 64) -> None:
        generator = np.random.default_rng(5)
        self._images = generator.random((batch_size, 784), np.float32)
        self._labels = np.eye(10, dtype=np.float32)[generator.integers(10, size=batch_size)]
        self._hidden_weights = generator.normal(0, 0.05, (784, 128)).astype(np.float32)
        self._output_weights = generator.normal(0, 0.05, (128, 10)).astype(np.float32)

    def measure(self, num_steps: int = 500) -> Steps:
        """Mean and spread, in seconds of a core, without the slowest hundredth: the first steps, and disturbances."""
        seconds = []
        for _ in range(num_steps):
            began = time.thread_time()
            self._do()
            seconds.append(time.thread_time() - began)
        kept = sorted(seconds)[: -num_steps // 100]
        return Steps(statistics.mean(kept), statistics.stdev(kept))

    def _do(self) -> None:
        hidden = np.maximum(self._images @ self._hidden_weights, 0)
        logits = hidden @ self._output_weights
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (exponents / exponents.sum(axis=1, keepdims=True) - self._labels) / len(self._images)
        hidden_error = (error @ self._output_weights.T) * (hidden > 0)
        self._output_weights -= 0.5 * (hidden.T @ error)
        self._hidden_weights -= 0.5 * (self._images.T @ hidden_error)
