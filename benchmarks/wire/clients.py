"""How many clients one server serves: total throughput with 1 to 64 of them, and how long each waits.

Throughput and latency are those of a closed loop: a client begins its next transfer when the last one is over, so that
N clients keep N requests at the server. Each round measures all numbers of clients, one right after the other; the
processes of all clients are there meanwhile, idle but for those that are measured. What many connections cost whatever
the server does (caches, and processes that take turns on a few cores) is told by raw TCP with as many. What they cost
the server is told by the time that it had of a core, whoever else wanted it meanwhile.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.measuring.processes import Peer, seconds_of, started, together
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire import raw_peers
from benchmarks.wire.fleet import DEADLINE_S, Fleet, serving, traffic_of

_COMPARED = (4, 64)
_OPERATIONS = ("pull", "push")
_AT_LEAST = 0.8
# By size, how many times a client pulls or pushes in one measurement, by the number of clients.
_NUM_TRANSFERS = {
    0.4: {1: 800, 4: 300, 16: 80, 64: 24},
    10.0: {1: 40, 4: 16, 16: 6, 64: 4},
}
_NUM_LATENCIES = {1: 600, 4: 200, 16: 60, 64: 20}
_LATENCY_MB = 0.4
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 5, 2
_PERCENTILES = (50, 99)


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of throughput."""
    for size_mb, num_transfers in _NUM_TRANSFERS.items():
        measure_throughput(report, size_mb, num_transfers, _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS)


def measure_latency(report: Report, is_quick: bool) -> None:
    """Adds the rows of latency."""
    measure_latencies(report, _LATENCY_MB, _NUM_LATENCIES, _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS)


def measure_throughput(
    report: Report,
    size_mb: float,
    num_transfers: Mapping[int, int],
    num_rounds: int,
    compared: tuple[int, int] = _COMPARED,
) -> None:
    """Adds a size's rows.

    Args:
        num_transfers: of a client in one measurement, by the number of clients.
        compared: few clients and many, of which the ratio is reported.
    """
    traffic, many = traffic_of(size_mb), max(num_transfers)
    say(f"{size_mb:g} MB: throughput with {_listed(num_transfers)} clients, {num_rounds} rounds")
    with serving(traffic, many) as fleet:
        figures = _throughputs(fleet.clients, traffic.num_bytes, num_transfers, num_rounds)
        processor_s = _processor_seconds(fleet, num_transfers)
        fleet.check()
    say(f"{size_mb:g} MB: raw TCP with {_listed(compared)} clients, {num_rounds} rounds")
    with (
        Peer("raw server", raw_peers.RawServer, traffic.num_bytes) as raw_server,
        started(_raw_clients(raw_server, traffic.num_bytes, many)) as raw_clients,
    ):
        some = {num_clients: num_transfers[num_clients] for num_clients in compared}
        raw_figures = _throughputs(raw_clients, traffic.num_bytes, some, num_rounds)
    for operation in _OPERATIONS:
        for num_clients in num_transfers:
            of_one = figures[operation, num_clients]
            report.add(f"{_what(operation, size_mb, num_clients)}, in all", statistics.median(of_one), "GB/s")
            core_ms = processor_s[operation, num_clients] * 1000
            report.add(f"{_what(operation, size_mb, num_clients)}, of a server's core", core_ms, "ms each")
        name = f"{operation} {size_mb:g} MB, {compared[1]} clients / {compared[0]}"
        few, many_together = (figures[operation, num_clients] for num_clients in compared)
        report.add(name, median_ratio(many_together, few), "x", at_least=_AT_LEAST)
        few, many_together = (raw_figures[operation, num_clients] for num_clients in compared)
        report.add(f"raw TCP, {name}", median_ratio(many_together, few), "x")


def _throughputs(
    clients: Sequence[Peer], num_bytes: int, num_transfers: Mapping[int, int], num_rounds: int
) -> Mapping[tuple[str, int], list[float]]:
    """GB/s of all clients together, one value a round, by operation and number of clients."""
    figures: dict[tuple[str, int], list[float]] = defaultdict(list)
    for is_warm in itertools.chain([False], itertools.repeat(True, num_rounds)):
        for operation, (num_clients, count) in itertools.product(_OPERATIONS, num_transfers.items()):
            seconds = seconds_of(together(clients[:num_clients], operation, count, deadline_s=DEADLINE_S))
            if is_warm:
                figures[operation, num_clients].append(num_bytes / 1e9 * count * num_clients / seconds)
    return figures


def _processor_seconds(fleet: Fleet, num_transfers: Mapping[int, int]) -> Mapping[tuple[str, int], float]:
    """What a transfer takes of the server's threads together, by operation and number of clients."""
    seconds = {}
    for operation, (num_clients, count) in itertools.product(_OPERATIONS, num_transfers.items()):
        before = fleet.server.call("processor_s")
        fleet.together(num_clients, operation, count)
        seconds[operation, num_clients] = (fleet.server.call("processor_s") - before) / (count * num_clients)
    return seconds


def _raw_clients(server: Peer, num_bytes: int, num_clients: int) -> list[Peer]:
    port = server.call("port")
    return [
        Peer(f"raw client {index}", raw_peers.RawClient, port, num_bytes, deadline_s=DEADLINE_S)
        for index in range(num_clients)
    ]


def measure_latencies(report: Report, size_mb: float, num_samples: Mapping[int, int], num_rounds: int) -> None:
    """Adds a size's rows: percentiles of a pull, and of a push and the pull behind it, of all clients and rounds.

    Args:
        num_samples: of a client in one measurement, by the number of clients.
    """
    say(f"{size_mb:g} MB: latency with {_listed(num_samples)} clients, {num_rounds} rounds")
    operations = {"pull": "pull_seconds", "push and pull": "round_seconds"}
    figures: dict[tuple[str, int], list[float]] = defaultdict(list)
    with serving(traffic_of(size_mb), max(num_samples)) as fleet:
        for is_warm in itertools.chain([False], itertools.repeat(True, num_rounds)):
            for (name, operation), (num_clients, count) in itertools.product(operations.items(), num_samples.items()):
                taken = fleet.together(num_clients, operation, count)
                if is_warm:
                    figures[name, num_clients] += itertools.chain.from_iterable(taken)
        fleet.check()
    for (name, num_clients), seconds in figures.items():
        for percentile, value in zip(_PERCENTILES, np.percentile(seconds, _PERCENTILES), strict=True):
            report.add(f"{_what(name, size_mb, num_clients)}, p{percentile}", float(value) * 1000, "ms")


def _what(operation: str, size_mb: float, num_clients: int) -> str:
    return f"{operation} {size_mb:g} MB, {num_clients} client{'s' if num_clients > 1 else ''}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
