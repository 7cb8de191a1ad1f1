"""Real runs of a few workers on this machine, beside what the simulation predicts for them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring.processes import Peer, started, together
from benchmarks.measuring.report import Report, say
from benchmarks.scale.model import Cluster, Costs, Outcome, Plan, Steps
from benchmarks.scale.peers import Server, Trained, Worker
from benchmarks.scale.simulation import simulate

_TARGET = 0.15
_RUN_S = 1.0
_BATCH_SIZE = 64
_DEADLINE_S = 120.0
_NUM_SEEDS = 5
_NUM_WARMING_ROUNDS = 3
# A run counts as one that had the machine to itself where others had less of it.
_ALONE_SHARE = 0.03
_MAX_REPEATS_FOR_EACH = 2


@dataclass(frozen=True)
class Case:
    """A run that is done and predicted.

    Attributes:
        step_ms: of a core, on average; the spread is a fifth of it.
    """

    num_workers: int
    size_mb: float
    staleness: int | None
    sync_interval: int
    step_ms: float

    def __str__(self) -> str:
        return (
            f"{self.num_workers} workers, {self.size_mb:g} MB, staleness {self.staleness}, "
            f"{self.sync_interval} x {self.step_ms:g} ms"
        )

    @property
    def steps(self) -> Steps:
        return Steps(self.step_ms / 1e3, self.step_ms / 5e3)


@dataclass(frozen=True)
class Measured:
    """A real run, and the share of the machine's cores that other processes had meanwhile."""

    outcome: Outcome
    others_share: float


CASES = (
    Case(2, 0.4, 0, 1, 5.0),
    Case(2, 0.4, None, 16, 1.0),
    Case(2, 10.0, 0, 4, 5.0),
    Case(2, 10.0, None, 1, 20.0),
    Case(2, 100.0, 0, 10, 20.0),
    Case(4, 0.4, 0, 16, 1.0),
    Case(4, 0.4, 4, 1, 2.0),
    Case(4, 10.0, 0, 1, 20.0),
    Case(4, 10.0, 2, 4, 5.0),
    Case(4, 100.0, None, 10, 20.0),
    Case(8, 0.4, 0, 1, 2.0),
    Case(8, 0.4, None, 16, 1.0),
    Case(8, 10.0, 0, 4, 5.0),
    Case(8, 10.0, 4, 1, 10.0),
    Case(8, 10.0, None, 1, 5.0),
)


def this_machine(window_bytes: int) -> Cluster:
    """Workers and server on the cores that there are, as in the real runs."""
    return Cluster(
        is_one_machine=True,
        server_cores=_num_cores(),
        link_bytes_per_s=None,
        window_bytes=window_bytes,
        chunk_bytes=2**17,
        max_chunks=100,
    )


def check(report: Report, costs: Costs, cluster: Cluster, cases: Sequence[Case], num_repeats: int) -> None:
    """Adds the rows of each case, and a summary."""
    errors, others_shares = [], []
    for case in cases:
        say(f"real and simulated: {case}")
        num_rounds = rounds_for(case)
        predicted = predict(case, costs, cluster, num_rounds)
        measured = measure(case, num_rounds, num_repeats)
        errors.append(_add_rows(report, str(case), predicted, measured.outcome))
        others_shares.append(measured.others_share)
    for index, what in enumerate(("samples/s", "idle share")):
        median = statistics.median(error[index] for error in errors)
        report.add(f"median error of {what} over {len(cases)} runs", median, "share", below=_TARGET)
        report.add(f"largest error of {what} over {len(cases)} runs", max(error[index] for error in errors), "share")
    name = "the machine's time that other processes had in these runs"
    report.add(f"{name}, median", statistics.median(others_shares), "share")
    report.add(f"{name}, at most", max(others_shares), "share")


def rounds_for(case: Case) -> int:
    """As many as take about as long as a run is to take, if nothing but the steps took time."""
    interval_s = case.sync_interval * case.step_ms / 1e3
    transfer_s = case.size_mb / 1e3  # about a second for a GB, with all that it costs
    share = max(1.0, case.num_workers / 2)
    return max(8, round(_RUN_S / ((interval_s + transfer_s) * share)))


def predict(case: Case, costs: Costs, cluster: Cluster, num_rounds: int) -> Outcome:
    """The mean over some seeds."""
    outcomes = [
        simulate(
            Plan(
                case.num_workers,
                case.size_mb * 1e6,
                case.steps,
                case.staleness,
                case.sync_interval,
                _BATCH_SIZE,
                num_rounds,
                seed=seed,
            ),
            costs,
            cluster,
        )
        for seed in range(_NUM_SEEDS)
    ]
    return _median(outcomes)


def measure(case: Case, num_rounds: int, num_repeats: int) -> Measured:
    """The median of some real runs, after a short one that warms up.

    While others use the machine, runs are repeated, up to a limit; those count in which others had least of it.
    """
    num_bytes, num_workers = round(case.size_mb * 1e6), case.num_workers
    runs: list[Measured] = []
    with Peer("parameter server", Server, num_bytes, num_workers, case.staleness) as server:
        address = server.call("address")
        peers = [Peer(f"worker {index}", Worker, address, index, num_bytes) for index in range(num_workers)]
        with started(peers) as workers:
            _train(case, workers, _NUM_WARMING_ROUNDS)
            while _num_alone(runs) < num_repeats and len(runs) < _MAX_REPEATS_FOR_EACH * num_repeats:
                runs.append(_measure_run(case, server, workers, num_rounds))
            version = server.call("version")
    num_done = _NUM_WARMING_ROUNDS + len(runs) * num_rounds
    num_published = num_done * (1 if case.staleness == 0 else num_workers)
    if version != num_published:
        raise ValueError(f"{case}: expected version {num_published} after all rounds, got {version}")
    kept = sorted(runs, key=lambda run: run.others_share)[:num_repeats]
    return Measured(_median([run.outcome for run in kept]), max(run.others_share for run in kept))


def _num_alone(runs: Sequence[Measured]) -> int:
    return sum(run.others_share < _ALONE_SHARE for run in runs)


def _measure_run(case: Case, server: Peer, workers: Sequence[Peer], num_rounds: int) -> Measured:
    server_s, cores_s = server.call("process_s"), _busy_s()
    began = time.monotonic()
    trained = _train(case, workers, num_rounds)
    seconds = time.monotonic() - began
    own_s = server.call("process_s") - server_s + sum(worker.process_s for worker in trained)
    others_s = max(0.0, _busy_s() - cores_s - own_s)
    return Measured(_outcome(case, trained), others_s / (seconds * _num_cores()))


def _busy_s() -> float:
    """Seconds of a core that all processes of the machine have used, and other machines on the same hardware."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, line.split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _train(case: Case, workers: Sequence[Peer], num_rounds: int) -> list[Trained]:
    return together(workers, "train", num_rounds, case.sync_interval, case.steps, deadline_s=_DEADLINE_S)


def _outcome(case: Case, workers: Sequence[Trained]) -> Outcome:
    seconds = max(worker.ended for worker in workers) - min(worker.began for worker in workers)
    num_pushes = sum(worker.num_rounds for worker in workers)
    samples_per_s = num_pushes * case.sync_interval * _BATCH_SIZE / seconds
    total_s = sum(worker.ended - worker.began for worker in workers)
    idle_share = 1 - sum(worker.steps_s for worker in workers) / total_s
    return Outcome(num_pushes, seconds, samples_per_s, samples_per_s, idle_share)


def _median(outcomes: list[Outcome]) -> Outcome:
    def median(figure: str) -> float:
        return float(statistics.median(getattr(outcome, figure) for outcome in outcomes))

    samples_per_s = median("samples_per_s")
    return Outcome(outcomes[0].num_pushes, median("seconds"), samples_per_s, samples_per_s, median("idle_share"))


def _add_rows(report: Report, name: str, predicted: Outcome, measured: Outcome) -> tuple[float, float]:
    """Returns the errors of samples/s and of the idle share, each as a share of what was measured."""
    report.add(f"{name}: measured", measured.samples_per_s, "samples/s")
    report.add(f"{name}: predicted", predicted.samples_per_s, "samples/s")
    error = abs(predicted.samples_per_s / measured.samples_per_s - 1)
    report.add(f"{name}: error of samples/s", error, "share", below=_TARGET)
    report.add(f"{name}: idle share measured", measured.idle_share, "share")
    report.add(f"{name}: idle share predicted", predicted.idle_share, "share")
    idle_error = abs(predicted.idle_share / measured.idle_share - 1)
    report.add(f"{name}: error of idle share", idle_error, "share", below=_TARGET)
    return error, idle_error
