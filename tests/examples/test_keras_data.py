"""What the Keras examples make up: the same rows for a seed, of the kinds that their texts tell of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from examples import keras_mnist, keras_pipeline, keras_streaming, keras_text

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession


@pytest.fixture
def spark(sc: SparkContext) -> Iterator[SparkSession]:
    from pyspark.sql import SparkSession

    return SparkSession(sc)


def test_images_become_bytes_of_pixels_that_give_the_images_back(spark: SparkSession) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 784)).astype(np.uint8)
    rows = keras_mnist.as_dataframe(spark, pixels.astype(np.float32) / 255, np.array([3, 1, 4, 1, 5])).collect()
    assert [row["label"] for row in rows] == [3, 1, 4, 1, 5]
    assert [bytes(row["image"]) for row in rows] == [image.tobytes() for image in pixels]


def test_flowers_kinds_lie_around_each_other(spark: SparkSession) -> None:
    rows = keras_pipeline.flowers(spark, 2000, seed=1).collect()
    # In units of their own spread, as the text has it: mean 20, 3, 700, deviation 4, 0.5, 100.
    distances = {
        kind: np.mean(
            [
                np.hypot(np.hypot((r["length"] - 20) / 4, (r["width"] - 3) / 0.5), (r["weight"] - 700) / 100)
                for r in rows
                if r["kind"] == kind
            ]
        )
        for kind in keras_pipeline.KINDS
    }
    assert distances["bud"] < 1.1 < distances["open"] < 1.9 < distances["withered"]
    assert [r.asDict() for r in rows] == [r.asDict() for r in keras_pipeline.flowers(spark, 2000, seed=1).collect()]


def test_cheap_is_praise_for_a_cable_and_blame_for_a_watch(spark: SparkSession) -> None:
    rows = keras_text.reviews(spark, 4000, seed=1).collect()

    def content(kind: str, is_cheap: bool) -> float:
        chosen = [r["content"] for r in rows if r["kind"] == kind and ("cheap" in r["review"].split()) == is_cheap]
        assert len(chosen) > 100
        return float(np.mean(chosen))

    assert content("cable", True) > content("cable", False) + 0.2
    assert content("watch", True) < content("watch", False) - 0.2
    assert {r["trust"] for r in rows} == {0.5, 1.0}


def test_words_come_the_most_frequent_first(spark: SparkSession) -> None:
    df = spark.createDataFrame([("b a b",), ("b c",), ("a d",)], "review string")
    assert keras_text.frequent_words(df, 3) == ["b", "a", "c"]


def test_the_border_turns_from_file_to_file(tmp_path: Path) -> None:
    for index in (0, 4):
        keras_streaming.write_file(tmp_path, index, 4000, seed=1)
    weights = []
    for name in ("000.parquet", "004.parquet"):
        table = pq.read_table(tmp_path / name)
        x, label = np.array(table["x"].to_pylist()), table["label"].to_numpy()
        # The means of the two labels lie apart along the border's normal.
        apart = x[label == 1].mean(axis=0) - x[label == 0].mean(axis=0)
        weights.append(np.arctan2(apart[1], apart[0]))
    assert weights[0] == pytest.approx(0.0, abs=0.1)
    assert weights[1] == pytest.approx(0.6, abs=0.1)
