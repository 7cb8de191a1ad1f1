"""The real `ParameterServer` and `ParameterClient`s, each in a process of its own, for the wire benchmark to drive."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np

from benchmarks.processes import Span, wait_until
from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

_HOST = "127.0.0.1"
_MAX_UNANSWERED = 2
# Whole numbers below this keep float32 sums exact for as many pushes as a benchmark makes.
_NUM_VALUES = 31


def layout_of(num_bytes: int) -> WeightLayout:
    """Two float32 tensors that fill `num_bytes`, a multiple of 128, without gaps."""
    half = (num_bytes // 8,)
    return WeightLayout([TensorSpec("first", half, "float32"), TensorSpec("second", half, "float32")])


def initial_weights(num_bytes: int) -> Buffer:
    """Weights to begin with, of which one in `_NUM_VALUES` is zero."""
    values = np.arange(num_bytes // 4, dtype=np.float32) % _NUM_VALUES
    return _aligned(values)


def delta_of(client: int, num_bytes: int) -> Buffer:
    """What a client pushes, always: no two clients the same, no number zero."""
    values = (np.arange(num_bytes // 4, dtype=np.float32) + client) % _NUM_VALUES + 1
    return _aligned(values)


class Server:
    """A parameter server with one run, which adds up deltas."""

    def __init__(self, num_bytes: int, num_clients: int) -> None:
        self._num_bytes = num_bytes
        self._server = ParameterServer(layout_of(num_bytes), _HOST)
        self._server.begin_run(initial_weights(num_bytes), DeltaWeightCombiner(), num_clients)

    def address(self) -> ServerAddress:
        return ServerAddress(_HOST, self._server.port, self._server.token)

    def peak_memory_bytes(self) -> int:
        """The most that was resident in this process so far, all of it: Python and libraries included."""
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    def check_weights(self, num_pushes: list[int]) -> None:
        """Raises ValueError unless the weights are the initial ones and `num_pushes` of every client's deltas."""
        expected = initial_weights(self._num_bytes).view(np.float32)
        for client, count in enumerate(num_pushes):
            expected += count * delta_of(client, self._num_bytes).view(np.float32)
        weights = layout_of(self._num_bytes).allocate()
        version = self._server.read_weights(weights)
        if version != sum(num_pushes) or not np.array_equal(weights.view(np.float32), expected):
            raise ValueError(f"the weights, version {version}, are not the sum of the pushes {num_pushes}")

    def close(self) -> None:
        self._server.close()


class Client:
    """A worker that holds a partition. Its methods return when the transfers began and ended."""

    def __init__(self, address: ServerAddress, partition: int, num_bytes: int) -> None:
        layout = layout_of(num_bytes)
        self._pulled = layout.allocate()
        self._delta = delta_of(partition, num_bytes)
        self._client = _PipeliningClient(address)
        granted = self._client.register(Registration(1, partition, partition, layout.fingerprint, _HOST))
        self._sequence = granted.sequence

    def pull(self, start_at: float, count: int) -> Span:
        """Pulls `count` times."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            self._client.pull(self._pulled)
        return began, time.monotonic()

    def push(self, start_at: float, count: int) -> Span:
        """Pushes `count` times, at most two of them unacknowledged; ends when all are in the weights."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            self._client.wait_for_pushes(_MAX_UNANSWERED - 1)
            self._push()
        self._client.flush()
        return began, time.monotonic()

    def alternate(self, start_at: float, count: int) -> Span:
        """Pushes and pulls in turn, as training does, `count` times."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            self._push()
            self._client.pull(self._pulled)
        return began, time.monotonic()

    def num_pushes(self) -> int:
        return self._sequence

    def close(self) -> None:
        self._client.close()

    def _push(self) -> None:
        self._sequence += 1
        self._client.push(self._delta, Push(self._sequence, Cursor(0, self._sequence), num_steps=1, num_samples=1))


class _PipeliningClient(ParameterClient):
    """Can wait for some of its pushes; the library's own `flush` waits for all."""

    def wait_for_pushes(self, max_unanswered: int) -> None:
        """Waits until at most `max_unanswered` pushes are not accepted yet."""
        while len(self._unanswered) > max_unanswered:
            sequence = protocol.count(self._link.receive(Kind.ACCEPTED), "sequence")
            if sequence != self._unanswered.pop(0)[0].sequence:
                raise ProtocolError(f"expected another push to be accepted next, got {sequence}")


def _aligned(values: np.ndarray) -> Buffer:
    buffer = layout_of(values.nbytes).allocate()
    buffer.view(np.float32)[:] = values
    return buffer
