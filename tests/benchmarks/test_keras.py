"""What `benchmarks.keras` measures with: its rows, its peers and its ways to measure. No rates: they differ."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.keras import __main__ as program
from benchmarks.keras import feed, measurements, memory
from benchmarks.measuring.report import Report
from benchmarks.workloads.digits import Digits, find
from examples import mnist_data

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession as Spark


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Digits:
    """The repository's own, wherever MNIST may be."""
    monkeypatch.setenv(mnist_data.DATA_DIR_VARIABLE, str(mnist_data.DATA_DIR))
    return find()


@pytest.fixture
def spark(sc: SparkContext) -> Spark:
    from pyspark.sql import SparkSession

    return SparkSession(sc)


def test_digits_are_repeated_to_as_many_rows_as_mnist_has(digits: Digits) -> None:
    images, labels = digits.train()
    own_images, own_labels, _, _ = mnist_data.load(digits.files)
    num_own = len(own_images)

    assert images.shape == (60_000, 784)
    assert 0 < num_own < 60_000
    np.testing.assert_array_equal(images[num_own : num_own + 5], own_images[:5])
    np.testing.assert_array_equal(labels[-3:], [own_labels[index % num_own] for index in (59_997, 59_998, 59_999)])


def test_the_dataframe_has_the_rows_that_the_peers_have(digits: Digits) -> None:
    images, labels = digits.share(1, 200)
    (batch,) = digits.batches(1, 200)

    assert labels.tolist() == digits.train()[1][1::200].tolist() == batch.column("label").to_pylist()
    np.testing.assert_array_equal(np.array(batch.column("image").to_pylist(), np.float32), images)


def test_both_ways_to_count_read_every_row(spark: Spark, monkeypatch: pytest.MonkeyPatch) -> None:
    df = memory.large_partition(spark, 300 * 4 * 784).repartition(2)
    counts: list[int] = []
    monkeypatch.setattr(feed, "_rows_per_s", lambda count: counts.append(count()))

    feed.fed_rows_per_s(df, shuffle=True)
    feed.fed_rows_per_s(df, shuffle=False)
    feed.counted_rows_per_s(df)

    assert counts == [300, 300, 300]


def test_the_peak_is_that_of_a_worker_in_spark_and_of_no_other_process(sc: SparkContext) -> None:
    num_bytes = 150 * 2**20

    def hold(_: object) -> list[int]:
        held = np.ones(num_bytes, np.uint8)
        deadline = time.monotonic() + 0.5  # for the watch to look several times
        while time.monotonic() < deadline:
            assert held[-1]
        return [os.getpid()]

    own = np.ones(4 * num_bytes, np.uint8)  # not a worker's
    with memory.PeakOfWorkers() as peak:
        sc.parallelize([0], 1).mapPartitions(hold).collect()

    assert own[-1] == 1
    assert num_bytes <= peak.num_bytes < 4 * num_bytes


def test_a_worker_that_trains_has_at_least_the_memory_of_an_idle_one(spark: Spark) -> None:
    df = memory.large_partition(spark, 2**20)  # small: what remains is TensorFlow's own

    assert [field.simpleString() for field in df.schema] == ["image:array<float>", "label:bigint"]
    assert df.rdd.getNumPartitions() == 1
    assert 50e6 < memory.idle_bytes(spark) <= memory.training_bytes(spark, df)


def test_an_unknown_measurement_is_refused() -> None:
    with pytest.raises(SystemExit):
        program.make_parser().parse_args(["--only", "speed"])

    assert program.make_parser().parse_args(["--only", "feed", "memory"]).only == ["feed", "memory"]


def test_the_feed_is_reported_with_its_target(spark: Spark, digits: Digits) -> None:
    df = memory.large_partition(spark, 300 * 4 * 784)
    report = Report("test", ["numpy"])

    measurements.measure_feed(measurements.Setting(spark, df, digits, 1, 1, report))

    rows = {row.name: row for row in report.rows}
    counted, fed = "DataFrame to mapInArrow that counts", "DataFrame to trainer that counts, shuffled"
    assert rows[f"{fed} / {counted}"].target == 0.8
    assert rows[f"{fed} / {counted}"].value == pytest.approx(rows[fed].value / rows[counted].value)
