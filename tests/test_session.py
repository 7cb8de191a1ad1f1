"""`SparkSession` on a real local Spark: what it trains, what it leaves behind, and what bad input gets."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tensorspark import DeltaWeightCombiner, MeanDeltaCombiner, MeanWeightCombiner, SparkSession, WeightCombiner
from tensorspark.core import spark_session as original
from tensorspark.errors import (
    CombinerError,
    ConfigError,
    FeedError,
    GraphError,
    ServerUnreachableError,
    SessionClosedError,
    StagingError,
    WorkerFailedError,
)
from tensorspark.ps.rounds import Rounds
from tensorspark.ps.server import ParameterServer
from tensorspark.trainers.startup import importing
from tests.regression import TRUE_W, W0, Regression, build, rows_of, run, sgd

with importing():
    import tensorflow.compat.v1 as tf

if TYPE_CHECKING:
    from pyspark import SparkContext

# What is trained


@pytest.mark.parametrize("sync_interval", [1, 2, 1000])
@pytest.mark.parametrize("memory", ["cached", "spilled"])
def test_one_worker_trains_as_plain_sgd_does_from_non_zero_weights_remainders_included(
    sc: SparkContext, model: Regression, tmp_path: Path, sync_interval: int, memory: str
) -> None:
    rows = rows_of(23)
    with SparkSession(
        sc,
        model.session,
        sync_interval=sync_interval,
        batch_size=5,
        tmp_dir=str(tmp_path),
        cache_memory_bytes=0 if memory == "spilled" else None,
    ) as session:
        history = run(session, model, sc.parallelize(rows, 1), num_epochs=3)
    W, b, losses = sgd(rows, 5, 3)
    np.testing.assert_allclose(model.weights[0], W, rtol=1e-4)
    np.testing.assert_allclose(model.weights[1], b, rtol=1e-4)
    assert (history.num_steps, history.num_samples) == (15, 69)
    assert history.steps[-1] == 15
    sizes = [5, 5, 5, 5, 3] * 3
    weighted = np.dot(losses, sizes) / 69
    points = np.diff([0, *[point.num_samples for point in history.points]])
    np.testing.assert_allclose(np.dot(history.scalars["loss"], points) / 69, weighted, rtol=1e-4)


def test_shuffles_depend_on_the_seed_alone(sc: SparkContext) -> None:
    rows = rows_of(40)

    def train(seed: int) -> np.ndarray:
        model = build()
        with SparkSession(sc, model.session, sync_interval=3, batch_size=4) as session:
            history = run(
                session, model, sc.parallelize(rows, 1), num_epochs=2, shuffle_within_partition=True, seed=seed
            )
            assert history.seed == seed
        return np.concatenate([weight.ravel() for weight in model.weights])

    np.testing.assert_array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))


def test_empty_small_and_many_partitions_are_all_trained(sc: SparkContext, model: Regression) -> None:
    rows = rows_of(30)
    sizes = [0, 1, 20, 0, 2, 7]
    bounds = np.cumsum([0, *sizes])
    rdd = sc.parallelize(range(6), 6).flatMap(lambda i: rows[bounds[i] : bounds[i + 1]])
    with SparkSession(sc, model.session, sync_interval=2, batch_size=4) as session:
        history = run(session, model, rdd, num_epochs=2, shuffle_within_partition=True)
    assert [worker.num_samples for worker in history.workers] == [2 * size for size in sizes]
    assert [worker.num_steps for worker in history.workers] == [2 * -(-size // 4) for size in sizes]
    assert all(worker.finished for worker in history.workers)
    assert [worker.epoch_samples for worker in history.workers] == [(size, size) if size else () for size in sizes]


def test_two_workers_learn_the_function(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session, sync_interval=1, batch_size=10) as session:
        history = run(session, model, sc.parallelize(rows_of(400), 2), num_epochs=20, shuffle_within_partition=True)
    np.testing.assert_allclose(model.weights[0], TRUE_W, atol=1e-3)
    np.testing.assert_allclose(model.weights[1], [3.0], atol=1e-3)
    assert history.scalars["loss"][-1] < 1e-4 < history.scalars["loss"][0]
    assert history.samples_per_s > 0


def test_a_feed_without_rows_is_an_error(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session) as session, pytest.raises(FeedError, match="the feed has no rows"):
        run(session, model, sc.parallelize([], 2))
    np.testing.assert_array_equal(model.weights[0], W0)


def test_an_optimizers_slots_start_from_the_drivers_on_every_worker_and_stay_there(sc: SparkContext) -> None:
    rows = rows_of(12)

    def momentum(rate: float) -> Any:
        return tf.train.MomentumOptimizer(rate, 0.9)

    here, there = build(optimizer=momentum), build(optimizer=momentum)
    x, y = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    for start in range(0, 12, 4):
        here.session.run(here.train, {here.x: x[start : start + 4], here.y: y[start : start + 4]})
    for _ in range(2):  # the second run must not find the first one's momentum
        there.session.run([there.W.initializer, there.b.initializer])
        with SparkSession(sc, there.session, sync_interval=100, batch_size=4) as session:
            run(session, there, sc.parallelize(rows, 1))
        np.testing.assert_allclose(there.weights[0], here.weights[0], rtol=1e-5)


def test_values_of_feed_dict_are_fed_with_every_batch(sc: SparkContext) -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as session:
        x = tf.placeholder(tf.float32, [None], name="x")
        scale = tf.placeholder(tf.float32, [], name="scale")
        total = tf.Variable(1.0, name="total")
        train = tf.assign_add(total, scale * tf.reduce_sum(x)).op
        session.run(tf.global_variables_initializer())
        with SparkSession(sc, session, batch_size=3) as spark_session:
            feed = sc.parallelize([float(i) for i in range(10)], 2)
            spark_session.run(train, feed, ["x:0"], [total], {scale: 2.0}, DeltaWeightCombiner(), progress=False)
        assert session.run(total) == 1 + 2 * 45


def test_without_a_feed_it_is_the_sessions_run(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session) as session:
        x, y = np.ones((2, 3), np.float32), np.zeros((2, 1), np.float32)
        expected = model.session.run(model.loss, {model.x: x, model.y: y})
        assert session.run(model.loss, feed_dict={model.x: x, model.y: y}) == expected
        assert session.get_session() is model.session


def test_a_pyspark_sql_session_will_do(sc: SparkContext, model: Regression) -> None:
    from pyspark.sql import SparkSession as SqlSession

    with SparkSession(SqlSession(sc), model.session, batch_size=8) as session:
        assert run(session, model, sc.parallelize(rows_of(8), 1)).num_samples == 8


def test_the_default_combiner_is_the_mean_over_the_workers(sc: SparkContext, model: Regression) -> None:
    rows = rows_of(8)
    with SparkSession(sc, model.session, batch_size=8) as session:
        run(session, model, sc.parallelize(rows, 1), weight_combiner=None)
    np.testing.assert_allclose(model.weights[0], sgd(rows, 8, 1)[0], rtol=1e-5)


class Halfway(WeightCombiner):
    def compute(self, origin_weight: Any, new_weight: Any, worker_id: int | str = -1, name: str | None = None) -> Any:
        assert worker_id == 0
        assert name in ("W:0", "b:0")
        return origin_weight + 0.5 * (new_weight - origin_weight)


@pytest.mark.parametrize("combiner", [Halfway(), MeanWeightCombiner(2)])
def test_a_combiner_of_ones_own_decides_what_a_push_does(
    sc: SparkContext, model: Regression, combiner: WeightCombiner
) -> None:
    rows = rows_of(8)
    with SparkSession(sc, model.session, batch_size=8) as session:
        run(session, model, sc.parallelize(rows, 1), weight_combiner=combiner)
    np.testing.assert_allclose(model.weights[0], (W0 + sgd(rows, 8, 1)[0]) / 2, rtol=1e-5)


# Servers and processes that last


def kept_trainers(_: Any) -> list[tuple[int, int]]:
    from tensorspark.trainers import base

    return [(os.getpid(), id(trainer)) for trainer in base._kept.values()]


@pytest.mark.parametrize("reusable", [True, False])
def test_runs_follow_one_another_and_workers_keep_their_trainer(
    sc: SparkContext, model: Regression, reusable: bool
) -> None:
    rows = rows_of(16)
    seen, ports = [], []
    with SparkSession(sc, model.session, batch_size=4, dashboard=False) as session:
        for _ in range(2):
            run(session, model, sc.parallelize(rows, 1), server_reusable=reusable)
            seen.append(set(sc.parallelize(range(2), 2).flatMap(kept_trainers).collect()))
            ports.append(session._server.port if session._server else None)
        session.stop_param_server()
        session.stop_param_server()
    assert seen[1] & seen[0]
    assert (ports[0] == ports[1] != None) if reusable else ports == [None, None]  # noqa: E711
    np.testing.assert_allclose(model.weights[0], sgd(rows, 4, 2)[0], rtol=1e-4)


def test_what_the_user_assigns_between_runs_is_what_the_next_run_begins_with(
    sc: SparkContext, model: Regression
) -> None:
    rows = rows_of(8)
    with SparkSession(sc, model.session, batch_size=8) as session:
        run(session, model, sc.parallelize(rows, 1), server_reusable=True)
        model.session.run([model.W.initializer, model.b.initializer])
        run(session, model, sc.parallelize(rows, 1), server_reusable=True)
    np.testing.assert_allclose(model.weights[0], sgd(rows, 8, 1)[0], rtol=1e-5)


def test_the_originals_constructor_has_its_defaults(sc: SparkContext, model: Regression) -> None:
    with original.SparkSession(sc, model.session, "me", "mine") as session:
        config = session._engine.config
        assert (config.server_host, config.server_port) == ("localhost", 10080)
        assert (config.sync_interval, config.batch_size) == (3, 10000)


# What is left behind


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_temporary_files_are_gone_after_close(sc: SparkContext, model: Regression, tmp_path: Path) -> None:
    staging, local = tmp_path / "staging", tmp_path / "local"
    staging.mkdir()
    local.mkdir()
    session = SparkSession(sc, model.session, hdfs_dir=staging.as_uri(), tmp_dir=str(local), batch_size=4)
    run(session, model, sc.parallelize(rows_of(8), 2))
    checkpoints = Path(str(session.checkpoint_dir)).name
    assert len(files_in(staging)) == 2
    assert len(files_in(local)) == 1
    session.close()
    session.close()
    assert files_in(staging) == [checkpoints]
    assert files_in(local) == []


def test_temporary_files_are_gone_after_a_failed_run(sc: SparkContext, model: Regression, tmp_path: Path) -> None:
    with SparkSession(sc, model.session, hdfs_dir=str(tmp_path), tmp_dir=str(tmp_path)) as session:
        with pytest.raises(WorkerFailedError):
            run(session, model, sc.parallelize([(1, 2)], 1))
        assert session.status() is None
    assert files_in(tmp_path) == []


def test_the_spark_context_and_the_tensorflow_session_stay_open(sc: SparkContext, model: Regression) -> None:
    SparkSession(sc, model.session).close()
    assert sc.parallelize([1, 2]).sum() == 3
    assert model.weights[0].shape == (3, 1)


def test_a_session_that_is_forgotten_frees_its_port_and_files(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    session = SparkSession(sc, model.session, tmp_dir=str(tmp_path), hdfs_dir=str(tmp_path), checkpoint_interval_s=0)
    run(session, model, sc.parallelize(rows_of(4), 1), server_reusable=True)
    assert session._server is not None
    port = session._server.port
    del session
    socket.create_server(("127.0.0.1", port)).close()
    assert files_in(tmp_path) == []


# What dies


def test_a_worker_that_is_killed_is_succeeded_at_its_cursor(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    rows = rows_of(40)
    killed = tmp_path / "killed"

    def dies_once(index: int, partition: Any) -> Iterator[Any]:
        for number, row in enumerate(partition):
            if index == 0 and number == 17 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    with SparkSession(sc, model.session, sync_interval=1, batch_size=2) as session:
        history = run(session, model, sc.parallelize(rows, 2).mapPartitionsWithIndex(dies_once), num_epochs=2)
    first = history.workers[0]
    assert killed.exists()
    assert (first.num_attempts, first.num_samples, first.num_applied) == (2, 40, 20)
    assert history.num_samples == 80


def cut_short(tmp_path: Path, rows: int) -> Callable[[int, Any], Iterator[Any]]:
    """An upstream step whose Python worker is killed, once, halfway through its second partition."""
    killed = tmp_path / "killed"

    def upstream(index: int, partition: Any) -> Iterator[Any]:
        for number, row in enumerate(partition):
            if index == 1 and number == rows // 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    return upstream


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_feed_that_breaks_off_upstream_is_trained_whole_by_the_retry(
    sc: SparkContext, model: Regression, tmp_path: Path, shuffle: bool
) -> None:
    # Behind a coalesce, the upstream step runs in a Python worker of its own: its death ends our rows early.
    upstream = cut_short(tmp_path, 1500)
    feed = sc.parallelize(rows_of(6000), 4).mapPartitionsWithIndex(upstream).coalesce(2)
    with SparkSession(sc, model.session, sync_interval=2, batch_size=10) as session:
        history = run(session, model, feed, num_epochs=2, shuffle_within_partition=shuffle)
    assert (tmp_path / "killed").exists()
    assert [worker.num_samples for worker in history.workers] == [2 * len(rows) for rows in feed.glom().collect()]


def test_an_interrupt_ends_job_and_server_and_leaves_a_session_that_runs_again(
    sc: SparkContext, model: Regression
) -> None:
    def slow(row: Any) -> Any:
        time.sleep(0.2)
        return row

    rows = rows_of(4)
    session = SparkSession(sc, model.session, batch_size=1, sync_interval=1)
    threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run(session, model, sc.parallelize(rows_of(1000), 2).map(slow))
    assert session.status() is None
    assert not sc.statusTracker().getActiveJobsIds()
    np.testing.assert_array_equal(model.weights[0], W0)
    assert run(session, model, sc.parallelize(rows, 1)).num_samples == 4
    session.close()


def test_an_interrupt_does_not_wait_for_a_checkpoint_of_a_round_that_never_ends(
    sc: SparkContext, model: Regression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            while index == 1 and number == 4:
                time.sleep(0.1)
            yield row

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            (status := session.status()) and status.num_steps == 7 and any(not cut.done() for cut in cuts)
        ):
            time.sleep(0.05)
        interrupted_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def between_rounds(rounds: Rounds, cut: Any) -> Any:
        cuts.append(ask(rounds, cut))
        return cuts[-1]

    ask, cuts = Rounds.between_rounds, []
    monkeypatch.setattr(Rounds, "between_rounds", between_rounds)
    interrupted_at: list[float] = []
    settings: dict[str, Any] = {"staleness": 0, "batch_size": 1, "sync_interval": 1}
    with SparkSession(sc, model.session, hdfs_dir=str(tmp_path), checkpoint_interval_s=0.1, **settings) as session:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(session, model, sc.parallelize(rows_of(20), 2).mapPartitionsWithIndex(hang))
        assert time.monotonic() - interrupted_at[0] < 15
        assert cuts[-1].cancelled()
        assert not [thread for thread in threading.enumerate() if thread.name == "tensorspark-checkpoint"]


# Two at once


def test_two_sessions_train_at_once_on_one_spark_context(sc: SparkContext) -> None:
    rows = rows_of(40)
    models = [build(), build()]

    def train(model: Regression) -> int:
        with SparkSession(sc, model.session, batch_size=4) as session:
            return run(session, model, sc.parallelize(rows, 1), num_epochs=3).num_samples

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(train, models)) == [120, 120]
    for model in models:
        np.testing.assert_allclose(model.weights[0], sgd(rows, 4, 3)[0], rtol=1e-4)


def test_a_session_trains_one_feed_at_a_time(sc: SparkContext, model: Regression) -> None:
    started, rows = threading.Event(), rows_of(8)
    with SparkSession(sc, model.session, batch_size=8) as session, ThreadPoolExecutor(1) as threads:
        begin_run = ParameterServer.begin_run

        def begin(*arguments: Any, **options: Any) -> int:
            started.set()
            return begin_run(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ParameterServer, "begin_run", begin)
            first = threads.submit(run, session, model, sc.parallelize(rows, 1))
            assert started.wait(30)
            with pytest.raises(ConfigError, match="training already"):
                run(session, model, sc.parallelize(rows, 1))
            assert first.result(60).num_samples == 8


def test_a_combiner_serves_one_session_at_a_time(sc: SparkContext, model: Regression) -> None:
    rows, combiner, other = rows_of(8), MeanDeltaCombiner(), build()

    def train_another_meanwhile(index: int, values: Any) -> Iterator[Any]:
        while not release.exists():
            time.sleep(0.01)
        return iter(values)

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as threads:
        release = Path(directory, "release")
        with SparkSession(sc, model.session, batch_size=8) as session, SparkSession(sc, other.session) as second:
            feed = sc.parallelize(rows, 1).mapPartitionsWithIndex(train_another_meanwhile)
            first = threads.submit(run, session, model, feed, weight_combiner=combiner)
            deadline = time.monotonic() + 60
            while session.status() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            try:
                with pytest.raises(ConfigError, match="MeanDeltaCombiner is at work in another session"):
                    run(second, other, sc.parallelize(rows, 1), weight_combiner=combiner)
            finally:
                release.touch()
            assert first.result(60).num_samples == 8
            assert run(second, other, sc.parallelize(rows, 1), weight_combiner=combiner).num_samples == 8


# Bad input: a clear error on the driver, nothing lost


def test_a_row_of_the_wrong_shape_fails_the_run_naming_partition_row_and_shape(
    sc: SparkContext, model: Regression
) -> None:
    rows = rows_of(40)
    rows[27] = (np.zeros(4, np.float32), rows[27][1])
    with SparkSession(sc, model.session, batch_size=4, sync_interval=1) as session:
        with pytest.raises(
            WorkerFailedError, match=r"partition 1, row 7: expected float32 of shape \[3\] for x:0, got"
        ) as e:
            run(session, model, sc.parallelize(rows, 2))
        assert e.value.partition == 1
        assert e.value.host == socket.gethostname()
        assert "Traceback" in e.value.worker_traceback
        np.testing.assert_array_equal(model.weights[0], W0)
        assert run(session, model, sc.parallelize(rows[:20], 1)).num_samples == 20


def test_a_feed_that_raises_fails_the_run_with_its_traceback(sc: SparkContext, model: Regression) -> None:
    def explode(row: Any) -> Any:
        raise OSError("the feed's own trouble")

    with (
        SparkSession(sc, model.session) as session,
        pytest.raises(WorkerFailedError, match="OSError: the feed's own trouble") as caught,
    ):
        run(session, model, sc.parallelize(rows_of(4), 2).map(explode))
    assert "in explode" in caught.value.worker_traceback


def test_weights_that_become_nan_fail_the_run_naming_the_tensor(sc: SparkContext) -> None:
    model = build(learning_rate=1e30)
    with (
        SparkSession(sc, model.session, batch_size=4, sync_interval=3) as session,
        pytest.raises(WorkerFailedError, match="NaN or infinity in W:0"),
    ):
        run(session, model, sc.parallelize(rows_of(40), 1))
    np.testing.assert_array_equal(model.weights[0], W0)


class Raising(WeightCombiner):
    def compute(self, origin_weight: Any, new_weight: Any, worker_id: int | str = -1, name: str | None = None) -> Any:
        raise ZeroDivisionError("on purpose")


def test_a_combiner_that_raises_is_a_combiner_error(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session, batch_size=4) as session:
        with pytest.raises(CombinerError, match=r"Raising\.compute for W:0 raised ZeroDivisionError: on purpose"):
            run(session, model, sc.parallelize(rows_of(8), 2), weight_combiner=Raising())
        assert session.status() is None


BAD_RUNS = {
    "feed name": ({"feed_name_list": ["x:0", "nope:0"]}, FeedError, "'nope:0', which is not in .* x:0, y:0"),
    "no feed names": ({"feed_name_list": None}, FeedError, "feed_name_list must be a list"),
    "no params": ({"param_list": None}, ConfigError, "param_list must be a list"),
    "empty params": ({"param_list": []}, GraphError, "param_list is empty"),
    "unknown param": ({"param_list": ["V:0"]}, GraphError, "V:0, which is no variable .* W:0, b:0"),
    "fetch": ({"fetches": "nope"}, GraphError, "fetch 'nope'"),
    "list for a feed": ({"feed_rdd": [1, 2]}, FeedError, "feed_rdd must be an RDD of tuples, got list"),
    "epochs": ({"num_epochs": 0}, ConfigError, "num_epochs must be an integer of at least 1, got 0"),
    "seed": ({"seed": "x"}, ConfigError, "seed must be an integer of at least 0, got 'x'"),
    "combiner": ({"weight_combiner": "mean"}, ConfigError, "weight_combiner must be a WeightCombiner"),
    "metadata": ({"run_metadata": object()}, ConfigError, "run_metadata"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_RUNS.values(), ids=BAD_RUNS.keys())
def test_arguments_that_cannot_work_are_refused_before_a_task_starts(
    sc: SparkContext, model: Regression, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(row: Any) -> Any:
        raise AssertionError("a task started")

    with SparkSession(sc, model.session) as session, pytest.raises(error, match=message):
        run(session, model, **{"rdd": sc.parallelize(rows_of(2), 1).map(never), **_as_rdd(options)})


def _as_rdd(options: dict[str, Any]) -> dict[str, Any]:
    return {("rdd" if name == "feed_rdd" else name): value for name, value in options.items()}


def test_a_bare_variable_for_param_list_is_refused(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session) as session, pytest.raises(ConfigError, match="param_list must be a list"):
        run(session, model, sc.parallelize(rows_of(2), 1), param_list=model.W)


def test_an_uninitialized_variable_is_named(sc: SparkContext) -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as tf_session:
        x = tf.placeholder(tf.float32, [None], name="x")
        v = tf.Variable(1.0, name="v")
        with SparkSession(sc, tf_session) as session, pytest.raises(GraphError, match="v:0 is not initialized"):
            session.run(tf.assign_add(v, tf.reduce_sum(x)), sc.parallelize([1.0], 1), ["x:0"], [v])


def test_what_lives_in_the_drivers_process_is_refused_by_name(sc: SparkContext) -> None:
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as tf_session:
        x = tf.placeholder(tf.float32, [None], name="x")
        v = tf.Variable(1.0, name="v")
        doubled = tf.py_func(lambda value: 2 * value, [x], tf.float32, name="double")
        train = tf.assign_add(v, tf.reduce_sum(doubled))
        tf_session.run(tf.global_variables_initializer())
        queue = tf.FIFOQueue(4, tf.float32).dequeue(name="next")
        table = tf.lookup.experimental.MutableHashTable(tf.string, tf.float32, 0.0).lookup(tf.constant(["a"]))
        for fetch, expected in ((train, r"double.* \(PyFunc"), (queue, r"next \(QueueDequeue"), (table, "Mutable")):
            with SparkSession(sc, tf_session) as session, pytest.raises(GraphError, match=expected):
                session.run(fetch, sc.parallelize([1.0], 1), ["x:0"], [v])


def test_a_feed_that_exits_fails_the_run(sc: SparkContext, model: Regression) -> None:
    def leave(row: Any) -> Any:
        raise SystemExit("bad \udcff name")

    with SparkSession(sc, model.session) as session, pytest.raises(WorkerFailedError, match="SystemExit: bad"):
        run(session, model, sc.parallelize(rows_of(4), 1).map(leave))


def test_a_server_that_is_stopped_while_it_trains_says_so(sc: SparkContext, model: Regression) -> None:
    def slow(row: Any) -> Any:
        time.sleep(0.5)
        return row

    with SparkSession(sc, model.session) as session:
        threading.Timer(2, session.stop_param_server).start()
        with pytest.raises(SessionClosedError, match="stop_param_server"):
            run(session, model, sc.parallelize(rows_of(100), 1).map(slow))


def test_a_closed_tensorflow_session_says_so(sc: SparkContext) -> None:
    model = build()
    model.session.close()
    with SparkSession(sc, model.session) as session, pytest.raises(SessionClosedError, match="TensorFlow session"):
        run(session, model, sc.parallelize(rows_of(2), 1))


def test_weights_that_are_not_finite_are_refused_before_training(sc: SparkContext, model: Regression) -> None:
    model.session.run(model.W.initializer, {model.W.initializer.inputs[1]: np.full_like(W0, np.nan)})
    with SparkSession(sc, model.session) as session, pytest.raises(GraphError, match="W:0 holds NaN"):
        run(session, model, sc.parallelize(rows_of(2), 1))


def test_a_closed_session_says_so(sc: SparkContext, model: Regression) -> None:
    session = SparkSession(sc, model.session)
    session.close()
    with pytest.raises(SessionClosedError):
        run(session, model, sc.parallelize(rows_of(2), 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 0},
            r"batch_size \(or spark\.tensorspark\.batch\.size\) must be an integer of at least 1, got 0",
        ),
        ({"server_port": 70000}, "server_port .* from 0 to 65535, got 70000"),
        ({"graph": "another"}, "graph must be the session's own"),
        ({"session": None}, "session must be a compiled keras.Model, .*, got NoneType"),
        ({"spark_context": "local"}, "spark_context must be a SparkContext or a pyspark SparkSession, got str"),
    ],
)
def test_constructor_arguments_that_cannot_work_are_refused(
    sc: SparkContext, model: Regression, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SparkSession(**{"spark_context": sc, "session": model.session, **options})


def test_a_port_that_is_taken_gives_way_to_the_next_and_is_named(
    sc: SparkContext, model: Regression, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with SparkSession(sc, model.session, server_port=port) as session:
            run(session, model, sc.parallelize(rows_of(2), 1), server_reusable=True)
            assert session._server is not None
            assert port < session._server.port <= port + 16
    assert f"port {port} (spark.tensorspark.server.port) is taken" in caplog.text


def test_an_address_that_executors_cannot_reach_is_said_within_seconds(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session, server_host="203.0.113.7", connect_timeout_s=1.0) as session:
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError, match=r"203\.0\.113\.7.*spark\.tensorspark\.server\.host"):
            run(session, model, sc.parallelize(rows_of(2), 2))
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["missing", "a file"])
@pytest.mark.parametrize("setting", ["hdfs_dir", "tmp_dir"])
def test_a_directory_that_cannot_be_used_is_named_with_its_setting(
    sc: SparkContext, model: Regression, tmp_path: Path, kind: str, setting: str
) -> None:
    path = tmp_path / "directory"
    if kind == "a file":
        path.touch()
    expected = rf"spark\.{setting.replace('_', '.')}"
    with (
        pytest.raises(StagingError, match=expected),
        SparkSession(sc, model.session, **{setting: str(path)}) as session,
    ):
        run(session, model, sc.parallelize(rows_of(2), 1))


def test_a_target_is_ignored_with_a_word(sc: SparkContext, model: Regression, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SparkSession(sc, model.session, target="grpc://elsewhere").close()
    assert "target='grpc://elsewhere' is ignored" in caplog.text


# Progress


def test_progress_shows_steps_loss_and_partitions_done(
    sc: SparkContext, model: Regression, capfd: pytest.CaptureFixture[str]
) -> None:
    with SparkSession(sc, model.session, name="mine", batch_size=4) as session:
        run(session, model, sc.parallelize(rows_of(8), 2), progress=True)
    shown = capfd.readouterr().err
    assert "mine: step 2  loss " in shown
    assert "2 of 2 partitions done" in shown
