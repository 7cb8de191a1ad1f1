"""The real server, whole or in shards, and real clients, each in a process of its own, for the wire benchmark."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.processes import Span, wait_until
from benchmarks.measuring.procfs import forget_peak, status_bytes
from benchmarks.workloads.weights import layout_of, noise, whole_numbers
from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.shards.client import ShardedClient
from tensorspark.shards.places import ShardPlace
from tensorspark.shards.processes import ShardProcesses
from tensorspark.shards.sharded_server import AnyServer, Endpoint, ShardedServer
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tensorspark.weights.ranges import split

RECEIVE_BUFFER_BYTES = 2**28
"""The bound of the server's pool for pushes in arrival: the library's default."""

Where = ServerAddress | tuple[ShardPlace, ...]
"""What a client needs to know to find a server, or all shards."""

_HOST = "127.0.0.1"
_MAX_UNANSWERED = 2
_ROW_VALUES = 256
_CHANGED_ROW_STRIDE = 100
_PULL_TOLERANCE = 0.01  # of the largest weight: more than any codec for pulls loses
_TOLERANCE = 1e-3  # of sums of numbers around 1 that went through a codec with error feedback


@dataclass(frozen=True)
class Traffic:
    """What travels, and how.

    Attributes:
        num_bytes: of the weights; a multiple of 128, and of 1,024 where `push` or `pull` is "rows".
        push, pull: codecs, see `tensorspark.weights.compression`.
        num_shards: servers that the weights are split over.
    """

    num_bytes: int
    push: str = "none"
    pull: str = "none"
    num_shards: int = 1

    @property
    def compression(self) -> Compression:
        return Compression(self.push, self.pull)

    @property
    def is_exact(self) -> bool:
        """Whether the weights are the very sum of the pushes, and what is pulled the very weights."""
        return self.push == self.pull == "none"

    def layout(self) -> WeightLayout:
        """An embedding's table where rows are told apart, else two flat tensors."""
        if "rows" not in (self.push, self.pull):
            return layout_of(self.num_bytes)
        return WeightLayout([TensorSpec("table", (self.num_bytes // (4 * _ROW_VALUES), _ROW_VALUES), "float32")])

    def initial(self) -> Buffer:
        return whole_numbers(self.layout(), 0) if self.is_exact else noise(self.layout(), 0)

    def delta(self, client: int) -> Buffer:
        """What a client pushes, always, no two clients the same: whole numbers, none zero, where nothing is encoded;
        else noise, and with "rows" in one row of a hundred only."""
        if self.is_exact:
            return whole_numbers(self.layout(), client, first=1)
        delta = noise(self.layout(), 1 + client)
        if "rows" in (self.push, self.pull):
            rows = delta.view(np.float32).reshape(-1, _ROW_VALUES)
            rows[np.arange(len(rows)) % _CHANGED_ROW_STRIDE != client % _CHANGED_ROW_STRIDE] = 0
        return delta


class Server:
    """A parameter server with one run, which adds up deltas."""

    def __init__(self, traffic: Traffic, num_clients: int) -> None:
        self._traffic = traffic
        self._server = _make_server(traffic)
        self._idle_bytes = status_bytes("VmRSS")
        self._server.begin_run(traffic.initial(), DeltaWeightCombiner(), num_clients, compression=traffic.compression)
        forget_peak()  # which was the making of the initial weights

    def where(self) -> Where:
        return self._server.places if isinstance(self._server, ShardedServer) else _address_of(self._server)

    def peak_memory_bytes(self) -> int:
        """The most that was resident in this process since the run began, over what was before it had weights."""
        return status_bytes("VmHWM") - self._idle_bytes

    def processor_s(self) -> float:
        """Seconds that all threads of this process have had of a core so far."""
        return time.process_time()

    def bytes_on_the_wire(self) -> tuple[int, int]:
        """What all clients pushed and pulled so far; of shards the first one's."""
        _, reports = self._server.records()
        return sum(report.num_bytes_pushed for report in reports), sum(report.num_bytes_pulled for report in reports)

    def check_weights(self, num_pushes: Sequence[int], unsent: Sequence[Buffer | None] = ()) -> None:
        """Raises ValueError unless the weights are the initial ones and all clients' deltas.

        Args:
            num_pushes: of each client.
            unsent: what each client's codec holds back.
        """
        expected = self._traffic.initial().view(np.float32)
        for client, count in enumerate(num_pushes):
            expected += np.float32(count) * self._traffic.delta(client).view(np.float32)
        weights = self._traffic.layout().allocate()
        version = self._server.read_weights(weights)
        arrived = weights.view(np.float32)
        for error in unsent:
            if error is not None:
                arrived += error.view(np.float32)
        tolerance = 0.0 if self._traffic.is_exact else _TOLERANCE * (1 + sum(num_pushes))
        if version != sum(num_pushes) or not np.allclose(arrived, expected, rtol=0, atol=tolerance):
            raise ValueError(f"the weights, version {version}, are not the sum of the pushes {num_pushes}")

    def check_pulled(self, pulled: Buffer) -> None:
        """Raises ValueError unless what a client pulled last is the weights, as precisely as they travel."""
        weights = self._traffic.layout().allocate()
        self._server.read_weights(weights)
        expected = weights.view(np.float32)
        tolerance = 0.0 if self._traffic.pull in ("none", "rows") else _PULL_TOLERANCE * np.abs(expected).max()
        if not np.allclose(pulled.view(np.float32), expected, rtol=0, atol=tolerance):
            raise ValueError(f"a client pulled other weights than the server's ({self._traffic})")

    def close(self) -> None:
        self._server.close()


class Client:
    """A worker that holds a partition. Methods that take `start_at` return when the transfers began and ended, or how
    many seconds each of them took."""

    def __init__(self, where: Where, partition: int, traffic: Traffic) -> None:
        layout = traffic.layout()
        self._pulled = layout.allocate()
        self._delta = traffic.delta(partition)
        self._client: ParameterClient | ShardedClient
        self._parts: Sequence[ParameterClient]
        if isinstance(where, ServerAddress):
            self._client = ParameterClient(where, layout, traffic.compression)
            self._parts = [self._client]
        else:
            self._client = ShardedClient(where, traffic.compression)
            self._parts = self._client._clients
        granted = self._client.register(Registration(1, partition, partition, layout.fingerprint, _HOST))
        self._sequence = granted.sequence

    def pull(self, start_at: float, count: int) -> Span:
        """Pulls `count` times."""
        return _span(start_at, count, self._pull)

    def push(self, start_at: float, count: int) -> Span:
        """Pushes `count` times, at most two of them unacknowledged; ends when all are in the weights."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            for part in self._parts:
                _wait_for_pushes(part, _MAX_UNANSWERED - 1)
            self._push()
        self._client.flush()
        return began, time.monotonic()

    def alternate(self, start_at: float, count: int) -> Span:
        """Pushes and pulls in turn, as training does, `count` times."""
        return _span(start_at, count, self._round)

    def pull_seconds(self, start_at: float, count: int) -> list[float]:
        """What each of `count` pulls took."""
        return _seconds(start_at, count, self._pull)

    def round_seconds(self, start_at: float, count: int) -> list[float]:
        """What each of `count` rounds of a push and a pull took."""
        return _seconds(start_at, count, self._round)

    def pull_changes(self, start_at: float, count: int) -> list[float]:
        """What each of `count` pulls took of what a push, which was in the weights before, had changed."""
        holds = self._client.pull(self._pulled).version
        seconds = []
        wait_until(start_at)
        for _ in range(count):
            self._push()
            self._client.flush()
            began = time.monotonic()
            holds = self._client.pull(self._pulled, holds).version
            seconds.append(time.monotonic() - began)
        return seconds

    def num_pushes(self) -> int:
        return self._sequence

    def unsent(self) -> Buffer | None:
        """What the codec holds back for the pushes to come; None where it never does. Of one server only."""
        return self._parts[0]._outlet._error

    def pulled(self) -> Buffer:
        """The newest weights, as they come."""
        self._pull()
        return self._pulled

    def close(self) -> None:
        self._client.close()

    def _pull(self) -> None:
        self._client.pull(self._pulled)

    def _push(self) -> None:
        self._sequence += 1
        self._client.push(self._delta, Push(self._sequence, Cursor(0, self._sequence), num_steps=1, num_samples=1))

    def _round(self) -> None:
        self._push()
        self._pull()


def _make_server(traffic: Traffic) -> AnyServer:
    layout = traffic.layout()
    if traffic.num_shards == 1:
        return ParameterServer(layout, _HOST, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
    shards = split(layout, traffic.num_shards)
    buffer_bytes = RECEIVE_BUFFER_BYTES // len(shards)
    return ShardedServer(
        layout,
        shards,
        ParameterServer(shards[0].layout, _HOST, receive_buffer_bytes=buffer_bytes),
        start=ShardProcesses,
        dumps=pickle.dumps,
        server={"receive_buffer_bytes": buffer_bytes},
        address_of=_address_of,
    )


def _address_of(server: Endpoint) -> ServerAddress:
    return ServerAddress(server.host, server.port, server.token)


def _span(start_at: float, count: int, act: Callable[[], None]) -> Span:
    wait_until(start_at)
    began = time.monotonic()
    for _ in range(count):
        act()
    return began, time.monotonic()


def _seconds(start_at: float, count: int, act: Callable[[], None]) -> list[float]:
    wait_until(start_at)
    moments = [time.monotonic()]
    for _ in range(count):
        act()
        moments.append(time.monotonic())
    return np.diff(moments).tolist()


def _wait_for_pushes(client: ParameterClient, max_unanswered: int) -> None:
    """Waits until at most so many pushes are not accepted yet; the library's own `flush` waits for all."""
    while len(client._unanswered) > max_unanswered:
        sequence = protocol.count(client._link.receive(Kind.ACCEPTED)[0], "sequence")
        if sequence != client._unanswered.pop(0)[0].sequence:
            raise ProtocolError(f"expected another push to be accepted next, got {sequence}")
