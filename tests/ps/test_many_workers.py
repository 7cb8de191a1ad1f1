"""1,000 workers on one server: small clients that speak real frames over real connections, all on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from tensorspark.ps import protocol
from tensorspark.ps.messages import Registration
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.wire import Wire

NUM_WORKERS = 1000
NUM_ROUNDS = 4
NUM_BUFFERS = 32
DEADLINE_S = 60.0
SPECS = [TensorSpec("W:0", (16, 4), "float32"), TensorSpec("step:0", (), "int64")]
LAYOUT = WeightLayout(SPECS)
# Of both sides, which share this process. Measured: 24 MiB for 2,000 ends of connections, and nothing on a second run.
MAX_GROWTH_BYTES = 100 * 2**20


class CountingLayout(WeightLayout):
    """Counts the buffers that are made of it."""

    def __init__(self) -> None:
        super().__init__(SPECS)
        self.num_allocated = 0

    def allocate(self) -> Buffer:
        self.num_allocated += 1
        return super().allocate()


def weights_of(value: int) -> Buffer:
    """Whole numbers: a sum of them is exact, in whatever order."""
    return LAYOUT.pack({"W:0": np.full((16, 4), value, np.float32), "step:0": np.array(value, np.int64)})


def value_of(buffer: bytes | Buffer) -> int:
    """The number that all weights are; fails where they differ."""
    views = LAYOUT.views(np.frombuffer(buffer, np.uint8))
    assert np.unique(views["W:0"]).size == 1, "a torn snapshot"
    assert views["W:0"][0, 0] == views["step:0"]
    return int(views["step:0"])


def delta(partition: int, round_: int) -> int:
    return 1 + (partition + 3 * round_) % 7


def sum_of_rounds(num_rounds: int) -> int:
    return sum(delta(partition, round_) for partition in range(NUM_WORKERS) for round_ in range(num_rounds))


def push_header(sequence: int, version: int = 0) -> dict[str, Any]:
    header = {"sequence": sequence, "epoch": 0, "batch": sequence, "num_steps": 1, "num_samples": 10}
    return {**header, "version": version, "sums": {"loss": 5.0}, "progress": sequence / NUM_ROUNDS}


class Fleet:
    """The workers, and what each has sent: the test's own books, kept before a frame leaves.

    Args:
        staleness: None where nothing is to be waited for.

    Attributes:
        num_pushed: pushes sent, by worker.
        num_finished: workers whose end the server noted.
        may_begin: the first worker, the slowest, pushes nothing before this is set.
    """

    def __init__(self, server: ParameterServer, staleness: int | None) -> None:
        self.num_pushed = [0] * NUM_WORKERS
        self.num_finished = 0
        self.max_lead = 0
        self.may_begin = asyncio.Event()
        self._server = server
        self._staleness = staleness
        self._random = random.Random(11)

    async def work(self, partition: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            await self._upgrade(reader, writer)
            registration = Registration(1, partition, 1000 + partition, LAYOUT.fingerprint, "here")
            _send(writer, Kind.REGISTER, vars(registration))
            await _receive(reader, Kind.GRANTED)
            for round_ in range(NUM_ROUNDS):
                await self._train(reader, writer, partition, round_)
            _send(
                writer,
                Kind.FINISH,
                {"epoch_samples": [40], "epoch_seconds": [0.5], "step_s": 0.25, "sync_s": 0.25, "hidden_s": 0.0},
            )
            await _receive(reader, Kind.ACCEPTED)
            self.num_finished += 1
        finally:
            writer.close()

    async def _upgrade(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            f"GET {protocol.PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {protocol.UPGRADE}\r\n"
            f"Authorization: Bearer {self._server.token}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")

    async def _train(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, partition: int, round_: int
    ) -> None:
        _send(writer, Kind.PULL, {})
        header, snapshot = await _receive(reader, Kind.SNAPSHOT)
        self._check(round_, header["version"], value_of(snapshot))
        for _ in range(self._random.randrange(3)):  # workers are not equally fast
            await asyncio.sleep(0)
        if partition == 0 and round_ == 0:
            await self.may_begin.wait()
        self.num_pushed[partition] += 1
        push = push_header(round_ + 1, header["version"])
        _send(writer, Kind.PUSH, push, weights_of(delta(partition, round_)))
        accepted, _ = await _receive(reader, Kind.ACCEPTED)
        assert accepted["sequence"] == round_ + 1

    def _check(self, round_: int, version: int, value: int) -> None:
        """A pull has returned: was the worker allowed to begin the round, with these weights?"""
        lead = round_ - min(self.num_pushed)
        self.max_lead = max(self.max_lead, lead)
        if self._staleness is not None:
            assert lead <= self._staleness, f"a worker began round {round_}, the slowest had sent {round_ - lead}"
        if self._staleness == 0:
            assert (version, value) == (round_, 2 + sum_of_rounds(round_))


def _send(writer: asyncio.StreamWriter, kind: Kind, header: Mapping[str, Any], payload: Buffer | None = None) -> None:
    data = b"" if payload is None else payload.tobytes()
    writer.write(protocol.encode(kind, header, len(data)) + data)


async def _receive(reader: asyncio.StreamReader, expected: Kind) -> tuple[dict[str, int], bytes]:
    while True:
        prefix = protocol.decode_prefix(
            await reader.readexactly(protocol.PREFIX_BYTES), protocol.FROM_SERVER, LAYOUT.num_bytes
        )
        header = protocol.decode_header(await reader.readexactly(prefix.header_bytes))
        payload = await reader.readexactly(prefix.payload_bytes)
        if prefix.kind is not Kind.WAIT:
            assert prefix.kind is expected, header
            return header, payload


async def train(server: ParameterServer, staleness: int | None) -> Fleet:
    """All workers, the first of which is held up until nobody else can do anything without it."""
    fleet = Fleet(server, staleness)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for partition in range(NUM_WORKERS):
            group.create_task(fleet.work(partition))
        while not await _is_stuck(server, fleet, staleness):
            await asyncio.sleep(0.02)
        fleet.may_begin.set()
    return fleet


async def _is_stuck(server: ParameterServer, fleet: Fleet, staleness: int | None) -> bool:
    """Whether all workers but the first have gone as far as they can: to the gate, to their end, or, where they are
    bulk-synchronous, to a push that waits for the first worker's."""
    expected = NUM_ROUNDS if staleness is None else staleness + 1
    if fleet.num_pushed != [0] + [expected] * (NUM_WORKERS - 1):
        return False
    status = await asyncio.to_thread(server.status)
    return staleness == 0 or status.num_waiting + fleet.num_finished == NUM_WORKERS - 1


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as two ends of every connection need."""
    needed = 2 * NUM_WORKERS + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"`ulimit -Hn` is {hard}, {needed} files are needed")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("staleness", [0, 2, None])
def test_1000_workers_finish_in_step_and_lose_nothing(staleness: int | None) -> None:
    layout = CountingLayout()
    before_bytes, num_threads, began = resident_bytes(), threading.active_count(), time.monotonic()
    receive_buffer_bytes = NUM_BUFFERS * layout.num_bytes
    with ParameterServer(layout, "127.0.0.1", receive_buffer_bytes=receive_buffer_bytes) as server:
        sync = SyncPlan(staleness, num_first=NUM_WORKERS)
        server.begin_run(weights_of(2), DeltaWeightCombiner(), NUM_WORKERS, sync=sync)
        fleet = asyncio.run(train(server, staleness))
        out = LAYOUT.allocate()
        version = server.read_weights(out)
        status, (_, reports) = server.status(), server.records()
        grown_bytes = resident_bytes() - before_bytes
    print(f"staleness {staleness}: {time.monotonic() - began:.1f} s, {grown_bytes / 2**20:.0f} MiB")
    assert fleet.num_finished == status.num_finished == NUM_WORKERS
    assert value_of(out) == 2 + sum_of_rounds(NUM_ROUNDS)
    assert version == (NUM_ROUNDS if staleness == 0 else NUM_ROUNDS * NUM_WORKERS)
    assert [report.num_applied for report in reports] == [NUM_ROUNDS] * NUM_WORKERS
    assert sum(report.num_refused + report.num_repeated for report in reports) == 0
    assert fleet.max_lead == (NUM_ROUNDS if staleness is None else staleness) - (staleness is None)
    assert layout.num_allocated <= NUM_BUFFERS + 3  # beside pushes: two snapshots, and what is folded of a round
    assert grown_bytes < MAX_GROWTH_BYTES
    assert threading.active_count() <= num_threads + 1  # asyncio's own, of `to_thread`


def test_a_partition_given_up_frees_the_buffers_kept_for_its_push() -> None:
    sync = SyncPlan(0, num_first=4, recovery_timeout_s=0.3)
    with ParameterServer(LAYOUT, "127.0.0.1", receive_buffer_bytes=0) as server, contextlib.ExitStack() as workers:
        server.begin_run(weights_of(2), DeltaWeightCombiner(), 4, sync=sync)
        wires = [workers.enter_context(Wire(server)) for _ in range(4)]
        for partition, wire in enumerate(wires):
            wire.register(server, 1, partition)
        for partition in (3, 2, 1):  # the first to push takes what is free to all; the two others wait
            wires[partition].send(Kind.PUSH, push_header(1), weights_of(partition))
            if partition == 3:
                wait_until(lambda: server.records()[1][3].num_pushed == 1)
        wires[0].close()
        for wire in wires[1:]:
            assert wire.receive(Kind.ACCEPTED)["sequence"] == 1
        out = LAYOUT.allocate()
        wait_until(lambda: server.read_weights(out) == 1)
    assert value_of(out) == 2 + 3 + 2 + 1


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("the condition did not come about within 10 s")
