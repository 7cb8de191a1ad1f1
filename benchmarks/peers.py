"""tensorspark next to elephas and to plain `model.fit`: the same model, rows, epochs and cores.

The model is 784-128-10, trained with SGD 0.1 in batches of 64 on MNIST (``MNIST_DATA_DIR``). Contenders are, each by
its name alone with ``--only``:

fit-1, fit-2
    `model.fit` in one process, with so many TensorFlow threads.
elephas-http-epoch, elephas-http-batch, elephas-socket-epoch, elephas-socket-batch, elephas-sync
    elephas with two Spark workers of one thread each: asynchronous, over its HTTP or socket server, exchanging weights
    each epoch or each batch; and synchronous. It runs in an environment of its own, see `peers_environment`. Its
    socket server keeps a thread busy for each exchange that there ever was, so that it gets slower and slower: there
    batches are of 640 rows only, and accuracy is not told.
ours-S-I
    `SparkSession.fit` with two Spark workers of one thread each; S is the staleness, 0, 4 or async, and I the
    sync_interval: 1, 16, 100, or epoch for one synchronization in an epoch.

Each training is a program that begins anew. **Start-up is left out**: samples/s are each worker's rows from the end of
its first epoch to the end of its last, divided by that time, and added up. So Spark's start, TensorFlow's import, the
compilation of the step, the first reading of rows and the first exchange are in no figure; all that happens between
epochs is. Seconds to 97 % are the epochs that the test accuracy takes to reach it (between two ends of epochs on a
straight line), at that rate. Of elephas, exchanges are timed by a client around its own. Test accuracy is computed from
the server's weights at the ends of epochs. Bytes are those of the weights that workers and server exchange, in both
directions, without headers. Memory is anonymous memory of all processes, JVM included.

Contenders run in turns in each round: figures are medians over the rounds, ratios the medians of the rounds' ratios. On
a machine with other work only the ratios mean something.
"""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import keras_digits, peers_course, peers_environment
from benchmarks.keras_digits import Images, Labels
from benchmarks.peers_environment import EnvironmentFailedError
from benchmarks.peers_processes import Trained, TrainingFailedError, train
from benchmarks.report import Report, argument_parser, median_ratio, say

_BATCH_SIZE = 64
_TARGET_ACCURACY = 0.97
_NUM_EPOCHS, _NUM_QUICK_EPOCHS = 10, 2
_NUM_ROUNDS = 3
_NUM_ROWS_OF_SLOW = 640
_DEADLINE_S = 280.0
_FAILED = 2
_PACKAGES = ("numpy", "tornado", "tensorflow", "keras", "pyspark")
_STALENESS = ("0", "4", "async")
# By name; an interval beyond an epoch ends with it.
_INTERVALS = {"1": 1, "16": 16, "100": 100, "epoch": keras_digits.NUM_ROWS}


@dataclass(frozen=True)
class Contender:
    """A program that trains.

    Attributes:
        text: for the report.
        is_whole: whether it trains on all rows, so that its accuracy can be compared.
    """

    text: str
    module: str
    arguments: tuple[str, ...]
    is_whole: bool = True

    @property
    def is_elephas(self) -> bool:
        return self.module.endswith("elephas")


def _contenders() -> Iterator[tuple[str, Contender]]:
    for num_threads in ("1", "2"):
        text = f"1 process, model.fit, {num_threads} thread(s)"
        yield f"fit-{num_threads}", Contender(text, "benchmarks.peers_programs", ("fit", "--threads", num_threads))
    for mode in ("http", "socket"):
        for frequency in ("epoch", "batch"):
            is_whole = (mode, frequency) != ("socket", "batch")
            num_rows = keras_digits.NUM_ROWS if is_whole else _NUM_ROWS_OF_SLOW
            arguments = (mode, "--frequency", frequency, "--rows", str(num_rows))
            text = f"elephas, asynchronous, {mode}, each {frequency}"
            yield f"elephas-{mode}-{frequency}", Contender(text, "benchmarks.peers_elephas", arguments, is_whole)
    options: tuple[str, ...] = ("synchronous", "--rows", str(keras_digits.NUM_ROWS))
    yield "elephas-sync", Contender("elephas, synchronous, each epoch", "benchmarks.peers_elephas", options)
    for staleness in _STALENESS:
        for name, interval in _INTERVALS.items():
            options = ("ours", "--staleness", staleness, "--interval", str(interval))
            how = "one synchronization an epoch" if name == "epoch" else f"sync_interval {name}"
            text = f"tensorspark, staleness {staleness}, {how}"
            yield f"ours-{staleness}-{name}", Contender(text, "benchmarks.peers_programs", options)


CONTENDERS = dict(_contenders())
_QUICK = ("fit-1", "elephas-http-epoch", "ours-async-16")

# Ours, theirs, at least so many times their samples/s. Accuracy is to be no worse.
_RATES = (
    *((f"ours-async-{n}", f"elephas-{mode}-epoch", 5.0) for n in ("epoch", "16") for mode in ("http", "socket")),
    *((f"ours-{s}-1", f"elephas-{mode}-batch", 5.0) for s in ("async", "0") for mode in ("http", "socket")),
    *((f"ours-{s}-epoch", "elephas-sync", None) for s in ("0",)),
    *((f"ours-{s}-{n}", "fit-1", 3.5) for s in _STALENESS for n in ("16", "100")),
    *((f"ours-{s}-{n}", "fit-1", None) for s in _STALENESS for n in ("1", "epoch")),
)
_MAX_TIME_RATIO = 0.4


class Rounds:
    """What was measured: by contender, one training a round, with its test accuracies by epoch."""

    def __init__(self, test: tuple[Images, Labels]) -> None:
        self._test = test
        self.trained: dict[str, list[Trained]] = {}
        self.accuracies: dict[str, list[list[float]]] = {}

    def add(self, name: str, trained: Trained) -> None:
        self.trained.setdefault(name, []).append(trained)
        rows = trained.course.weights
        self.accuracies.setdefault(name, []).append([peers_course.accuracy(row, *self._test) for row in rows])

    def keep_whole(self) -> None:
        """Drops the last round where it was not finished, unless it is the only one."""
        num_whole = max(1, min((len(trained) for trained in self.trained.values()), default=0))
        self.trained = {name: values[:num_whole] for name, values in self.trained.items()}
        self.accuracies = {name: values[:num_whole] for name, values in self.accuracies.items()}

    def rates(self, name: str) -> list[float]:
        return [trained.course.samples_per_s for trained in self.trained[name]]

    def final(self, name: str) -> float:
        """Median of the accuracies at the end."""
        return statistics.median(accuracies[-1] for accuracies in self.accuracies[name])

    def seconds(self, name: str) -> list[float] | None:
        """To 97 %, a round; None where a round does not reach it."""
        pairs = zip(self.trained[name], self.accuracies[name], strict=True)
        seconds = [trained.course.seconds_to(accuracies, _TARGET_ACCURACY) for trained, accuracies in pairs]
        reached = [value for value in seconds if value is not None]
        return reached if len(reached) == len(seconds) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="measure only these")
    parser.add_argument("--rounds", type=int, help=f"default: {_NUM_ROUNDS}; 1 with --quick")
    parser.add_argument("--epochs", type=int, help=f"default: {_NUM_EPOCHS}; {_NUM_QUICK_EPOCHS} with --quick")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="of elephas; default: in the user's cache")
    parsed = parser.parse_args(arguments)
    chosen = parsed.only or list(_QUICK if parsed.quick else CONTENDERS)
    num_rounds = parsed.rounds or (1 if parsed.quick else _NUM_ROUNDS)
    num_epochs = parsed.epochs or (_NUM_QUICK_EPOCHS if parsed.quick else _NUM_EPOCHS)
    digits = keras_digits.find()
    rounds = Rounds(digits.test())
    failure = ""
    try:
        # What is asked to end tells what it has, and ends the training that runs.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _measure(rounds, chosen, num_rounds, num_epochs, parsed.environment)
    except KeyboardInterrupt:
        failure = "interrupted"
    except (EnvironmentFailedError, TrainingFailedError) as error:
        failure = str(error)
    if failure:
        print(f"error: {failure}\nFigures are of the rounds that were finished.", file=sys.stderr)
        rounds.keep_whole()
    report = Report(f"Peers: 784-128-10, SGD 0.1, batches of 64, {num_epochs} epochs of {digits}", _PACKAGES)
    if not rounds.trained:
        return _FAILED
    add_rows(report, rounds)
    status = report.conclude(parsed.json, parsed.out)
    return _FAILED if failure else status


def _measure(rounds: Rounds, chosen: Sequence[str], num_rounds: int, num_epochs: int, environment: Path | None) -> None:
    python: Path | None = None
    if any(CONTENDERS[name].is_elephas for name in chosen):
        python = peers_environment.elephas_python(environment or peers_environment.default_directory())
    for index in range(num_rounds):
        for name in chosen:
            say(f"round {index + 1} of {num_rounds}: {name}")
            rounds.add(name, _train(CONTENDERS[name], num_epochs, index + 1, python))


def _train(contender: Contender, num_epochs: int, seed: int, python: Path | None) -> Trained:
    arguments = [*contender.arguments, "--epochs", str(num_epochs), "--batch-size", str(_BATCH_SIZE)]
    return train(
        contender.module,
        [*arguments, "--seed", str(seed)],
        python=python if contender.is_elephas else None,
        deadline_s=_DEADLINE_S,
    )


def add_rows(report: Report, rounds: Rounds) -> None:
    """Every figure of every contender, then what is compared."""
    for name, all_trained in rounds.trained.items():
        _add_contender(report, CONTENDERS[name], rounds, name, all_trained)
    for ours, theirs, target in _RATES:
        if not {ours, theirs} <= rounds.trained.keys():
            continue
        what = f"{CONTENDERS[ours].text} / {CONTENDERS[theirs].text}"
        report.add(f"{what}, samples/s", median_ratio(rounds.rates(ours), rounds.rates(theirs)), "x", at_least=target)
        if CONTENDERS[theirs].is_elephas:
            _add_accuracy(report, rounds, ours, theirs)
        else:
            _add_time(report, rounds, ours, theirs, None if target is None else _MAX_TIME_RATIO)


def _add_contender(
    report: Report, contender: Contender, rounds: Rounds, name: str, all_trained: Sequence[Trained]
) -> None:
    def add(what: str, value: Callable[[Trained], float], unit: str) -> None:
        report.add(f"{contender.text}: {what}", statistics.median(map(value, all_trained)), unit)

    add("rate", lambda trained: trained.course.samples_per_s, "samples/s")
    seconds = rounds.seconds(name)
    if seconds is not None and contender.is_whole:
        report.add(f"{contender.text}: to 97 %", statistics.median(seconds), "s")
    if contender.is_whole:
        report.add(f"{contender.text}: final test accuracy", 100 * rounds.final(name), "%")
        best = statistics.median(max(accuracies) for accuracies in rounds.accuracies[name])
        report.add(f"{contender.text}: best test accuracy", 100 * best, "%")
    add("moved", lambda trained: trained.course.bytes_per_sample, "bytes/sample")
    add("peak memory", lambda trained: trained.peak_bytes / 1e6, "MB")


def _add_accuracy(report: Report, rounds: Rounds, ours: str, theirs: str) -> None:
    if CONTENDERS[theirs].is_whole:
        points = 100 * (rounds.final(ours) - rounds.final(theirs))
        what = f"{CONTENDERS[ours].text} - {CONTENDERS[theirs].text}, final test accuracy"
        report.add(what, float(np.round(points, 6)), "points", at_least=0.0)


def _add_time(report: Report, rounds: Rounds, ours: str, theirs: str, target: float | None) -> None:
    mine, others = rounds.seconds(ours), rounds.seconds(theirs)
    if mine is not None and others is not None:
        what = f"{CONTENDERS[ours].text} / {CONTENDERS[theirs].text}, seconds to 97 %"
        report.add(what, median_ratio(mine, others), "x", below=target)
    elif others is not None and target is not None:
        reached = [max(accuracies) >= _TARGET_ACCURACY for accuracies in rounds.accuracies[ours]]
        what = f"{CONTENDERS[ours].text}, share of rounds that reach 97 %"
        report.add(what, statistics.mean(reached), "", at_least=1.0)


if __name__ == "__main__":
    sys.exit(main())
