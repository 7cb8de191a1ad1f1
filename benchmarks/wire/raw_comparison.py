"""Pull and push against raw TCP. Each round measures both, one right after the other, with all processes up."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.measuring.processes import Peer, seconds_of, started, together
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire import raw_peers
from benchmarks.wire.fleet import MB, Fleet, serving
from benchmarks.wire.parameter_server import Traffic

_ECHO_MB = 0.4
_CLIENT_COUNTS = (1, 4)
# How many times a client pulls or pushes in one measurement, alone and as one of four.
_NUM_TRANSFERS = {0.4: {1: 800, 4: 300}, 10.0: {1: 40, 4: 16}, 100.0: {1: 5, 4: 2}}
_TARGETS = {"pull": 0.85, "push": 0.75}
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 9, 2

Figures = dict[str, list[float]]
"""By what was measured, one value a round."""


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of all sizes."""
    num_rounds = _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS
    for size_mb in _NUM_TRANSFERS:
        say(f"{size_mb:g} MB: raw TCP and parameter server, {num_rounds} rounds")
        _measure_size(report, size_mb, num_rounds)


def _measure_size(report: Report, size_mb: float, num_rounds: int) -> None:
    num_bytes, num_clients = round(size_mb * MB), max(_CLIENT_COUNTS)
    with (
        Peer("raw server", raw_peers.RawServer, num_bytes) as raw_server,
        serving(Traffic(num_bytes), num_clients) as fleet,
        started(_raw_clients(raw_server, num_bytes, num_clients)) as raw_clients,
    ):
        figures: Figures = defaultdict(list)
        _measure_round(defaultdict(list), size_mb, raw_clients, fleet)  # warms buffers up and TCP's windows
        for _ in range(num_rounds):
            _measure_round(figures, size_mb, raw_clients, fleet)
        fleet.check()
    _add_throughput_rows(report, size_mb, figures)
    if size_mb == _ECHO_MB:
        _add_echo_rows(report, size_mb, figures)


def _measure_round(figures: Figures, size_mb: float, raw_clients: Sequence[Peer], fleet: Fleet) -> None:
    for num_clients in _CLIENT_COUNTS:
        count = _NUM_TRANSFERS[size_mb][num_clients]
        for operation in _TARGETS:
            for who, peers in (("raw", raw_clients), ("ours", fleet.clients)):
                seconds = seconds_of(together(peers[:num_clients], operation, count))
                figures[f"{who} {operation} {num_clients}"].append(size_mb / 1000 * count * num_clients / seconds)
    if size_mb == _ECHO_MB:
        count = _NUM_TRANSFERS[size_mb][1]
        for figure, peers, operation in (("echo_s", raw_clients, "echo"), ("pull_s", fleet.clients, "pull")):
            figures[figure].append(seconds_of(together(peers[:1], operation, count)) / count)


def _raw_clients(server: Peer, num_bytes: int, num_clients: int) -> list[Peer]:
    port = server.call("port")
    return [Peer(f"raw client {index}", raw_peers.RawClient, port, num_bytes) for index in range(num_clients)]


def _add_throughput_rows(report: Report, size_mb: float, figures: Figures) -> None:
    for operation, target in _TARGETS.items():
        one_raw = figures[f"raw {operation} 1"]
        for num_clients in _CLIENT_COUNTS:
            raw, ours = figures[f"raw {operation} {num_clients}"], figures[f"ours {operation} {num_clients}"]
            what = f"{operation} {size_mb:g} MB, {num_clients} client{'s' if num_clients > 1 else ''}"
            report.add(f"raw TCP for {what}", statistics.median(raw), "GB/s")
            report.add(what, statistics.median(ours), "GB/s")
            at_least = target if size_mb != _ECHO_MB else None
            report.add(f"{what} / raw TCP", median_ratio(ours, raw), "x", at_least=at_least)
            if num_clients > 1:
                report.add(f"{what} / one raw TCP connection", median_ratio(ours, one_raw), "x")


def _add_echo_rows(report: Report, size_mb: float, figures: Figures) -> None:
    report.add(f"raw TCP echo {size_mb:g} MB", statistics.median(figures["echo_s"]) * 1000, "ms")
    report.add(f"pull {size_mb:g} MB", statistics.median(figures["pull_s"]) * 1000, "ms")
    ratio = median_ratio(figures["pull_s"], figures["echo_s"])
    report.add(f"pull {size_mb:g} MB / raw TCP echo", ratio, "x", below=2)
