"""Who trains in `benchmarks.peers`: programs by name, `CONTENDERS`, and who is compared with whom, `RATES`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.workloads.digits import NUM_ROWS

_NUM_ROWS_OF_SLOW = 640
_STALENESS = ("0", "4", "async")
# By name; an interval beyond an epoch ends with it.
_INTERVALS = {"1": 1, "16": 16, "100": 100, "epoch": NUM_ROWS}
_ELEPHAS, _OTHERS = "benchmarks.peers.elephas", "benchmarks.peers.programs"


@dataclass(frozen=True)
class Contender:
    """A program that trains.

    Attributes:
        text: for the report.
        is_whole: whether it trains on all rows, so that its accuracy can be compared.
    """

    text: str
    module: str
    arguments: tuple[str, ...]
    is_whole: bool = True

    @property
    def is_elephas(self) -> bool:
        return self.module == _ELEPHAS


def _contenders() -> Iterator[tuple[str, Contender]]:
    for num_threads in ("1", "2"):
        text = f"1 process, model.fit, {num_threads} thread(s)"
        yield f"fit-{num_threads}", Contender(text, _OTHERS, ("fit", "--threads", num_threads))
    for mode in ("http", "socket"):
        for frequency in ("epoch", "batch"):
            is_whole = (mode, frequency) != ("socket", "batch")
            num_rows = NUM_ROWS if is_whole else _NUM_ROWS_OF_SLOW
            arguments = (mode, "--frequency", frequency, "--rows", str(num_rows))
            text = f"elephas, asynchronous, {mode}, each {frequency}"
            yield f"elephas-{mode}-{frequency}", Contender(text, _ELEPHAS, arguments, is_whole)
    options: tuple[str, ...] = ("synchronous", "--rows", str(NUM_ROWS))
    yield "elephas-sync", Contender("elephas, synchronous, each epoch", _ELEPHAS, options)
    for staleness in _STALENESS:
        for name, interval in _INTERVALS.items():
            options = ("ours", "--staleness", staleness, "--interval", str(interval))
            how = "one synchronization an epoch" if name == "epoch" else f"sync_interval {name}"
            text = f"tensorspark, staleness {staleness}, {how}"
            yield f"ours-{staleness}-{name}", Contender(text, _OTHERS, options)


CONTENDERS = dict(_contenders())
QUICK = ("fit-1", "elephas-http-epoch", "ours-async-16")
"""Who is measured to see that it works."""

RATES = (
    *((f"ours-async-{n}", f"elephas-{mode}-epoch", 5.0) for n in ("epoch", "16") for mode in ("http", "socket")),
    *((f"ours-{s}-1", f"elephas-{mode}-batch", 5.0) for s in ("async", "0") for mode in ("http", "socket")),
    *((f"ours-{s}-epoch", "elephas-sync", None) for s in ("0",)),
    *((f"ours-{s}-{n}", "fit-1", 3.5) for s in _STALENESS for n in ("16", "100")),
    *((f"ours-{s}-{n}", "fit-1", None) for s in _STALENESS for n in ("1", "epoch")),
)
"""Ours, theirs, and how many times their samples/s ours are to be. Accuracy is to be no worse."""
