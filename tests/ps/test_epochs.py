"""Epochs of a real server: workers that train, rest, evaluate, die and come back, and a driver that waits for them."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tensorspark.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLostError,
    ProtocolError,
    RunStoppedError,
    SessionClosedError,
    WorkerFailedError,
)
from tensorspark.ps.checkpoint import RunCheckpoint, decode, encode
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import (
    MAX_TOTALS_BYTES,
    Cursor,
    EpochEnd,
    EpochPlan,
    EpochProgress,
    Order,
    OrderKind,
    Push,
    Registration,
    TimeSpent,
)
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.test_client import Proxy

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])
DEADLINE_S = 20.0
INITIAL = 2.0
EVALUATED = 7  # held-out rows of each partition
MODES = pytest.mark.parametrize("staleness", [None, 0, 2])


def filled(value: float) -> Buffer:
    return LAYOUT.pack({"W:0": np.full(3, value, np.float32)})


def value_of(buffer: Buffer) -> float:
    (value,) = set(LAYOUT.views(buffer)["W:0"].tolist())
    return float(value)


def packed(*totals: float) -> bytes:
    return np.array(totals, "<f8").tobytes()


def unpacked(reports: tuple[tuple[int, np.ndarray], ...]) -> dict[int, list[float]]:
    return {partition: totals.tolist() for partition, totals in reports}


class Worker:
    """A worker that adds 1 + its partition to the weights in each interval, of ten rows and two steps.

    Its totals: of an interval, the epoch and one; of an evaluation, the weights and ten times the partition.
    """

    def __init__(self, cluster: Cluster, partition: int, num_intervals: int, attempt: int, port: int) -> None:
        self.partition, self.num_intervals, self.cluster = partition, num_intervals, cluster
        address = ServerAddress("127.0.0.1", port, cluster.server.token, 5.0, DEADLINE_S, DEADLINE_S)
        self.client = ParameterClient(address)
        registration = Registration(cluster.run, partition, attempt, LAYOUT.fingerprint, f"host{attempt}")
        granted = self.client.register(registration)
        self.sequence, self.cursor = granted.sequence, granted.cursor
        self.weights = LAYOUT.allocate()
        self.orders: list[Order] = []

    def pull(self) -> Order:
        self.orders.append(self.client.pull(self.weights))
        return self.orders[-1]

    def train(self) -> None:
        epoch, batch = self.cursor.epoch, self.cursor.batch
        is_last = batch + 1 == self.num_intervals
        self.cursor = Cursor(epoch + 1) if is_last else Cursor(epoch, batch + 1)
        self.sequence += 1
        version = self.orders[-1].version
        push = Push(self.sequence, self.cursor, 2, 10, version, totals=packed(epoch, 1))
        self.client.push(filled(1 + self.partition), push)

    def evaluate(self, epoch: int) -> None:
        self.client.report_evaluation(epoch, packed(value_of(self.weights), 10 * self.partition), EVALUATED)

    def obey(self, order: Order) -> bool:
        """Does what it is told; False at the end."""
        if order.kind is OrderKind.FINISH:
            self.client.finish(TimeSpent())
            return False
        if order.kind is OrderKind.EVALUATE:
            self.evaluate(order.epoch)
        elif self.num_intervals:
            self.train()
        else:
            self.client.skip_epoch(order.epoch)
            self.cursor = Cursor(order.epoch + 1)
        return True

    def work(self) -> list[Order]:
        """All to the end; the orders."""
        while self.obey(self.pull()):
            pass
        return self.orders


class Cluster:
    """A server with a run of epochs, and workers on threads."""

    def __init__(self, num_partitions: int, epochs: EpochPlan, sync: SyncPlan, resume: RunCheckpoint | None) -> None:
        self.server = ParameterServer(LAYOUT, "127.0.0.1", io_timeout_s=DEADLINE_S)
        weights = resume.weights if resume else filled(INITIAL)
        self.run = self.server.begin_run(
            weights, DeltaWeightCombiner(), num_partitions, sync=sync, epochs=epochs, resume=resume
        )
        self._threads = ThreadPoolExecutor(8)
        self._workers: list[Worker] = []
        self._proxies: list[Proxy] = []

    def worker(self, partition: int, num_intervals: int = 2, attempt: int = 0, port: int | None = None) -> Worker:
        attempt = attempt or 1 + partition
        self._workers.append(Worker(self, partition, num_intervals, attempt, port or self.server.port))
        return self._workers[-1]

    def proxy(self) -> Proxy:
        self._proxies.append(Proxy(self.server.port))
        return self._proxies[-1]

    def start(self, function: Callable[[], object]) -> Future[object]:
        return self._threads.submit(function)

    def wait_epoch(self) -> EpochEnd:
        end = self.server.wait_epoch(DEADLINE_S)
        assert end is not None
        return end

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)

    def weights(self) -> float:
        out = LAYOUT.allocate()
        self.server.read_weights(out)
        return value_of(out)

    def close(self) -> None:
        for worker in self._workers:
            worker.client.close()
        for proxy in self._proxies:
            proxy.close()
        self.server.close()
        self._threads.shutdown()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    clusters: list[Cluster] = []

    def start_cluster(
        num_partitions: int = 2,
        num_epochs: int = 2,
        *,
        validates: bool = True,
        staleness: int | None = None,
        resume: RunCheckpoint | None = None,
        values: Mapping[str, float] | None = None,
        recovery_timeout_s: float = 60.0,
    ) -> Cluster:
        epochs = EpochPlan(num_epochs, validates, 2, values or {})
        sync = SyncPlan(staleness, num_partitions, 60.0, recovery_timeout_s)
        clusters.append(Cluster(num_partitions, epochs, sync, resume))
        return clusters[-1]

    yield start_cluster
    for cluster in clusters:
        cluster.close()


# The whole way


@MODES
def test_workers_of_uneven_partitions_train_rest_evaluate_and_go_on_together(
    start: Start, staleness: int | None
) -> None:
    cluster = start(3, 2, staleness=staleness, values={"learning_rate": 0.5})
    lengths = [3, 0, 5]
    working = [cluster.start(cluster.worker(partition, length).work) for partition, length in enumerate(lengths)]
    weights = INITIAL
    for epoch in range(2):
        end = cluster.wait_epoch()
        weights += 3 * 1 + 5 * 3
        assert cluster.weights() == weights
        assert (end.epoch, end.num_samples, end.evaluation_samples) == (epoch, 80, 3 * EVALUATED)
        assert unpacked(end.totals) == {0: [3 * epoch, 3], 2: [5 * epoch, 5]}
        assert unpacked(end.evaluation) == {partition: [weights, 10 * partition] for partition in range(3)}
        status = cluster.server.status()
        assert (status.epoch, status.num_epochs) == (epoch, 2)
        cluster.wait_for(lambda: cluster.server.status().num_resting == 3)
        assert cluster.server.wait_epoch(0.0) is not None  # the same, until it is released
        cluster.server.release_epoch(epoch, {"learning_rate": 0.25})
    assert cluster.server.wait_epoch(DEADLINE_S) is None  # at once: there will be no more
    orders = [future.result(DEADLINE_S) for future in working]
    for length, of_worker in zip(lengths, orders, strict=True):
        assert isinstance(of_worker, list)
        kinds = [order.kind for order in of_worker]
        an_epoch = [OrderKind.TRAIN] * max(length, 1) + [OrderKind.EVALUATE]
        assert kinds == [*an_epoch, *an_epoch, OrderKind.FINISH]
        assert {order.values["learning_rate"] for order in of_worker if order.epoch == 0} == {0.5}
        assert all(order.num_steps <= 32 for order in of_worker)
        assert of_worker[-1].num_steps == 32
    assert cluster.server.status().num_finished == 3


def test_a_bulk_synchronous_run_is_the_same_however_the_workers_are_late(start: Start) -> None:
    """Versions, steps and counts of workers with every pull: what a schedule or a combiner may look at."""

    def orders(late: int) -> list[list[Order]]:
        cluster = start(3, 2, staleness=0)
        workers = [cluster.worker(partition, length) for partition, length in enumerate([1, 0, 3])]
        working = {worker.partition: cluster.start(worker.work) for worker in workers if worker.partition != late}
        cluster.wait_for(lambda: have_done_what_they_can(cluster, set(working)))
        working[late] = cluster.start(workers[late].work)
        for epoch in range(2):
            cluster.wait_epoch()
            cluster.server.release_epoch(epoch, {})
        return [working[partition].result(DEADLINE_S) for partition in range(3)]  # type: ignore[misc]

    def have_done_what_they_can(cluster: Cluster, partitions: set[int]) -> bool:
        reports = cluster.server.records()[1]
        has_skipped = 1 not in partitions or cluster.server.status().num_resting == 1
        return has_skipped and all(reports[partition].num_pushed == 1 for partition in partitions - {1})

    assert orders(late=0) == orders(late=1) == orders(late=2)


def test_an_epoch_without_validation_is_ready_at_once_and_the_driver_may_end_the_run(start: Start) -> None:
    cluster = start(1, 9, validates=False)
    working = cluster.start(cluster.worker(0).work)
    end = cluster.wait_epoch()
    assert (unpacked(end.totals), end.evaluation, end.evaluation_samples) == ({0: [0, 2]}, (), 0)
    assert 0 < end.seconds < DEADLINE_S
    cluster.server.release_epoch(0, {}, finish=True)
    working.result(DEADLINE_S)
    assert cluster.server.status().num_finished == 1


def test_totals_of_two_curves_of_ten_thousand_thresholds_travel_with_a_push(start: Start) -> None:
    cluster = start(1)
    num_totals = 2 * 4 * 10_000
    run = cluster.server.begin_run(
        filled(INITIAL), DeltaWeightCombiner(), 1, epochs=EpochPlan(1, validates=True, num_totals=num_totals)
    )
    cluster.run = run
    worker = cluster.worker(0)
    totals = np.random.default_rng(1).normal(size=num_totals)
    worker.pull()
    worker.client.push(filled(1), Push(1, Cursor(0, 1), 1, 10, totals=totals.astype("<f8").tobytes()))
    worker.client.push(filled(1), Push(2, Cursor(1), 1, 10, totals=totals.astype("<f8").tobytes()))
    assert worker.pull().kind is OrderKind.EVALUATE
    worker.client.report_evaluation(0, (3 * totals).astype("<f8").tobytes(), 10)
    end = cluster.wait_epoch()
    np.testing.assert_array_equal(end.totals[0][1], totals + totals)
    np.testing.assert_array_equal(end.evaluation[0][1], 3 * totals)


def test_totals_over_the_limit_are_refused_where_they_are_made(start: Start) -> None:
    with pytest.raises(ConfigError, match=r"at most 131,072 numbers in all, these keep 131,073: use fewer metrics"):
        EpochPlan(1, num_totals=MAX_TOTALS_BYTES // 8 + 1)
    worker = start(1).worker(0)
    with pytest.raises(ProtocolError, match="at most 1048576 bytes, got 1048584: the model's metrics keep"):
        worker.client.push(filled(1), Push(1, Cursor(0, 1), 1, 10, totals=bytes(MAX_TOTALS_BYTES + 8)))


# Who dies


@MODES
def test_a_worker_that_dies_while_it_rests_has_a_successor_that_evaluates(start: Start, staleness: int | None) -> None:
    cluster = start(staleness=staleness)
    first, second = cluster.worker(0, 1), cluster.worker(1, 2)
    first.obey(first.pull())
    second.obey(second.pull())
    first.client.flush()
    cluster.wait_for(lambda: cluster.server.status().num_resting == 1)
    first.client.close()
    cluster.wait_for(lambda: cluster.server.status().num_lost == 1)
    second.obey(second.pull())  # nobody else counts, so that this round ends without the lost one
    assert second.obey(second.pull())
    working = cluster.start(second.work)
    assert cluster.server.wait_epoch(0.2) is None  # the lost one's evaluation is missing
    successor = cluster.worker(0, 1, attempt=9)
    assert (successor.sequence, successor.cursor) == (1, Cursor(1))
    successor_works = cluster.start(successor.work)
    end = cluster.wait_epoch()
    assert unpacked(end.totals) == {0: [0, 1], 1: [0, 2]}
    assert unpacked(end.evaluation) == {0: [INITIAL + 5, 0], 1: [INITIAL + 5, 10]}
    cluster.server.release_epoch(0, {})
    assert cluster.wait_epoch().epoch == 1
    cluster.server.release_epoch(1, {})
    working.result(DEADLINE_S)
    successor_works.result(DEADLINE_S)
    assert cluster.weights() == INITIAL + 2 * 5


@MODES
def test_a_worker_that_dies_while_it_evaluates_is_awaited_and_not_for_ever(start: Start, staleness: int | None) -> None:
    cluster = start(staleness=staleness, recovery_timeout_s=0.5)
    first, second = cluster.worker(0, 1), cluster.worker(1, 1)
    for worker in (first, second):
        worker.pull()
    for worker in (first, second):
        worker.train()
    assert first.pull().kind is OrderKind.EVALUATE
    assert second.obey(second.pull())
    first.client.close()
    end = cluster.wait_epoch()
    assert unpacked(end.totals) == {0: [0, 1], 1: [0, 1]}
    assert unpacked(end.evaluation) == {1: [INITIAL + 3, 10]}
    cluster.server.release_epoch(0, {})
    working = cluster.start(second.work)
    assert unpacked(cluster.wait_epoch().totals) == {1: [1, 1]}
    late = cluster.worker(0, 1, attempt=9)  # trains what it missed when the epoch is released
    late_works = cluster.start(late.work)
    cluster.server.release_epoch(1, {})
    working.result(DEADLINE_S)
    late_works.result(DEADLINE_S)
    assert [order.kind for order in late.orders] == [OrderKind.FINISH]


def test_what_comes_late_of_an_epoch_trains_but_is_not_in_its_figures(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tensorspark.ps.epochs")
    cluster = start(2, 3, validates=False, recovery_timeout_s=0.3)
    lost, other = cluster.worker(0, 2), cluster.worker(1, 1)
    assert lost.obey(lost.pull())
    lost.client.flush()
    lost.client.close()
    working = cluster.start(other.work)
    assert unpacked(cluster.wait_epoch().totals) == {0: [0, 1], 1: [0, 1]}  # the push before its death counts
    cluster.server.release_epoch(0, {})
    cluster.wait_epoch()
    late = cluster.worker(0, 2, attempt=9)
    assert late.cursor == Cursor(0, 1)
    late_works = cluster.start(late.work)
    cluster.server.release_epoch(1, {})
    end = cluster.wait_epoch()
    assert unpacked(end.totals) == {0: [4, 2], 1: [2, 1]}
    cluster.server.release_epoch(2, {})
    working.result(DEADLINE_S)
    late_works.result(DEADLINE_S)
    assert [order.epoch for order in late.orders[:-1]] == [0, 1, 1, 2, 2]
    assert cluster.weights() == INITIAL + 3 * 2 * 1 + 3 * 1 * 2
    assert "partition 0: a push of epoch 0 comes after the epoch's end" in caplog.text


# Connections that break


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("moment", ["skip", "rest", "evaluation"])
def test_a_connection_that_breaks_changes_nothing(start: Start, moment: str, direction: str) -> None:
    cluster = start(2, 1)
    proxy = cluster.proxy()
    cut = cluster.worker(0, 0 if moment == "skip" else 1, port=proxy.port)
    other = cluster.worker(1, 1)
    order = cut.pull()
    if moment == "skip":
        proxy.cuts[direction] = 5
    assert cut.obey(order)
    cut.client.flush()
    if moment == "rest":
        proxy.cuts[direction] = 5
    resting = cluster.start(cut.pull)
    if moment == "rest" and direction == "down":
        cluster.wait_for(lambda: cluster.server.status().num_resting == 1)
    assert other.obey(other.pull())
    assert other.obey(other.pull())
    order = resting.result(DEADLINE_S)  # type: ignore[assignment]
    assert order.kind is OrderKind.EVALUATE
    if moment == "evaluation":
        proxy.cuts[direction] = 5
    assert cut.obey(order)
    end = cluster.wait_epoch()
    assert proxy.num_connections == 2
    trained = INITIAL + 2 + (moment != "skip")
    assert unpacked(end.evaluation) == {0: [trained, 0], 1: [trained, 10]}
    assert end.evaluation_samples == 2 * EVALUATED
    assert unpacked(end.totals) == ({1: [0, 1]} if moment == "skip" else {0: [0, 1], 1: [0, 1]})
    assert cluster.server.records()[1][0].num_reconnects == 1


# Ends


@MODES
def test_a_stop_in_the_middle_reaches_all_with_the_next_pull_and_no_push_is_lost(
    start: Start, staleness: int | None
) -> None:
    cluster = start(3, staleness=staleness)
    pushing, computing, resting = cluster.worker(0, 3), cluster.worker(1, 3), cluster.worker(2, 0)
    for worker in (pushing, computing, resting):
        worker.pull()
    resting.obey(resting.orders[-1])
    waits_at_the_end = cluster.start(resting.work)
    cluster.wait_for(lambda: cluster.server.status().num_resting == 1)
    pushing.train()
    waits_for_the_round = cluster.start(pushing.work)
    waiting_for_epoch = cluster.start(lambda: cluster.server.wait_epoch(DEADLINE_S))
    if staleness == 0:
        cluster.wait_for(lambda: cluster.server.records()[1][0].num_pushed == 1)
        cluster.server.request_stop()
    else:
        cluster.wait_for(lambda: cluster.server.status().num_waiting + cluster.server.status().num_steps >= 6)
        cluster.server.request_stop()
    assert waiting_for_epoch.result(DEADLINE_S) is None
    waits_at_the_end.result(DEADLINE_S)
    computing.train()
    computing.work()
    waits_for_the_round.result(DEADLINE_S)
    assert cluster.server.status().num_finished == 3
    reports = cluster.server.records()[1]
    assert [report.num_pushed for report in reports] == [report.num_applied for report in reports]
    assert reports[1].num_applied == 1
    assert cluster.weights() == INITIAL + reports[0].num_applied + 2


def test_a_stop_closes_the_round_of_a_worker_that_has_died(start: Start) -> None:
    cluster = start(2, staleness=0)
    pushing, dying = cluster.worker(0, 3), cluster.worker(1, 3)
    for worker in (pushing, dying):
        worker.pull()
    pushing.train()
    working = cluster.start(pushing.work)
    dying.client.close()
    cluster.wait_for(lambda: cluster.server.status().num_lost == 1)
    cluster.server.request_stop()
    working.result(DEADLINE_S)
    assert cluster.weights() == INITIAL + 1


@MODES
def test_a_worker_told_to_finish_in_the_middle_of_an_interval_may_still_push_it(
    start: Start, staleness: int | None
) -> None:
    """As in elastic averaging, where the difference is taken from weights that are pulled after the steps."""
    cluster = start(2, staleness=staleness)
    workers = [cluster.worker(partition, 3) for partition in range(2)]
    for worker in workers:
        worker.pull()
    cluster.server.request_stop()
    for worker in workers:
        assert worker.pull().kind is OrderKind.FINISH
    for worker in workers:
        worker.train()
    for worker in workers:
        cluster.start(lambda worker=worker: worker.obey(worker.orders[-1])).result(DEADLINE_S)  # type: ignore[misc]
    assert cluster.weights() == INITIAL + 1 + 2


def test_who_waits_for_an_epoch_is_woken_by_a_failure(start: Start) -> None:
    cluster = start(1)
    waiting = cluster.start(lambda: cluster.server.wait_epoch(DEADLINE_S))
    worker = cluster.worker(0)
    worker.client.report("ValueError: bad row", "Traceback")
    assert waiting.result(DEADLINE_S) is None
    assert isinstance(cluster.server.failure(), WorkerFailedError)
    cluster.server.release_epoch(0, {})  # too late to matter
    with pytest.raises(RunStoppedError):
        worker.pull()


def test_who_waits_for_an_epoch_is_woken_when_the_server_closes(start: Start) -> None:
    cluster = start(1)
    waiting = cluster.start(lambda: cluster.server.wait_epoch(DEADLINE_S))
    cluster.worker(0)
    cluster.server.close()
    assert waiting.result(DEADLINE_S) is None
    with pytest.raises(SessionClosedError):
        cluster.server.wait_epoch(0.0)


def test_only_the_epoch_that_is_ready_can_be_released(start: Start) -> None:
    cluster = start(1)
    with pytest.raises(ValueError, match="it is not ready"):
        cluster.server.release_epoch(0, {})
    cluster.start(cluster.worker(0).work)
    cluster.wait_epoch()
    with pytest.raises(ValueError, match="got 1"):
        cluster.server.release_epoch(1, {})
    with pytest.raises(ConfigError, match="at most 16384 bytes"):
        cluster.server.release_epoch(0, {"x" * 20_000: 1.0})
    cluster.server.release_epoch(0, {}, finish=True)


# Restored


def stored(checkpoint: RunCheckpoint | None) -> RunCheckpoint:
    """The checkpoint as it is read from its files."""
    assert checkpoint is not None
    files = {f"c{ending}": b"".join(file.parts) for ending, file in encode(checkpoint).items()}
    return decode("c", lambda name: io.BytesIO(files[name]))


@MODES
@pytest.mark.parametrize("moment", ["in the middle", "while some rest", "while some evaluate", "at the end"])
def test_a_restored_run_goes_on_with_what_was_reported_of_its_epoch(
    start: Start, staleness: int | None, moment: str
) -> None:
    cluster = start(2, 2, staleness=staleness)
    short, long = cluster.worker(0, 1), cluster.worker(1, 2)
    if moment == "at the end":
        for worker in (short, long):
            cluster.start(worker.work)
        end = cluster.wait_epoch()
        cluster.server.release_epoch(0, {"learning_rate": 0.125})
        cluster.wait_epoch()
    else:
        for worker in (short, long):
            worker.pull()
        for worker in (short, long):
            worker.train()
        for worker in (short, long):
            worker.client.flush()
        if moment != "in the middle":
            long.obey(long.pull())
            long.client.flush()
        if moment == "while some evaluate":
            assert short.obey(short.pull())
    checkpoint = stored(cluster.server.capture())
    is_second = moment == "at the end"
    assert checkpoint.epochs == EpochProgress(int(is_second), {"learning_rate": 0.125} if is_second else {})
    cluster.close()
    again = start(2, 2, staleness=staleness, resume=checkpoint)
    working = [again.start(again.worker(partition, 1 + partition, attempt=50 + partition).work) for partition in (0, 1)]
    weights = INITIAL + 1 + 2 * 2
    if moment != "at the end":
        end = again.wait_epoch()
        again.server.release_epoch(0, {"learning_rate": 0.125})
    assert unpacked(end.totals) == {0: [0, 1], 1: [0, 2]}
    assert unpacked(end.evaluation) == {0: [weights, 0], 1: [weights, 10]}
    assert (end.num_samples, end.evaluation_samples) == (30, 2 * EVALUATED)
    end = again.wait_epoch()
    weights += 1 + 2 * 2
    assert end.epoch == 1
    assert unpacked(end.totals) == {0: [1, 1], 1: [2, 2]}
    assert unpacked(end.evaluation) == {0: [weights, 0], 1: [weights, 10]}
    again.server.release_epoch(1, {})
    for future in working:
        orders = future.result(DEADLINE_S)
        assert isinstance(orders, list)
        rates = {order.values["learning_rate"] for order in orders[:-1] if order.epoch == 1}
        assert rates == (set() if moment == "at the end" else {0.125})
    assert again.weights() == weights


def test_a_run_that_was_ended_stays_ended_when_it_is_restored(start: Start) -> None:
    cluster = start(1, 5, validates=False)
    worker = cluster.worker(0, 1)
    assert worker.obey(worker.pull())
    worker.client.flush()
    cluster.wait_epoch()
    cluster.server.release_epoch(0, {}, finish=True)
    checkpoint = stored(cluster.server.capture())
    assert checkpoint.epochs == EpochProgress(0, {}, is_over=True)
    again = start(1, 5, validates=False, resume=checkpoint)
    assert [order.kind for order in again.worker(0, 1, attempt=2).work()] == [OrderKind.FINISH]
    assert again.server.wait_epoch(DEADLINE_S) is None


def test_partitions_that_are_dealt_anew_begin_at_the_epoch_of_the_earliest(start: Start) -> None:
    cluster = start(2, 3, validates=False)
    working = [cluster.start(cluster.worker(partition, 1).work) for partition in range(2)]
    cluster.wait_epoch()
    cluster.server.release_epoch(0, {"learning_rate": 0.5})
    cluster.wait_epoch()
    checkpoint = stored(cluster.server.capture())
    cluster.server.stop_run()
    for future in working:
        with pytest.raises(RunStoppedError):
            future.result(DEADLINE_S)
    fresh = replace(checkpoint.partitions[0], sequence=0, cursor=Cursor(0), round=0, epoch_totals=b"", epoch_samples=0)
    again = start(1, 3, validates=False, resume=replace(checkpoint, partitions=(fresh,)))
    again.start(again.worker(0, 1, attempt=7).work)
    end = again.wait_epoch()
    assert (end.epoch, unpacked(end.totals)) == (0, {0: [0, 1]})
    again.server.release_epoch(0, {}, finish=True)


def test_a_checkpoint_of_other_metrics_is_refused_with_what_to_do(start: Start) -> None:
    cluster = start(1)
    worker = cluster.worker(0)
    assert worker.obey(worker.pull())
    worker.client.flush()
    checkpoint = stored(cluster.server.capture())
    with pytest.raises(CheckpointError, match="totals of 2 numbers for an epoch, these metrics keep 3: compile the"):
        cluster.server.begin_run(
            filled(1), DeltaWeightCombiner(), 1, epochs=EpochPlan(2, num_totals=3), resume=checkpoint
        )


# What is not due


@pytest.mark.parametrize(
    "misuse",
    [
        lambda worker: worker.client.skip_epoch(1),
        lambda worker: (worker.obey(worker.pull()), worker.client.skip_epoch(0)),
        lambda worker: worker.client.report_evaluation(0, packed(1, 2), 5),
        lambda worker: worker.client.report_evaluation(1, packed(1, 2), 5),
        lambda worker: worker.client._tell(Kind.EVALUATION, {"epoch": 0, "num_samples": 5}, bytes(8)),
        lambda worker: worker.client._tell(Kind.SKIP, {"epoch": 0}, bytes(16)),
        lambda worker: (worker.client.push(filled(1), Push(1, Cursor(0, 1), 1, 1, totals=bytes(8))), worker.pull()),
        lambda worker: (worker.client.push(filled(1), Push(1, Cursor(1, 1), 1, 1)), worker.pull()),
        lambda worker: (
            worker.client.push(filled(1), Push(1, Cursor(1), 1, 1)),
            worker.client.flush(),
            worker.client.push(filled(1), Push(2, Cursor(1), 1, 1)),
            worker.client.flush(),
        ),
    ],
    ids=["skip ahead", "skip with rows", "evaluation early", "evaluation ahead", "short evaluation", "skip with totals",
         "short totals", "push ahead", "push at rest"],
)  # fmt: skip
def test_what_is_not_due_closes_the_connection_and_changes_nothing(
    start: Start, misuse: Callable[[Worker], object]
) -> None:
    cluster = start(2)
    worker = cluster.worker(0)
    worker.client._address = replace(worker.client._address, reconnect_timeout_s=0.0)
    with pytest.raises(ConnectionLostError):
        misuse(worker)
    assert cluster.server.failure() is None
    assert cluster.server.status().epoch == 0


def test_a_run_without_epochs_knows_neither_totals_nor_skips_nor_evaluations(start: Start) -> None:
    cluster = start(2)
    cluster.run = cluster.server.begin_run(filled(INITIAL), DeltaWeightCombiner(), 4)
    for partition, tell in enumerate(
        [
            lambda client: client.skip_epoch(0),
            lambda client: client.report_evaluation(0, b"", 1),
            lambda client: client.report_evaluation(0, packed(1, 2), 1),
            lambda client: (client.push(filled(1), Push(1, Cursor(0, 1), 1, 1, totals=packed(1))), client.flush()),
        ]
    ):
        client = cluster.worker(partition).client
        client._address = replace(client._address, reconnect_timeout_s=0.0)
        with pytest.raises(ConnectionLostError):
            tell(client)  # type: ignore[no-untyped-call]
    assert cluster.weights() == INITIAL
    status = cluster.server.status()
    assert (status.epoch, status.num_epochs, status.num_resting) == (None, None, 0)
