"""A run that ended too early goes on from its checkpoint, on a real local Spark. See test_chaos for a killed driver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tensorspark import MeanDeltaCombiner, ServerAdam, SparkSession, WeightCombiner
from tensorspark.driver.checkpoints import CheckpointDirectory
from tensorspark.errors import CheckpointError, ConfigError, WorkerFailedError
from tensorspark.ps.messages import Cursor
from tests.regression import W0, Regression, build, rows_of, run

if TYPE_CHECKING:
    from pyspark import SparkContext

ROWS = rows_of(400)
SETTINGS: dict[str, Any] = {"staleness": 0, "sync_interval": 2, "batch_size": 5}


def slowly(fails: Path | None = None) -> Callable[[int, Any], Iterator[Any]]:
    """Rows that take 3 ms each; partition 1 fails at its row 150 while there is no file at `fails`."""

    def read(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            if fails is not None and (index, number) == (1, 150) and not fails.exists():
                raise OSError("the disk is gone")
            time.sleep(0.003)
            yield row

    return read


def interrupt(sc: SparkContext, directory: Path, make: Callable[[], WeightCombiner] = MeanDeltaCombiner) -> str:
    """Trains until the feed fails; returns the directory of its checkpoints."""
    model = build()
    with SparkSession(
        sc, model.session, name="slow", hdfs_dir=str(directory), checkpoint_interval_s=0.1, **SETTINGS
    ) as session:
        feed = sc.parallelize(ROWS, 2).mapPartitionsWithIndex(slowly(directory / "mended"))
        with pytest.raises(WorkerFailedError, match="the disk is gone"):
            run(session, model, feed, weight_combiner=make(), seed=3, progress=True)
        np.testing.assert_array_equal(model.weights[0], W0)
    assert session.checkpoint_dir is not None
    assert any(Path(session.checkpoint_dir).glob("*.msgpack"))
    return session.checkpoint_dir


@pytest.fixture(scope="module")
def interrupted_once(sc: SparkContext, tmp_path_factory: pytest.TempPathFactory) -> str:
    return interrupt(sc, tmp_path_factory.mktemp("interrupted"))


@pytest.fixture
def interrupted(interrupted_once: str, tmp_path: Path) -> str:
    """Checkpoints of an interrupted run, for one test to go on from."""
    return str(shutil.copytree(interrupted_once, tmp_path / "checkpoints"))


def undisturbed(sc: SparkContext, make: Callable[[], WeightCombiner] = MeanDeltaCombiner) -> list[bytes]:
    model = build()
    with SparkSession(sc, model.session, **SETTINGS) as session:
        run(session, model, sc.parallelize(ROWS, 2), weight_combiner=make(), seed=3)
    return [value.tobytes() for value in model.weights]


@pytest.mark.parametrize("make", [MeanDeltaCombiner, lambda: ServerAdam(0.05)], ids=["mean", "adam"])
def test_a_restored_bulk_synchronous_run_ends_with_the_bits_of_an_undisturbed_one(
    sc: SparkContext, model: Regression, tmp_path: Path, make: Callable[[], WeightCombiner]
) -> None:
    url = interrupt(sc, tmp_path, make)
    with SparkSession.restore(sc, url, model.session) as session:
        assert not np.array_equal(model.weights[0], W0)
        history = run(session, model, sc.parallelize(ROWS, 2), weight_combiner=make())
    assert [value.tobytes() for value in model.weights] == undisturbed(sc, make)
    assert (history.num_samples, history.seed, history.name) == (400, 3, "slow")
    assert [worker.num_samples for worker in history.workers] == [200, 200]
    newest = sorted(Path(url).glob("*.safetensors"))[-1]
    np.testing.assert_array_equal(load_file(newest)["W:0"], model.weights[0])


def test_a_restored_run_that_fails_is_begun_again_from_the_checkpoint_with_its_slots(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    def break_off(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            if (index, number) == (1, 190):
                raise OSError("again")
            yield row

    def make() -> WeightCombiner:
        return ServerAdam(0.05)

    url = interrupt(sc, tmp_path, make)
    with SparkSession.restore(sc, url, model.session) as session:
        with pytest.raises(WorkerFailedError, match="again"):
            run(session, model, sc.parallelize(ROWS, 2).mapPartitionsWithIndex(break_off), weight_combiner=make())
        run(session, model, sc.parallelize(ROWS, 2), weight_combiner=make())
    assert [value.tobytes() for value in model.weights] == undisturbed(sc, make)


@pytest.mark.parametrize("num_partitions", [2, 1])
def test_a_run_that_had_pushed_everything_is_restored_and_ends_with_the_checkpoints_weights(
    sc: SparkContext, model: Regression, interrupted: str, num_partitions: int
) -> None:
    directory = CheckpointDirectory(interrupted)
    checkpoint = directory.read_newest()
    at_end = tuple(replace(progress, cursor=Cursor(1, 0)) for progress in checkpoint.partitions)
    directory.write(replace(checkpoint, partitions=at_end))
    with SparkSession.restore(sc, interrupted, model.session) as session:
        restored = model.weights[0]
        history = run(session, model, sc.parallelize(ROWS, num_partitions), weight_combiner=MeanDeltaCombiner())
    assert all(worker.finished for worker in history.workers)
    np.testing.assert_array_equal(model.weights[0], restored)
    assert not np.array_equal(restored, W0)


def test_a_checkpoint_that_no_session_wrote_is_refused(sc: SparkContext, model: Regression, interrupted: str) -> None:
    directory = CheckpointDirectory(interrupted)
    directory.write(replace(directory.read_newest(), plan={"batch_size": 10}))
    with pytest.raises(CheckpointError, match="does not say its run's seed, staleness, sync_interval"):
        SparkSession.restore(sc, interrupted, model.session)


@pytest.mark.parametrize(("interval_s", "num_more"), [(30.0, 1), (0, 0)])
def test_a_restored_run_takes_another_checkpoint_interval(
    sc: SparkContext, model: Regression, interrupted: str, interval_s: float, num_more: int
) -> None:
    before = {path.name for path in Path(interrupted).glob("*.msgpack")}
    with SparkSession.restore(sc, interrupted, model.session, checkpoint_interval_s=interval_s) as session:
        assert session.checkpoint_dir == (interrupted if interval_s else None)
        run(session, model, sc.parallelize(ROWS, 2), weight_combiner=MeanDeltaCombiner())
    assert len({path.name for path in Path(interrupted).glob("*.msgpack")} - before) == num_more


def test_a_finished_run_is_restored_as_its_weights_and_the_next_one_is_new(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    with SparkSession(sc, model.session, hdfs_dir=str(tmp_path), **SETTINGS) as session:
        run(session, model, sc.parallelize(ROWS, 2))
        url = str(session.checkpoint_dir)
    fresh = build()
    with SparkSession.restore(sc, url, fresh.session) as session:
        np.testing.assert_array_equal(fresh.weights[0], model.weights[0])
        assert run(session, fresh, sc.parallelize(ROWS[:50], 2)).num_samples == 50
    assert len(list(Path(url).glob("*.msgpack"))) == 2


def test_with_another_number_of_partitions_the_epoch_is_trained_again_and_said_so(
    sc: SparkContext, model: Regression, interrupted: str, caplog: pytest.LogCaptureFixture
) -> None:
    with SparkSession.restore(sc, interrupted, model.session) as session:
        history = run(session, model, sc.parallelize(ROWS, 1), weight_combiner=MeanDeltaCombiner())
    assert "1 partitions, and 2 in the checkpoint: all partitions begin at epoch 0" in caplog.text
    assert history.workers[0].num_samples == 400


def test_the_default_combiner_stays_the_checkpoints_with_another_number_of_partitions(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "staleness": None}
    with SparkSession(sc, model.session, hdfs_dir=str(tmp_path), checkpoint_interval_s=0.1, **settings) as session:
        feed = sc.parallelize(ROWS, 2).mapPartitionsWithIndex(slowly(tmp_path / "mended"))
        with pytest.raises(WorkerFailedError, match="the disk is gone"):
            run(session, model, feed, weight_combiner=None)
    with SparkSession.restore(sc, str(session.checkpoint_dir), model.session) as session:
        history = run(session, model, sc.parallelize(ROWS, 4), weight_combiner=None)
    assert [worker.num_samples for worker in history.workers] == [100, 100, 100, 100]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"batch_size": 7}, {}, "batch_size must be 5 as in the checkpoint .* got 7"),
        ({}, {"num_epochs": 2}, "num_epochs must be 1 as in the checkpoint"),
        ({}, {"seed": 9}, "seed must be 3 as in the checkpoint .* got 9"),
        ({}, {"shuffle_within_partition": True}, "shuffle_within_partition must be False"),
        ({}, {"weight_combiner": ServerAdam(0.5)}, r"must be MeanDeltaCombiner\(.*got ServerAdam\(learning_rate=0.5"),
        ({}, {"weight_combiner": MeanDeltaCombiner(weighted=True)}, r"weighted=False.*got .*weighted=True"),
    ],
)
def test_what_must_stay_the_same_is_named(
    sc: SparkContext,
    model: Regression,
    interrupted: str,
    arguments: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with (
        SparkSession.restore(sc, interrupted, model.session, **arguments) as session,
        pytest.raises(ConfigError, match=message),
    ):
        run(session, model, sc.parallelize(ROWS, 2), **{"weight_combiner": MeanDeltaCombiner(), **options})


def test_a_checkpoint_of_another_model_names_the_tensors_that_differ(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    from tensorspark.trainers.startup import importing

    with importing():
        import tensorflow.compat.v1 as tf

    with SparkSession(sc, model.session, hdfs_dir=str(tmp_path), **SETTINGS) as session:
        run(session, model, sc.parallelize(ROWS, 2))
    with tf.Graph().as_default() as graph, tf.Session(graph=graph) as other:
        tf.get_variable("W", [4, 1], tf.float32, tf.zeros_initializer())
        with pytest.raises(CheckpointError, match=r"expected W:0 float32\[3, 1\], got W:0 float32\[4, 1\].*b:0.*none"):
            SparkSession.restore(sc, str(session.checkpoint_dir), other)


def test_another_param_list_than_the_checkpoints_is_refused(
    sc: SparkContext, model: Regression, interrupted: str
) -> None:
    with (
        SparkSession.restore(sc, interrupted, model.session) as session,
        pytest.raises(CheckpointError, match=r"another param_list: expected b:0 float32\[1\], got none"),
    ):
        run(session, model, sc.parallelize(ROWS, 2), param_list=[model.W])


def test_a_torn_checkpoint_is_skipped_for_the_one_before_and_said_so(
    sc: SparkContext, model: Regression, interrupted: str, caplog: pytest.LogCaptureFixture
) -> None:
    marks = sorted(Path(interrupted).glob("*.msgpack"))
    assert len(marks) > 1
    marks[-1].write_bytes(marks[-1].read_bytes()[:-5])
    with SparkSession.restore(sc, interrupted, model.session) as session:
        run(session, model, sc.parallelize(ROWS, 2), weight_combiner=MeanDeltaCombiner())
    assert f"skipped {marks[-1].stem}" in caplog.text
    assert [value.tobytes() for value in model.weights] == undisturbed(sc)


@pytest.mark.parametrize("url", [None, "", Path("checkpoints")])
def test_a_url_that_is_no_string_is_refused_by_name(sc: SparkContext, model: Regression, url: Any) -> None:
    with pytest.raises(ConfigError, match=r"url must be the directory of the checkpoints as a string.*got"):
        SparkSession.restore(sc, url, model.session)


def test_checkpoints_without_a_directory_for_them_are_refused(sc: SparkContext, model: Regression) -> None:
    with pytest.raises(ConfigError, match="checkpoint_interval_s needs hdfs_dir"):
        SparkSession(sc, model.session, checkpoint_interval_s=5)
