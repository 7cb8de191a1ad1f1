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
import sys

from benchmarks.clusters.local import local_spark
from benchmarks.keras.measurements import MEASUREMENTS, Setting, measure_memory
from benchmarks.measuring.report import Report, argument_parser, say
from benchmarks.workloads import digits
from benchmarks.workloads.spark_rows import cached_rows

_PACKAGES = ("numpy", "tornado", "tensorflow", "keras", "pyspark", "pyarrow")
# Measured last, in a Spark of its own.
_MEMORY = "memory"
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 5, 2


def main() -> int:
    arguments = make_parser().parse_args()
    chosen = arguments.only or [*MEASUREMENTS, _MEMORY]
    rows = digits.find()
    report = Report(f"Keras: 784-128-10, batches of 64, on {rows}", _PACKAGES)
    in_spark = [name for name in chosen if name != _MEMORY]
    if in_spark:
        say("starting Spark")
        with local_spark(arguments.workers) as spark:
            df = cached_rows(spark, rows, arguments.workers)
            num_rounds = _NUM_QUICK_ROUNDS if arguments.quick else _NUM_ROUNDS
            setting = Setting(spark, df, rows, arguments.workers, num_rounds, report)
            for name in in_spark:
                MEASUREMENTS[name](setting)
    if _MEMORY in chosen:
        measure_memory(report)
    return report.conclude(arguments.json, arguments.out)


def make_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*MEASUREMENTS, _MEMORY], help="measure only these")
    parser.add_argument("--workers", type=int, default=2, help="of Spark, and processes to compare with (default: 2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
