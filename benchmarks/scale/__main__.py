"""How far training scales: a simulation of many workers and one server or several shards, checked and then used.

First the program measures on this machine what pushes, pulls, folds, decisions and codecs cost, with the real server
and clients. With that, and nothing else, it predicts real runs of 2, 4 and 8 workers, does them, and compares samples/s
and the share of their time in which workers do not compute. Then it predicts runs on a cluster: the number of workers
at which one server saturates, what shards, codecs and longer intervals make of it, and two curves: samples/s against
workers, and workers' idle share against staleness (Li et al., OSDI 2014: about a half at 0, under 2 % at 16).

`benchmarks.scale.simulation` says what is simulated, and what is not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.measuring.report import Report, argument_parser, say
from benchmarks.scale import plots
from benchmarks.scale.calibration import SIZES, Calibration, calibrate
from benchmarks.scale.check import CASES, Case, check, this_machine
from benchmarks.scale.model import Cluster, Steps
from benchmarks.scale.planning import Setting, add_idle_by_staleness, add_rates, add_saturation

_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 3, 1
_NUM_REPEATS, _NUM_QUICK_REPEATS = 3, 1
_QUICK_SIZES = tuple(num_bytes for num_bytes in SIZES if num_bytes <= 10_000_000)
_QUICK_CASES = (Case(2, 0.4, 0, 1, 5.0), Case(4, 10.0, None, 1, 20.0))
_NUM_WORKERS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
_QUICK_NUM_WORKERS = (2, 20, 200)
_CURVES = ((10.0, 1), (100.0, 16))
_GBIT = 1e9 / 8


def main() -> int:
    arguments = _parser().parse_args()
    is_quick: bool = arguments.quick
    report = Report("Scale: predicted and measured", packages=["numpy", "tornado", "msgpack"])
    calibration = calibrate(
        _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS,
        _QUICK_SIZES if is_quick else SIZES,
    )
    add_calibration(report, calibration)
    if "check" in arguments.only:
        cases, num_repeats = (_QUICK_CASES, _NUM_QUICK_REPEATS) if is_quick else (CASES, _NUM_REPEATS)
        check(report, calibration.crowded, this_machine(calibration.window_bytes), cases, num_repeats)
    if "plan" in arguments.only:
        _plan(report, calibration, arguments)
    directory: Path | None = arguments.out
    return report.conclude(directory / "scale.json" if directory and not arguments.json else arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=["check", "plan"], default=["check", "plan"], help="do only this (default: both)"
    )
    parser.add_argument(
        "--step-s", type=float, default=1.0, help="of the cluster's workers, seconds of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--step-spread", type=float, default=0.1, help="a step's standard deviation / its mean (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a step (default: %(default)s)")
    parser.add_argument(
        "--gbit", type=float, default=10.0, help="of each server's link, each way, Gbit/s (default: %(default)s)"
    )
    parser.add_argument(
        "--latency-ms", type=float, default=0.1, help="of the network, one way, ms (default: %(default)s)"
    )
    parser.add_argument("--server-cores", type=int, default=4, help="of each server's machine (default: %(default)s)")
    return parser


def add_calibration(report: Report, calibration: Calibration) -> None:
    """Adds what was measured, and what the simulation therefore goes by."""
    for where, costs in (("alone", calibration.alone), ("all cores busy", calibration.crowded)):
        curves = {
            "worker's thread, push": costs.client_push,
            "worker's thread, pull": costs.client_pull,
            "worker's thread, load and subtract": costs.prepare,
            "server's loop, push": costs.server_push,
            "server's loop, pull": costs.server_pull,
            "server's arithmetic, push": costs.fold,
        }
        for name, curve in curves.items():
            for num_bytes, seconds in curve:
                report.add(f"{name}, {num_bytes / 1e6:g} MB, {where}", seconds * 1e3, "ms")
    report.add("decisions on a push, for each worker of the run", calibration.alone.decide_s * 1e6, "us")
    report.add("a connection on loopback takes in", calibration.window_bytes / 1e6, "MB")
    report.add("a step of a perceptron, 784-128-10, batch 64", calibration.step.mean_s * 1e3, "ms")
    report.add("its standard deviation", calibration.step.spread_s * 1e3, "ms")
    for codec in calibration.codecs.values():
        report.add(f"{codec.name}: bytes sent", codec.ratio, "of float32")
        report.add(f"{codec.name}: encode", 1e-9 / codec.encode_s, "GB/s")
        report.add(f"{codec.name}: encode and keep the error", 1e-9 / (codec.encode_s + codec.feedback_s), "GB/s")
        report.add(f"{codec.name}: decode", 1e-9 / codec.decode_s, "GB/s")


def _plan(report: Report, calibration: Calibration, arguments: argparse.Namespace) -> None:
    cluster = Cluster(
        server_cores=arguments.server_cores,
        link_bytes_per_s=arguments.gbit * _GBIT,
        latency_s=arguments.latency_ms / 1e3,
    )
    step = Steps(arguments.step_s, arguments.step_s * arguments.step_spread)
    num_workers = _QUICK_NUM_WORKERS if arguments.quick else _NUM_WORKERS
    setting = Setting(calibration.alone, cluster, step, calibration.codecs, num_workers, arguments.batch_size)
    add_saturation(report, setting)
    directory: Path | None = arguments.out
    for size_mb, sync_interval in _CURVES:
        curves = add_rates(report, setting, size_mb, sync_interval)
        if directory is not None:
            name = f"{size_mb:g}mb_interval_{sync_interval}"
            say(f"written: {plots.plot_rates(directory, name, curves)}")
    shares = add_idle_by_staleness(report, setting)
    if directory is not None:
        say(f"written: {plots.plot_idle_by_staleness(directory, shares)}")


if __name__ == "__main__":
    sys.exit(main())
