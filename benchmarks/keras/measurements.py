"""What `benchmarks.keras` measures, each part with what it is compared with: `MEASUREMENTS`."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark

from benchmarks.clusters.local import local_spark
from benchmarks.keras import feed, memory, ours
from benchmarks.keras.peers import BATCH_SIZE, KerasPeer, StepPeer
from benchmarks.measuring.epochs import samples_per_s
from benchmarks.measuring.processes import Peer, seconds_of, started, together
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.workloads.digits import NUM_ROWS, Digits

_NUM_EPOCHS = 8
_NUM_ACCURACY_EPOCHS = 3
_PREDICT_BATCH_SIZES = (BATCH_SIZE, 32, 256)
_STALENESS = (0, 4, None)
_DEADLINE_S = 300.0

Figures = dict[str, list[float]]
"""By what was measured, one value a round."""


@dataclass(frozen=True)
class Setting:
    """What all measurements run on.

    Attributes:
        df: the rows, in Spark's memory.
        num_workers: of Spark, and partitions.
        num_rounds: that rates are measured in.
    """

    spark: Spark
    df: DataFrame
    digits: Digits
    num_workers: int
    num_rounds: int
    report: Report

    def rounds(self, what: str, measure: Callable[[Figures], None]) -> Figures:
        """Measures so many times, after one that does not count."""
        figures: Figures = defaultdict(list)
        for index in range(self.num_rounds + 1):
            say(f"{what}: " + (f"round {index} of {self.num_rounds}" if index else "warming up"))
            measure(figures)
        return {name: values[1:] for name, values in figures.items()}

    def add_rows(self, figures: Figures, names: dict[str, str], unit: str) -> None:
        for name, text in names.items():
            self.report.add(text, statistics.median(figures[name]), unit)


def _peers(make: Callable[..., Any], digits: Digits, num_shares: int) -> list[Peer]:
    return [
        Peer(f"{make.__name__} {index}", make, digits, index, num_shares, deadline_s=_DEADLINE_S)
        for index in range(num_shares)
    ]


def _measure_rate(setting: Setting) -> None:
    our_fits = ours.Fits(setting.spark, setting.df)
    firsts: list[float] = []
    fits, steps = (_peers(make, setting.digits, setting.num_workers) for make in (KerasPeer, StepPeer))

    def measure(figures: Figures) -> None:
        # What has a target stands next to what it is compared with.
        for interval in (16, 100):
            epochs = our_fits.epochs(interval, _NUM_EPOCHS)
            figures[f"ours {interval}"].append(samples_per_s(epochs))
            firsts.append(sum(worker.samples[0] / worker.seconds[0] for worker in epochs))
            alone = together(steps, "train", _NUM_EPOCHS, interval, deadline_s=_DEADLINE_S)
            figures[f"steps {interval}"].append(samples_per_s(alone))
            if interval == 16:
                trained = together(fits, "fit", _NUM_EPOCHS // 2, deadline_s=_DEADLINE_S)
                figures["fit"].append(samples_per_s(trained))
        figures["steps 1"].append(samples_per_s(together(steps, "train", _NUM_EPOCHS, 1, deadline_s=_DEADLINE_S)))

    with started(fits), started(steps):
        figures = setting.rounds("rate", measure)
    processes, workers = f"{setting.num_workers} processes", f"{setting.num_workers} Spark workers"
    names = {"fit": f"{processes}, model.fit"}
    names |= {f"steps {n}": f"{processes}, our trainer, {n} step(s) a call" for n in (1, 16, 100)}
    names |= {f"ours {n}": f"{workers}, sync_interval {n}" for n in (16, 100)}
    setting.add_rows(figures, names, "samples/s")
    setting.report.add(f"{workers}, first epoch", statistics.median(firsts), "samples/s")
    for ours_name, other, target in (
        ("ours 16", "fit", 2.0),
        ("ours 100", "fit", None),
        ("ours 16", "steps 16", 0.75),
        ("ours 100", "steps 100", 0.92),
        ("ours 16", "steps 1", None),
        ("ours 100", "steps 1", None),
    ):
        ratio = median_ratio(figures[ours_name], figures[other])
        setting.report.add(f"{names[ours_name]} / {names[other]}", ratio, "x", at_least=target)


def measure_feed(setting: Setting) -> None:
    def measure(figures: Figures) -> None:
        figures["shuffled"].append(feed.fed_rows_per_s(setting.df, shuffle=True))
        figures["counted"].append(feed.counted_rows_per_s(setting.df))
        figures["in order"].append(feed.fed_rows_per_s(setting.df, shuffle=False))

    figures = setting.rounds("feed", measure)
    names = {
        "counted": "DataFrame to mapInArrow that counts",
        "shuffled": "DataFrame to trainer that counts, shuffled",
        "in order": "DataFrame to trainer that counts, in order",
    }
    setting.add_rows(figures, names, "rows/s")
    for fed in ("shuffled", "in order"):
        ratio = median_ratio(figures[fed], figures["counted"])
        setting.report.add(f"{names[fed]} / {names['counted']}", ratio, "x", at_least=0.8)


def _measure_predict(setting: Setting) -> None:
    num_cores = len(os.sched_getaffinity(0))
    peers = _peers(KerasPeer, setting.digits, num_cores)

    def measure(figures: Figures) -> None:
        for batch_size in _PREDICT_BATCH_SIZES:
            predictions = ours.predictions(setting.spark, setting.df, batch_size)
            for name, df in (("all", predictions), ("new", predictions.select("label", "probabilities"))):
                figures[f"{name} {batch_size}"].append(feed.predicted_rows_per_s(df, NUM_ROWS))
            spans = together(peers, "predict", batch_size, deadline_s=_DEADLINE_S)
            figures[f"keras {batch_size}"].append(NUM_ROWS / seconds_of(spans))
        figures["counted"].append(feed.counted_rows_per_s(setting.df))

    with started(peers):
        figures = setting.rounds("predict", measure)
    names: dict[str, str] = {}
    for size in _PREDICT_BATCH_SIZES:
        names |= {
            f"keras {size}": f"{num_cores} processes, model.predict, batches of {size}",
            f"all {size}": f"session.predict, all columns, batches of {size}",
            f"new {size}": f"session.predict, label and prediction, batches of {size}",
        }
    names["counted"] = "the same DataFrame to mapInArrow that counts, beside predictions"
    setting.add_rows(figures, names, "rows/s")
    for size in _PREDICT_BATCH_SIZES:
        for written in ("all", "new"):
            ratio = median_ratio(figures[f"{written} {size}"], figures[f"keras {size}"])
            target = 0.8 if size == BATCH_SIZE else None
            setting.report.add(f"{names[f'{written} {size}']} / model.predict", ratio, "x", at_least=target)


def _measure_accuracy(setting: Setting) -> None:
    our_fits = ours.Fits(setting.spark, setting.df)
    seeds = range(1, 1 + min(setting.num_rounds, 3))
    figures: Figures = defaultdict(list)
    with started(_peers(KerasPeer, setting.digits, 1)) as (peer,):
        for seed in seeds:
            say(f"accuracy: seed {seed} of {len(seeds)}")
            figures["fit"].append(peer.call("accuracy", _NUM_ACCURACY_EPOCHS, seed, deadline_s=_DEADLINE_S))
            for staleness in _STALENESS:
                for scales in (True, False):
                    figures[f"{scales} {staleness}"].append(
                        our_fits.accuracy(setting.digits, staleness, _NUM_ACCURACY_EPOCHS, seed, scales)
                    )
    alone = statistics.mean(figures["fit"])
    setting.report.add("test accuracy, 1 process, model.fit", 100 * alone, "%")
    for staleness in _STALENESS:
        for scales, text in ((True, ""), (False, ", learning rate not scaled")):
            points = 100 * (statistics.mean(figures[f"{scales} {staleness}"]) - alone)
            what = f"test accuracy over that, {setting.num_workers} Spark workers, staleness {staleness}{text}"
            setting.report.add(what, points, "points", at_least=-0.5 if scales else None)


def measure_memory(report: Report, num_bytes: int = memory.PARTITION_BYTES) -> None:
    """In a Spark of its own: Python workers that have trained before keep a model and TensorFlow's memory."""
    say("memory: starting Spark")
    with local_spark(1) as spark:
        idle = memory.idle_bytes(spark)
        trained = memory.training_bytes(spark, memory.large_partition(spark, num_bytes))
    report.add("anonymous memory, worker with TensorFlow loaded", idle / 1e6, "MB")
    report.add(f"anonymous memory, worker with {num_bytes / 1e6:,.0f} MB of rows", trained / 1e6, "MB")
    report.add("anonymous memory, worker with rows - idle", (trained - idle) / 1e6, "MB", below=600)


MEASUREMENTS: dict[str, Callable[[Setting], None]] = {
    "rate": _measure_rate,
    "feed": measure_feed,
    "predict": _measure_predict,
    "accuracy": _measure_accuracy,
}
