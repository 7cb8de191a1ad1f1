"""What callers pass to `SparkSession`, checked on the driver before anything starts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pyspark import RDD, SparkContext

from tensorspark.driver.feeding import coalesced
from tensorspark.errors import ConfigError, FeedError
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import MeanWeightCombiner, WeightCombiner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """How a feed is to be trained.

    Attributes:
        feed_rdd: as it is trained: coalesced, where it has more partitions than a bulk-synchronous run has slots.
        num_first: workers that the first round waits for.
    """

    feed_rdd: RDD[Any]
    num_partitions: int
    num_first: int
    combiner: WeightCombiner
    shuffle: bool
    num_epochs: int
    seed: int


def make_plan(
    feed_rdd: RDD[Any],
    combiner: Any,
    shuffle: Any,
    num_epochs: Any,
    seed: Any,
    *,
    staleness: int | None,
    num_slots: Callable[[int], int],
    restored: RunCheckpoint | None = None,
) -> RunPlan:
    """Checks and completes what `SparkSession.run` takes; see there. Raises ConfigError.

    Args:
        num_slots: tells how many slots there are, once there are as many as it is given, or no more will come.
        restored: the run that is to be continued.
    """
    num_partitions = feed_rdd.getNumPartitions()
    num_restored = len(restored.partitions) if restored else num_partitions
    slots = num_slots(min(num_partitions, num_restored))
    # With as many partitions as before, the cursors of a restored run stand for the same rows.
    num_at_once = num_restored if num_restored < min(num_partitions, slots) else slots
    if staleness == 0 and num_partitions > num_at_once:
        logger.warning(
            "the feed's %d partitions are coalesced to %d (%d slots): in a bulk-synchronous run all train at once",
            num_partitions,
            num_at_once,
            slots,
        )
        feed_rdd, num_partitions = coalesced(feed_rdd, num_at_once), num_at_once
    num_first = max(1, min(num_partitions, slots))
    return RunPlan(
        feed_rdd=feed_rdd,
        num_partitions=num_partitions,
        num_first=num_first,
        combiner=_as_combiner(combiner, num_partitions, num_first, staleness, restored),
        shuffle=bool(shuffle),
        num_epochs=_checked_count("num_epochs", num_epochs),
        seed=_as_seed(restored.plan["seed"] if restored and seed is None else seed),
    )


def as_spark_context(spark: Any) -> SparkContext:
    """The SparkContext of a SparkContext or pyspark SparkSession that runs; raises ConfigError for anything else."""
    context = spark if isinstance(spark, SparkContext) else getattr(spark, "sparkContext", None)
    if not isinstance(context, SparkContext):
        raise ConfigError(f"spark_context must be a SparkContext or a pyspark SparkSession, got {type(spark).__name__}")
    if context._jsc is None:
        raise ConfigError("spark_context is stopped: pass one that runs")
    return context


def as_tensorflow_session(session: Any, graph: Any) -> Any:
    """`session`, if it looks like a TensorFlow 1 session (TensorFlow is not imported here); else raises ConfigError."""
    if not (callable(getattr(session, "run", None)) and hasattr(session, "graph")):
        raise ConfigError(f"session must be a tf.compat.v1.Session, got {type(session).__name__}")
    if graph is not None and graph is not session.graph:
        raise ConfigError("graph must be the session's own: a session runs no other; make a session with that graph")
    return session


def _as_combiner(
    combiner: WeightCombiner | None,
    num_partitions: int,
    num_workers: int,
    staleness: int | None,
    restored: RunCheckpoint | None,
) -> WeightCombiner:
    if combiner is None and restored is not None and restored.combiner == MeanWeightCombiner.__name__:
        return MeanWeightCombiner(int(restored.combiner_settings["num"] or 1))  # of the partitions that there were
    if combiner is None and staleness == 0:
        return MeanDeltaCombiner()
    if combiner is None:
        # Not the slots: a cluster that has just started has fewer than it will have, and one makes pushes overwrite.
        return MeanWeightCombiner(max(1, num_partitions))
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


def _as_seed(seed: Any) -> int:
    return secrets.randbits(32) if seed is None else _checked_count("seed", seed, minimum=0)


def _checked_count(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value
