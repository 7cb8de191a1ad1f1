"""How fast training is: the original's MNIST program on two Spark workers, against two processes with no server.

Both train softmax regression (784 to 10, SGD 0.5, batches of 100, shuffled anew in every epoch) on halves of the same
rows, with one TensorFlow thread a worker. Figures are samples/s of both workers together, from the second epoch on.
Each round runs everything, one after the other; figures are medians over the rounds, ratios the medians of the rounds'
ratios.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

from pyspark import RDD, SparkContext

from benchmarks.clusters.local import local_spark
from benchmarks.measuring.epochs import Epochs, epochs_of, samples_per_s
from benchmarks.measuring.processes import Peer, started, together
from benchmarks.measuring.report import Report, argument_parser, median_ratio, say
from benchmarks.train import mnist_rows, softmax
from benchmarks.train.mnist_rows import Images, Labels, Rows
from benchmarks.train.softmax import Program
from tensorspark import DeltaWeightCombiner, SparkSession

_NUM_WORKERS = 2
_NUM_EPOCHS = 20
# By sync interval; short intervals are slower, and need fewer epochs to be measured.
_NUM_EPOCHS_OF_OURS = {100: _NUM_EPOCHS, 10: 10, 1: 4}
_TARGET = 0.90
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 7, 2
_DEADLINE_S = 300.0

Figures = dict[str, list[float]]
"""By what was measured, one value a round."""


def main() -> int:
    arguments = argument_parser(__doc__.splitlines()[0]).parse_args()
    num_rounds = _NUM_QUICK_ROUNDS if arguments.quick else _NUM_ROUNDS
    rows = mnist_rows.find(_NUM_WORKERS)
    report = Report(f"Training: softmax regression on {rows}", ["numpy", "tornado", "tensorflow", "pyspark"])
    figures: Figures = defaultdict(list)
    say(f"starting Spark and {_NUM_WORKERS} processes without a server; training on {rows}")
    loops = [
        Peer(f"plain loop {index}", softmax.PlainLoop, rows, index, deadline_s=_DEADLINE_S)
        for index in range(_NUM_WORKERS)
    ]
    with started(loops), local_spark(_NUM_WORKERS, memory="1g") as spark, _Ours(spark.sparkContext, rows) as ours:
        ours.warm_up()
        together(loops, "train", 2, deadline_s=_DEADLINE_S)
        for index in range(num_rounds):
            say(f"round {index + 1} of {num_rounds}")
            _measure_round(figures, ours, loops)
        accuracy = ours.accuracy()
    _add_rows(report, figures)
    if accuracy is not None:
        report.add(f"test accuracy after {_NUM_EPOCHS} epochs, sync_interval 100", accuracy, "share")
    return report.conclude(arguments.json, arguments.out)


class _Ours:
    """The program on Spark, one tensorspark session for each sync interval."""

    def __init__(self, spark_context: SparkContext, rows: Rows) -> None:
        self._program = Program()
        self._feed: RDD[tuple[Images, Labels]] = spark_context.parallelize(range(_NUM_WORKERS), _NUM_WORKERS).flatMap(
            rows.tuples
        )
        self._test = rows.test()
        self._sessions = {
            interval: SparkSession(
                spark_context,
                self._program.session,
                name="bench",
                sync_interval=interval,
                batch_size=softmax.BATCH_SIZE,
            )
            for interval in _NUM_EPOCHS_OF_OURS
        }

    def __enter__(self) -> _Ours:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._program.session.close)
            for session in self._sessions.values():
                stack.callback(session.close)

    def warm_up(self) -> None:
        """Lets the executors import TensorFlow and build the graph, and every session its server."""
        for interval in self._sessions:
            self.train(interval, 2)

    def train(self, interval: int, num_epochs: int) -> list[Epochs]:
        """Trains from the initial weights; returns every worker's epochs."""
        program = self._program
        program.reset()
        history = self._sessions[interval].run(
            program.train_step,
            feed_rdd=self._feed,
            feed_name_list=[program.x.name, program.y_.name],
            param_list=program.params,
            weight_combiner=DeltaWeightCombiner(),
            shuffle_within_partition=True,
            server_reusable=True,
            num_epochs=num_epochs,
            progress=False,
        )
        return epochs_of(history.workers)

    def accuracy(self) -> float | None:
        """Test accuracy of a training at the longest interval; None where there is no test set."""
        if self._test is None:
            return None
        self.train(max(self._sessions), _NUM_EPOCHS)
        return self._program.accuracy(*self._test)


def _measure_round(figures: Figures, ours: _Ours, loops: Sequence[Peer]) -> None:
    # What has a target stands next to what it is compared with.
    theirs = {"plain": "train", "callable": "train_callable"}
    for interval, name in ((100, "plain"), (10, "callable"), (1, None)):
        figures[f"ours {interval}"].append(samples_per_s(ours.train(interval, _NUM_EPOCHS_OF_OURS[interval])))
        if name is not None:
            epochs = together(loops, theirs[name], _NUM_EPOCHS, deadline_s=_DEADLINE_S)
            figures[name].append(samples_per_s(epochs))


def _add_rows(report: Report, figures: Figures) -> None:
    plain, fastest = figures["plain"], figures["callable"]
    report.add("2 processes, no server, session.run", statistics.median(plain), "samples/s")
    report.add("2 processes, no server, make_callable", statistics.median(fastest), "samples/s")
    for interval in _NUM_EPOCHS_OF_OURS:
        ours = figures[f"ours {interval}"]
        what = f"2 Spark workers, sync_interval {interval}"
        report.add(what, statistics.median(ours), "samples/s")
        at_least = _TARGET if interval == 100 else None
        report.add(f"{what} / no server, session.run", median_ratio(ours, plain), "x", at_least=at_least)
        report.add(f"{what} / no server, make_callable", median_ratio(ours, fastest), "x")


if __name__ == "__main__":
    sys.exit(main())
