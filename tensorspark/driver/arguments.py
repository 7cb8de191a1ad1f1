"""What callers pass to `SparkSession`, checked on the driver before anything starts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyspark import RDD, SparkContext

from tensorspark.data.decoders import Decoder
from tensorspark.driver.feeding import coalesced, with_validation
from tensorspark.errors import ConfigError, FeedError
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import MeanWeightCombiner, WeightCombiner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """How a feed is to be trained.

    Attributes:
        feed_rdd: as it is trained: coalesced, where all of it trains at once and it has more partitions than slots.
        decoder: reads its elements.
        num_first: workers that the first round waits for.
        has_epochs: whether workers wait for each other at the end of an epoch.
        validates: whether they evaluate held-out rows there.
        validation_split: part of the feed that is held out.
        values: what workers are told in the first epoch, such as a learning rate.
        notes: lines to be shown when it begins.
    """

    feed_rdd: RDD[Any]
    decoder: Decoder
    num_partitions: int
    num_first: int
    combiner: WeightCombiner
    shuffle: bool
    num_epochs: int
    batch_size: int
    seed: int
    has_epochs: bool = False
    validates: bool = False
    validation_split: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrangement:
    """A feed's partitions, as many as are to train at once."""

    feed_rdd: RDD[Any]
    num_partitions: int
    num_first: int


def arrange(
    feed_rdd: RDD[Any],
    num_slots: Callable[[int], int],
    *,
    at_once: bool,
    restored: RunCheckpoint | None = None,
    validation_rdd: RDD[Any] | None = None,
) -> Arrangement:
    """Fits a feed's partitions to the slots.

    Args:
        num_slots: tells how many slots there are, once there are as many as it is given, or no more will come.
        at_once: whether all partitions have to train at the same time.
        restored: the run that is to be continued.
        validation_rdd: held-out rows, spread over the partitions; needs `at_once`.
    """
    num_partitions = feed_rdd.getNumPartitions()
    num_restored = len(restored.partitions) if restored else num_partitions
    slots = num_slots(min(num_partitions, num_restored))
    # With as many partitions as before, the cursors of a restored run stand for the same rows.
    num_at_once = num_restored if num_restored < min(num_partitions, slots) else slots
    if at_once and num_partitions > num_at_once:
        logger.warning(
            "the feed's %d partitions are coalesced to %d (%d slots): in such a run all train at once",
            num_partitions,
            num_at_once,
            slots,
        )
        num_partitions = num_at_once
    if validation_rdd is not None:
        feed_rdd = with_validation(feed_rdd, validation_rdd, num_partitions)
    elif num_partitions < feed_rdd.getNumPartitions():
        feed_rdd = coalesced(feed_rdd, num_partitions)
    return Arrangement(feed_rdd, num_partitions, max(1, min(num_partitions, slots)))


def as_combiner(
    combiner: WeightCombiner | None,
    arranged: Arrangement,
    staleness: int | None,
    restored: RunCheckpoint | None = None,
) -> WeightCombiner:
    """The combiner of `SparkSession.run`; raises ConfigError for what is none."""
    if combiner is None and restored is not None and restored.combiner == MeanWeightCombiner.__name__:
        return MeanWeightCombiner(int(restored.combiner_settings["num"] or 1))  # of the partitions that there were
    if combiner is None and staleness == 0:
        return MeanDeltaCombiner()
    if combiner is None:
        # Not the slots: a cluster that has just started has fewer than it will have, and one makes pushes overwrite.
        return MeanWeightCombiner(max(1, arranged.num_partitions))
    return checked_combiner(combiner, arranged.num_first)


def checked_combiner(combiner: Any, num_workers: int) -> WeightCombiner:
    """`combiner`, if it is one; else raises ConfigError."""
    if not isinstance(combiner, WeightCombiner):
        raise ConfigError(f"weight_combiner must be a WeightCombiner, such as DeltaWeightCombiner(), got {combiner!r}")
    if combiner.moving_rate * num_workers > 1:
        logger.warning(
            "moving_rate %g times %d workers is over 1: the server's weights may overshoot the workers' mean; lower it "
            "to 0.9 / workers, say",
            combiner.moving_rate,
            num_workers,
        )
    return combiner


def as_seed(seed: Any, restored: RunCheckpoint | None) -> int:
    """`seed`, or the continued run's, or one drawn now; raises ConfigError for what is none."""
    if seed is None and restored is None:
        return secrets.randbits(32)
    return checked_count("seed", restored.plan["seed"] if restored and seed is None else seed, minimum=0)


def as_spark_context(spark: Any) -> SparkContext:
    """The SparkContext of a SparkContext or pyspark SparkSession that runs; raises ConfigError for anything else."""
    context = spark if isinstance(spark, SparkContext) else getattr(spark, "sparkContext", None)
    if not isinstance(context, SparkContext):
        raise ConfigError(f"spark_context must be a SparkContext or a pyspark SparkSession, got {type(spark).__name__}")
    if context._jsc is None:
        raise ConfigError("spark_context is stopped: pass one that runs")
    return context


def check_feed(feed_rdd: Any, feed_names: Any, params: Any, run_metadata: Any) -> None:
    """Raises FeedError or ConfigError for arguments of `SparkSession.run` that are not what they should be."""
    if not isinstance(feed_rdd, RDD):
        raise FeedError(
            f"feed_rdd must be an RDD of tuples, got {type(feed_rdd).__name__}; "
            f"for a DataFrame pass df.rdd, its columns in the order of feed_name_list"
        )
    if not isinstance(feed_names, list | tuple) or not feed_names:
        raise FeedError(f"feed_name_list must be a list of tensor names such as [x.name, y_.name], got {feed_names!r}")
    if isinstance(params, str) or hasattr(params, "op") or not isinstance(params, Iterable):
        raise ConfigError(f"param_list must be a list of the variables to synchronize such as [W, b], got {params!r}")
    if run_metadata is not None:
        raise ConfigError("run_metadata cannot be collected from workers: leave it out when feed_rdd is given")


def checked_count(name: str, value: Any, minimum: int = 1) -> int:
    """`value`, if it is an integer of at least `minimum`; else raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value
