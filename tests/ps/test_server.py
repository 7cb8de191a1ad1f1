"""A live server and real clients on loopback."""

from __future__ import annotations

import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tensorspark.errors import (
    AuthenticationError,
    CombinerError,
    ConfigError,
    ConnectionLostError,
    LayoutMismatchError,
    LeaseLostError,
    NonFiniteError,
    ProtocolError,
    RunStoppedError,
    ServerUnreachableError,
    WorkerFailedError,
)
from tensorspark.ps import protocol
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import DeltaWeightCombiner, MeanWeightCombiner, WeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

SMALL = WeightLayout([TensorSpec("W:0", (4, 3), "float32"), TensorSpec("step:0", (), "int64")])
# Over the size from which merges leave the server's loop.
LARGE = WeightLayout([TensorSpec("W:0", (600_000,), "float32")])


def filled(layout: WeightLayout, value: float) -> Buffer:
    return layout.pack({spec.name: np.full(spec.shape, value, spec.dtype) for spec in layout.specs})


def values(layout: WeightLayout, buffer: Buffer) -> set[float]:
    return {float(value) for view in layout.views(buffer).values() for value in np.unique(view)}


def push_of(sequence: int) -> Push:
    return Push(sequence, Cursor(0, sequence), num_steps=1, num_samples=10, sums={"loss": 5.0}, progress=0.5)


class Cluster:
    """A server with a run on it, and workers that register on demand."""

    def __init__(self, server: ParameterServer, run: int) -> None:
        self.server = server
        self.run = run
        self.address = ServerAddress(
            "127.0.0.1", server.port, server.token, connect_timeout_s=5, io_timeout_s=10, reconnect_timeout_s=0
        )
        self._clients: list[ParameterClient] = []

    def connect(self, address: ServerAddress | None = None) -> ParameterClient:
        client = ParameterClient(address or self.address)
        self._clients.append(client)
        return client

    def worker(self, partition: int = 0, attempt: int = 1) -> ParameterClient:
        client = self.connect()
        client.register(self.registration(partition, attempt))
        return client

    def registration(self, partition: int = 0, attempt: int = 1) -> Registration:
        return Registration(self.run, partition, attempt, self.server.layout.fingerprint, "here")

    def weights(self) -> set[float]:
        out = self.server.layout.allocate()
        self.server.read_weights(out)
        return values(self.server.layout, out)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.server.close()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    clusters: list[Cluster] = []

    def start_cluster(
        layout: WeightLayout = SMALL, combiner: WeightCombiner | None = None, partitions: int = 4, **options: Any
    ) -> Cluster:
        server = ParameterServer(layout, "127.0.0.1", **options)
        run = server.begin_run(filled(layout, 2), combiner or DeltaWeightCombiner(), partitions)
        clusters.append(Cluster(server, run))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()


@pytest.mark.parametrize("layout", [SMALL, LARGE])
def test_a_worker_pulls_what_the_run_began_with_and_sees_its_own_push(start: Start, layout: WeightLayout) -> None:
    worker = start(layout).worker()
    buffer = layout.allocate()
    assert worker.pull(buffer).version == 0
    assert values(layout, buffer) == {2}
    worker.push(filled(layout, 3), push_of(1))
    assert worker.pull(buffer).version == 1
    assert values(layout, buffer) == {5}


@pytest.mark.parametrize("layout", [SMALL, LARGE])
def test_pushes_of_workers_at_once_are_all_added_up(start: Start, layout: WeightLayout) -> None:
    cluster = start(layout, receive_buffer_bytes=2 * layout.num_bytes)

    def work(partition: int) -> None:
        worker = cluster.worker(partition)
        buffer = layout.allocate()
        for sequence in range(1, 26):
            worker.pull(buffer)
            assert len(values(layout, buffer)) == 1  # never torn
            worker.push(filled(layout, 1 + partition), push_of(sequence))
        worker.flush()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, partition) for partition in range(4)]:
            done.result(60)
    assert cluster.weights() == {2 + 25 * (1 + 2 + 3 + 4)}
    points, reports = cluster.server.records()
    assert [report.num_applied for report in reports] == [25] * 4
    assert (points[-1].num_steps, points[-1].num_samples, points[-1].scalars) == (100, 1000, {"loss": 0.5})


def test_weights_are_merged_as_the_combiner_says(start: Start) -> None:
    cluster = start(combiner=MeanWeightCombiner(2))
    worker = cluster.worker()
    worker.push(filled(SMALL, 6), push_of(1))
    worker.flush()
    assert cluster.weights() == {4}


def test_nan_is_refused_by_the_tensors_name_and_changes_nothing(start: Start) -> None:
    cluster = start(LARGE)
    worker = cluster.worker()
    bad = filled(LARGE, 1)
    LARGE.views(bad)["W:0"][500_000] = np.nan
    worker.push(bad, push_of(1))
    with pytest.raises(NonFiniteError, match="W:0"):
        worker.flush()
    assert cluster.weights() == {2}
    assert cluster.server.records()[1][0].num_refused == 1


@pytest.mark.parametrize("name", ["num_steps", "num_samples"])
def test_counts_that_would_not_fit_when_added_up_close_the_connection_and_harm_nobody(start: Start, name: str) -> None:
    cluster = start()
    honest, other = cluster.worker(partition=0, attempt=1), cluster.worker(partition=1, attempt=2)
    honest.push(filled(SMALL, 1), replace(push_of(1), **{name: 2**40 - 1}))
    honest.flush()
    other.push(filled(SMALL, 1), replace(push_of(1), **{name: 2**40}))
    with pytest.raises(ConnectionLostError):
        other.flush()
    honest.pull(SMALL.allocate())


class Raising(WeightCombiner):
    def compute(self, origin_weight: Any, new_weight: Any, worker_id: int | str = -1, name: str | None = None) -> Any:
        raise ZeroDivisionError("on purpose")


class Misshapen(WeightCombiner):
    def compute(self, origin_weight: Any, new_weight: Any, worker_id: int | str = -1, name: str | None = None) -> Any:
        return np.zeros(7, np.float32)


@pytest.mark.parametrize(
    ("combiner", "expected"), [(Raising(), "on purpose"), (Misshapen(), r"\[7\], expected \[4, 3\]")]
)
def test_a_combiner_that_fails_fails_the_run_and_keeps_the_weights(
    start: Start, combiner: WeightCombiner, expected: str
) -> None:
    cluster = start(combiner=combiner)
    worker = cluster.worker()
    worker.push(filled(SMALL, 6), push_of(1))
    with pytest.raises(RunStoppedError):
        worker.flush()
    failure = cluster.server.failure()
    assert isinstance(failure, CombinerError)
    with pytest.raises(CombinerError, match=expected):
        raise failure
    assert cluster.weights() == {2}


def test_a_worker_that_reports_failure_fails_the_run(start: Start) -> None:
    cluster = start()
    cluster.worker(partition=2).report("ValueError: bad row", "Traceback: line 7\n" + "x" * 100_000)
    failure = cluster.server.failure()
    assert isinstance(failure, WorkerFailedError)
    assert (failure.partition, failure.host) == (2, "here")
    assert "ValueError: bad row" in str(failure)


def test_a_report_behind_pushes_in_flight_arrives(start: Start) -> None:
    cluster = start(LARGE)
    worker = cluster.worker()
    worker.push(filled(LARGE, 1), push_of(1))
    worker.push(filled(LARGE, 1), push_of(2))
    worker.report("ValueError: bad row", "Traceback")
    assert isinstance(cluster.server.failure(), WorkerFailedError)


def test_a_worker_whose_push_broke_off_sends_nothing_that_could_pass_for_its_rest(start: Start) -> None:
    cluster = start(LARGE)
    worker = cluster.worker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker._link, "_socket", _Breaking(worker._link._socket, LARGE.num_bytes - 200))
        with pytest.raises(ConnectionLostError):
            worker.push(filled(LARGE, 1), push_of(1))
        worker.report("ConnectionLostError", "Traceback " + "x" * 1000)
    worker.close()
    wait_until(lambda: cluster.server.status().num_live == 0)
    assert cluster.weights() == {2}


class _Breaking:
    """A socket that breaks after `limit` bytes of its first payload."""

    def __init__(self, wrapped: socket.socket, limit: int) -> None:
        self._wrapped = wrapped
        self._limit = limit

    def send(self, data: Any) -> int:
        if len(data) > self._limit:
            self._wrapped.sendall(data[: self._limit])
            raise TimeoutError
        return self._wrapped.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def test_a_slow_combiner_of_a_users_own_does_not_hold_up_the_servers_loop(start: Start) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(WeightCombiner):
        def compute(self, origin_weight: Any, new_weight: Any, worker_id: int | str = -1, name: Any = None) -> Any:
            entered.set()
            assert leave.wait(10)
            return new_weight

    cluster = start(combiner=Slow())
    worker = cluster.worker()
    worker.push(filled(SMALL, 6), push_of(1))
    assert entered.wait(10)
    assert cluster.server.status().num_live == 1
    leave.set()
    worker.flush()
    assert cluster.weights() == {6}


def test_a_standby_takes_over_when_the_holder_is_gone(start: Start) -> None:
    cluster = start()
    holder = cluster.worker(attempt=1)
    holder.push(filled(SMALL, 1), push_of(1))
    holder.flush()
    standby = cluster.connect()
    with ThreadPoolExecutor(1) as threads:
        granted = threads.submit(standby.register, cluster.registration(attempt=2))
        wait_until(lambda: cluster.server.status().num_standby == 1)
        assert not granted.done()
        holder.close()
        assert granted.result(10).cursor == Cursor(0, 1)
    assert cluster.weights() == {3}


def test_a_standby_that_pulls_is_refused(start: Start) -> None:
    cluster = start()
    cluster.worker(attempt=1)
    standby = cluster.connect()
    standby._link.send(Kind.REGISTER, vars(cluster.registration(attempt=2)))
    with pytest.raises(LeaseLostError):
        standby.pull(SMALL.allocate())


def test_a_worker_with_other_variables_learns_which_the_server_has(start: Start) -> None:
    cluster = start()
    with pytest.raises(LayoutMismatchError, match=r"W:0 float32\[4, 3\], step:0 int64\[\]"):
        cluster.connect().register(Registration(cluster.run, 0, 1, LARGE.fingerprint, "here"))


def test_workers_of_an_earlier_run_are_refused_on_a_server_that_is_used_again(start: Start) -> None:
    cluster = start()
    old = cluster.worker()
    second = cluster.server.begin_run(filled(SMALL, 9), DeltaWeightCombiner(), 1)
    assert second == cluster.run + 1
    with pytest.raises((RunStoppedError, ConnectionLostError)):
        old.pull(SMALL.allocate())
    with pytest.raises(RunStoppedError):
        cluster.connect().register(cluster.registration())
    cluster.run = second
    buffer = SMALL.allocate()
    cluster.worker().pull(buffer)
    assert values(SMALL, buffer) == {9}


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls, since what another connection did is seen by asking only."""
    ended = threading.Event()
    for _ in range(1000):
        if condition():
            return
        ended.wait(0.01)
    pytest.fail("the condition did not come about within 10 s")


# What a stranger sends


def get(cluster: Cluster, path: str, token: str | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{cluster.server.port}{path}", headers=headers)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_only_liveness_is_open(start: Start) -> None:
    cluster = start()
    assert get(cluster, "/healthz") == (200, '{"status": "ok"}')
    for path in ("/status", "/workers"):
        assert get(cluster, path) == (401, "401 Unauthorized\n")
        assert get(cluster, path, token="wrong") == (401, "401 Unauthorized\n")
    status, body = get(cluster, "/status", token=cluster.server.token)
    assert status == 200
    assert '"num_partitions": 4' in body
    assert get(cluster, "/workers", token=cluster.server.token)[0] == 426
    assert get(cluster, "/other")[0] == 401
    assert get(cluster, "/other", token=cluster.server.token)[0] == 404


def test_a_wrong_token_is_an_authentication_error(start: Start) -> None:
    cluster = start()
    with pytest.raises(AuthenticationError, match="token"):
        cluster.connect(ServerAddress("127.0.0.1", cluster.server.port, "wrong"))


def test_the_token_is_in_no_repr(start: Start) -> None:
    cluster = start()
    assert cluster.server.token not in repr(cluster.server) + repr(cluster.address) + str(cluster.worker())


BAD_FRAMES = {
    "foreign": b"GET / HTTP/1.1\r\n\r\n",
    "another version": struct.pack("<4sBBHQ", b"TSPK", 9, Kind.PULL, 1, 0) + b"\x80",
    "unknown kind": struct.pack("<4sBBHQ", b"TSPK", 1, 99, 1, 0) + b"\x80",
    "oversized": struct.pack("<4sBBHQ", b"TSPK", 1, Kind.PUSH, 1, 2**62) + b"\x80",
    "push too short": protocol.encode(Kind.PUSH, {}, 64),
    "pull with a payload": protocol.encode(Kind.PULL, {}, 64),
    "no header": struct.pack("<4sBBHQ", b"TSPK", 1, Kind.PULL, 0, 0),
    "header of nonsense": struct.pack("<4sBBHQ", b"TSPK", 1, Kind.PULL, 3, 0) + b"\xc1\xc1\xc1",
    "push without its fields": protocol.encode(Kind.PUSH, {}, SMALL.num_bytes) + bytes(SMALL.num_bytes),
    "push with fields of other types": protocol.encode(
        Kind.PUSH, {"sequence": "1", "sums": []}, SMALL.num_bytes
    ) + bytes(SMALL.num_bytes),
    "report with lists": protocol.encode(Kind.FAIL, {"message": [], "traceback": {}}),
    "epochs that are no numbers": protocol.encode(
        Kind.FINISH, {"epoch_samples": [None], "epoch_seconds": [[]], "step_s": 0.0, "sync_s": 0.0, "hidden_s": 0.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_bad_frame_closes_its_connection_and_touches_nothing_else(
    start: Start, frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = start(partitions=2)
    other, bad = cluster.worker(1), cluster.worker(0)
    bad._link._socket.sendall(frame)
    with pytest.raises(ConnectionLostError):
        bad._link.receive(Kind.ACCEPTED)
    other.push(filled(SMALL, 1), push_of(1))
    other.flush()
    assert cluster.weights() == {3}
    assert "closed: expected" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 20, 100])
def test_a_truncated_push_leaves_no_trace_and_gives_its_buffer_back(start: Start, num_bytes: int) -> None:
    cluster = start(receive_buffer_bytes=0)
    frame = protocol.encode(Kind.PUSH, {"sequence": 1}, SMALL.num_bytes) + bytes(SMALL.num_bytes)
    bad = cluster.worker(0)
    bad._link._socket.sendall(frame[:num_bytes])
    bad.close()
    worker = cluster.worker(1)
    worker.push(filled(SMALL, 1), push_of(1))
    worker.flush()
    assert cluster.weights() == {3}


def test_a_push_that_stalls_is_cut_off_at_its_deadline(start: Start) -> None:
    cluster = start(LARGE, receive_buffer_bytes=0, io_timeout_s=0.3)
    stalled, other = [cluster.worker(partition) for partition in (0, 1)], cluster.worker(2)
    for worker in stalled:  # each takes one of the two buffers that are free beside the current snapshot's
        worker._link._socket.sendall(protocol.encode(Kind.PUSH, {"sequence": 1}, LARGE.num_bytes) + bytes(1000))
    other.push(filled(LARGE, 1), push_of(1))
    other.flush()
    assert cluster.weights() == {3}
    for worker in stalled:
        with pytest.raises(ConnectionLostError):
            worker._link.receive(Kind.ACCEPTED)


def test_a_worker_that_stops_in_the_middle_of_a_push_loses_its_lease(start: Start) -> None:
    cluster = start(LARGE, io_timeout_s=60, lease_timeout_s=0.3)
    client = cluster.worker()
    client._closing.set()  # no heartbeat, as of a process that is stopped
    header = protocol.encode(Kind.PUSH, {}, LARGE.num_bytes)
    client._link._socket.sendall(header + bytes(LARGE.num_bytes // 2))
    client._link._socket.settimeout(10)
    assert client._link._socket.recv(1) == b""
    wait_until(lambda: cluster.server.status().num_lost == 1)


def test_the_log_says_why_a_push_that_stalls_was_cut_off(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    cluster = start(LARGE, io_timeout_s=0.3)
    client = cluster.worker()
    client._link._socket.sendall(protocol.encode(Kind.PUSH, {}, LARGE.num_bytes))
    assert client._link._socket.recv(1) == b""
    wait_until(lambda: cluster.server.status().num_live == 0)
    assert "closed: a frame did not end in time" in caplog.text


def test_a_puller_that_does_not_read_holds_nobody_up_beyond_its_deadline(start: Start) -> None:
    layout = WeightLayout([TensorSpec("W:0", (8_000_000,), "float32")])
    cluster = start(layout, io_timeout_s=0.5)
    for partition in (0, 1):
        cluster.worker(partition)._link.send(Kind.PULL, {})  # and never reads the snapshot
        worker = cluster.worker(2 + partition)
        worker.push(filled(layout, 1), push_of(1))
        worker.flush()
    assert cluster.weights() == {4}


def test_a_foreign_server_is_told_from_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example.com ESMTP\r\n\r\n")

        answered = threads.submit(answer)
        with pytest.raises(ProtocolError, match="220 mail"):
            ParameterClient(ServerAddress("127.0.0.1", listener.getsockname()[1], "token", io_timeout_s=5))
        answered.result(5)


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = ServerAddress("127.0.0.1", listener.getsockname()[1], "token", io_timeout_s=0.2)
        with pytest.raises(ConnectionLostError, match=r"spark\.tensorspark\.io\.timeout"):
            ParameterClient(address)


def test_nobody_at_the_address_names_the_settings_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServerUnreachableError, match=r"server_host.*spark\.tensorspark\.server\.host"):
        ParameterClient(ServerAddress("127.0.0.1", port, "token", connect_timeout_s=1))


def test_a_server_that_goes_ends_its_workers(start: Start) -> None:
    cluster = start()
    worker = cluster.worker()
    cluster.server.close()
    with pytest.raises(ConnectionLostError):
        worker.pull(SMALL.allocate())


# Starting and ending


def test_a_taken_port_is_a_config_error_that_names_the_setting(start: Start) -> None:
    cluster = start()
    with pytest.raises(
        ConfigError, match=rf"port {cluster.server.port} .*server_port.*spark\.tensorspark\.server\.port"
    ):
        ParameterServer(SMALL, "127.0.0.1", cluster.server.port)


def test_a_host_without_an_address_is_a_config_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid.*spark\.tensorspark\.server\.host"):
        ParameterServer(SMALL, "no-such-host.invalid")


def test_an_address_of_another_machine_is_served_on_all_interfaces(start: Start) -> None:
    server = ParameterServer(SMALL, "203.0.113.7")
    with server:
        server.begin_run(filled(SMALL, 1), DeltaWeightCombiner(), 1)
        ParameterClient(ServerAddress("127.0.0.1", server.port, server.token)).close()


def test_close_is_idempotent_ends_the_thread_and_frees_the_port() -> None:
    server = ParameterServer(SMALL, "127.0.0.1")
    thread = server._thread
    server.close()
    server.close()
    assert not thread.is_alive()
    ParameterServer(SMALL, "127.0.0.1", server.port).close()


def test_a_closed_server_says_so() -> None:
    server = ParameterServer(SMALL, "127.0.0.1")
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.status()
