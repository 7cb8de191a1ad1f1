"""Weights in several shards, each with a server of its own, against what one server would make of them."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark import cloudpickle

from tensorspark.errors import (
    CombinerError,
    NonFiniteError,
    RunStoppedError,
    SessionClosedError,
    ShardLostError,
)
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Asked, Cursor, EpochPlan, OrderKind, Push, Registration, TimeSpent
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.shards.channel import Reply
from tensorspark.shards.client import ShardedClient
from tensorspark.shards.fleet import Fleet, deadline_after
from tensorspark.shards.host import ShardJob, serve
from tensorspark.shards.processes import ShardProcesses
from tensorspark.shards.sharded_server import Endpoint, ShardedServer
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import CombinerState, DeltaWeightCombiner, UpdateMeanWeightCombiner, WeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tensorspark.weights.ranges import Shard, split
from tensorspark.weights.server_optimizers import ServerAdam, ServerSGD

LAYOUT = WeightLayout(
    [
        TensorSpec("embedding", (1500, 9), "float32"),
        TensorSpec("W", (4000,), "float32"),
        TensorSpec("b", (2000,), "float64"),
        TensorSpec("step", (), "int64"),
    ]
)
DEADLINE_S = 30.0
BULK = SyncPlan(0, num_first=2, start_timeout_s=DEADLINE_S)
SERVER = {"io_timeout_s": DEADLINE_S, "lease_timeout_s": DEADLINE_S}
SPENT = TimeSpent((), (), 0.0, 0.0)

Client = ParameterClient | ShardedClient


def filled(value: float) -> Buffer:
    return LAYOUT.pack({spec.name: np.full(spec.shape, value, spec.dtype) for spec in LAYOUT.specs})


def numbers() -> Buffer:
    rng = np.random.default_rng(11)
    return LAYOUT.pack({s.name: np.asarray(rng.standard_normal(s.shape) * 5 + 1).astype(s.dtype) for s in LAYOUT.specs})


def values(buffer: Buffer) -> set[float]:
    return {float(value) for view in LAYOUT.views(buffer).values() for value in np.unique(view)}


def push_of(sequence: int, version: int = 0, **more: Any) -> Push:
    return Push(sequence, Cursor(0, sequence), num_steps=1, num_samples=10, version=version, **more)


def address_of(server: Endpoint) -> ServerAddress:
    return ServerAddress(
        server.host,
        server.port,
        server.token,
        connect_timeout_s=5.0,
        io_timeout_s=DEADLINE_S,
        reconnect_timeout_s=0.0,
        certificate=server.certificate,
    )


class ShardThreads:
    """Hosts of shards that need no start of an interpreter."""

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        self._threads = ThreadPoolExecutor(len(jobs))
        self._served = [self._threads.submit(serve, job) for job in jobs]

    def failure(self) -> str | None:
        return next((f"a shard ended: {served}" for served in self._served if served.done()), None)

    def close(self, lost: Collection[int] = ()) -> None:
        for served in self._served:
            served.result(DEADLINE_S)
        self._threads.shutdown()


class Cluster:
    """Servers of all shards with a run on them, or one server (`num_shards` 1), and workers."""

    def __init__(self, num_shards: int, combiner: WeightCombiner, hosts: Callable[..., Any], tls: bool) -> None:
        self.hosts: list[Any] = []
        shards = split(LAYOUT, num_shards, whole_tensors=not combiner.is_elementwise)
        assert len(shards) == num_shards
        self.server: ParameterServer | ShardedServer
        primary = ParameterServer(shards[0].layout, "127.0.0.1", **SERVER, tls=tls)  # type: ignore[arg-type]

        def start(jobs: Sequence[ShardJob]) -> Any:
            self.hosts.append(hosts(jobs))
            return self.hosts[-1]

        self.server = primary
        if num_shards > 1:
            self.server = ShardedServer(
                LAYOUT,
                shards,
                primary,
                start=start,
                dumps=cloudpickle.dumps,
                server={**SERVER, "tls": tls},
                address_of=address_of,
            )
        self.combiner = combiner
        self.run = 0
        self._compression = NO_COMPRESSION
        self._clients: list[Client] = []
        self.threads = ThreadPoolExecutor(8)

    def begin(
        self,
        weights: Buffer,
        *,
        sync: SyncPlan | None = None,
        resume: RunCheckpoint | None = None,
        epochs: EpochPlan | None = None,
        compression: Compression = NO_COMPRESSION,
        partitions: int = 2,
    ) -> Cluster:
        self._compression = compression
        weights = resume.weights if resume else weights
        self.run = self.server.begin_run(
            weights,
            self.combiner,
            partitions,
            sync=sync or SyncPlan(),
            resume=resume,
            epochs=epochs,
            compression=compression,
        )
        return self

    @property
    def sharded(self) -> ShardedServer:
        assert isinstance(self.server, ShardedServer)
        return self.server

    def connect(self) -> Client:
        if isinstance(self.server, ShardedServer):
            self._clients.append(ShardedClient(self.server.places, self._compression))
        else:
            self._clients.append(ParameterClient(address_of(self.server), LAYOUT, self._compression))
        return self._clients[-1]

    def worker(self, partition: int = 0, attempt: int | None = None) -> Worker:
        client = self.connect()
        granted = client.register(
            Registration(self.run, partition, attempt or 1 + partition, LAYOUT.fingerprint, "here")
        )
        assert not granted.finished
        return Worker(client, partition, granted.sequence)

    def at_shard(self, index: int, partition: int = 0, attempt: int | None = None) -> ParameterClient:
        """A part of a worker: its conversation with one shard."""
        place = self.sharded.places[index]
        client = ParameterClient(place.address, place.shard.layout, self._compression)
        self._clients.append(client)
        attempt = attempt or 1 + partition
        client.register(Registration(place.run, partition, attempt, place.shard.layout.fingerprint, "here"))
        if index:  # a shard that follows counts a worker from its first pull on
            client.pull(place.shard.layout.allocate())
        return client

    def weights(self) -> Buffer:
        out = LAYOUT.allocate()
        self.server.read_weights(out)
        return out

    def capture(self) -> RunCheckpoint:
        captured = self.server.capture(DEADLINE_S)
        assert captured is not None
        return captured

    def leave(self) -> None:
        """Has all workers go."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def close(self) -> None:
        self.leave()
        self.server.close()
        self.threads.shutdown()


class Worker:
    """Pulls and pushes; `sequence` is that of its last push."""

    def __init__(self, client: Client, partition: int, sequence: int) -> None:
        self.client = client
        self.partition = partition
        self.sequence = sequence
        self.weights = LAYOUT.allocate()
        self.holds: int | None = None

    def pull(self) -> None:
        self.holds = self.client.pull(self.weights, self.holds).version

    def push(self, weights: Buffer) -> None:
        self.sequence += 1
        self.client.push(weights, push_of(self.sequence, self.holds or 0, sums={"loss": 5.0}))

    def train(self, num_rounds: int) -> None:
        """Rounds whose bits depend on all that was pulled."""
        for _ in range(num_rounds):
            self.pull()
            delta = LAYOUT.allocate()
            views = LAYOUT.views(delta)
            for name, view in LAYOUT.views(self.weights).items():
                change = (0.1 + 0.07 * self.partition) - view * 0.013 if view.dtype.kind == "f" else 1 + self.partition
                views[name][...] = change
            self.push(delta)
        self.client.flush()

    def add(self, value: float, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.pull()
            self.push(filled(value))
        self.client.flush()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    clusters: list[Cluster] = []

    def start_cluster(
        num_shards: int = 3,
        combiner: WeightCombiner | None = None,
        hosts: Callable[..., Any] = ShardThreads,
        *,
        tls: bool = False,
    ) -> Cluster:
        clusters.append(Cluster(num_shards, combiner or DeltaWeightCombiner(), hosts, tls))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def all_of(*futures: Future[Any]) -> None:
    for future in futures:
        future.result(DEADLINE_S)


def train(cluster: Cluster, num_rounds: int) -> Buffer:
    workers = [cluster.worker(0), cluster.worker(1)]
    all_of(*(cluster.threads.submit(worker.train, num_rounds) for worker in workers))
    return cluster.weights()


# As one server


@pytest.mark.parametrize(
    ("combiner", "num_shards", "hosts"),
    [
        (DeltaWeightCombiner, 3, ShardProcesses),
        (DeltaWeightCombiner, 2, ShardThreads),
        (MeanDeltaCombiner, 4, ShardThreads),
        (lambda: ServerSGD(0.7, momentum=0.9, nesterov=True), 3, ShardThreads),
        (lambda: ServerAdam(0.01), 5, ShardThreads),
    ],
    ids=["delta in processes", "delta", "mean", "momentum", "adam"],
)
def test_bulk_synchronous_training_gives_the_bits_of_one_server(
    start: Start, combiner: Callable[[], WeightCombiner], num_shards: int, hosts: Callable[..., Any]
) -> None:
    expected = train(start(1, combiner()).begin(numbers(), sync=BULK), 12)
    cluster = start(num_shards, combiner(), hosts).begin(numbers(), sync=BULK)
    assert np.array_equal(train(cluster, 12), expected)
    assert not np.array_equal(expected, numbers())
    assert LAYOUT.views(expected)["embedding"].std() > 0.01
    points, reports = cluster.server.records()
    assert [(r.num_pushed, r.num_applied, r.num_samples) for r in reports] == [(12, 12, 120)] * 2
    assert (points[-1].num_steps, points[-1].scalars) == (24, {"loss": 0.5})


def test_asynchronous_pushes_are_all_added_up_in_every_shard(start: Start) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2), partitions=3)
    workers = [cluster.worker(partition) for partition in range(3)]
    all_of(*(cluster.threads.submit(worker.add, 10.0**worker.partition, 20) for worker in workers))
    assert values(cluster.weights()) == {2 + 20 * 111}
    workers[1].pull()
    assert np.array_equal(workers[1].weights, filled(2 + 20 * 111))


def test_shards_that_speak_tls_alone_are_reached(start: Start) -> None:
    cluster = start(2, tls=True).begin(filled(2))
    cluster.worker().add(3, 2)
    assert values(cluster.weights()) == {8}
    assert all(place.address.certificate for place in cluster.sharded.places)


@pytest.mark.parametrize("compression", [Compression("int8", "float16"), Compression("topk:0.1", "rows")])
def test_compression_is_every_shards(start: Start, compression: Compression) -> None:
    cluster = start().begin(filled(2), compression=compression)
    worker = cluster.worker()
    worker.add(1, 30)
    # Of int8, a push's error at most; of top-k, what waits for its turn.
    bound = 0.05 if compression.push == "int8" else 11
    assert max(abs(value - 32) for value in values(cluster.weights())) <= bound
    report = cluster.server.records()[1][0]
    assert 0 < report.num_bytes_pushed < 30 * 0.3 * LAYOUT.num_bytes
    assert 0 < report.num_bytes_pulled < (30 * 0.51 if compression.pull == "float16" else 30.1) * LAYOUT.num_bytes


def test_bytes_are_those_of_all_shards(start: Start) -> None:
    cluster = start().begin(filled(2))
    worker = cluster.worker(1)
    worker.pull()
    worker.pull()  # nothing new
    worker.push(filled(1))
    worker.client.flush()
    none, report = cluster.server.records()[1]
    assert (report.num_bytes_pulled, report.num_bytes_pushed) == (LAYOUT.num_bytes, LAYOUT.num_bytes)
    assert (none.num_bytes_pulled, none.num_bytes_pushed) == (0, 0)


def test_what_did_not_change_is_not_sent_again_by_any_shard(start: Start) -> None:
    cluster = start().begin(filled(2), compression=Compression(pull="rows"))
    puller, pusher = cluster.worker(0), cluster.worker(1)
    puller.pull()
    delta = LAYOUT.allocate()
    for row in (3, 700, 1499):  # in the first shard, the first or second, and the second
        LAYOUT.views(delta)["embedding"][row] = 5
    pusher.push(delta)
    pusher.client.flush()
    puller.pull()
    num_bytes = cluster.server.records()[1][0].num_bytes_pulled - LAYOUT.num_bytes
    assert 3 * (4 + 36) < num_bytes < 500
    assert np.array_equal(puller.weights, cluster.weights())
    assert not np.array_equal(puller.weights, filled(2))


def test_pulls_into_two_buffers_are_kept_apart(start: Start) -> None:
    cluster = start(2).begin(filled(2))
    puller, pusher = cluster.connect(), cluster.at_shard(1, 1)
    puller.register(Registration(cluster.run, 0, 1, LAYOUT.fingerprint, "here"))
    first, second = LAYOUT.allocate(), LAYOUT.allocate()
    held = puller.pull(first).version
    shard = cluster.sharded.shards[1]
    pusher.push(shard.of(filled(5)), push_of(1))  # which has not come to the first shard yet
    pusher.flush()
    assert puller.pull(second).version == held
    puller.pull(first, held)
    assert np.array_equal(second, cluster.weights())
    assert np.array_equal(first, second)


def test_nan_is_refused_by_the_name_of_the_tensors_piece(start: Start) -> None:
    cluster = start(2).begin(filled(2))
    worker = cluster.worker()
    bad = filled(1)
    LAYOUT.views(bad)["b"][1999] = np.nan
    worker.push(bad)
    with pytest.raises(NonFiniteError, match="NaN or infinity in b"):
        worker.client.flush()


def test_who_is_to_finish_is_told_so_and_refused_after_the_run(start: Start) -> None:
    cluster = start().begin(filled(2), sync=BULK)
    workers = [cluster.worker(0), cluster.worker(1)]
    cluster.server.request_stop()
    for worker in workers:
        assert worker.client.pull(worker.weights).kind is OrderKind.FINISH
        worker.client.finish(SPENT)
    assert cluster.server.status().num_finished == 2
    cluster.server.stop_run()
    with pytest.raises(RunStoppedError):
        workers[0].pull()


def test_a_run_after_another_has_servers_of_its_own(start: Start) -> None:
    cluster = start(2).begin(filled(2))
    old = cluster.worker()
    cluster.begin(filled(7))
    cluster.worker().add(1, 1)
    assert values(cluster.weights()) == {8}
    with pytest.raises((RunStoppedError, ConnectionError)):
        old.pull()


@pytest.mark.parametrize(
    "num_shards",
    [
        1,
        2,
    ],
)
def test_a_combiner_that_serves_a_second_run_remembers_the_first(start: Start, num_shards: int) -> None:
    cluster = start(num_shards, UpdateMeanWeightCombiner()).begin(filled(2))
    cluster.worker().add(10, 1)  # the first push is taken as it is
    assert values(cluster.weights()) == {10}
    if num_shards > 1:
        cluster.sharded.return_state()
    cluster.leave()
    cluster.begin(cluster.weights())
    cluster.worker().add(20, 1)
    assert values(cluster.weights()) == {15}


# Cuts


def check_cut(captured: RunCheckpoint, step: float) -> int:
    """Of weights that begin at 2 and to which each round adds `step`; the rounds that are in them."""
    (value,) = values(captured.weights)
    assert captured.parts == ()
    assert value == 2 + step * captured.version
    assert [progress.sequence for progress in captured.partitions] == [captured.version] * 2
    return captured.version


def test_a_bulk_synchronous_capture_is_one_cut_while_workers_push(start: Start) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2), sync=BULK)
    workers = [cluster.worker(0), cluster.worker(1)]
    trained = [cluster.threads.submit(worker.add, 1 + worker.partition, 100) for worker in workers]
    versions = [check_cut(cluster.capture(), 3.0)]
    while not all(each.done() for each in trained):
        versions.append(check_cut(cluster.capture(), 3.0))
    all_of(*trained)
    assert len(set(versions)) > 2
    assert versions == sorted(versions)
    assert values(cluster.weights()) == {2 + 100 * 3}


def test_captures_of_several_threads_at_once_are_one_cut_each(start: Start) -> None:
    cluster = start(3).begin(filled(2), sync=BULK)
    workers = [cluster.worker(0), cluster.worker(1)]
    trained = [cluster.threads.submit(worker.add, 1 + worker.partition, 100) for worker in workers]

    def capture() -> int:
        num_cuts = 0
        while not all(each.done() for each in trained):
            check_cut(cluster.capture(), 3.0)
            num_cuts += 1
        return num_cuts

    captured = [cluster.threads.submit(capture) for _ in range(3)]
    all_of(*captured, *trained)
    assert values(cluster.weights()) == {2 + 100 * 3}


def test_a_capture_that_does_not_come_about_in_time_leaves_nothing_held_and_is_told(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = start().begin(filled(2), sync=BULK)
    first, second = cluster.worker(0), cluster.worker(1)
    all_of(cluster.threads.submit(first.pull), cluster.threads.submit(second.pull))
    first.push(filled(1))  # of a round that the second leaves open
    wait_for(lambda: cluster.server.records()[1][0].num_bytes_pushed == LAYOUT.num_bytes)
    assert cluster.server.capture(0.3) is None
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("no checkpoint was made: shard 0, 1, 2 did not come to the end of a round within 0.3 s")
    second.push(filled(2))
    all_of(cluster.threads.submit(first.add, 1, 3), cluster.threads.submit(second.add, 2, 3))
    assert check_cut(cluster.capture(), 3.0) == 4


@pytest.mark.parametrize(
    "num_shards",
    [
        1,
        2,
    ],
)
def test_a_capture_is_not_waited_for_when_the_server_closes(start: Start, num_shards: int) -> None:
    cluster = start(num_shards).begin(filled(2), sync=BULK)
    workers = [cluster.worker(0), cluster.worker(1)]
    all_of(*(cluster.threads.submit(worker.pull) for worker in workers))
    workers[0].push(filled(1))  # of a round that stays open
    primary = cluster.sharded._primary if num_shards > 1 else cluster.server
    rounds = primary._run._rounds  # type: ignore[union-attr]
    wait_for(lambda: bool(rounds._folds))
    captured = cluster.threads.submit(cluster.server.capture, 60.0)
    wait_for(lambda: bool(rounds._cuts))
    cluster.server.close()
    assert captured.result(DEADLINE_S) is None


def test_a_worker_that_comes_between_two_rounds_of_the_shards_is_in_no_cut_in_part(start: Start) -> None:
    cluster = start(2).begin(filled(0), sync=SyncPlan(0, num_first=1))
    shards = cluster.sharded.shards
    early = [cluster.at_shard(index, 0) for index in range(2)]
    late = [cluster.at_shard(0, 1)]  # before the round closes in the first shard, behind it in the second
    deltas = {name: filled(value) for name, value in [("early", 1.0), ("late", 10.0)]}

    def push(client: ParameterClient, index: int, name: str, sequence: int) -> None:
        client.push(shards[index].of(deltas[name]), push_of(sequence))

    for index in range(2):
        push(early[index], index, "early", 1)
    early[1].flush()
    late.append(cluster.at_shard(1, 1))
    for index in range(2):
        push(late[index], index, "late", 1)
    early[0].flush()
    late[0].flush()
    early[1].pull(shards[1].layout.allocate())
    for index in range(2):
        push(early[index], index, "early", 2)
    early[1].flush()
    late[1].flush()
    late[0].pull(shards[0].layout.allocate())
    push(late[0], 0, "late", 2)
    late[0].flush()
    early[0].flush()
    # Both shards have two rounds: the first 1 + 10 and 1 + 10, the second 1 and 1 + 10.
    captured = cluster.capture()
    cluster.leave()
    resumed = start(2).begin(filled(0), resume=captured, sync=SyncPlan(0, num_first=1))
    worker = resumed.worker(1)
    # Whatever is repeated: what the worker goes on from is in all shards, and no push in any twice.
    while worker.sequence < 2:
        worker.add(10, 1)
    assert values(resumed.weights()) == {22}


def test_workers_go_on_while_the_parts_of_a_capture_are_fetched(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = start(2).begin(filled(2), sync=BULK)
    workers = [cluster.worker(0), cluster.worker(1)]
    is_fetching, may_fetch = threading.Event(), threading.Event()
    ask_one = Fleet.ask_one

    def ask_one_later(self: Fleet, position: int, name: str, num_bytes: int) -> Reply:
        is_fetching.set()
        assert may_fetch.wait(DEADLINE_S)
        return ask_one(self, position, name, num_bytes)

    monkeypatch.setattr(Fleet, "ask_one", ask_one_later)
    all_of(*(cluster.threads.submit(worker.add, 1 + worker.partition, 2) for worker in workers))
    captured = cluster.threads.submit(cluster.capture)
    assert is_fetching.wait(DEADLINE_S)
    all_of(*(cluster.threads.submit(worker.add, 1 + worker.partition, 3) for worker in workers))
    may_fetch.set()
    assert check_cut(captured.result(DEADLINE_S), 3.0) == 2
    assert values(cluster.weights()) == {2 + 5 * 3}


# Goes on


def checkpoint_of(cluster: Cluster, sync: SyncPlan) -> RunCheckpoint:
    """Of a run whose workers have each pushed three times."""
    cluster.begin(filled(2), sync=sync)
    workers = [cluster.worker(0), cluster.worker(1)]
    all_of(*(cluster.threads.submit(worker.add, 1 + worker.partition, 3) for worker in workers))
    captured = cluster.capture()
    cluster.leave()
    return captured


@pytest.mark.parametrize("sync", [SyncPlan(), SyncPlan(2, num_first=2), BULK], ids=["async", "stale", "bulk"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_a_run_goes_on_in_as_many_shards_or_others(start: Start, sync: SyncPlan, num_shards: int) -> None:
    captured = checkpoint_of(start(3), sync)
    assert values(captured.weights) == {2 + 3 * 3}
    assert captured.parts == ()  # all shards have the same pushes
    cluster = start(num_shards)
    cluster.begin(filled(0), sync=sync, resume=captured if num_shards > 1 else captured.without_parts())
    workers = [cluster.worker(0), cluster.worker(1)]
    assert [worker.sequence for worker in workers] == [3, 3]
    all_of(*(cluster.threads.submit(worker.add, 10.0 + worker.partition, 2) for worker in workers))
    assert values(cluster.weights()) == {2 + 3 * 3 + 2 * 21}
    points, reports = cluster.server.records()
    assert [(report.num_applied, report.num_repeated) for report in reports] == [(5, 0)] * 2
    assert points[-1].num_steps == 10
    assert cluster.capture().partitions[1].sequence == 5


def pushes_in_part(cluster: Cluster) -> None:
    """A worker that has pushed three times to the first shard and twice to the others, when it dies."""
    worker = cluster.worker()
    worker.add(1, 2)
    cluster.leave()
    shards = cluster.sharded.shards
    first = cluster.at_shard(0, attempt=7)
    first.push(shards[0].of(filled(1)), push_of(3))
    first.flush()


def test_a_successor_repeats_what_is_not_in_all_shards_and_none_counts_it_twice(start: Start) -> None:
    cluster = start().begin(filled(2))
    pushes_in_part(cluster)
    cluster.leave()
    successor = cluster.worker(attempt=8)
    assert successor.sequence == 2
    successor.add(1, 2)
    assert values(cluster.weights()) == {2 + 4}
    assert cluster.server.records()[1][0].num_repeated == 1


def test_asynchronous_shards_each_go_on_from_their_own_cursors(start: Start) -> None:
    before = start().begin(filled(2))
    pushes_in_part(before)
    captured = before.capture()
    assert [part.partitions[0].sequence for part in captured.parts] == [3, 2, 2]
    assert [part.version for part in captured.parts] == [3, 2, 2]
    assert [part.stop for part in captured.parts] == [shard.stop for shard in before.sharded.shards]
    cluster = start().begin(filled(0), resume=captured)
    worker = cluster.worker()
    assert worker.sequence == 2
    worker.add(1, 2)
    assert values(cluster.weights()) == {2 + 4}


def test_in_other_shards_what_is_not_in_all_is_trained_once_more_and_nothing_is_left_out(start: Start) -> None:
    before = start().begin(filled(2))
    pushes_in_part(before)
    cluster = start(2).begin(filled(0), resume=before.capture())
    worker = cluster.worker()
    assert worker.sequence == 2
    worker.add(1, 2)
    weights = cluster.weights()
    first = before.sharded.shards[0]
    assert set(LAYOUT.views(weights)["b"].tolist()) == {2 + 4}
    head = first.layout.views(first.of(weights))
    assert {float(value) for view in head.values() for value in np.unique(view)} == {2 + 3 + 2}


def test_a_combiners_memory_goes_on_in_other_shards_with_the_same_bits(start: Start) -> None:
    def new() -> WeightCombiner:
        return ServerSGD(0.5, momentum=0.9)

    expected = train(start(1, new()).begin(numbers(), sync=BULK), 6)
    cluster = start(3, new()).begin(numbers(), sync=BULK)
    train(cluster, 4)
    captured = cluster.capture()
    assert set(captured.combiner_state.slots) == {"momentum"}
    assert captured.combiner_state.slots["momentum"].nbytes == LAYOUT.num_bytes
    assert (captured.combiner, captured.combiner_settings) == ("ServerSGD", new().settings)
    cluster.close()
    combiner = new()
    combiner.restore_state(LAYOUT, captured.combiner_state)
    resumed = start(2, combiner).begin(numbers(), sync=BULK, resume=captured)
    assert np.array_equal(train(resumed, 2), expected)


# What goes wrong


def wait_for_failure(cluster: Cluster, timeout_s: float) -> BaseException:
    deadline = time.monotonic() + timeout_s
    while (failure := cluster.server.failure()) is None:
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    return failure


def test_a_shard_that_is_killed_is_found_within_seconds_and_named(start: Start) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2), sync=BULK)
    assert cluster.server.failure() is None
    (hosts,) = cluster.hosts
    victim, other = hosts._processes
    os.kill(victim.pid, signal.SIGKILL)
    wait_for_failure(cluster, 5)
    victim.wait(DEADLINE_S)
    failure = cluster.server.failure()
    assert isinstance(failure, ShardLostError)
    assert f"the process of shard 1 (pid {victim.pid}) ended with exit status -9" in str(failure)
    assert "SparkSession.restore" in str(failure)
    assert cluster.server.capture(5.0) is None
    with pytest.raises(ShardLostError):
        cluster.weights()
    cluster.server.stop_run()
    cluster.server.close()
    assert other.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("is_pulling", [True, False])
def test_a_shard_that_is_stopped_is_found_within_seconds_and_named(start: Start, is_pulling: bool) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2), sync=BULK)
    worker = cluster.worker(0) if is_pulling else None
    pull = worker and cluster.threads.submit(worker.pull)  # at the gate
    (hosts,) = cluster.hosts
    other, victim = hosts._processes
    os.kill(victim.pid, signal.SIGSTOP)
    failure = wait_for_failure(cluster, 12)
    assert isinstance(failure, ShardLostError)
    expected = rf"shard 2 \(process {victim.pid} on \S+\) has given no sign of life for 10 s: the part .*restore"
    assert re.search(expected, str(failure))
    assert str(cluster.sharded.lost_shard()) == str(failure)
    began = time.monotonic()
    assert cluster.server.capture(5.0) is None
    with pytest.raises(ShardLostError, match="no sign of life"):
        cluster.weights()
    cluster.server.stop_run()
    cluster.server.close()
    assert time.monotonic() - began < 5
    assert (other.returncode, victim.returncode) == (0, -signal.SIGKILL)
    if pull:
        with pytest.raises((RunStoppedError, ConnectionError)):
            pull.result(DEADLINE_S)


def test_no_shard_is_lost_while_all_give_signs_of_life(start: Start) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2))
    assert cluster.sharded.lost_shard() is None


def test_an_answer_that_takes_too_long_names_the_shard_and_what_to_do(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start(2, hosts=ShardProcesses).begin(filled(2), sync=BULK, epochs=EpochPlan(1, validates=False))
    monkeypatch.setattr("tensorspark.shards.fleet._CALL_TIMEOUT_S", 0.1)
    cluster.sharded._epoch_ended = 0  # the shard waits for its pushes, which do not come
    cluster.sharded._recovery_timeout_s = 0.0
    with pytest.raises(
        ShardLostError, match=r"shard 1 \(process .*\) lives, but has not done 'await_epoch' within 1 s: a push"
    ):
        cluster.weights()


def test_what_a_shard_may_take_grows_with_the_bytes() -> None:
    now = time.monotonic()
    assert deadline_after(10**10) - now == pytest.approx(60 + 1000, abs=1)
    assert deadline_after() - now == pytest.approx(60, abs=1)


def test_a_combiners_slots_travel_to_their_shard_alone(start: Start) -> None:
    combiner = ServerSGD(0.5, momentum=0.9)
    slot = numbers()
    combiner.restore_state(LAYOUT, CombinerState({"momentum": slot}))
    jobs: list[ShardJob] = []

    def hosts(given: Sequence[ShardJob]) -> ShardThreads:
        jobs.extend(given)
        return ShardThreads(given)

    cluster = start(3, combiner, hosts).begin(filled(2))
    assert max(len(job.combiner) for job in jobs) < 2000 < LAYOUT.num_bytes
    assert combiner.state().slots["momentum"] is slot
    captured = cluster.capture()
    assert np.array_equal(captured.combiner_state.slots["momentum"], numbers())


def test_a_combiner_that_served_another_model_begins_anew_as_on_one_server(start: Start) -> None:
    def used() -> WeightCombiner:
        combiner = ServerSGD(0.5, momentum=0.9)
        other = WeightLayout([TensorSpec("w", (5,), "float32")])
        combiner.restore_state(other, CombinerState({"momentum": np.full(other.num_bytes, 1, np.uint8)}))
        return combiner

    expected = train(start(1, used()).begin(numbers(), sync=BULK), 4)
    assert np.array_equal(train(start(3, used()).begin(numbers(), sync=BULK), 4), expected)


def test_a_combiner_that_raises_in_a_shard_is_an_error_of_the_combiner(start: Start) -> None:
    class Picky(WeightCombiner):
        def compute(
            self,
            origin_weight: NDArray[Any],
            new_weight: NDArray[Any],
            worker_id: int | str = -1,
            name: str | None = None,
        ) -> NDArray[Any]:
            if name == "b":
                raise ZeroDivisionError("on purpose")
            return new_weight

    cluster = start(2, Picky(), ShardProcesses).begin(filled(2))
    assert [[s.name for s in shard.layout.specs] for shard in cluster.sharded.shards] == [
        ["embedding"],
        ["W", "b", "step"],
    ]
    worker = cluster.worker()
    worker.push(filled(3))
    with pytest.raises(RunStoppedError):
        worker.client.flush()
    failure = wait_for_failure(cluster, 5)
    assert isinstance(failure, CombinerError)
    assert "Picky.compute for b raised ZeroDivisionError: on purpose" in str(failure)


def test_a_shard_that_cannot_begin_is_an_error_that_says_why_and_leaves_nothing_behind(start: Start) -> None:
    cluster = start(2)
    cluster.sharded._server = {**SERVER, "portt": 3}
    with pytest.raises(ShardLostError, match="portt"):
        cluster.begin(filled(2))
    assert all(served.done() for served in cluster.hosts[0]._served)


class ExitAtOnce(ShardProcesses):
    """Processes that are given a job that they cannot do."""

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        super().__init__([None for _ in jobs])  # type: ignore[misc]


def test_a_shard_that_does_not_come_up_is_found_at_once(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    cluster = start(2, hosts=ExitAtOnce)
    began = time.monotonic()
    with pytest.raises(ShardLostError, match=r"the process of shard 1 \(pid \d+\) ended with exit status 1"):
        cluster.begin(filled(2))
    assert time.monotonic() - began < 20
    assert "AttributeError" in capfd.readouterr().err  # what it said, in the driver's standard error


@pytest.mark.parametrize("is_running", [True, False])
def test_close_ends_all_processes_whatever_they_do(start: Start, is_running: bool) -> None:
    cluster = start(hosts=ShardProcesses).begin(filled(2), sync=BULK)
    processes = list(cluster.hosts[0]._processes)
    assert [process.poll() for process in processes] == [None, None]
    if is_running:  # a pull waits at the gate for the second worker, and a cut for its push
        worker = cluster.worker(0)
        pull = cluster.threads.submit(worker.pull)
    cluster.server.close()
    assert [process.poll() for process in processes] == [0, 0]
    if is_running:
        with pytest.raises((RunStoppedError, ConnectionError)):
            pull.result(DEADLINE_S)
    cluster.server.close()
    with pytest.raises(SessionClosedError):
        cluster.server.status()


def test_processes_end_when_their_driver_is_gone(start: Start) -> None:
    cluster = start(2, hosts=ShardProcesses).begin(filled(2))
    (process,) = cluster.hosts[0]._processes
    for channel in cluster.sharded._fleet._channels.values():  # type: ignore[union-attr]
        channel.close()
    assert process.wait(DEADLINE_S) == 0


# Epochs


def packed(*totals: float) -> bytes:
    return np.array(totals, "<f8").tobytes()


class EpochWorker:
    """Two pushes an epoch, each of 1 + its partition; evaluates to the weights, as it has pulled them."""

    def __init__(self, cluster: Cluster, partition: int) -> None:
        self.client = cluster.worker(partition).client
        self.partition = partition
        self.kinds: list[str] = []

    def work(self) -> None:
        weights, holds = LAYOUT.allocate(), None
        sequence, cursor = 0, Cursor()
        while True:
            order = self.client.pull(weights, holds)
            holds = order.version
            self.kinds.append(order.kind.value)
            if order.kind is OrderKind.FINISH:
                self.client.finish(SPENT)
                return
            if order.kind is OrderKind.EVALUATE:
                (value,) = values(weights)
                self.client.report_evaluation(order.epoch, packed(value, self.partition), 7)
                continue
            sequence += 1
            cursor = Cursor(cursor.epoch + 1) if cursor.batch else Cursor(cursor.epoch, 1)
            push = Push(sequence, cursor, 1, 10, order.version, totals=packed(order.epoch, 1))
            self.client.push(filled(1 + self.partition), push)


@pytest.mark.parametrize(
    ("staleness", "hosts"), [(0, ShardProcesses), (None, ShardThreads), (2, ShardThreads)], ids=["bulk", "async", "ssp"]
)
def test_epochs_go_through_training_evaluation_release_and_end(
    start: Start, staleness: int | None, hosts: Callable[..., Any]
) -> None:
    cluster = start(hosts=hosts)
    plan = EpochPlan(3, validates=True, num_totals=2, values={"rate": 0.5})
    cluster.begin(filled(2), sync=SyncPlan(staleness, 2, DEADLINE_S), epochs=plan)
    workers = [EpochWorker(cluster, partition) for partition in range(2)]
    working = [cluster.threads.submit(worker.work) for worker in workers]
    for epoch in range(3):
        end = cluster.server.wait_epoch(DEADLINE_S)
        assert end is not None
        expected = 2 + 6 * (epoch + 1)
        assert (end.epoch, end.num_samples, end.evaluation_samples) == (epoch, 40, 14)
        assert [(partition, totals.tolist()) for partition, totals in end.totals] == [
            (partition, [2 * epoch, 2]) for partition in range(2)
        ]
        assert [(partition, totals.tolist()) for partition, totals in end.evaluation] == [
            (partition, [expected, partition]) for partition in range(2)
        ]
        assert values(cluster.weights()) == {expected}
        cluster.server.release_epoch(epoch, {"rate": 0.25})
    all_of(*working)
    assert cluster.server.wait_epoch(DEADLINE_S) is None
    for worker in workers:
        assert worker.kinds == [*(["train", "train", "evaluate"] * 3), "finish"]
    assert cluster.server.status().num_finished == 2
    assert cluster.capture().is_complete


def test_a_run_can_be_finished_at_an_epochs_end_and_go_on_from_there(start: Start) -> None:
    plan = EpochPlan(3, validates=True, num_totals=2)
    cluster = start().begin(filled(2), sync=BULK, epochs=plan)
    workers = [EpochWorker(cluster, partition) for partition in range(2)]
    working = [cluster.threads.submit(worker.work) for worker in workers]
    assert cluster.server.wait_epoch(DEADLINE_S) is not None
    captured = cluster.capture()
    assert check_cut(captured, 3.0) == 2
    cluster.server.release_epoch(0, {}, finish=True)
    all_of(*working)
    assert values(cluster.weights()) == {2 + 6}
    resumed = start(2).begin(filled(0), sync=BULK, epochs=plan, resume=captured)
    end = None
    granted = [
        resumed.connect().register(Registration(resumed.run, partition, 1, LAYOUT.fingerprint, "here"))
        for partition in range(2)
    ]
    assert [(each.sequence, each.cursor) for each in granted] == [(2, Cursor(1))] * 2
    end = resumed.server.wait_epoch(DEADLINE_S)  # it was evaluated before, and the driver not done with it
    assert end is not None
    assert (end.epoch, end.evaluation_samples, end.num_samples) == (0, 14, 40)
    resumed.server.release_epoch(0, {})
    assert resumed.server.wait_epoch(0.1) is None


def epoch_push(worker: ParameterClient, shard: Shard, sequence: int, cursor: Cursor, totals: bytes = b"") -> None:
    worker.push(shard.of(filled(1)), Push(sequence, cursor, 1, 10, totals=totals))
    worker.flush()


PULL_TIMEOUT_S = 2.0  # of one that nothing holds up


@pytest.mark.parametrize(("ahead", "validates"), [(1, False), (1, True), (0, True)])
def test_a_successor_trains_what_one_shard_has_to_its_epochs_end_and_others_have_not(
    start: Start, ahead: int, validates: bool
) -> None:
    cluster = start(2).begin(filled(2), epochs=EpochPlan(2, validates=validates), partitions=1)
    # The worker dies in the last push of its epoch, which only one shard has got.
    epoch_push(cluster.at_shard(ahead, attempt=7), cluster.sharded.shards[ahead], 1, Cursor(1))
    cluster.leave()
    successor = cluster.worker(attempt=8)
    assert successor.sequence == 0
    pulled = cluster.threads.submit(successor.client.pull, successor.weights)
    assert pulled.result(PULL_TIMEOUT_S).kind is OrderKind.TRAIN


def test_a_worker_that_comes_while_the_shards_end_an_epoch_one_after_the_other_holds_nobody_up(start: Start) -> None:
    cluster = start(2).begin(filled(2), sync=SyncPlan(None, num_first=1), epochs=EpochPlan(1, validates=True))
    early = [cluster.at_shard(index, 0) for index in range(2)]
    epoch_push(early[0], cluster.sharded.shards[0], 1, Cursor(1))
    late = cluster.worker(1)
    epoch_push(early[1], cluster.sharded.shards[1], 1, Cursor(1))
    train = cluster.threads.submit(late.client.pull, late.weights)
    # The one who has trained evaluates, as the first shard says; the latecomer waits for the next epoch.
    buffers = [shard.layout.allocate() for shard in cluster.sharded.shards]
    first = cluster.threads.submit(early[0].pull, buffers[0])
    assert first.result(PULL_TIMEOUT_S).kind is OrderKind.EVALUATE
    second = cluster.threads.submit(early[1].pull, buffers[1], None, Asked.EVALUATE)
    assert second.result(PULL_TIMEOUT_S).kind is OrderKind.EVALUATE
    early[0].report_evaluation(0, b"", 5)
    assert cluster.server.wait_epoch(DEADLINE_S) is not None
    cluster.server.release_epoch(0, {}, finish=True)
    assert train.result(DEADLINE_S).kind is OrderKind.FINISH
