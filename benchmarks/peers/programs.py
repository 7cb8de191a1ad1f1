"""The two trainings beside elephas's: plain `model.fit`, and tensorspark; see `benchmarks.peers`.

Each is a program, so that it begins as a user's does and its memory is its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.course import Course, flat
from benchmarks.workloads import digits
from benchmarks.workloads.perceptron import exchanged_bytes, make_sgd_model
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

_NUM_WORKERS = 2


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.program == "fit":  # before the first operation, which starts the threads
        tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
        tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    train = _fit if arguments.program == "fit" else _ours
    train(digits.find(), make_sgd_model(arguments.seed), arguments).save(arguments.result)


class EpochEnds(keras.callbacks.Callback):  # type: ignore[misc]
    """When each epoch ended, on `time.monotonic`, and the model's weights then.

    Attributes:
        moments: of the begin of training, and of each epoch's end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []
        self.weights: list[Any] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.moments.append(time.monotonic())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.moments.append(time.monotonic())
        self.weights.append(flat(self.model.get_weights()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=["fit", "ours"])
    parser.add_argument("--threads", type=int, default=1, help="of fit")
    parser.add_argument("--staleness", default="0", help="of ours: a number, or async")
    parser.add_argument("--interval", type=int, default=16, help="of ours: steps between two synchronizations")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser


def _fit(rows: digits.Digits, model: Any, arguments: argparse.Namespace) -> Course:
    images, labels = rows.train()
    ends = EpochEnds()
    model.fit(images, labels, batch_size=arguments.batch_size, epochs=arguments.epochs, callbacks=[ends], verbose=0)
    samples = np.full((1, arguments.epochs), len(images))
    return Course(samples, np.diff(ends.moments)[np.newaxis], np.array(ends.weights), 0)


def _ours(rows: digits.Digits, model: Any, arguments: argparse.Namespace) -> Course:
    from benchmarks.clusters.local import local_spark
    from benchmarks.workloads.spark_rows import cached_rows
    from tensorspark import SparkSession

    staleness = None if arguments.staleness == "async" else int(arguments.staleness)
    ends = EpochEnds()
    with local_spark(_NUM_WORKERS) as spark:
        df = cached_rows(spark, rows, _NUM_WORKERS)
        with SparkSession(spark, model, name="peers", sync_interval=arguments.interval, staleness=staleness) as session:
            history = session.fit(
                df,
                features="image",
                label="label",
                batch_size=arguments.batch_size,
                epochs=arguments.epochs,
                callbacks=[ends],
                seed=arguments.seed,
                progress=False,
            )
    workers = history.workers
    return Course(
        np.array([worker.epoch_samples for worker in workers]),
        np.array([worker.epoch_seconds for worker in workers]),
        np.array(ends.weights),
        exchanged_bytes(sum(worker.num_pushed for worker in workers)),
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
