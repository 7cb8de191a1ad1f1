"""Pull and push against JSON over a WebSocket, as the original had it."""

from __future__ import annotations

import statistics
from collections import defaultdict

from benchmarks.measuring.processes import Peer, seconds_of, together
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire import json_peers
from benchmarks.wire.fleet import MB, serving
from benchmarks.wire.parameter_server import Traffic

_SIZE_MB = 10.0
_NUM_TRANSFERS = 40
_NUM_ROUNDS = 2
_OPERATIONS = ("pull", "push")


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows. JSON takes seconds a transfer, and is so much slower that two rounds tell, quick or not."""
    say(f"{_SIZE_MB:g} MB: JSON over WebSocket and parameter server, {_NUM_ROUNDS} rounds")
    num_bytes = round(_SIZE_MB * MB)
    seconds: dict[str, list[float]] = defaultdict(list)
    with (
        Peer("JSON server", json_peers.JsonServer, num_bytes) as json_server,
        Peer("JSON client", json_peers.JsonClient, json_server.call("port"), num_bytes) as json_client,
        serving(Traffic(num_bytes), 1) as fleet,
    ):
        for operation in _OPERATIONS:
            fleet.together(1, operation, _NUM_TRANSFERS)
        for _ in range(_NUM_ROUNDS):
            for operation in _OPERATIONS:
                seconds[f"json {operation}"].append(seconds_of(together([json_client], operation, 1)))
                ours_s = seconds_of(fleet.together(1, operation, _NUM_TRANSFERS)) / _NUM_TRANSFERS
                seconds[f"ours {operation}"].append(ours_s)
        json_client.call("check_weights")
        fleet.check()
    for operation in _OPERATIONS:
        json_s, beside_s = seconds[f"json {operation}"], seconds[f"ours {operation}"]
        report.add(f"JSON {operation} {_SIZE_MB:g} MB", statistics.median(json_s) * 1000, "ms")
        report.add(f"{operation} {_SIZE_MB:g} MB beside it", statistics.median(beside_s) * 1000, "ms")
        ratio = median_ratio(json_s, beside_s)
        report.add(f"{operation} {_SIZE_MB:g} MB, times as fast as JSON", ratio, "x", at_least=100)
