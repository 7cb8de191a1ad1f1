"""How fast Keras training and prediction are on a DataFrame, next to Keras alone on arrays in memory.

The model is 784-128-10 with Adam, in batches of 64, on MNIST (``MNIST_DATA_DIR``) or, without it, on the repository's
own digits, repeated to 60,000 rows; two Spark workers (or ``--workers``) of one TensorFlow thread each. Measured are,
each alone with ``--only``:

rate
    samples/s of both workers from the second epoch on, with what lies between steps and between epochs (exchange, the
    epoch's end on the driver), bulk-synchronous; against two processes at the same time, each with one thread and half
    of the rows: ``model.fit``; and our trainer without a server, that takes the same number of steps in a call
    (the targets), or one.
feed
    rows/s of a Spark job from the DataFrame, cached in Spark's memory, to batches at a trainer that only counts, as in
    the first of several epochs; against a job with a `mapInArrow` that only counts.
predict
    rows/s of ``session.predict`` on that DataFrame, written nowhere; against ``model.predict`` on arrays in one process
    a core, in batches of the same size: 64, as in training (the target), 32, the default of Keras, and 256.
accuracy
    on the test set, after 3 epochs at ``sync_interval=16``, over the same seeds; against one process with all rows.
    With the learning rate multiplied by the number of workers, as `fit` does by default, and left as it is.
memory
    the most anonymous memory of a worker in two epochs on a partition of 1 GB, over that of a worker that has only
    loaded TensorFlow.

All that is compared is measured in turns in each round: figures are medians over the rounds, ratios the medians of the
rounds' ratios. On a machine with other work only the ratios mean something, and they too only roughly: three busy
processes get more of a crowded machine than two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as Spark

from benchmarks import keras_digits, keras_feed, keras_memory, keras_spark
from benchmarks.keras_digits import NUM_ROWS, Digits
from benchmarks.keras_peers import BATCH_SIZE, KerasPeer, StepPeer
from benchmarks.processes import Peer, seconds_of, started, together
from benchmarks.report import Report, argument_parser, median_ratio, say
from benchmarks.softmax import Epochs

_NUM_EPOCHS = 8
_NUM_ACCURACY_EPOCHS = 3
_PREDICT_BATCH_SIZES = (BATCH_SIZE, 32, 256)
_STALENESS = (0, 4, None)
_PACKAGES = ("numpy", "tornado", "tensorflow", "keras", "pyspark", "pyarrow")
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


def main() -> int:
    arguments = _parser().parse_args()
    chosen = arguments.only or list(_MEASUREMENTS)
    digits = keras_digits.find()
    report = Report(f"Keras: 784-128-10, batches of 64, on {digits}", _PACKAGES)
    in_spark = [name for name in chosen if name != "memory"]
    if in_spark:
        say("starting Spark")
        with keras_spark.spark_session(arguments.workers) as spark:
            df = keras_spark.cached_rows(spark, digits, arguments.workers)
            setting = Setting(spark, df, digits, arguments.workers, 2 if arguments.quick else 5, report)
            for name in in_spark:
                _MEASUREMENTS[name](setting)
    if "memory" in chosen:
        _measure_memory(report, keras_memory.PARTITION_BYTES)
    return report.conclude(arguments.json, arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(_MEASUREMENTS), help="measure only these")
    parser.add_argument("--workers", type=int, default=2, help="of Spark, and processes to compare with (default: 2)")
    return parser


def _peers(make: Callable[..., Any], digits: Digits, num_shares: int) -> list[Peer]:
    return [
        Peer(f"{make.__name__} {index}", make, digits, index, num_shares, deadline_s=_DEADLINE_S)
        for index in range(num_shares)
    ]


def _measure_rate(setting: Setting) -> None:
    ours = keras_spark.Fits(setting.spark, setting.df)
    firsts: list[float] = []
    fits, steps = (_peers(make, setting.digits, setting.num_workers) for make in (KerasPeer, StepPeer))

    def measure(figures: Figures) -> None:
        # What has a target stands next to what it is compared with.
        for interval in (16, 100):
            epochs = ours.epochs(interval, _NUM_EPOCHS)
            figures[f"ours {interval}"].append(_samples_per_s(epochs))
            firsts.append(sum(worker.samples[0] / worker.seconds[0] for worker in epochs))
            alone = together(steps, "train", _NUM_EPOCHS, interval, deadline_s=_DEADLINE_S)
            figures[f"steps {interval}"].append(_samples_per_s(alone))
            if interval == 16:
                trained = together(fits, "fit", _NUM_EPOCHS // 2, deadline_s=_DEADLINE_S)
                figures["fit"].append(_samples_per_s(trained))
        figures["steps 1"].append(_samples_per_s(together(steps, "train", _NUM_EPOCHS, 1, deadline_s=_DEADLINE_S)))

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


def _samples_per_s(workers: Sequence[Epochs]) -> float:
    return sum(worker.samples_per_s for worker in workers)


def _measure_feed(setting: Setting) -> None:
    def measure(figures: Figures) -> None:
        figures["shuffled"].append(keras_feed.fed_rows_per_s(setting.df, shuffle=True))
        figures["counted"].append(keras_feed.counted_rows_per_s(setting.df))
        figures["in order"].append(keras_feed.fed_rows_per_s(setting.df, shuffle=False))

    figures = setting.rounds("feed", measure)
    names = {
        "counted": "DataFrame to mapInArrow that counts",
        "shuffled": "DataFrame to trainer that counts, shuffled",
        "in order": "DataFrame to trainer that counts, in order",
    }
    setting.add_rows(figures, names, "rows/s")
    for ours in ("shuffled", "in order"):
        ratio = median_ratio(figures[ours], figures["counted"])
        setting.report.add(f"{names[ours]} / {names['counted']}", ratio, "x", at_least=0.8)


def _measure_predict(setting: Setting) -> None:
    num_cores = len(os.sched_getaffinity(0))
    peers = _peers(KerasPeer, setting.digits, num_cores)

    def measure(figures: Figures) -> None:
        for batch_size in _PREDICT_BATCH_SIZES:
            predictions = keras_spark.predictions(setting.spark, setting.df, batch_size)
            for name, df in (("all", predictions), ("new", predictions.select("label", "probabilities"))):
                figures[f"{name} {batch_size}"].append(keras_feed.predicted_rows_per_s(df, NUM_ROWS))
            spans = together(peers, "predict", batch_size, deadline_s=_DEADLINE_S)
            figures[f"keras {batch_size}"].append(NUM_ROWS / seconds_of(spans))
        figures["counted"].append(keras_feed.counted_rows_per_s(setting.df))

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
        for ours in ("all", "new"):
            ratio = median_ratio(figures[f"{ours} {size}"], figures[f"keras {size}"])
            target = 0.8 if size == BATCH_SIZE else None
            setting.report.add(f"{names[f'{ours} {size}']} / model.predict", ratio, "x", at_least=target)


def _measure_accuracy(setting: Setting) -> None:
    ours = keras_spark.Fits(setting.spark, setting.df)
    seeds = range(1, 1 + min(setting.num_rounds, 3))
    figures: Figures = defaultdict(list)
    with started(_peers(KerasPeer, setting.digits, 1)) as (peer,):
        for seed in seeds:
            say(f"accuracy: seed {seed} of {len(seeds)}")
            figures["fit"].append(peer.call("accuracy", _NUM_ACCURACY_EPOCHS, seed, deadline_s=_DEADLINE_S))
            for staleness in _STALENESS:
                for scales in (True, False):
                    figures[f"{scales} {staleness}"].append(
                        ours.accuracy(setting.digits, staleness, _NUM_ACCURACY_EPOCHS, seed, scales)
                    )
    alone = statistics.mean(figures["fit"])
    setting.report.add("test accuracy, 1 process, model.fit", 100 * alone, "%")
    for staleness in _STALENESS:
        for scales, text in ((True, ""), (False, ", learning rate not scaled")):
            points = 100 * (statistics.mean(figures[f"{scales} {staleness}"]) - alone)
            what = f"test accuracy over that, {setting.num_workers} Spark workers, staleness {staleness}{text}"
            setting.report.add(what, points, "points", at_least=-0.5 if scales else None)


def _measure_memory(report: Report, num_bytes: int) -> None:
    """In a Spark of its own: Python workers that have trained before keep a model and TensorFlow's memory."""
    say("memory: starting Spark")
    with keras_spark.spark_session(1) as spark:
        idle = keras_memory.idle_bytes(spark)
        trained = keras_memory.training_bytes(spark, keras_memory.large_partition(spark, num_bytes))
    report.add("anonymous memory, worker with TensorFlow loaded", idle / 1e6, "MB")
    report.add(f"anonymous memory, worker with {num_bytes / 1e6:,.0f} MB of rows", trained / 1e6, "MB")
    report.add("anonymous memory, worker with rows - idle", (trained - idle) / 1e6, "MB", below=600)


_MEASUREMENTS: dict[str, Callable[[Setting], None]] = {
    "rate": _measure_rate,
    "feed": _measure_feed,
    "predict": _measure_predict,
    "accuracy": _measure_accuracy,
    "memory": lambda setting: _measure_memory(setting.report, keras_memory.PARTITION_BYTES),
}

if __name__ == "__main__":
    sys.exit(main())
