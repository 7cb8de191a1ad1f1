"""How workers are kept in step, on a real local Spark with two slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tensorspark import (
    DeltaWeightCombiner,
    ElasticAveragingCombiner,
    MeanDeltaCombiner,
    ServerAdam,
    ServerSGD,
    SparkSession,
    StalenessScaledCombiner,
    WeightCombiner,
)
from tensorspark.errors import ConfigError
from tests.regression import B0, TRUE_W, W0, Regression, build, rows_of, run

if TYPE_CHECKING:
    from pyspark import SparkContext

BATCH = 10


def jittered(seed: int) -> Callable[[int, Any], Iterator[Any]]:
    """Has rows come unevenly: each partition pauses elsewhere."""

    def pause(index: int, rows: Any) -> Iterator[Any]:
        generator = np.random.default_rng((seed, index))
        for row in rows:
            if generator.random() < 0.02:
                time.sleep(0.01)
            yield row

    return pause


def final_bytes(sc: SparkContext, rows: list[Any], num_partitions: int, **options: Any) -> bytes:
    model = build()
    feed = sc.parallelize(rows, num_partitions).mapPartitionsWithIndex(jittered(options.pop("timing", 0)))
    with SparkSession(sc, model.session, staleness=0, sync_interval=2, batch_size=BATCH) as session:
        run(session, model, feed, seed=5, shuffle_within_partition=True, num_epochs=2, **options)
    return b"".join(value.tobytes() for value in model.weights)


def test_bulk_synchronous_rounds_of_one_step_are_plain_sgd_on_the_joined_batches(
    sc: SparkContext, model: Regression
) -> None:
    num_steps = 30
    rows = rows_of(2 * num_steps * BATCH)
    with SparkSession(sc, model.session, staleness=0, sync_interval=1, batch_size=BATCH) as session:
        run(session, model, sc.parallelize(rows, 2), weight_combiner=MeanDeltaCombiner())
    W, b = W0.astype(np.float64), B0.astype(np.float64)
    half = len(rows) // 2
    for step in range(num_steps):
        batches = [rows[first + step * BATCH : first + (step + 1) * BATCH] for first in (0, half)]
        x = np.array([row[0] for batch in batches for row in batch], np.float64)
        y = np.array([row[1] for batch in batches for row in batch], np.float64)
        error = x @ W + b - y
        W, b = W - 0.1 * 2 * x.T @ error / len(x), b - 0.1 * 2 * error.mean(axis=0)
    np.testing.assert_allclose(model.weights[0], W, atol=1e-6)
    np.testing.assert_allclose(model.weights[1], b, atol=1e-6)


@pytest.mark.parametrize("combiner", [DeltaWeightCombiner, MeanDeltaCombiner, lambda: ServerAdam(0.1)])
def test_a_bulk_synchronous_run_gives_the_same_bits_whatever_the_timing(
    sc: SparkContext, combiner: Callable[[], WeightCombiner]
) -> None:
    rows = rows_of(303)
    first = final_bytes(sc, rows, 2, weight_combiner=combiner(), timing=1)
    assert final_bytes(sc, rows, 2, weight_combiner=combiner(), timing=2) == first
    assert final_bytes(sc, rows[::-1], 2, weight_combiner=combiner(), timing=1) != first


def test_a_bulk_synchronous_feed_with_more_partitions_than_slots_is_coalesced_and_says_so(
    sc: SparkContext, model: Regression, caplog: pytest.LogCaptureFixture
) -> None:
    feed = sc.parallelize(rows_of(205), 5).cache()
    sizes = [len(rows) for rows in feed.glom().collect()]
    with SparkSession(sc, model.session, staleness=0, sync_interval=2, batch_size=BATCH) as session:
        history = run(session, model, feed)
    assert [worker.num_samples for worker in history.workers] == [sum(sizes[:2]), sum(sizes[2:])]
    assert "5 partitions are coalesced to 2 (2 slots)" in caplog.text


@pytest.mark.parametrize("staleness", [0, 1, 3, None])
def test_uneven_empty_and_late_partitions_neither_hang_a_run_nor_lose_rows(
    sc: SparkContext, model: Regression, staleness: int | None
) -> None:
    rows = rows_of(200)

    def partition(index: int, _: Any) -> Iterator[Any]:
        yield from {0: rows[:150], 1: [], 2: rows[150:151], 3: rows[151:]}.get(index, [])

    feed = sc.parallelize(range(5), 5).mapPartitionsWithIndex(partition)
    with SparkSession(sc, model.session, staleness=staleness, sync_interval=2, batch_size=4) as session:
        history = run(session, model, feed, num_epochs=2)
    assert history.num_samples == 400
    assert all(worker.finished for worker in history.workers)


@pytest.mark.parametrize(
    "make",
    [
        MeanDeltaCombiner,
        lambda: MeanDeltaCombiner(weighted=True),
        StalenessScaledCombiner,
        lambda: ElasticAveragingCombiner(0.3),
        lambda: ServerSGD(0.7, momentum=0.5, nesterov=True),
        lambda: ServerAdam(0.1, beta_1=0.5, epsilon=1e-2),
    ],
    ids=["mean", "weighted", "scaled", "elastic", "nesterov", "adam"],
)
@pytest.mark.parametrize("staleness", [0, 2, None])
def test_every_combiner_learns_in_every_mode(
    sc: SparkContext, model: Regression, make: Callable[[], WeightCombiner], staleness: int | None
) -> None:
    rows = sc.parallelize(rows_of(400), 2).cache()
    with SparkSession(sc, model.session, staleness=staleness, sync_interval=2, batch_size=BATCH) as session:
        run(session, model, rows, weight_combiner=make(), num_epochs=12)
    np.testing.assert_allclose(model.weights[0], TRUE_W, atol=0.2)


def test_the_key_and_the_argument_say_the_same(sc: SparkContext, model: Regression) -> None:
    with SparkSession(sc, model.session, staleness="async") as session:
        assert session._engine.config.staleness is None
    with SparkSession(sc, model.session, staleness=3) as session:
        assert session._engine.config.staleness == 3


@pytest.mark.parametrize("staleness", [-1, 1.5, True, "bulk", "2"])
def test_a_staleness_that_is_none_is_refused_by_name(sc: SparkContext, model: Regression, staleness: Any) -> None:
    with pytest.raises(ConfigError, match=r"staleness \(or spark.tensorspark.staleness\) must be an integer"):
        SparkSession(sc, model.session, staleness=staleness)


def test_a_setting_that_does_not_exist_is_refused_with_the_valid_ones(sc: SparkContext, model: Regression) -> None:
    with pytest.raises(ConfigError, match=r"unknown argument stalenes; .* staleness, overlap, compression"):
        SparkSession(sc, model.session, stalenes=3)
