"""Codecs: alone, on one core; and end to end, a client with a server of its own for each codec.

GB/s are of float32, whatever is sent for it. Alone, the time is what the thread had of its core, so that other
processes on a busy machine do not count. On loopback codecs are slower than none, as it is no more than copying memory.
What a codec is worth is told by the *link below which it pays*: on that link sending all takes as long as encoding,
sending the codec's bytes and decoding, one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.measuring.processes import seconds_of
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire.fleet import Fleet, serving, traffic_of
from benchmarks.wire.parameter_server import Traffic
from tensorspark.weights.codecs import codec_of

_SPECS = ("float16", "bfloat16", "int8", "topk:0.01", "rows")
_NONE = "none"
_ROWS = "rows"
_NO_TARGET = "topk:0.01"
_AT_LEAST_GB_PER_S = 1.0
_ALONE_MB, _NUM_ALONE, _NUM_QUICK_ALONE = 100.0, 7, 2
_TOGETHER_MB, _NUM_TRANSFERS = 10.0, 16
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 7, 2


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of all codecs."""
    measure_alone(report, _ALONE_MB, _SPECS, _NUM_QUICK_ALONE if is_quick else _NUM_ALONE)
    measure_together(report, _TOGETHER_MB, _SPECS, _NUM_TRANSFERS, _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS)


def measure_alone(report: Report, size_mb: float, specs: Sequence[str], num_rounds: int) -> None:
    """Adds the rows of what codecs do in memory, with what a client pushes."""
    for spec in specs:
        say(f"{size_mb:g} MB: {spec} alone, {num_rounds} rounds")
        traffic = traffic_of(size_mb, push=spec)
        at_least = None if spec == _NO_TARGET else _AT_LEAST_GB_PER_S
        seconds, num_bytes = _alone(traffic, num_rounds)
        for step, taken in seconds.items():
            gb_per_s = traffic.num_bytes / 1e9 / taken
            report.add(f"{spec}, {step}", gb_per_s, "GB/s per core", at_least=at_least)
        report.add(f"{spec}, bytes", num_bytes / traffic.num_bytes, "of float32")
        saved_gb = (traffic.num_bytes - num_bytes) / 1e9
        pays_below = saved_gb / (seconds["encode_keeping_error"] + seconds["decode"])
        report.add(f"{spec}, a push pays on a link below", pays_below, "GB/s")


def _alone(traffic: Traffic, num_rounds: int) -> tuple[dict[str, float], int]:
    """Median seconds of a core by what the codec did, and its bytes."""
    codec, layout, delta = codec_of(traffic.push), traffic.layout(), traffic.delta(0)
    assert codec is not None
    values, out = layout.allocate(), np.zeros(codec.capacity(layout), np.uint8)
    seconds: dict[str, list[float]] = defaultdict(list)
    num_bytes = 0
    for _ in range(1 + num_rounds):
        values[:] = delta
        seconds["encode"].append(_processor_s(lambda: codec.encode(layout, values, out)))
        seconds["encode_keeping_error"].append(_processor_s(lambda: codec.encode_keeping_error(layout, values, out)))
        values[:] = delta
        num_bytes = codec.encode(layout, values, out)
        values[layout.num_bytes - num_bytes :] = out[:num_bytes]
        seconds["decode"].append(_processor_s(lambda: codec.decode(layout, values, num_bytes)))  # noqa: B023
    return {step: statistics.median(taken[1:]) for step, taken in seconds.items()}, num_bytes


def _processor_s(act: Callable[[], Any]) -> float:
    began = time.thread_time()
    act()
    return time.thread_time() - began


def measure_together(report: Report, size_mb: float, specs: Sequence[str], count: int, num_rounds: int) -> None:
    """Adds the rows of pushes with each codec, and of pulls with those that can.

    Args:
        count: transfers in one measurement.
    """
    say(f"{size_mb:g} MB: end to end with none, {', '.join(specs)}, {num_rounds} rounds")
    cases = [("push", spec) for spec in (_NONE, *specs)]
    cases += [("pull", spec) for spec in (_NONE, *specs) if not spec.startswith("topk")]
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        # A server a case: one that has a codec for pulls encodes whenever somebody pushes.
        fleets = {
            (operation, spec): stack.enter_context(serving(traffic_of(size_mb, **{operation: spec}), num_clients=1))
            for operation, spec in cases
        }
        for is_warm in itertools.chain([False], itertools.repeat(True, num_rounds)):
            for operation, spec in cases:
                gb_per_s = _gb_per_s(fleets[operation, spec], operation, count)
                if is_warm:
                    figures[operation, spec].append(gb_per_s)
        for fleet in fleets.values():
            fleet.check()
        shares = {case: _share_on_the_wire(fleets[case], case[0]) for case in cases}
    for operation, spec in cases:
        name, achieved = f"{operation} {size_mb:g} MB, {spec}", figures[operation, spec]
        report.add(name, statistics.median(achieved), "GB/s")
        report.add(f"{name}, bytes on the wire", shares[operation, spec], "of float32")
        if spec != _NONE:
            report.add(f"{name} / none", median_ratio(achieved, figures[operation, _NONE]), "x")


def _gb_per_s(fleet: Fleet, operation: str, count: int) -> float:
    """Of float32 that the client moves. Rows are pulled one by one, each pull behind a push, which is not counted."""
    if (operation, fleet.traffic.pull) == ("pull", _ROWS):
        seconds: float = sum(fleet.together(1, "pull_changes", count)[0])
    else:
        seconds = seconds_of(fleet.together(1, operation, count))
    return fleet.traffic.num_bytes / 1e9 * count / seconds


def _share_on_the_wire(fleet: Fleet, operation: str) -> float:
    """Of what a transfer would be raw, as the server counted one more of them."""
    direction = ("push", "pull").index(operation)
    if (operation, fleet.traffic.pull) == ("pull", _ROWS):
        return _pulled_change_bytes(fleet) / fleet.traffic.num_bytes
    before = fleet.server.call("bytes_on_the_wire")[direction]
    fleet.together(1, operation, 1)
    share: float = (fleet.server.call("bytes_on_the_wire")[direction] - before) / fleet.traffic.num_bytes
    return share


def _pulled_change_bytes(fleet: Fleet) -> int:
    """Of one pull of what a push has changed: `pull_changes` begins with a pull of everything."""
    before = fleet.server.call("bytes_on_the_wire")[1]
    fleet.together(1, "pull_changes", 1)
    pulled: int = fleet.server.call("bytes_on_the_wire")[1] - before
    return pulled - fleet.traffic.num_bytes
