"""The client against a real server, over connections that break."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tensorspark.errors import ConnectionLostError, LeaseLostError, TensorsparkError, WorkerFailedError
from tensorspark.ps.client import Granted, ParameterClient, ServerAddress
from tensorspark.ps.link import Link
from tensorspark.ps.messages import Cursor, Push, Registration, TimeSpent
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

# Of a size that no socket's buffers hold: a cut in the middle of it is one for both sides.
LAYOUT = WeightLayout([TensorSpec("W:0", (4_000_000,), "float32")])
DEADLINE_S = 30.0


def filled(value: float) -> Buffer:
    return LAYOUT.pack({"W:0": np.full(4_000_000, value, np.float32)})


def values(buffer: Buffer) -> set[float]:
    """The smallest and the largest: all are one."""
    weights = LAYOUT.views(buffer)["W:0"]
    return {float(weights.min()), float(weights.max())}


def push_of(sequence: int, version: int = 0) -> Push:
    return Push(sequence, Cursor(0, sequence), num_steps=1, num_samples=10, version=version)


class Proxy:
    """Passes bytes on between workers and a server, until it is told otherwise.

    Attributes:
        cuts: by direction ("up" to the server, "down" to the worker), after how many bytes more the connection is cut.
        is_cutting_always: whether the same cuts are made on every connection that follows.
        is_frozen: passes nothing on, and closes nothing: as when a network cable is pulled.
        num_connections: that were opened so far.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts: dict[str, int] = {}
        self.is_cutting_always = False
        self.is_frozen = False
        self.num_connections = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut_all(self) -> None:
        """Closes all connections now."""
        for pair in self._pairs:
            _shut(*pair)
        self._pairs.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                worker, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port), timeout=5)
            except OSError:
                worker.close()
                continue
            server.settimeout(None)
            self._pairs.append((worker, server))
            cuts = dict(self.cuts) if self.is_cutting_always else self.cuts
            self._start(self._pass_on, "up", worker, server, cuts)
            self._start(self._pass_on, "down", server, worker, cuts)

    def _pass_on(self, direction: str, source: socket.socket, target: socket.socket, cuts: dict[str, int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if self.is_frozen:
                    continue
                left = cuts.get(direction)
                if left is not None and left < len(data):
                    target.sendall(data[:left])
                    cuts.pop(direction)
                    break
                target.sendall(data)
                if left is not None:
                    cuts[direction] = left - len(data)
        _shut(source, target)


def _shut(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


class Cluster:
    """A server with a run on it, and workers that reach it through a proxy."""

    def __init__(self, partitions: int, sync: SyncPlan, options: dict[str, Any]) -> None:
        self._times = {"io_timeout_s": 10.0, "lease_timeout_s": 10.0} | options
        self._reconnect_timeout_s = self._times.pop("reconnect_timeout_s", 10.0)
        self.beat_lease_s = self._times.pop("client_lease_timeout_s", self._times["lease_timeout_s"])
        self.server = ParameterServer(LAYOUT, "127.0.0.1", **self._times)
        self.run = self.server.begin_run(filled(2), DeltaWeightCombiner(), partitions, sync=sync)
        self.proxy = Proxy(self.server.port)
        self._clients: list[ParameterClient] = []

    def address(self) -> ServerAddress:
        return ServerAddress(
            "127.0.0.1",
            self.proxy.port,
            self.server.token,
            connect_timeout_s=2.0,
            io_timeout_s=self._times["io_timeout_s"],
            reconnect_timeout_s=self._reconnect_timeout_s,
            lease_timeout_s=self.beat_lease_s,
        )

    def registration(self, partition: int = 0, attempt: int = 1) -> Registration:
        return Registration(self.run, partition, attempt, LAYOUT.fingerprint, f"host{attempt}")

    def client(self) -> ParameterClient:
        self._clients.append(ParameterClient(self.address()))
        return self._clients[-1]

    def worker(self, partition: int = 0, attempt: int = 1) -> ParameterClient:
        client = self.client()
        client.register(self.registration(partition, attempt))
        return client

    def weights(self) -> set[float]:
        out = LAYOUT.allocate()
        self.server.read_weights(out)
        return values(out)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)

    def close(self) -> None:
        self.proxy.is_frozen = False
        for client in self._clients:
            client.close()
        self.proxy.close()
        self.server.close()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    clusters: list[Cluster] = []

    def start_cluster(partitions: int = 2, sync: SyncPlan | None = None, **options: Any) -> Cluster:
        clusters.append(Cluster(partitions, sync or SyncPlan(), options))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()


def test_one_who_rests_is_answered_before_its_push_is_accepted_and_pulls_it_later(start: Start) -> None:
    cluster = start(sync=SyncPlan(0, num_first=2, start_timeout_s=600.0))
    first, second = cluster.worker(0, attempt=1), cluster.worker(1, attempt=2)
    out, others = LAYOUT.allocate(), LAYOUT.allocate()
    with ThreadPoolExecutor(2) as threads:
        pulls = [threads.submit(first.pull, out), threads.submit(second.pull, others)]
        assert [pull.result(DEADLINE_S).version for pull in pulls] == [0, 0]
        first.push(filled(3), push_of(1))
        first.rest()  # the round waits for the second
        assert values(out) == {2.0}
        pull = threads.submit(first.pull, out)
        second.push(filled(4), push_of(1))
        second.rest()  # after the round: its push may be accepted first
        assert pull.result(DEADLINE_S).version == 1
        assert second.pull(others).version == 1
    assert values(out) == values(others) == {9.0}


def compute(seconds: float) -> None:
    """What a worker does between a pull and a push."""
    threading.Event().wait(seconds)


@pytest.mark.parametrize(
    "cuts",
    [{"up": 0}, {"up": 40}, {"up": 9_000_000}, {"down": 0}, {"down": 17}, {"down": 9_000_000}],
    ids=lambda cuts: "-".join(f"{direction}-{num_bytes}" for direction, num_bytes in cuts.items()),
)
@pytest.mark.parametrize("staleness", [None, 0])
def test_a_push_counts_once_wherever_the_connection_is_cut(
    start: Start, cuts: dict[str, int], staleness: int | None
) -> None:
    cluster = start(sync=SyncPlan(staleness))
    worker = cluster.worker()
    out = LAYOUT.allocate()
    assert worker.pull(out).version == 0
    cluster.proxy.cuts.update(cuts)  # in the PUSH, or before ACCEPTED, or in the SNAPSHOT behind it
    worker.push(filled(3), push_of(1))
    assert worker.pull(out).version == 1
    worker.push(filled(4), push_of(2, version=1))
    worker.flush()
    assert values(out) == {2 + 3}
    assert cluster.weights() == {2 + 3 + 4}
    (report, _) = cluster.server.records()[1]
    assert (report.num_applied, report.num_reconnects, report.num_attempts) == (2, 1, 1)


def test_a_finish_whose_answer_is_lost_is_a_finish(start: Start) -> None:
    cluster = start(partitions=1)
    worker = cluster.worker()
    cluster.proxy.cuts["down"] = 0
    worker.finish(TimeSpent((7,), (0.5,), step_s=1.0, sync_s=2.0))
    assert cluster.server.status().num_finished == 1


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_failure_is_reported_at_once_while_another_thread_waits_at_the_gate(tls: bool) -> None:
    server = ParameterServer(LAYOUT, "127.0.0.1", tls=tls)
    with contextlib.closing(server), ThreadPoolExecutor(1) as threads:
        run = server.begin_run(filled(2), DeltaWeightCombiner(), 2, sync=SyncPlan(0, num_first=2, start_timeout_s=600))
        address = ServerAddress("127.0.0.1", server.port, server.token, certificate=server.certificate)
        with ParameterClient(address) as worker:
            worker.register(Registration(run, 0, 1, LAYOUT.fingerprint, "here"))
            pulled = threads.submit(worker.pull, LAYOUT.allocate())  # waits for the other worker, for minutes
            deadline = time.monotonic() + DEADLINE_S
            while server.status().num_waiting == 0:
                assert time.monotonic() < deadline
                threading.Event().wait(0.01)
            began = time.monotonic()
            worker.report("ValueError: bad row", "Traceback: it was on line 7")
            assert time.monotonic() - began < 5
            failure = server.failure()
            assert isinstance(failure, WorkerFailedError)
            assert "bad row" in str(failure)
            assert "line 7" in failure.worker_traceback
            assert isinstance(pulled.exception(DEADLINE_S), TensorsparkError)


def test_a_failure_is_reported_after_a_connection_that_another_thread_finds_broken(start: Start) -> None:
    cluster = start(sync=SyncPlan(0, num_first=2, start_timeout_s=600.0))
    worker = cluster.worker()
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(worker.pull, LAYOUT.allocate())
        cluster.wait_for(lambda: cluster.server.status().num_waiting == 1)
        cluster.proxy.cut_all()
        worker.report("ValueError: bad row", "Traceback")
        cluster.wait_for(lambda: cluster.server.failure() is not None)
        assert isinstance(pulled.exception(DEADLINE_S), TensorsparkError)
    assert "bad row" in str(cluster.server.failure())


def test_what_is_pulled_may_be_received_into_what_was_pushed_wherever_the_connection_is_cut(start: Start) -> None:
    cluster = start()
    worker = cluster.worker()
    buffer = LAYOUT.allocate()
    for sequence, cuts in enumerate([{"up": 9_000_000}, {"down": 17}, {"down": 9_000_000}], 1):
        cluster.proxy.cuts.update(cuts)
        buffer[:] = filled(10**sequence)
        worker.push(buffer, push_of(sequence))
        worker.pull(buffer)
        assert values(buffer) == cluster.weights()
    assert cluster.weights() == {2 + 10 + 100 + 1000}
    assert cluster.server.records()[1][0].num_reconnects == 3


def test_a_server_that_is_gone_is_an_error_in_bounded_time_that_says_where_to_look(start: Start) -> None:
    cluster = start(reconnect_timeout_s=1.0)
    worker = cluster.worker()
    cluster.server.close()
    began = time.monotonic()
    with pytest.raises(ConnectionLostError, match=r"could not be reached again within 1 s .*driver still runs"):
        worker.pull(LAYOUT.allocate())
    assert time.monotonic() - began < 5


def test_a_network_that_swallows_everything_is_an_error_in_bounded_time(start: Start) -> None:
    cluster = start(reconnect_timeout_s=1.0, io_timeout_s=1.0)
    worker = cluster.worker()
    cluster.proxy.is_frozen = True
    began = time.monotonic()
    with pytest.raises(ConnectionLostError, match="could not be reached again"):
        worker.pull(LAYOUT.allocate())
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_frame_that_never_gets_through_is_an_error_in_bounded_time(start: Start, direction: str) -> None:
    cluster = start(reconnect_timeout_s=2.0)
    worker = cluster.worker()
    cluster.proxy.cuts[direction] = 5_000_000  # in the PUSH, or in the SNAPSHOT
    cluster.proxy.is_cutting_always = True
    cluster.proxy.cut_all()

    def exchange() -> None:
        if direction == "up":
            worker.push(filled(3), push_of(1))
        worker.pull(LAYOUT.allocate())

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(exchange)
        try:
            with pytest.raises(ConnectionLostError, match="could not be reached again"):
                done.result(15)
        finally:
            cluster.server.close()  # so that the thread ends in any case


def test_a_worker_that_computes_for_longer_than_its_lease_keeps_it(start: Start) -> None:
    cluster = start(lease_timeout_s=1.0)
    worker = cluster.worker()
    worker.pull(LAYOUT.allocate())
    compute(2.5)
    worker.push(filled(3), push_of(1))
    worker.flush()
    assert cluster.server.records()[1][0].num_reconnects == 0


def register_silent(cluster: Cluster, partition: int = 0, attempt: int = 1) -> Link:
    """A worker whose process hangs: nothing of it is alive but its connection."""
    link = Link(cluster.address())
    link.send(Kind.REGISTER, vars(cluster.registration(partition, attempt)))
    link.receive(Kind.GRANTED)
    return link


def test_a_silent_worker_loses_its_lease_to_the_next_attempt(start: Start) -> None:
    cluster = start(lease_timeout_s=1.0)
    link = register_silent(cluster)
    began = time.monotonic()
    assert cluster.client().register(cluster.registration(attempt=2)) == Granted(0, Cursor(), finished=False)
    assert 0.5 < time.monotonic() - began < 5
    with pytest.raises(ConnectionLostError):
        link.receive(Kind.SNAPSHOT, LAYOUT.num_bytes)
    link.close()
    assert cluster.server.records()[1][0].num_attempts == 2


def test_a_late_push_on_a_lost_lease_is_refused_with_the_new_holders_name(start: Start) -> None:
    cluster = start(lease_timeout_s=1.0, client_lease_timeout_s=60.0)
    late = cluster.worker(attempt=1)
    late.pull(LAYOUT.allocate())
    successor = cluster.worker(attempt=2)  # waits until the server has heard nothing of the first for a second

    def push_late() -> None:
        late.push(filled(100), push_of(1))
        late.flush()

    with pytest.raises(LeaseLostError, match="partition 0 has passed to attempt 2 on host2"):
        push_late()
    successor.pull(LAYOUT.allocate())
    successor.push(filled(3), push_of(1))
    successor.flush()
    assert cluster.weights() == {2 + 3}


def test_a_pull_outlasts_the_io_timeout_while_the_server_says_that_it_lives(start: Start) -> None:
    cluster = start(sync=SyncPlan(0, num_first=2, start_timeout_s=60.0), io_timeout_s=1.0)
    first, second = cluster.worker(0), cluster.client()
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(first.pull, LAYOUT.allocate())
        compute(2.5)
        assert not pulled.done()
        second.register(cluster.registration(1, attempt=2))
        assert pulled.result(DEADLINE_S).version == 0
    assert cluster.server.records()[1][0].num_reconnects == 0


def test_a_wait_at_the_gate_does_not_count_as_silence(start: Start) -> None:
    cluster = start(
        sync=SyncPlan(0, num_first=2, start_timeout_s=60.0), lease_timeout_s=1.5, client_lease_timeout_s=5.0
    )
    first, second = cluster.worker(0), cluster.client()
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(first.pull, LAYOUT.allocate())
        compute(2.0)
        second.register(cluster.registration(1, attempt=2))
        pulled.result(DEADLINE_S)
    compute(0.6)
    assert cluster.server.status().num_live == 2
    assert cluster.server.records()[1][0].num_reconnects == 0


def test_a_half_open_connection_is_taken_over_by_the_same_attempt(start: Start) -> None:
    cluster = start(io_timeout_s=1.0, lease_timeout_s=60.0)
    worker = cluster.worker()
    out = LAYOUT.allocate()
    worker.pull(out)
    cluster.proxy.is_frozen = True
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(worker.pull, out)
        cluster.wait_for(lambda: cluster.proxy.num_connections >= 2)
        cluster.proxy.is_frozen = False
        assert pulled.result(DEADLINE_S).version == 0
    status = cluster.server.status()
    assert (status.num_live, status.num_lost, status.num_standby) == (1, 0, 0)
