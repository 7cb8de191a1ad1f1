"""What mutated frames and requests do to the parser and to a live server: nothing, or this program fails.

Inputs come from frames that real workers sent, mutated (`benchmarks.fuzz.mutations`). They go to

- the **parser** alone: prefix, header and every field of it; only `ProtocolError` may come out;
- a live server, from **strangers**: connections that showed the token and hold no partition. They never registered,
  registered for another run, or wait as a standby for the partition that an honest worker trains; some send mutated
  HTTP instead, with the token and without. The run is bulk-synchronous;
- a live server, from **holders**: connections that were granted a partition of their own, so that their mutated pushes
  may be legal. The server's combiner leaves the weights as they are for these partitions, after the arithmetic is done;
  what they send is anything but a whole report of failure, which rightly ends a run. The run is asynchronous.

Beside the live ones an honest worker goes on pulling and pushing, and compares every pull with its own sum, bit for
bit. The server has room for four pushes, so that the honest worker would hang if buffers were lost.

One input is one mutated frame or request of which the server took notice: it answered, or closed the connection over
it. Frames behind one that closed the connection do not count, nor do those that may have been read as part of another:
of the answers on a connection, each is counted for the earliest input that may have caused it.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.fuzz.campaigns import WARM_SHARE, Outcome, fuzz_parser, fuzz_server
from benchmarks.fuzz.mutations import record
from benchmarks.fuzz.victims import EPOCHS, LAYOUT
from benchmarks.measuring.report import Report, argument_parser, say

_NUM_INPUTS, _NUM_QUICK_INPUTS = 1_000_000, 20_000
_HOLDERS_SHARE = 0.05
_MAX_GROWTH_MB = 4.0
_MB = 10**6


def main() -> int:
    arguments = _arguments()
    frames = record(LAYOUT, EPOCHS)
    live = max(2, arguments.inputs)
    num_holders = round(live * _HOLDERS_SHARE)
    say(f"parser: {arguments.inputs} inputs")
    outcomes = [fuzz_parser(frames, arguments.inputs, arguments.seed)]
    for role, count in (("strangers", live - num_holders), ("holders", num_holders)):
        say(f"live server, {role}: {count} inputs")
        outcomes.append(fuzz_server(role, frames, count, arguments.seed, arguments.deadline))
    report = Report("Fuzzing: the frame parser and a live server", packages=["numpy", "tornado", "msgpack"])
    for outcome in outcomes:
        add_rows(report, outcome)
    for failure in (failure for outcome in outcomes for failure in outcome.failures):
        say(f"FAILURE: {failure}")
    return report.conclude(arguments.json, arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=_NUM_INPUTS, metavar="N", help="for the parser; as many live")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the mutations")
    parser.add_argument("--deadline", type=float, default=1800.0, metavar="SECONDS", help="for each live campaign")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.inputs = min(arguments.inputs, _NUM_QUICK_INPUTS)
    return arguments


def add_rows(report: Report, outcome: Outcome) -> None:
    """An outcome's figures; those with a target are the claims."""
    name, total = outcome.name, outcome.num_inputs.total()
    report.add(f"{name}: inputs", total, "")
    report.add(f"{name}: inputs/s", total / outcome.seconds, "1/s")
    report.add(f"{name}: failures", len(outcome.failures), "", below=1)
    report.add(f"{name}: growth of memory after the first {WARM_SHARE:.0%}", outcome.growth_bytes / _MB, "MB",
               below=_MAX_GROWTH_MB)  # fmt: skip
    report.add(f"{name}: peak memory", outcome.peak_bytes / _MB, "MB")
    if outcome.num_rounds:
        report.add(f"{name}: honest rounds beside them", outcome.num_rounds, "", at_least=1)
    for what, count in sorted(outcome.num_inputs.items()):
        report.add(f"{name}: {what}", count, "")
    for what, count in sorted(outcome.answers.items()):
        report.add(f"{name}: answered {what}", count, "")


if __name__ == "__main__":
    sys.exit(main())
