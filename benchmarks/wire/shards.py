"""One server against two that have half of the weights each, the second a process of its own beside the first."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping

from benchmarks.measuring.processes import seconds_of
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire.fleet import serving, traffic_of

_SHARD_COUNTS = (1, 2)
_OPERATIONS = ("pull", "push")
# By size, how many times a client pulls or pushes in one measurement, by the number of clients.
_NUM_TRANSFERS = {0.4: {1: 600, 4: 200}, 10.0: {1: 30, 4: 12}, 100.0: {1: 4, 4: 2}}
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 7, 2


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of all sizes."""
    for size_mb, num_transfers in _NUM_TRANSFERS.items():
        measure_size(report, size_mb, num_transfers, _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS)


def measure_size(report: Report, size_mb: float, num_transfers: Mapping[int, int], num_rounds: int) -> None:
    """Adds a size's rows.

    Args:
        num_transfers: of a client in one measurement, by the number of clients.
    """
    say(f"{size_mb:g} MB: 1 and 2 shards, {num_rounds} rounds")
    figures: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        fleets = {
            num_shards: stack.enter_context(serving(traffic_of(size_mb, num_shards=num_shards), max(num_transfers)))
            for num_shards in _SHARD_COUNTS
        }
        for is_warm in itertools.chain([False], itertools.repeat(True, num_rounds)):
            for operation, num_clients, num_shards in itertools.product(_OPERATIONS, num_transfers, fleets):
                fleet, count = fleets[num_shards], num_transfers[num_clients]
                seconds = seconds_of(fleet.together(num_clients, operation, count))
                if is_warm:
                    gb_per_s = fleet.traffic.num_bytes / 1e9 * count * num_clients / seconds
                    figures[operation, num_clients, num_shards].append(gb_per_s)
        for fleet in fleets.values():
            fleet.check()
    for operation, num_clients in itertools.product(_OPERATIONS, num_transfers):
        one, two = (figures[operation, num_clients, num_shards] for num_shards in _SHARD_COUNTS)
        what = f"{operation} {size_mb:g} MB, {num_clients} client{'s' if num_clients > 1 else ''}"
        report.add(f"{what}, 1 shard", statistics.median(one), "GB/s")
        report.add(f"{what}, 2 shards", statistics.median(two), "GB/s")
        report.add(f"{what}, 2 shards / 1", median_ratio(two, one), "x")
