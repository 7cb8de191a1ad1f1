"""How fast weights travel: pull and push against raw TCP, and against JSON over a WebSocket as the original had it.

Everything runs on loopback, server and clients in processes of their own. Each round measures raw TCP and the parameter
server one right after the other; throughputs are medians over the rounds, ratios the medians of the rounds' ratios.
A push counts when it is merged into the weights, and at the end the weights are checked to be the sum of all pushes.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

from benchmarks import json_baseline, parameter_server, raw_tcp
from benchmarks.processes import Peer, seconds_of, started, together
from benchmarks.report import Report, argument_parser, median_ratio, say

_MB = 10**6
_ECHO_MB = 0.4
_JSON_MB = 10.0
_MEMORY_MB = 100.0
_CLIENT_COUNTS = (1, 4)
# How many times a client pulls or pushes in one measurement, alone and as one of four.
_NUM_TRANSFERS = {0.4: {1: 800, 4: 300}, 10.0: {1: 40, 4: 16}, 100.0: {1: 5, 4: 2}}
_TARGETS = {"pull": 0.85, "push": 0.75}
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 9, 2
_NUM_JSON_ROUNDS = 2
_NUM_MEMORY_TURNS = 8

Figures = dict[str, list[float]]
"""By what was measured, one value a round."""


def main() -> int:
    arguments = argument_parser(__doc__.splitlines()[0]).parse_args()
    num_rounds = _NUM_QUICK_ROUNDS if arguments.quick else _NUM_ROUNDS
    report = Report("Wire: pull and push over loopback", packages=["numpy", "tornado", "msgpack"])
    for size_mb in _NUM_TRANSFERS:
        say(f"{size_mb:g} MB: raw TCP and parameter server, {num_rounds} rounds")
        peak_bytes = _measure_size(report, size_mb, num_rounds)
        if size_mb == _MEMORY_MB:
            report.add(
                f"server's peak memory, {size_mb:g} MB, 4 clients", peak_bytes / (size_mb * _MB), "models", below=8
            )
    say(f"{_JSON_MB:g} MB: JSON over WebSocket and parameter server, {_NUM_JSON_ROUNDS} rounds")
    _measure_json(report)
    return report.conclude(arguments.json)


def _measure_size(report: Report, size_mb: float, num_rounds: int) -> float:
    """Adds a size's rows; returns the server's peak memory in bytes."""
    num_bytes, num_clients = round(size_mb * _MB), max(_CLIENT_COUNTS)
    with (
        Peer("raw server", raw_tcp.RawServer, num_bytes) as raw_server,
        Peer("parameter server", parameter_server.Server, num_bytes, num_clients) as server,
        started(_raw_clients(raw_server, num_bytes, num_clients)) as raw_clients,
        started(_clients(server, num_bytes, num_clients)) as clients,
    ):
        figures: Figures = defaultdict(list)
        _measure_round(defaultdict(list), size_mb, raw_clients, clients)  # warms buffers up and TCP's windows
        for _ in range(num_rounds):
            _measure_round(figures, size_mb, raw_clients, clients)
        together(clients, "alternate", _NUM_MEMORY_TURNS)
        peak_bytes: int = server.call("peak_memory_bytes")
        server.call("check_weights", [client.call("num_pushes") for client in clients])
    _add_throughput_rows(report, size_mb, figures)
    if size_mb == _ECHO_MB:
        _add_echo_rows(report, size_mb, figures)
    return peak_bytes


def _measure_round(figures: Figures, size_mb: float, raw_clients: Sequence[Peer], clients: Sequence[Peer]) -> None:
    for num_clients in _CLIENT_COUNTS:
        count = _NUM_TRANSFERS[size_mb][num_clients]
        for operation in _TARGETS:
            for who, peers in (("raw", raw_clients), ("ours", clients)):
                seconds = seconds_of(together(peers[:num_clients], operation, count))
                figures[f"{who} {operation} {num_clients}"].append(size_mb / 1000 * count * num_clients / seconds)
    if size_mb == _ECHO_MB:
        count = _NUM_TRANSFERS[size_mb][1]
        for figure, peers, operation in (("echo_s", raw_clients, "echo"), ("pull_s", clients, "pull")):
            figures[figure].append(seconds_of(together(peers[:1], operation, count)) / count)


def _raw_clients(server: Peer, num_bytes: int, num_clients: int) -> list[Peer]:
    port = server.call("port")
    return [Peer(f"raw client {index}", raw_tcp.RawClient, port, num_bytes) for index in range(num_clients)]


def _clients(server: Peer, num_bytes: int, num_clients: int) -> list[Peer]:
    address = server.call("address")
    return [Peer(f"client {index}", parameter_server.Client, address, index, num_bytes) for index in range(num_clients)]


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


def _measure_json(report: Report) -> None:
    num_bytes = round(_JSON_MB * _MB)
    count = _NUM_TRANSFERS[_JSON_MB][1]
    seconds: Figures = defaultdict(list)
    with (
        Peer("JSON server", json_baseline.JsonServer, num_bytes) as json_server,
        Peer("JSON client", json_baseline.JsonClient, json_server.call("port"), num_bytes) as json_client,
        Peer("parameter server", parameter_server.Server, num_bytes, 1) as server,
        started(_clients(server, num_bytes, 1)) as clients,
    ):
        for operation in _TARGETS:
            together(clients, operation, count)
        for _ in range(_NUM_JSON_ROUNDS):
            for operation in _TARGETS:
                seconds[f"json {operation}"].append(seconds_of(together([json_client], operation, 1)))
                seconds[f"ours {operation}"].append(seconds_of(together(clients, operation, count)) / count)
        json_client.call("check_weights")
        server.call("check_weights", [client.call("num_pushes") for client in clients])
    for operation in _TARGETS:
        json_s, ours_s = seconds[f"json {operation}"], seconds[f"ours {operation}"]
        report.add(f"JSON {operation} {_JSON_MB:g} MB", statistics.median(json_s) * 1000, "ms")
        report.add(f"{operation} {_JSON_MB:g} MB beside it", statistics.median(ours_s) * 1000, "ms")
        ratio = median_ratio(json_s, ours_s)
        report.add(f"{operation} {_JSON_MB:g} MB, times as fast as JSON", ratio, "x", at_least=100)


if __name__ == "__main__":
    sys.exit(main())
