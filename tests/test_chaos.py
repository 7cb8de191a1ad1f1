"""Real processes of a real standalone cluster die while a program trains: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos import faults
from benchmarks.chaos.cutting_proxy import Direction
from benchmarks.chaos.driver import BATCH_SIZE, MAX_ROWS, NUM_PARTITIONS, Training
from benchmarks.chaos.faults import DEADLINE_S, Fault, Laboratory, Outcome, Scene, train_through
from benchmarks.clusters.standalone import StandaloneCluster
from examples import mnist_data

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_EPOCHS = 100


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneCluster]:
    """On each host a core for the usual driver's executor, and two for that of the test of speculation."""
    with StandaloneCluster(tmp_path_factory.mktemp("cluster"), num_cores=3, memory="2g") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def laboratory(cluster: StandaloneCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(cluster, tmp_path_factory.mktemp("drivers")) as laboratory:
        yield laboratory


@pytest.fixture(scope="module")
def undisturbed(laboratory: Laboratory) -> Outcome:
    return train_through(laboratory, new_training(laboratory))


@pytest.fixture(scope="module")
def partition_rows() -> list[int]:
    """Rows of each partition, counted without the program."""
    _, labels, _, _ = mnist_data.load(mnist_data.find(download=False))
    num_rows = min(len(labels), MAX_ROWS)
    return [len(range(index, num_rows, NUM_PARTITIONS)) for index in range(NUM_PARTITIONS)]


def new_training(laboratory: Laboratory, num_epochs: int = NUM_EPOCHS) -> Training:
    return Training(str(laboratory.new_path("weights")), num_epochs)


def num_batches(num_rows: int) -> int:
    return -(-num_rows // BATCH_SIZE)


def require_each_batch_once(outcome: Outcome, partition_rows: list[int], num_epochs: int = NUM_EPOCHS) -> None:
    """By what the server counted for each partition, and by the counter that is trained along with the weights."""
    workers = outcome.done["workers"]
    assert [worker["num_samples"] for worker in workers] == [rows * num_epochs for rows in partition_rows]
    num_steps = [num_batches(rows) * num_epochs for rows in partition_rows]
    assert [worker["num_steps"] for worker in workers] == num_steps
    assert outcome.done["num_steps_in_weights"] == sum(num_steps)


def in_the_middle(partition_rows: list[int]) -> int:
    return sum(num_batches(rows) for rows in partition_rows) * NUM_EPOCHS // 3


def test_an_undisturbed_run_trains_and_is_reproducible(
    laboratory: Laboratory, undisturbed: Outcome, partition_rows: list[int]
) -> None:
    again = train_through(laboratory, new_training(laboratory))
    assert again.weights == undisturbed.weights
    require_each_batch_once(again, partition_rows)
    shorter = train_through(laboratory, new_training(laboratory, num_epochs=1))
    assert shorter.weights != undisturbed.weights
    assert np.isfinite(np.frombuffer(undisturbed.weights[:-8], np.float32)).all()


@pytest.mark.parametrize(
    "fault",
    [faults.PYTHON_WORKER, faults.PYTHON_WORKERS, faults.EXECUTOR, faults.EXECUTORS],
    ids=lambda fault: fault.name,
)
def test_killed_workers_change_no_bit_of_the_weights(
    laboratory: Laboratory, undisturbed: Outcome, partition_rows: list[int], fault: Fault
) -> None:
    outcome = train_through(
        laboratory, new_training(laboratory), fault, after_steps=in_the_middle(partition_rows), seed=1
    )
    assert outcome.weights == undisturbed.weights
    require_each_batch_once(outcome, partition_rows)
    num_successors = sum(worker["num_attempts"] - 1 for worker in outcome.done["workers"])
    assert num_successors >= (2 if fault in (faults.PYTHON_WORKERS, faults.EXECUTORS) else 1)


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name.lower())
def test_a_connection_cut_in_the_middle_of_a_frame_changes_no_bit_of_the_weights(
    laboratory: Laboratory, undisturbed: Outcome, partition_rows: list[int], direction: Direction
) -> None:
    def cut(scene: Scene) -> float:
        assert scene.proxy is not None
        return scene.proxy.cut(direction, DEADLINE_S)

    fault = replace(faults.CONNECTION, inflict=cut)
    outcome = train_through(laboratory, new_training(laboratory), fault, after_steps=in_the_middle(partition_rows))
    assert outcome.weights == undisturbed.weights
    require_each_batch_once(outcome, partition_rows)
    workers = outcome.done["workers"]
    assert [worker["num_attempts"] for worker in workers] == [1, 1]
    assert sum(worker["num_reconnects"] for worker in workers) == 1


def test_a_worker_stopped_beyond_its_lease_comes_back_and_changes_no_bit_of_the_weights(
    laboratory: Laboratory, undisturbed: Outcome, partition_rows: list[int]
) -> None:
    outcome = train_through(
        laboratory, new_training(laboratory), faults.STOPPED, after_steps=in_the_middle(partition_rows)
    )
    assert outcome.weights == undisturbed.weights
    require_each_batch_once(outcome, partition_rows)
    assert sum(worker["num_reconnects"] for worker in outcome.done["workers"]) >= 1


def test_an_asynchronous_run_counts_every_batch_once_though_a_worker_is_killed(
    laboratory: Laboratory, partition_rows: list[int]
) -> None:
    # An interval that does not divide an epoch: what a dead worker had not pushed yet is trained again, no more.
    training = replace(new_training(laboratory), settings={"staleness": None, "sync_interval": 7})
    outcome = train_through(
        laboratory, training, faults.PYTHON_WORKER, after_steps=in_the_middle(partition_rows), seed=2
    )
    require_each_batch_once(outcome, partition_rows)
    assert sum(worker["num_attempts"] for worker in outcome.done["workers"]) == 3
    assert np.isfinite(np.frombuffer(outcome.weights[:-8], np.float32)).all()


def test_a_driver_killed_and_restored_changes_no_bit_of_the_weights(
    laboratory: Laboratory, undisturbed: Outcome, partition_rows: list[int]
) -> None:
    killed = laboratory.driver()
    outcome = train_through(
        laboratory, new_training(laboratory), faults.DRIVER, after_steps=in_the_middle(partition_rows)
    )
    assert laboratory.driver() is not killed
    assert outcome.weights == undisturbed.weights
    require_each_batch_once(outcome, partition_rows)
    # Not trained anew: the restored driver began where a checkpoint was.
    first = next(event for event in laboratory.driver().events() if event["event"] == "status")
    assert 0 < first["num_steps"] < outcome.done["num_steps_in_weights"]


SPECULATION = {
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    # As many tasks as one executor has slots: Spark copies what takes longer than this.
    "spark.speculation.task.duration.threshold": "2s",
    "spark.executor.cores": "2",
    "spark.cores.max": "4",
}


def test_a_speculative_copy_takes_over_from_a_slow_worker_that_dies_and_changes_no_bit_of_the_weights(
    cluster: StandaloneCluster, laboratory: Laboratory, partition_rows: list[int], tmp_path: Path
) -> None:
    num_epochs = 10
    training = replace(new_training(laboratory, num_epochs), shuffle=False)
    undisturbed = train_through(laboratory, training)
    marker = tmp_path / "slow"
    slowed = replace(training, weights_path=str(tmp_path / "weights"), slow_marker=str(marker))
    killed_at: list[float] = []

    def kill_the_slow_holder(scene: Scene) -> float:
        scene.driver.wait_for("two standbys", lambda event: event.get("num_standby") == 2, DEADLINE_S)
        holder = int(marker.read_text())
        assert holder in [pid for executor in scene.executors() for pid in scene.python_workers(executor)]
        killed_at.append(time.monotonic())
        os.kill(holder, signal.SIGKILL)
        return time.monotonic()

    with Laboratory(cluster, tmp_path, SPECULATION) as speculating:
        # Slow from its fourth batch on: some rounds are in the weights, and the copy has to begin after them.
        outcome = train_through(speculating, slowed, Fault("slow holder killed", kill_the_slow_holder), after_steps=4)
        events = [event for event in speculating.driver().events() if event["event"] == "status"]
    assert outcome.weights == undisturbed.weights
    require_each_batch_once(outcome, partition_rows, num_epochs)
    assert outcome.done["workers"][0]["num_attempts"] >= 2
    before, after = (
        [event for event in events if (event["at"] > killed_at[0]) is is_after] for is_after in (False, True)
    )
    assert before[-1]["num_live"] == NUM_PARTITIONS
    # The copy holds the partition now: it was not Spark's retry that took over, leaving the copy to wait.
    assert any(event["num_live"] == NUM_PARTITIONS and event["num_standby"] == 1 for event in after)
    assert all(one["num_steps"] <= next_one["num_steps"] for one, next_one in itertools.pairwise(events))
