"""Versions of the weights: what a puller is sent of them, and how they stand still between two rounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorspark.ps import protocol
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration, TimeSpent
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.snapshots import Form, SnapshotStore
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.changes import Units
from tensorspark.weights.codecs import codec_of
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.test_client import Proxy
from tests.ps.wire import Wire
from tests.weights.patches import apply

# A table of 64,000 bytes, then two blocks and a rest: 12,096 bytes.
LAYOUT = WeightLayout(
    [
        TensorSpec("embedding", (2000, 8), "float32"),
        TensorSpec("W", (3000,), "float32"),
        TensorSpec("step", (1,), "int64"),
    ]
)
# Over the size from which arithmetic leaves the loop.
LARGE = WeightLayout([TensorSpec("W", (600_000,), "float32")])
BLOCK_BYTES = 4096
DEADLINE_S = 20.0
ROWS = Compression(pull="rows")


def initial(layout: WeightLayout) -> Buffer:
    """Different numbers everywhere, none of them zero."""
    return layout.pack(
        {s.name: np.arange(1, 1 + s.num_elements).reshape(s.shape).astype(s.dtype) / 8 for s in layout.specs}
        if layout is LARGE
        else {s.name: np.arange(1, 1 + s.num_elements).reshape(s.shape).astype(s.dtype) for s in layout.specs}
    )


def delta(rows: dict[int, float] | None = None, everywhere: float = 0.0) -> Buffer:
    """A change of these rows of the table, and one of all weights but the counter."""
    buffer = LAYOUT.allocate()
    views = LAYOUT.views(buffer)
    views["embedding"][:] = views["W"][:] = everywhere
    for row, value in (rows or {}).items():
        views["embedding"][row] += value
    return buffer


def filled(layout: WeightLayout, value: float) -> Buffer:
    return layout.pack({spec.name: np.full(spec.shape, value, spec.dtype) for spec in layout.specs})


def push_of(sequence: int, version: int = 0) -> Push:
    return Push(sequence, Cursor(0, sequence), num_steps=1, num_samples=10, version=version)


class Worker:
    """A client that counts its pushes, and remembers which version its buffer holds."""

    def __init__(self, client: ParameterClient, partition: int, layout: WeightLayout, sequence: int) -> None:
        self.client = client
        self.partition = partition
        self.sequence = sequence
        self.weights = layout.allocate()
        self.holds: int | None = None

    def pull(self) -> int:
        self.holds = self.client.pull(self.weights, self.holds).version
        return self.holds

    def push(self, weights: Buffer) -> None:
        self.sequence += 1
        self.client.push(weights, push_of(self.sequence, self.holds or 0))


class Cluster:
    """A server with a run on it, and workers that reach it through a proxy."""

    def __init__(
        self,
        layout: WeightLayout,
        weights: Buffer,
        compression: Compression,
        sync: SyncPlan,
        resume: RunCheckpoint | None,
        partitions: int,
    ) -> None:
        self.layout = layout
        self.compression = compression
        self.server = ParameterServer(layout, "127.0.0.1", io_timeout_s=DEADLINE_S)
        self.run = self.server.begin_run(
            weights, DeltaWeightCombiner(), partitions, sync=sync, resume=resume, compression=compression
        )
        self.proxy = Proxy(self.server.port)
        self._workers: list[Worker] = []

    def worker(self, partition: int = 0) -> Worker:
        address = ServerAddress("127.0.0.1", self.proxy.port, self.server.token, 5.0, DEADLINE_S, DEADLINE_S)
        client = ParameterClient(address, self.layout, self.compression)
        self._workers.append(Worker(client, partition, self.layout, 0))
        registration = Registration(self.run, partition, 1 + partition, self.layout.fingerprint, "here")
        self._workers[-1].sequence = client.register(registration).sequence
        return self._workers[-1]

    def num_pulled(self, worker: Worker) -> int:
        """Bytes of payloads that the worker was sent."""
        return self.server.records()[1][worker.partition].num_bytes_pulled

    def sent_for(self, worker: Worker, pull: Callable[[], object]) -> int:
        before = self.num_pulled(worker)
        pull()
        return self.num_pulled(worker) - before

    def weights(self) -> Buffer:
        out = self.layout.allocate()
        self.server.read_weights(out)
        return out

    def value(self) -> float:
        """The weights' only one."""
        (value,) = {float(v) for view in self.layout.views(self.weights()).values() for v in np.unique(view)}
        return value

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)

    def close(self) -> None:
        for worker in self._workers:
            worker.client.close()
        self.proxy.close()
        self.server.close()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    clusters: list[Cluster] = []

    def start_cluster(
        compression: Compression = NO_COMPRESSION,
        *,
        layout: WeightLayout = LAYOUT,
        weights: Buffer | None = None,
        sync: SyncPlan | None = None,
        resume: RunCheckpoint | None = None,
        partitions: int = 2,
    ) -> Cluster:
        weights = initial(layout) if weights is None else weights
        clusters.append(Cluster(layout, weights, compression, sync or SyncPlan(), resume, partitions))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()


# What is sent


def test_a_worker_that_has_the_version_is_sent_nothing(start: Start) -> None:
    cluster = start()
    worker = cluster.worker()
    assert cluster.sent_for(worker, worker.pull) == LAYOUT.num_bytes
    assert cluster.sent_for(worker, worker.pull) == 0
    assert np.array_equal(worker.weights, initial(LAYOUT))


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        # Three groups' counts; three rows with an index each.
        (ROWS, 4 * 3 + 3 * (4 + 32)),
        # Two groups' counts; rows 5 and 7 are in one block, row 1,999 in another.
        (NO_COMPRESSION, 4 * 2 + 2 * (4 + BLOCK_BYTES)),
    ],
    ids=["rows", "blocks"],
)
def test_a_push_that_changes_little_is_pulled_as_a_patch(start: Start, compression: Compression, expected: int) -> None:
    cluster = start(compression)
    pusher, puller = cluster.worker(0), cluster.worker(1)
    puller.pull()
    pusher.push(delta({5: 0.5, 7: -2, 1999: 3}))
    pusher.client.flush()
    assert cluster.sent_for(puller, puller.pull) == expected
    whole = LAYOUT.allocate()
    pusher.client.pull(whole)
    assert np.array_equal(puller.weights, whole)
    views = LAYOUT.views(puller.weights)
    assert views["embedding"][7].tolist() == [57 - 2, 58 - 2, 59 - 2, 60 - 2, 61 - 2, 62 - 2, 63 - 2, 64 - 2]
    assert views["embedding"][8].tolist() == [65, 66, 67, 68, 69, 70, 71, 72]


def test_a_worker_several_versions_behind_is_sent_all_that_changed_since(start: Start) -> None:
    cluster = start(ROWS)
    pusher, puller = cluster.worker(0), cluster.worker(1)
    pusher.push(delta({1: 1}))
    pusher.client.flush()
    assert puller.pull() == 1
    for row in (10, 20, 10, 30):
        pusher.push(delta({row: 1}))
    pusher.push(delta({30: -1}))  # as it was; the puller is sent it all the same
    pusher.client.flush()
    assert cluster.sent_for(puller, puller.pull) == 12 + 3 * (4 + 32)
    assert puller.holds == 6
    assert np.array_equal(puller.weights, cluster.weights())
    assert LAYOUT.views(puller.weights)["embedding"][10, 0] == 81 + 2


def test_after_a_push_that_changes_everything_the_weights_are_sent_whole_and_then_in_patches_again(
    start: Start,
) -> None:
    cluster = start(ROWS)
    pusher, puller, late = cluster.worker(0), cluster.worker(1), LAYOUT.allocate()
    puller.pull()
    puller.client.pull(late)
    pusher.push(delta(everywhere=0.5))
    pusher.client.flush()
    assert cluster.sent_for(puller, puller.pull) == LAYOUT.num_bytes
    pusher.push(delta({3: 1}))
    pusher.client.flush()
    assert cluster.sent_for(puller, puller.pull) == 12 + 4 + 32
    assert cluster.sent_for(puller, lambda: puller.client.pull(late, 0)) == LAYOUT.num_bytes
    assert np.array_equal(puller.weights, late)
    assert np.array_equal(late, cluster.weights())


@pytest.mark.parametrize("held", [None, 99])
def test_who_has_no_version_or_one_that_never_was_is_sent_all(start: Start, held: int | None) -> None:
    cluster = start(ROWS)
    worker = cluster.worker()
    worker.push(delta({3: 1}))
    out = filled(LAYOUT, 0)
    assert cluster.sent_for(worker, lambda: worker.client.pull(out, held)) == LAYOUT.num_bytes
    assert np.array_equal(out, cluster.weights())


def test_a_restored_run_does_not_know_what_changed_before_it(start: Start) -> None:
    before = start(ROWS)
    worker = before.worker()
    for row in (1, 2, 3):
        worker.push(delta({row: 1}))
    worker.client.flush()
    checkpoint = before.server.capture()
    assert checkpoint is not None
    cluster = start(ROWS, resume=checkpoint, weights=checkpoint.weights)
    successor, puller = cluster.worker(0), cluster.worker(1)
    old, current = initial(LAYOUT), checkpoint.weights.copy()
    assert cluster.sent_for(puller, lambda: puller.client.pull(current, 3)) == 0
    assert cluster.sent_for(puller, lambda: puller.client.pull(old, 1)) == LAYOUT.num_bytes
    successor.push(delta({9: 1}))
    successor.client.flush()
    assert cluster.sent_for(puller, lambda: puller.client.pull(current, 3)) == 12 + 4 + 32
    assert cluster.sent_for(puller, lambda: puller.client.pull(old, 3)) == 12 + 4 + 32
    assert np.array_equal(current, old)
    assert np.array_equal(old, cluster.weights())


@pytest.mark.parametrize(("spec", "share"), [("float16", 0.51), ("bfloat16", 0.51), ("int8", 0.27)])
def test_a_pull_brings_what_the_codec_makes_of_the_weights(start: Start, spec: str, share: float) -> None:
    codec = codec_of(spec)
    assert codec is not None
    rng = np.random.default_rng(5)
    weights = LAYOUT.pack(
        {s.name: (rng.standard_normal(s.shape) * 3 + 1).astype(s.dtype) for s in LAYOUT.specs[:2]}
        | {"step": np.array([2**40 + 1])}
    )
    cluster = start(Compression(pull=spec), weights=weights)
    worker = cluster.worker()
    for version in range(3):
        num_bytes = cluster.sent_for(worker, worker.pull)
        assert 0 < num_bytes < share * LAYOUT.num_bytes
        assert worker.holds == version
        exact = cluster.weights()
        expected, room = LAYOUT.allocate(), np.empty(LAYOUT.num_bytes, np.uint8)
        size = codec.encode(LAYOUT, exact, room)
        expected[LAYOUT.num_bytes - size :] = room[:size]
        codec.decode(LAYOUT, expected, size)
        assert np.array_equal(worker.weights, expected)
        ours, theirs = LAYOUT.views(worker.weights), LAYOUT.views(exact)
        assert ours["step"] == theirs["step"]
        assert 0 < np.abs(ours["W"] - theirs["W"]).max() < 0.1
        assert cluster.sent_for(worker, worker.pull) == 0
        worker.push(delta({version: 1}))


@pytest.mark.parametrize("direction_of_cut", ["in the header", "in the payload"])
@pytest.mark.parametrize(
    ("compression", "everywhere"),
    [(NO_COMPRESSION, 0.0), (ROWS, 0.0), (NO_COMPRESSION, 1.0), (Compression(pull="bfloat16"), 1.0)],
    ids=["blocks", "rows", "whole", "encoded"],
)
def test_a_worker_that_lost_its_connection_in_a_pull_asks_for_all(
    start: Start, compression: Compression, everywhere: float, direction_of_cut: str
) -> None:
    cluster = start(compression)
    pusher, puller = cluster.worker(0), cluster.worker(1)
    puller.pull()
    pusher.push(delta(dict.fromkeys(range(300), 64.0), everywhere))
    pusher.client.flush()
    cluster.proxy.cuts["down"] = 20 if direction_of_cut == "in the header" else 4000
    num_bytes = cluster.sent_for(puller, puller.pull)
    assert cluster.server.records()[1][1].num_reconnects == 1
    whole = LAYOUT.allocate()
    num_whole = cluster.sent_for(puller, lambda: puller.client.pull(whole))
    assert np.array_equal(puller.weights, whole)
    assert LAYOUT.views(whole)["embedding"][0].tolist() == [value + 64 + everywhere for value in range(1, 9)]
    patch = {NO_COMPRESSION: 8 + 3 * (4 + BLOCK_BYTES), ROWS: 12 + 300 * (4 + 32)}.get(compression, 0)
    first = num_whole if everywhere else patch
    # In the header the buffer is not written to yet: then it still holds what it held.
    assert num_bytes == first + (first if direction_of_cut == "in the header" else num_whole)


def test_a_snapshots_header_and_its_weights_begin_in_one_packet(start: Start) -> None:
    cluster = start()
    with Wire(cluster.server) as wire:
        wire.register(cluster.server, cluster.run, 1)
        for _ in range(20):
            wire.send(Kind.PULL, {})
            received = wire.socket.recv(2**20)
            prefix = protocol.decode_prefix(received[: protocol.PREFIX_BYTES], protocol.FROM_SERVER, LAYOUT.num_bytes)
            num_head_bytes = protocol.PREFIX_BYTES + prefix.header_bytes
            assert len(received) > num_head_bytes
            while len(received) < num_head_bytes + prefix.payload_bytes:
                received += wire.socket.recv(2**20)
            assert received[num_head_bytes:] == initial(LAYOUT).tobytes()


@pytest.mark.parametrize("staleness", [0, None])
def test_with_the_smallest_pool_and_a_codec_for_pulls_nobody_waits_for_ever(staleness: int | None) -> None:
    num_workers, num_rounds = 3, 4
    with (
        ParameterServer(LARGE, "127.0.0.1", receive_buffer_bytes=1, io_timeout_s=DEADLINE_S) as server,
        ThreadPoolExecutor(num_workers) as threads,
    ):
        compression = Compression(pull="bfloat16")
        sync = SyncPlan(staleness, num_first=num_workers)
        run = server.begin_run(filled(LARGE, 2), DeltaWeightCombiner(), num_workers, sync=sync, compression=compression)
        address = ServerAddress("127.0.0.1", server.port, server.token, 5.0, DEADLINE_S, DEADLINE_S)

        def work(partition: int) -> None:
            weights = LARGE.allocate()
            with ParameterClient(address, LARGE, compression) as client:
                client.register(Registration(run, partition, 1 + partition, LARGE.fingerprint, "here"))
                for sequence in range(1, 1 + num_rounds):
                    version = client.pull(weights).version
                    client.push(filled(LARGE, 1 + partition), push_of(sequence, version))
                client.finish(TimeSpent())

        for worker in [threads.submit(work, partition) for partition in range(num_workers)]:
            worker.result(DEADLINE_S)
        out = LARGE.allocate()
        server.read_weights(out)
        assert np.array_equal(out, filled(LARGE, 2 + num_rounds * (1 + 2 + 3)))


# The store alone


@settings(max_examples=60)
@given(edits=st.lists(st.sets(st.integers(0, 2499), max_size=30), min_size=1, max_size=8), by_row=st.booleans())
def test_every_version_becomes_the_current_one_by_what_is_sent_for_it(edits: list[set[int]], by_row: bool) -> None:
    pool = BufferPool(LAYOUT, 2 * LAYOUT.num_bytes)
    store = SnapshotStore(LAYOUT, pool, initial(LAYOUT), 40, by_row=by_row)
    units = Units(LAYOUT, by_row=by_row)
    versions = [initial(LAYOUT)]
    for edit in edits:
        versions.append(versions[-1].copy())
        for place in edit:
            versions[-1].view(np.float32)[place * 7] += 1
        buffer = pool.take_now()
        assert buffer is not None
        buffer[:] = versions[-1]
        store.publish(buffer, store.derive(buffer))
    assert store.current.version == 40 + len(edits)
    for index, version in enumerate(versions):
        loan = store.lend(40 + index)
        target = version.copy()
        assert loan.version == 40 + len(edits)
        if index == len(edits):
            assert (loan.form, loan.buffer) == (Form.SAME, None)
        elif loan.form is Form.WHOLE:
            assert loan.buffer is store.current.buffer
            target[:] = loan.buffer
        else:
            assert loan.form is Form.PATCH
            assert loan.buffer is not None
            assert 2 * len(loan.buffer) <= LAYOUT.num_bytes
            apply(units, loan.buffer, target)
        assert np.array_equal(target, versions[-1])
        store.give_back(loan)
    assert store.current.num_pins == 0


def test_patches_on_their_way_take_no_more_memory_than_half_of_the_weights() -> None:
    pool = BufferPool(LAYOUT, 2 * LAYOUT.num_bytes)
    store = SnapshotStore(LAYOUT, pool, initial(LAYOUT), by_row=True)
    for version in range(5):
        buffer = pool.take_now()
        assert buffer is not None
        buffer[:] = store.current.buffer
        LAYOUT.views(buffer)["embedding"][200 * version : 200 * (version + 1)] += 1  # 7,200 bytes of a patch
        store.publish(buffer, store.derive(buffer))
    # From versions 0 to 4: patches of 36,000 down to 7,200 bytes; half of the weights is 38,048 bytes.
    first, again = store.lend(0), store.lend(0)
    assert (first.form, again.form) == (Form.PATCH, Form.PATCH)
    assert again.buffer is first.buffer is not None
    assert first.buffer.nbytes == 12 + 1000 * 36
    assert store.lend(4).form is Form.WHOLE
    store.give_back(first)
    assert store.lend(4).form is Form.WHOLE
    store.give_back(again)
    small = store.lend(4)
    assert small.form is Form.PATCH
    assert small.buffer is not None
    assert small.buffer.nbytes == 12 + 200 * 36
    assert store.lend(0).form is Form.WHOLE


def test_encoded_weights_stay_as_they_are_while_they_are_sent_and_their_weights_need_not() -> None:
    pool = BufferPool(LAYOUT, 4 * LAYOUT.num_bytes)
    store = SnapshotStore(LAYOUT, pool, initial(LAYOUT), codec=codec_of("float16"))
    loan = store.lend(None)
    assert loan.form is Form.ENCODED
    payload = loan.buffer
    assert payload is not None
    before = payload.copy()

    def publish(value: float) -> Buffer:
        buffer = pool.take_now()
        assert buffer is not None
        buffer[:] = filled(LAYOUT, value)
        store.publish(buffer, store.derive(buffer))
        brief = store.lend(None)
        store.give_back(brief)
        assert brief.buffer is not None
        return brief.buffer

    others = [publish(value) for value in (3, 4, 5)]
    assert np.array_equal(payload, before)
    assert not any(np.shares_memory(payload, other) for other in others)
    assert np.shares_memory(others[0], others[2])
    assert loan.snapshot is not None
    assert not loan.snapshot.buffer.any()  # the weights are gone: nobody reads them
    store.give_back(loan)
    assert store.current.num_encoded_pins == store.current.num_pins == 0
    assert np.array_equal(store.current.buffer, filled(LAYOUT, 5))


def test_encoded_copies_count_against_the_bound_of_the_pool() -> None:
    num_buffers = 5
    pool = BufferPool(LAYOUT, (num_buffers - 3) * LAYOUT.num_bytes)
    store = SnapshotStore(LAYOUT, pool, initial(LAYOUT), codec=codec_of("float16"))
    loans = []
    for value in (3, 4):
        loans.append(store.lend(None))
        buffer = pool.take_now()
        assert buffer is not None
        buffer[:] = filled(LAYOUT, value)
        store.publish(buffer, store.derive(buffer))

    def num_free() -> int:
        taken = []
        while (buffer := pool.take_now()) is not None:
            taken.append(buffer)
        for buffer in taken:
            pool.put_back(buffer)
        return len(taken)

    # One buffer is current, one stands for two copies (the current and the next), two for those that are being read.
    assert num_free() == num_buffers - 4
    assert sum(loan.buffer.nbytes for loan in loans if loan.buffer is not None) < 1.1 * LAYOUT.num_bytes
    store.give_back(loans[0])
    assert num_free() == num_buffers - 3
    store.give_back(loans[1])
    assert num_free() == num_buffers - 2


def test_weights_that_a_codec_does_not_shorten_are_read_themselves_and_stay_as_they_are() -> None:
    layout = WeightLayout([TensorSpec("counts", (1000,), "int64")])
    pool = BufferPool(layout, 2 * layout.num_bytes)
    store = SnapshotStore(layout, pool, filled(layout, 2), codec=codec_of("int8"))
    loan = store.lend(None)
    buffer = pool.take_now()
    assert buffer is not None
    buffer[:] = filled(layout, 3)
    store.publish(buffer, store.derive(buffer))
    assert loan.form is Form.WHOLE
    assert loan.buffer is not None
    assert np.array_equal(loan.buffer, filled(layout, 2))
    store.give_back(loan)


def test_long_patches_that_were_asked_for_before_are_made_on_the_thread_of_the_arithmetic(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = WeightLayout([TensorSpec("W", (2_000_000,), "float32")])
    made_on: list[str] = []
    write = Units.write

    def noted_write(units: Units, buffer: Buffer, chosen: np.ndarray) -> Buffer:
        made_on.append(threading.current_thread().name)
        return write(units, buffer, chosen)

    monkeypatch.setattr(Units, "write", noted_write)
    cluster = start(layout=layout, weights=filled(layout, 2), sync=SyncPlan(0, num_first=2))
    workers = [cluster.worker(0), cluster.worker(1)]
    change = layout.allocate()
    layout.views(change)["W"][:500_000] = 1  # 2 MB of 8
    with ThreadPoolExecutor(2) as threads:
        for _ in range(4):
            for pulled in [threads.submit(worker.pull) for worker in workers]:
                pulled.result(DEADLINE_S)
            for worker in workers:
                worker.push(change)
        for pulled in [threads.submit(worker.pull) for worker in workers]:
            pulled.result(DEADLINE_S)
    loop, *others = made_on  # the first time nobody knew that they would ask
    assert len(others) == 3
    assert loop not in others
    assert len(set(others)) == 1
    for worker in workers:
        assert np.array_equal(worker.weights, cluster.weights())
    assert cluster.num_pulled(workers[0]) < 2.2 * layout.num_bytes  # whole once, then a quarter four times


# Held between two rounds

LAYOUTS = pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["on the loop", "on a thread"])


@LAYOUTS
def test_while_rounds_are_held_pushes_wait_and_the_run_can_be_captured(start: Start, layout: WeightLayout) -> None:
    cluster = start(layout=layout, weights=filled(layout, 2))
    worker = cluster.worker()
    worker.push(filled(layout, 1))
    worker.client.flush()
    assert cluster.server.hold(0, DEADLINE_S) == 1
    worker.push(filled(layout, 10))
    cluster.wait_for(lambda: cluster.server.records()[1][0].num_pushed == 2)
    checkpoint = cluster.server.capture(DEADLINE_S)
    assert checkpoint is not None
    assert (checkpoint.version, checkpoint.partitions[0].sequence) == (1, 1)
    assert np.array_equal(checkpoint.weights, filled(layout, 3))
    assert cluster.value() == 3
    assert cluster.server.records()[1][0].num_applied == 1
    cluster.server.go_on()
    worker.client.flush()
    assert cluster.value() == 13


@LAYOUTS
def test_rounds_go_on_up_to_the_version_that_is_asked_for(start: Start, layout: WeightLayout) -> None:
    cluster = start(layout=layout, weights=filled(layout, 2))
    worker = cluster.worker()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(cluster.server.hold, 3, DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while not cluster.server._run._rounds._cuts:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
        deltas = [filled(layout, value) for value in (1, 2, 4, 8, 16)]
        for each in deltas:
            worker.push(each)
        assert held.result(DEADLINE_S) == 3
        assert cluster.value() == 2 + 1 + 2 + 4
        assert cluster.server.hold(4, DEADLINE_S) == 4
        assert cluster.value() == 2 + 1 + 2 + 4 + 8
        assert cluster.server.hold(2, DEADLINE_S) == 4
        cluster.server.go_on()
        worker.client.flush()
    assert cluster.value() == 2 + 31


@LAYOUTS
def test_an_open_round_ends_before_the_rounds_are_held(start: Start, layout: WeightLayout) -> None:
    cluster = start(layout=layout, weights=filled(layout, 2), sync=SyncPlan(0, num_first=2))
    first, second = cluster.worker(0), cluster.worker(1)
    first.pull()
    second.pull()
    first.push(filled(layout, 1))
    cluster.wait_for(lambda: cluster.server.records()[1][0].num_applied == 1)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(cluster.server.hold, 0, DEADLINE_S)
        assert cluster.server.capture(0.1) is None  # the round is open: no cut yet
        assert not held.done()
        second.push(filled(layout, 10))
        assert held.result(DEADLINE_S) == 1
    assert cluster.value() == 13
    assert (first.pull(), second.pull()) == (1, 1)
    first.push(filled(layout, 100))
    second.push(filled(layout, 1000))
    cluster.wait_for(lambda: cluster.server.records()[1][1].num_pushed == 2)
    assert cluster.server.capture(DEADLINE_S) is not None
    assert cluster.value() == 13
    cluster.server.go_on()
    first.client.flush()
    second.client.flush()
    assert cluster.value() == 1113


@LAYOUTS
def test_a_hold_that_does_not_come_about_in_time_leaves_nothing_held(start: Start, layout: WeightLayout) -> None:
    cluster = start(layout=layout, weights=filled(layout, 2))
    worker = cluster.worker()
    assert cluster.server.hold(2, 0.1) is None
    for _ in range(4):
        worker.push(filled(layout, 1))
        worker.client.flush()
    assert cluster.value() == 6
    assert cluster.server.hold(0, DEADLINE_S) == 4
    assert cluster.server.hold(9, 0.1) is None  # on, from where it was held
    worker.push(filled(layout, 1))
    worker.client.flush()
    assert cluster.value() == 7


def test_a_run_that_has_ended_is_not_held(start: Start) -> None:
    cluster = start()
    cluster.server.stop_run()
    assert cluster.server.hold(0, DEADLINE_S) is None
    assert cluster.server.is_ending


def test_a_run_that_ends_before_the_version_comes_is_not_waited_for(start: Start) -> None:
    cluster = start()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(cluster.server.hold, 5, 60.0)
        assert not cluster.server.is_ending
        cluster.server.stop_run()
        assert held.result(DEADLINE_S) is None


def test_a_run_that_is_to_finish_is_ending(start: Start) -> None:
    cluster = start()
    assert not cluster.server.is_ending
    cluster.server.request_stop()
    assert cluster.server.is_ending


def test_a_hold_is_not_waited_for_when_the_server_closes(start: Start) -> None:
    cluster = start()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(cluster.server.hold, 5, 60.0)
        run = cluster.server._run
        assert run is not None
        cluster.wait_for(lambda: len(run._rounds._cuts) == 1)
        cluster.server.close()
        assert held.result(DEADLINE_S) is None  # as a capture's is
