"""Overlap, codecs and shards in whole runs, on a real local Spark with two slots."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tensorspark import (
    DeltaWeightCombiner,
    ElasticAveragingCombiner,
    History,
    MeanDeltaCombiner,
    MeanWeightCombiner,
    ServerAdam,
    SparkSession,
    WeightCombiner,
)
from tensorspark.errors import CheckpointError, ConfigError, ModelError, ShardLostError
from tensorspark.trainers.startup import importing
from tests.regression import B0, W0, build, rows_of, run

with importing():
    import keras

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyspark import SparkContext

NUM_FEATURES, NUM_CLASSES, NUM_ROWS = 48, 4, 400
SETTINGS: dict[str, Any] = {"staleness": 0, "sync_interval": 2, "batch_size": 10}


def data() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    return x, (x @ generator.normal(size=(NUM_FEATURES, NUM_CLASSES))).argmax(axis=1)


def classifier() -> keras.Model:
    """Of 13 kB of weights, enough for three shards, in four tensors of which the first holds most."""
    keras.utils.set_random_seed(7)
    layers = [keras.Input((NUM_FEATURES,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(NUM_CLASSES, "softmax")]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def fit(sc: SparkContext, combiner: WeightCombiner | None = None, **settings: Any) -> tuple[list[bytes], History]:
    x, y = data()
    options = settings.pop("options", {"epochs": 3, "validation_split": 0.1})
    model = classifier()
    with SparkSession(sc, model, **{**SETTINGS, **settings}) as session:
        history = session.fit(x, y, seed=3, progress=False, weight_combiner=combiner, **options)
    return [weight.tobytes() for weight in model.get_weights()], history


class Half(DeltaWeightCombiner):
    """A user's own rule: it wants whole tensors."""

    def compute(self, origin_weight: Any, new_weight: Any, worker_id: Any = -1, name: Any = None) -> Any:
        assert "[" not in name
        return origin_weight + (new_weight - origin_weight) / 2


class Locked(DeltaWeightCombiner):
    """One that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


# Shards


@pytest.mark.parametrize("combiner", [lambda: None, lambda: ServerAdam(0.01), Half], ids=["mean", "adam", "own"])
def test_a_bulk_synchronous_fit_over_shards_gives_the_bits_of_one_server(
    sc: SparkContext, combiner: Callable[[], WeightCombiner | None]
) -> None:
    alone, expected = fit(sc, combiner())
    sharded, history = fit(sc, combiner(), num_shards=3)
    assert sharded == alone
    assert history.history == expected.history
    assert history.num_samples == expected.num_samples
    # A push is cut into parts, none of which travels twice.
    moved, whole = ([(w.num_bytes_pushed, w.num_bytes_pulled) for w in h.workers] for h in (history, expected))
    assert moved == whole


@pytest.mark.parametrize("staleness", [1, None])
def test_shards_that_go_each_at_its_pace_lose_no_push(sc: SparkContext, staleness: int | None) -> None:
    _, history = fit(sc, num_shards=2, staleness=staleness)
    assert history.num_samples == 3 * (NUM_ROWS - NUM_ROWS // 10)
    assert all(worker.finished and worker.num_applied == worker.num_pushed for worker in history.workers)
    assert history.history["val_accuracy"][-1] > 0.6


def test_more_shards_than_the_weights_are_worth_are_fewer_and_said_once(
    sc: SparkContext, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    with SparkSession(sc, model.session, num_shards=4, **SETTINGS) as session:
        run(session, model, sc.parallelize(rows_of(40), 2))
        run(session, model, sc.parallelize(rows_of(40), 2), server_reusable=True)
    said = [record.getMessage() for record in caplog.records if "num_shards=4" in record.getMessage()]
    assert said == ["1 shard(s) instead of num_shards=4: the weights are 128 bytes in 2 tensors"]


def test_runs_follow_one_another_on_shards(sc: SparkContext) -> None:
    x, y = data()
    model = classifier()
    with SparkSession(sc, model, num_shards=2, **SETTINGS) as session:
        first = session.fit(x, y, seed=3, progress=False)
        second = session.fit(x, y, seed=4, progress=False)
    assert second.history["loss"][0] < first.history["loss"][0]


def test_workers_are_told_the_advertised_address_of_every_shard(sc: SparkContext) -> None:
    hosts: list[str] = []

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            hosts.extend(place.address.host for place in session._server.places)  # type: ignore[union-attr]

    x, y = data()
    with SparkSession(sc, classifier(), num_shards=2, server_host="127.0.0.2", **SETTINGS) as session:
        session.fit(x, y, progress=False, callbacks=[Look()])
    assert hosts == ["127.0.0.2", "127.0.0.2"]


def test_a_shards_process_that_is_killed_fails_the_run_within_seconds(sc: SparkContext) -> None:
    killed_at = 0.0

    class Killer(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            nonlocal killed_at
            if epoch == 1:
                killed_at = time.monotonic()
                os.kill(session._server._fleet._hosts._processes[0].pid, signal.SIGKILL)  # type: ignore[union-attr]

    x, y = data()
    with (
        SparkSession(sc, classifier(), num_shards=2, **SETTINGS) as session,
        pytest.raises(ShardLostError, match=r"(shard 1 \(pid \d+\) ended with exit status -9|connection to a shard)"),
    ):
        session.fit(x, y, epochs=50, progress=False, callbacks=[Killer()])
    assert time.monotonic() - killed_at < 20
    after, _ = fit(sc, num_shards=2)
    assert after == fit(sc)[0]


@pytest.mark.parametrize(("staleness", "num_after"), [(0, 2), (0, 1), (None, 2), (None, 1)])
def test_a_run_over_shards_is_restored_with_as_many_or_with_others(
    sc: SparkContext, tmp_path: Path, staleness: int | None, num_after: int
) -> None:
    from tensorspark.driver.checkpoints import CheckpointDirectory

    def wait_for_a_checkpoint(epoch: int) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                if CheckpointDirectory(str(session.checkpoint_dir)).read_newest().epochs.epoch >= epoch:  # type: ignore
                    return
            except CheckpointError:
                pass
            assert time.monotonic() < deadline, f"no checkpoint of epoch {epoch}"
            time.sleep(0.02)

    def fail(epoch: int, logs: Any) -> None:
        if epoch == 2:
            raise OSError("the plug was pulled")

    x, y = data()
    options: dict[str, Any] = {"epochs": 4, "validation_split": 0.1}
    settings = {**SETTINGS, "staleness": staleness, "num_shards": 2, "hdfs_dir": str(tmp_path)}
    waiting = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: wait_for_a_checkpoint(epoch))
    failing = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    with (
        SparkSession(sc, classifier(), checkpoint_interval_s=0.05, **settings) as session,
        pytest.raises(ModelError, match="the plug was pulled"),
    ):
        session.fit(x, y, seed=3, progress=False, callbacks=[waiting, failing], **options)
    restored = classifier()
    with SparkSession.restore(sc, str(session.checkpoint_dir), restored, num_shards=num_after) as again:
        history = again.fit(x, y, seed=3, progress=False, **options)
    undisturbed, expected = fit(sc, staleness=staleness, options=options)
    assert history.num_samples == expected.num_samples
    assert [len(values) for values in history.history.values()] == [4] * 4
    if staleness == 0:
        assert [weight.tobytes() for weight in restored.get_weights()] == undisturbed
        assert history.history == expected.history


# Overlap


def test_overlapped_steps_in_step_are_what_the_rule_says_and_repeat(sc: SparkContext) -> None:
    """Two workers, one step an interval, one interval late: the same in plain numpy."""
    num_steps, batch = 12, 10
    rows = rows_of(2 * num_steps * batch)
    halves = rows[: num_steps * batch], rows[num_steps * batch :]

    def step(w: NDArray[np.float64], half: list[Any], index: int) -> NDArray[np.float64]:
        part = half[index * batch : (index + 1) * batch]
        x, y = np.array([row[0] for row in part], np.float64), np.array([row[1] for row in part], np.float64)
        error = x @ w[:3, None] + w[3] - y
        return -0.1 * 2 * np.append((x.T @ error)[:, 0], error.sum()) / batch

    server = np.append(W0[:, 0], B0[0]).astype(np.float64)
    bases = [server, server]
    pulled = None
    for index in range(num_steps):
        deltas = [step(base, half, index) for base, half in zip(bases, halves, strict=True)]
        bases = [(base if pulled is None else pulled) + delta for base, delta in zip(bases, deltas, strict=True)]
        server = pulled = server + np.mean(deltas, axis=0)

    results = []
    for _ in range(2):
        model = build()
        settings = {"staleness": 1, "overlap": True, "sync_interval": 1, "batch_size": batch}
        with SparkSession(sc, model.session, **settings) as session:
            history = run(session, model, sc.parallelize(rows, 2), weight_combiner=MeanDeltaCombiner())
        results.append(np.append(model.weights[0][:, 0], model.weights[1][0]))
    np.testing.assert_allclose(results[0], server, atol=1e-6)
    np.testing.assert_array_equal(results[0], results[1])
    assert history.num_samples == len(rows)
    assert all(worker.num_pushed == num_steps and worker.hidden_s > 0 for worker in history.workers)


@pytest.mark.parametrize(
    ("staleness", "combiner"),
    [(2, MeanDeltaCombiner), (None, DeltaWeightCombiner), (None, lambda: MeanWeightCombiner(2))],
    ids=["mean", "sum", "weights"],
)
def test_an_overlapped_fit_learns_with_any_rule_and_trains_every_row_once(
    sc: SparkContext, staleness: int | None, combiner: Callable[[], WeightCombiner]
) -> None:
    options = {"epochs": 4, "validation_split": 0.1, "scale_learning_rate": False}
    _, history = fit(sc, combiner(), overlap=True, staleness=staleness, options=options)
    assert history.num_samples == 4 * (NUM_ROWS - NUM_ROWS // 10)
    assert history.history["val_accuracy"][-1] > 0.6


def test_overlap_and_shards_and_codecs_go_together(sc: SparkContext) -> None:
    settings = {"staleness": 1, "overlap": True, "compression": "int8", "pull_compression": "bfloat16"}
    first, history = fit(sc, num_shards=2, **settings)
    again, _ = fit(sc, num_shards=2, **settings)
    assert first == again
    assert history.history["val_accuracy"][-1] > 0.6


def test_a_stop_request_ends_an_overlapped_fit(sc: SparkContext) -> None:
    x, y = data()

    class Stop(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = epoch == 1

    with SparkSession(sc, classifier(), **{**SETTINGS, "staleness": 1, "overlap": True}) as session:
        history = session.fit(x, y, epochs=30, progress=False, callbacks=[Stop()])
    assert history.epoch == (0, 1)


# Codecs


@pytest.mark.parametrize(
    ("compression", "share"), [("float16", 0.51), ("bfloat16", 0.51), ("int8", 0.27), ("topk:0.05", 0.09)]
)
def test_a_lossy_codec_of_pushes_sends_less_and_learns_the_same(
    sc: SparkContext, compression: str, share: float
) -> None:
    """With top-k too: what is left out is sent later."""
    options = {"epochs": 6, "validation_split": 0.1}
    _, whole = fit(sc, options=options)
    _, coded = fit(sc, compression=compression, options=options)
    pushed, all_pushed = (sum(worker.num_bytes_pushed for worker in h.workers) for h in (coded, whole))
    assert pushed < share * all_pushed
    assert coded.history["val_accuracy"][-1] == pytest.approx(whole.history["val_accuracy"][-1], abs=0.1)


@pytest.mark.parametrize(("compression", "share"), [("float16", 0.51), ("bfloat16", 0.51), ("int8", 0.27)])
def test_a_codec_of_pulls_sends_less_and_learns_the_same(sc: SparkContext, compression: str, share: float) -> None:
    _, whole = fit(sc)
    _, coded = fit(sc, pull_compression=compression)
    pulled, all_pulled = (sum(worker.num_bytes_pulled for worker in h.workers) for h in (coded, whole))
    assert pulled < share * all_pulled
    assert coded.history["val_accuracy"][-1] == pytest.approx(whole.history["val_accuracy"][-1], abs=0.1)


def test_rows_of_an_embedding_travel_alone_and_change_no_bit(sc: SparkContext) -> None:
    num_words, num_rows = 20_000, 80
    generator = np.random.default_rng(2)
    words = generator.integers(0, num_words, size=(num_rows, 5)).astype(np.int32)
    labels = (words.sum(axis=1) % 2).astype(np.int64)

    def train(**settings: Any) -> tuple[list[bytes], History]:
        keras.utils.set_random_seed(7)
        model = keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(num_words, 8),
                keras.layers.Flatten(),
                keras.layers.Dense(2, "softmax"),
            ]
        )
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        with SparkSession(sc, model, **{**SETTINGS, **settings}) as session:
            history = session.fit(words, labels, epochs=2, seed=3, progress=False)
        return [weight.tobytes() for weight in model.get_weights()], history

    plain, _ = train()
    rows, history = train(compression="rows", pull_compression="rows")
    assert rows == plain
    num_bytes = num_words * 8 * 4
    for worker in history.workers:
        assert worker.num_bytes_pushed < 0.02 * worker.num_pushed * num_bytes
        assert worker.num_bytes_pulled < 1.5 * num_bytes  # the first is whole


# What cannot work


@pytest.mark.parametrize(
    ("settings", "combiner", "message"),
    [
        ({"compression": "zip"}, None, r"none, float16, bfloat16, int8, topk:R, rows .*got 'zip'"),
        ({"compression": "topk:2"}, None, "topk"),
        ({"pull_compression": "topk:0.1"}, None, "would set all but a few weights to zero"),
        ({"compression": "topk:0.1"}, MeanWeightCombiner(2), "sends changes only, and MeanWeightCombiner takes whole"),
        ({"compression": "rows"}, ElasticAveragingCombiner(0.4), "sends changes only, and ElasticAveragingCombiner"),
        ({"pull_compression": "int8"}, MeanWeightCombiner(2), "rounds the weights .* MeanWeightCombiner would take"),
        ({"overlap": True, "staleness": 1}, ElasticAveragingCombiner(0.4), "overlap is not for ElasticAveraging"),
        ({"overlap": True}, None, "set staleness to 1"),
        ({"num_shards": 2}, Locked(), "Locked cannot be sent to the processes of shards"),
        ({"num_shards": 3, "shards_on": "executors"}, None, "takes 2 slots, and the cluster has 2"),
    ],
)
def test_what_cannot_work_is_said_before_a_task_starts(
    sc: SparkContext, settings: dict[str, Any], combiner: WeightCombiner | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(sc, combiner, **settings)
