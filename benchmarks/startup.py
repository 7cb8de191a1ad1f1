"""How long a job takes to its first step, and what a worker holds: `tensorspark.daemon` against Spark's own daemon.

Each round starts four Spark applications with two slots, one after the other, in processes of their own: with either
daemon, one that fits a model (784-128-10 on digits, one step a worker) as its first job and then again, and one whose
first job is ordinary Python, as where rows were made in Python or a notebook's workers have been idle for a minute.
Figures are medians over the rounds, ratios the medians of the rounds' ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import procfs
from benchmarks.measuring.processes import Peer
from benchmarks.measuring.report import Report, argument_parser, median_ratio, say
from benchmarks.workloads import digits, perceptron

_NUM_WORKERS = 2
_BATCH_SIZE = 100
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 3, 1
_DEADLINE_S = 120.0
_MIB = 2**20

OWN, PRELOADED = "Spark's daemon", "tensorspark.daemon"
_SETTINGS: dict[str, dict[str, str]] = {OWN: {}, PRELOADED: {"spark.python.daemon.module": "tensorspark.daemon"}}

Figures = dict[tuple[str, str], list[float]]
"""By what was measured and which daemon, one value a round."""


def main() -> int:
    arguments = argument_parser(__doc__.splitlines()[0]).parse_args()
    num_rounds = _NUM_QUICK_ROUNDS if arguments.quick else _NUM_ROUNDS
    rows = digits.find()
    report = Report(f"The first second: 784-128-10 on {rows}, one step", ["tensorflow", "keras", "pyspark"])
    figures: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        write_rows(rows, Path(directory))
        for index in range(num_rounds):
            for name, settings in _SETTINGS.items():
                say(f"round {index + 1} of {num_rounds}: {name}")
                _measure_fits(figures, name, settings, directory)
                _measure_after_python(figures, name, settings, directory)
                say("".join(f"  {what}: {values[-1]:.3g}\n" for (what, by), values in figures.items() if by == name))
    add_rows(report, figures)
    return report.conclude(arguments.json, arguments.out)


def write_rows(rows: digits.Digits, directory: Path) -> None:
    """A batch for each worker, as Parquet: reading it takes no Python."""
    import pyarrow as pa
    from pyarrow import parquet

    num_shares = digits.NUM_ROWS // _BATCH_SIZE
    for index in range(_NUM_WORKERS):
        table = pa.Table.from_batches(rows.batches(index, num_shares))
        parquet.write_table(table, directory / f"{index}.parquet")


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes.

    Attributes:
        rss: all that it has in memory.
        pss: the same, with what n processes share counted as an n-th.
    """

    is_daemon: bool
    rss: int
    pss: int


class Application:
    """A Spark application with two slots, a model that its driver has built, and no job so far.

    Args:
        rows: directory with the Parquet files of `write_rows`.
    """

    def __init__(self, settings: dict[str, str], rows: str) -> None:
        from benchmarks.clusters.local import local_spark
        from tensorspark.trainers.startup import importing

        self._open = ExitStack()
        self._spark = self._open.enter_context(local_spark(_NUM_WORKERS, memory="1g", settings=settings))
        with importing():
            self._model = perceptron.make_model()
        self._df = self._spark.read.parquet(rows)

    def fit(self) -> float:
        """Seconds of a fit with one step a worker."""
        from tensorspark import SparkSession

        begin = time.monotonic()
        with SparkSession(self._spark, self._model, name="bench", batch_size=_BATCH_SIZE) as session:
            history = session.fit(self._df, features="image", label="label", epochs=1, progress=False)
        seconds = time.monotonic() - begin
        assert [worker.num_steps for worker in history.workers] == [1] * _NUM_WORKERS
        return seconds

    def python_job(self) -> float:
        """Seconds of a job that has every slot run a line of Python."""
        begin = time.monotonic()
        count = self._spark.sparkContext.parallelize(range(_NUM_WORKERS), _NUM_WORKERS).map(lambda x: x + 1).sum()
        assert count == sum(range(1, _NUM_WORKERS + 1))
        return time.monotonic() - begin

    def memory(self) -> list[Memory]:
        """Of this application's Python daemons and their workers."""
        parents = procfs.parents()
        ours = {pid for pid in procfs.family(os.getpid()) if procfs.is_python_daemon(pid)}
        found = [
            Memory(
                parents.get(pid) not in ours,
                procfs.shared_out_bytes(pid, "Rss"),
                procfs.shared_out_bytes(pid, "Pss"),
            )
            for pid in ours
        ]
        return [memory for memory in found if memory.rss]

    def close(self) -> None:
        self._open.close()


def add_rows(report: Report, figures: Figures) -> None:
    """The medians, and the ratio of the two daemons for each."""
    for what in dict.fromkeys(what for what, _ in figures):
        own, preloaded = figures[what, OWN], figures[what, PRELOADED]
        unit = "MiB" if "memory" in what else "s"
        for name, values in ((OWN, own), (PRELOADED, preloaded)):
            report.add(f"{what}, {name}", statistics.median(values), unit)
        report.add(f"{what}: {PRELOADED} / {OWN}", median_ratio(preloaded, own), "x")


def _measure_fits(figures: Figures, name: str, settings: dict[str, str], rows: str) -> None:
    with Peer(name, Application, settings, rows, deadline_s=_DEADLINE_S) as application:
        figures["fit, the application's first job", name].append(application.call("fit", deadline_s=_DEADLINE_S))
        figures["fit, again", name].append(application.call("fit", deadline_s=_DEADLINE_S))
        trained: list[Memory] = application.call("memory")
    workers = [memory for memory in trained if not memory.is_daemon]
    assert len(workers) == _NUM_WORKERS
    figures["memory of a worker that has trained, RSS", name].append(max(worker.rss for worker in workers) / _MIB)
    figures["memory of a worker that has trained, PSS", name].append(max(worker.pss for worker in workers) / _MIB)
    figures["memory of daemon and 2 workers, PSS", name].append(sum(memory.pss for memory in trained) / _MIB)


def _measure_after_python(figures: Figures, name: str, settings: dict[str, str], rows: str) -> None:
    with Peer(name, Application, settings, rows, deadline_s=_DEADLINE_S) as application:
        figures["ordinary Python, first job", name].append(application.call("python_job", deadline_s=_DEADLINE_S))
        begun: list[Memory] = application.call("memory")
        figures["fit, workers new", name].append(application.call("fit", deadline_s=_DEADLINE_S))
    workers = [memory for memory in begun if not memory.is_daemon]
    figures["memory of a worker just begun, RSS", name].append(max(worker.rss for worker in workers) / _MIB)
    figures["memory of a worker just begun, PSS", name].append(max(worker.pss for worker in workers) / _MIB)


if __name__ == "__main__":
    sys.exit(main())
