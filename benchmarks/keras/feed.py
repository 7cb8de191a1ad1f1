"""How fast rows come from a DataFrame: to a trainer's feed, and to a `mapInArrow` that only counts them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame

from benchmarks.keras.peers import BATCH_SIZE
from benchmarks.workloads.perceptron import NUM_PIXELS
from tensorspark.data.columns import Column
from tensorspark.data.decoders import Decoder
from tensorspark.data.feed import PartitionFeed
from tensorspark.data.spill import EpochCache
from tensorspark.driver.feeding import require_whole_partitions
from tensorspark.driver.inputs import dataframe_feed

_COLUMNS = (Column("image", (NUM_PIXELS,), "float32"), Column("label", (), "int64"))
_CACHE_BYTES = 256 * 2**20
"""The default of ``spark.tensorspark.cache.memory``."""
_INTERVAL = 16
_NUM_EPOCHS = 3


@dataclass(frozen=True)
class _FirstEpoch:
    """A worker's first epoch, of several, with a trainer that only counts. Picklable."""

    decoder: Decoder
    shuffle: bool

    def __call__(self, partition: int, rows: Iterable[Any]) -> Iterator[int]:
        with EpochCache(_CACHE_BYTES, tempfile.gettempdir()) as cache:
            feed = PartitionFeed(
                rows,
                self.decoder,
                partition=partition,
                batch_size=BATCH_SIZE,
                num_epochs=_NUM_EPOCHS,
                shuffle=self.shuffle,
                seed=1,
                cache=cache,
            )
            num_rows = 0
            while (stretch := feed.take(_INTERVAL)) is not None:
                num_rows += stretch.num_rows
                if stretch.is_last_of_epoch:
                    break
            feed.drain()
            yield num_rows


def fed_rows_per_s(df: DataFrame, *, shuffle: bool) -> float:
    """A job that takes every row from the DataFrame into batches of 64, as the first epoch of `fit` does."""
    feed = dataframe_feed(df, _COLUMNS, (("image",), ("label",)))
    tasks = feed.rdd.mapPartitionsWithIndex(_FirstEpoch(feed.decoder, shuffle))
    require_whole_partitions(tasks)
    return _rows_per_s(lambda: sum(tasks.collect()))


def counted_rows_per_s(df: DataFrame) -> float:
    """A job with the simplest function that `mapInArrow` takes."""

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        num_rows = sum(batch.num_rows for batch in batches)
        yield pa.RecordBatch.from_pydict({"num_rows": [num_rows]})

    counted = df.mapInArrow(count, "num_rows bigint")
    return _rows_per_s(lambda: sum(row.num_rows for row in counted.collect()))


def predicted_rows_per_s(predictions: DataFrame, num_rows: int) -> float:
    """A job that computes the predictions and writes them nowhere."""

    def write() -> int:
        predictions.write.format("noop").mode("overwrite").save()
        return num_rows

    return _rows_per_s(write)


def _rows_per_s(count: Callable[[], int]) -> float:
    began = time.perf_counter()
    num_rows = count()
    return num_rows / (time.perf_counter() - began)
