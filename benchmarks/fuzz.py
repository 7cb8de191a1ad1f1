"""What mutated frames and requests do to the parser and to a live server: nothing, or this program fails.

Inputs come from frames that real workers sent, mutated (`benchmarks.mutations`). They go to

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
import collections
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.attackers import Attacker, HonestWorker
from benchmarks.mutations import record
from benchmarks.processes import Peer
from benchmarks.report import Report, argument_parser, say
from benchmarks.victims import EPOCHS, LAYOUT, FuzzedParser, FuzzedServer, Observation

_NUM_INPUTS = 1_000_000
_HOLDERS_SHARE = 0.05
_WARM_SHARE = 0.1  # of the inputs, after which memory must not grow any more
_NUM_ATTACKERS = 3
_PERIOD_S = 0.25
_DRAIN_S = 10.0
_MAX_GROWTH_MB = 4.0
_MB = 10**6


@dataclass(frozen=True)
class Outcome:
    """What a campaign came to.

    Attributes:
        num_inputs: by kind of mutation.
        answers: by kind of frame, or status of HTTP.
        failures: what should not have happened, in words.
        growth_bytes: of the attacked process's memory from 10% of the inputs to the end.
        peak_bytes: the most that it held.
    """

    name: str
    num_inputs: collections.Counter[str]
    answers: collections.Counter[str]
    failures: tuple[str, ...]
    seconds: float
    num_rounds: int
    growth_bytes: int
    peak_bytes: int


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
        arguments.inputs = min(arguments.inputs, 20_000)
    return arguments


def fuzz_parser(frames: Sequence[bytes], num_inputs: int, seed: int, deadline_s: float = 600.0) -> Outcome:
    """Mutated frames for the parser, in a process of its own."""
    with Peer("parser", FuzzedParser, list(frames), seed) as parser:
        began = time.monotonic()
        warm = round(num_inputs * _WARM_SHARE)
        parser.call("parse", warm, deadline_s=deadline_s)
        before = parser.call("observe")
        parser.call("parse", num_inputs - warm, deadline_s=deadline_s)
        after = parser.call("observe")
        num_inputs_by_kind, answers, failures = parser.call("results")
        seconds = time.monotonic() - began
    growth_bytes = after.rss_bytes - before.rss_bytes
    return Outcome("parser", num_inputs_by_kind, answers, failures, seconds, 0, growth_bytes, after.peak_bytes)


def fuzz_server(role: str, frames: Sequence[bytes], num_inputs: int, seed: int, deadline_s: float) -> Outcome:
    """Mutated frames for a live server in a process of its own, beside an honest worker.

    Args:
        role: of the attackers, "strangers" or "holders".
        deadline_s: after which it goes on no more, and fewer inputs are a failure.
    """
    with Peer("server", FuzzedServer, role) as server:
        address = server.call("address")
        honest = HonestWorker(address, seed)
        attackers = [Attacker(address, role, frames, seed + index) for index in range(_NUM_ATTACKERS)]
        try:
            honest.start_and_wait()
            baseline: Observation = server.call("observe")
            for attacker in attackers:
                attacker.start()
            began = time.monotonic()
            warm = _watch(server, attackers, honest, num_inputs, began + deadline_s)
            seconds = time.monotonic() - began
        finally:
            for attacker in attackers:
                attacker.stop()
        last = _drained(server, baseline)
        honest.stop()
        weights: bytes = server.call("weights")
    counts, answers = (
        _total(counters) for counters in zip(*((a.num_inputs, a.answers) for a in attackers), strict=True)
    )
    failures = [failure for thread in (honest, *attackers) for failure in thread.failures]
    failures += last.failures_since(baseline)
    if weights != honest.expected.tobytes():
        failures.append("the weights are not what the honest worker's pushes make")
    if counts.total() < num_inputs:
        failures.append(f"only {counts.total()} of {num_inputs} inputs within {deadline_s:g} s")
    growth_bytes = last.rss_bytes - warm.rss_bytes
    return Outcome(role, counts, answers, tuple(failures), seconds, honest.num_rounds, growth_bytes, last.peak_bytes)


def _watch(
    server: Peer, attackers: Sequence[Attacker], honest: HonestWorker, num_inputs: int, deadline: float
) -> Observation:
    """Waits until there were so many inputs, or something failed; returns what was seen after the warm-up."""
    warm: Observation | None = None
    while time.monotonic() < deadline and not any(thread.failures for thread in (honest, *attackers)):
        honest.ended.wait(_PERIOD_S)
        num_done = sum(attacker.num_inputs.total() for attacker in attackers)
        if warm is None and num_done >= _WARM_SHARE * num_inputs:
            warm = server.call("observe")
        if num_done >= num_inputs:
            break
    seen: Observation = warm or server.call("observe")
    return seen


def _drained(server: Peer, baseline: Observation) -> Observation:
    """What is seen when the server has noticed that the attackers are gone, or after a deadline."""
    deadline = time.monotonic() + _DRAIN_S
    while True:
        seen: Observation = server.call("observe")
        if seen.num_sockets <= baseline.num_sockets or time.monotonic() > deadline:
            return seen
        time.sleep(_PERIOD_S)


def _total(counters: Sequence[collections.Counter[str]]) -> collections.Counter[str]:
    return sum(counters, collections.Counter())


def add_rows(report: Report, outcome: Outcome) -> None:
    """An outcome's figures; those with a target are the claims."""
    name, total = outcome.name, outcome.num_inputs.total()
    report.add(f"{name}: inputs", total, "")
    report.add(f"{name}: inputs/s", total / outcome.seconds, "1/s")
    report.add(f"{name}: failures", len(outcome.failures), "", below=1)
    report.add(f"{name}: growth of memory after the first {_WARM_SHARE:.0%}", outcome.growth_bytes / _MB, "MB",
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
