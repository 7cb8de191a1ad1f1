"""What was measured of contenders, round by round, and the report's rows of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.measuring.report import Report, median_ratio
from benchmarks.peers import course
from benchmarks.peers.contenders import CONTENDERS, RATES, Contender
from benchmarks.peers.training import Trained
from benchmarks.workloads.digits import Images, Labels

_TARGET_ACCURACY = 0.97
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
        self.accuracies.setdefault(name, []).append([course.accuracy(row, *self._test) for row in rows])

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


def add_rows(report: Report, rounds: Rounds) -> None:
    """Every figure of every contender, then what is compared."""
    for name, all_trained in rounds.trained.items():
        _add_contender(report, CONTENDERS[name], rounds, name, all_trained)
    for ours, theirs, target in RATES:
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
