"""Whether training survives what happens to its processes: random faults on a real standalone cluster.

Softmax regression is trained bulk-synchronously by plain SGD on two executors, on the loopback addresses of two hosts:
undisturbed first, then once a trial with one fault at a random moment in the middle. A trial has *survived* if its run
ended by itself and without an error, and is *bit-equal* if the bytes of its final weights are those of the undisturbed
run. *Recovery* is from the fault's end to the next round that all workers took part in.

Kinds of faults come equally often, in random order. Spark is configured as it comes, its retries too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.chaos.driver import Training
from benchmarks.chaos.driver_process import DriverError
from benchmarks.chaos.faults import FAULTS, Fault, Laboratory, Outcome, train_through
from benchmarks.clusters.standalone import StandaloneCluster
from benchmarks.measuring.report import Report, argument_parser, say
from examples import mnist_data

_NUM_EPOCHS, _NUM_QUICK_EPOCHS = 400, 150
_NUM_TRIALS, _NUM_QUICK_TRIALS = 20, len(FAULTS)
# Shares of the training between which faults happen.
_EARLIEST, _LATEST = 0.2, 0.75


@dataclass(frozen=True)
class Trial:
    """One training through a fault.

    Attributes:
        after_steps: when the fault happened, in local steps of all workers.
        outcome: None where the run did not survive.
        is_bit_equal: whether the final weights are those of the undisturbed run.
    """

    fault: Fault
    after_steps: int
    outcome: Outcome | None
    is_bit_equal: bool


def main() -> int:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, metavar="N", help=f"how many faults (default: {_NUM_TRIALS})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults and their moments (default: 0)")
    arguments = parser.parse_args()
    num_trials = arguments.trials or (_NUM_QUICK_TRIALS if arguments.quick else _NUM_TRIALS)
    num_epochs = _NUM_QUICK_EPOCHS if arguments.quick else _NUM_EPOCHS
    source = mnist_data.find(download=False).source
    report = Report(f"Chaos: softmax regression on {source}", ["numpy", "tornado", "tensorflow", "pyspark"])
    with tempfile.TemporaryDirectory(prefix="tensorspark-chaos-") as name:
        say("starting a master and two workers")
        directory = Path(name)
        with (
            StandaloneCluster(directory, num_cores=2, memory="2g") as cluster,
            Laboratory(cluster, directory) as laboratory,
        ):
            undisturbed = _undisturbed(laboratory, num_epochs)
            trials = list(_trials(laboratory, undisturbed, num_epochs, num_trials, Random(arguments.seed)))
    _add_rows(report, undisturbed, trials)
    return report.conclude(arguments.json, arguments.out)


def _undisturbed(laboratory: Laboratory, num_epochs: int) -> Outcome:
    """Trained twice: the first warms up, and shows that equal runs are equal."""
    first, second = (train_through(laboratory, _training(laboratory, num_epochs)) for _ in range(2))
    if first.weights != second.weights:
        raise DriverError(f"two undisturbed runs differ: {_difference(first.weights, second.weights)}")
    say(f"undisturbed: {second.done['num_samples']:,} samples in {second.seconds:.1f} s")
    return second


def _trials(
    laboratory: Laboratory, undisturbed: Outcome, num_epochs: int, num_trials: int, random: Random
) -> Iterator[Trial]:
    num_steps = undisturbed.done["num_steps_in_weights"]
    faults: list[Fault] = []
    for index in range(num_trials):
        faults = faults or random.sample(FAULTS, len(FAULTS))
        fault, after_steps = faults.pop(), int(num_steps * random.uniform(_EARLIEST, _LATEST))
        outcome, what = None, ""
        began = time.monotonic()
        try:
            training = _training(laboratory, num_epochs)
            outcome = train_through(laboratory, training, fault, after_steps=after_steps, seed=random.getrandbits(32))
        except (DriverError, TimeoutError) as error:
            what = f"NOT SURVIVED after {time.monotonic() - began:.0f} s: {error}"
        is_bit_equal = outcome is not None and outcome.weights == undisturbed.weights
        if outcome is not None:
            equal = "bit-equal" if is_bit_equal else f"DIFFERS: {_difference(outcome.weights, undisturbed.weights)}"
            what = f"recovered in {outcome.recovery_s:.2f} s, done in {outcome.seconds:.1f} s, {equal}"
        say(f"trial {index + 1} of {num_trials}: {fault.name} after step {after_steps:,}: {what}")
        yield Trial(fault, after_steps, outcome, is_bit_equal)


def _training(laboratory: Laboratory, num_epochs: int) -> Training:
    return Training(str(laboratory.new_path("weights")), num_epochs)


def _difference(weights: bytes, others: bytes) -> str:
    """How far apart: the last variable is the counter of steps, an int64."""
    ours, theirs = (np.frombuffer(values[:-8], np.float32) for values in (weights, others))
    steps = [int.from_bytes(values[-8:], "little", signed=True) for values in (weights, others)]
    return f"{np.abs(ours - theirs).max():.3g} at most, {steps[0]} steps instead of {steps[1]}"


def _add_rows(report: Report, undisturbed: Outcome, trials: Sequence[Trial]) -> None:
    _add_counts(report, "", trials)
    report.add("undisturbed run", undisturbed.seconds, "s")
    _add_times(report, "", trials, undisturbed)
    for fault in FAULTS:
        of_kind = [trial for trial in trials if trial.fault is fault]
        if of_kind:
            _add_counts(report, f"{fault.name}: ", of_kind)
            _add_times(report, f"{fault.name}: ", of_kind, undisturbed)


def _add_counts(report: Report, prefix: str, trials: Sequence[Trial]) -> None:
    num_trials, unit = len(trials), f"of {len(trials)}"
    report.add(f"{prefix}survived", sum(trial.outcome is not None for trial in trials), unit, at_least=num_trials)
    report.add(f"{prefix}bit-equal", sum(trial.is_bit_equal for trial in trials), unit, at_least=num_trials)


def _add_times(report: Report, prefix: str, trials: Sequence[Trial], undisturbed: Outcome) -> None:
    outcomes = [trial.outcome for trial in trials if trial.outcome is not None]
    recoveries = [outcome.recovery_s for outcome in outcomes if outcome.recovery_s is not None]
    if recoveries:
        report.add(f"{prefix}mean recovery", statistics.mean(recoveries), "s")
        report.add(f"{prefix}longest recovery", max(recoveries), "s")
        slower = statistics.mean(outcome.seconds for outcome in outcomes) / undisturbed.seconds
        report.add(f"{prefix}mean run / undisturbed run", slower, "x")


if __name__ == "__main__":
    sys.exit(main())
