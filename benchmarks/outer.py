"""What rare synchronization saves and costs: with the plain mean of changes, and with an optimizer on the server.

Two Spark workers train 784-128-10 with SGD on MNIST (``MNIST_DATA_DIR``), bulk-synchronous, in batches of 60: then an
epoch is 500 steps of each worker, and every interval divides it. Of each interval and each rule, in turns over the same
seeds, are measured: bytes of weights that workers and server exchange, in both directions and without headers, for each
row that is trained on; and test accuracy after the last epoch, its mean over the seeds. The rules are

mean
    `MeanDeltaCombiner`, the default of `fit`.
momentum 0.5, momentum 0.9
    `ServerSGD` with Nesterov's momentum and a learning rate of 0.7, on the same mean of changes. With 0.9 it is the
    outer optimizer of DiLoCo (Douillard et al. 2023), which has hundreds of rounds; ten epochs with an interval of 500
    are ten rounds, in which so long a memory does not pay off.

Workers take steps of 0.1 times their number with every rule, as `fit` has it for the mean.

The target is that at one of the intervals at least 100 times fewer bytes than at interval 1 come within 0.3 points of
the accuracy that the mean has there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.clusters.local import local_spark
from benchmarks.measuring.report import Report, argument_parser, say
from benchmarks.workloads import digits
from benchmarks.workloads.perceptron import MODEL_BYTES, SGD_LEARNING_RATE, exchanged_bytes, make_sgd_model
from benchmarks.workloads.spark_rows import cached_rows
from tensorspark import MeanDeltaCombiner, ServerSGD, SparkSession, WeightCombiner

INTERVALS = (1, 10, 100, 500)
MOMENTUMS: Mapping[str, float | None] = {"mean": None, "momentum 0.5": 0.5, "momentum 0.9": 0.9}
"""Of the server's optimizer, by rule; None for the plain mean."""
_SERVER_LEARNING_RATE = 0.7
_NUM_WORKERS = 2
_BATCH_SIZE = 60
_NUM_EPOCHS, _NUM_QUICK_EPOCHS = 10, 1
_NUM_SEEDS, _NUM_QUICK_SEEDS = 3, 1
_MAX_POINTS = 0.3
_NUM_TIMES = 100.0
_PACKAGES = ("numpy", "tornado", "tensorflow", "keras", "pyspark")

Figures = Mapping[tuple[str, int], Sequence[float]]
"""By rule and interval, one value a seed."""


def combiner_for(rule: str) -> WeightCombiner:
    momentum = MOMENTUMS[rule]
    return MeanDeltaCombiner() if momentum is None else ServerSGD(_SERVER_LEARNING_RATE, momentum, nesterov=True)


def bytes_per_sample(num_pushes: int, num_samples: int, model_bytes: int = MODEL_BYTES) -> float:
    """Of weights, pushed and pulled, for each row that is trained on.

    >>> bytes_per_sample(num_pushes=10, num_samples=500, model_bytes=100)
    4.0
    """
    return exchanged_bytes(num_pushes, model_bytes) / num_samples


def fewest_times(moved: Mapping[int, float], points: Mapping[int, float], base: float) -> float:
    """How many times fewer bytes than `base` one of the intervals takes that is within 0.3 points; 0 where none is.

    >>> fewest_times({10: 50.0, 100: 5.0, 500: 1.0}, {10: 0.1, 100: -0.2, 500: -0.4}, base=500.0)
    100.0
    """
    within = [base / moved[interval] for interval, value in points.items() if value >= -_MAX_POINTS]
    return max(within, default=0.0)


def main() -> int:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help=f"default: {_NUM_SEEDS}; {_NUM_QUICK_SEEDS} with --quick")
    parser.add_argument("--epochs", type=int, help=f"default: {_NUM_EPOCHS}; {_NUM_QUICK_EPOCHS} with --quick")
    arguments = parser.parse_args()
    num_seeds = arguments.seeds or (_NUM_QUICK_SEEDS if arguments.quick else _NUM_SEEDS)
    num_epochs = arguments.epochs or (_NUM_QUICK_EPOCHS if arguments.quick else _NUM_EPOCHS)
    rows = digits.find()
    report = Report(f"Outer: 784-128-10, SGD 0.1, {num_epochs} epochs of {rows}", _PACKAGES)
    moved: dict[tuple[str, int], list[float]] = {}
    accuracies: dict[tuple[str, int], list[float]] = {}
    say("starting Spark")
    with local_spark(_NUM_WORKERS) as spark:
        df = cached_rows(spark, rows, _NUM_WORKERS)
        for seed in range(1, num_seeds + 1):
            for rule in MOMENTUMS:
                for interval in INTERVALS:
                    say(f"seed {seed} of {num_seeds}: {rule}, sync_interval {interval}")
                    per_sample, share = train(spark, df, rows, rule, interval, num_epochs, seed)
                    moved.setdefault((rule, interval), []).append(per_sample)
                    accuracies.setdefault((rule, interval), []).append(share)
    add_rows(report, moved, accuracies)
    return report.conclude(arguments.json, arguments.out)


def train(
    spark: Any, df: Any, rows: digits.Digits, rule: str, interval: int, num_epochs: int, seed: int
) -> tuple[float, float]:
    """Bytes per sample and test accuracy of one training."""
    model = make_sgd_model(seed)
    if MOMENTUMS[rule] is not None:  # with the mean, fit does it
        model.optimizer.learning_rate = SGD_LEARNING_RATE * _NUM_WORKERS
    with SparkSession(spark, model, name="outer", sync_interval=interval, staleness=0) as session:
        history = session.fit(
            df,
            features="image",
            label="label",
            batch_size=_BATCH_SIZE,
            epochs=num_epochs,
            seed=seed,
            weight_combiner=combiner_for(rule),
            progress=False,
        )
    num_pushes = sum(worker.num_pushed for worker in history.workers)
    return bytes_per_sample(num_pushes, history.num_samples), rows.test_accuracy(model)


def add_rows(report: Report, moved: Figures, accuracies: Figures) -> None:
    """Each interval of each rule, next to the mean at interval 1; then what is best."""
    base_moved, base = (statistics.mean(figures["mean", 1]) for figures in (moved, accuracies))
    for rule in MOMENTUMS:
        of_rule, points = {}, {}
        for interval in INTERVALS:
            of_rule[interval] = statistics.mean(moved[rule, interval])
            points[interval] = round(100 * (statistics.mean(accuracies[rule, interval]) - base), 6)
            what = f"{rule}, sync_interval {interval}"
            report.add(f"{what}: moved", of_rule[interval], "bytes/sample")
            report.add(f"{what}: fewer bytes than mean at interval 1", base_moved / of_rule[interval], "x")
            report.add(f"{what}: test accuracy", 100 * statistics.mean(accuracies[rule, interval]), "%")
            report.add(f"{what}: over mean at interval 1", points[interval], "points")
        times = fewest_times(of_rule, points, base_moved)
        what = f"{rule}: fewer bytes than mean at interval 1, within {_MAX_POINTS:g} points of it"
        report.add(what, times, "x", at_least=_NUM_TIMES)


if __name__ == "__main__":
    sys.exit(main())
