"""A campaign: so many mutated inputs for the parser, or for a live server beside an honest worker."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fuzz.attackers import Attacker, HonestWorker
from benchmarks.fuzz.victims import FuzzedParser, FuzzedServer, Observation
from benchmarks.measuring.processes import Peer

WARM_SHARE = 0.1
"""Of the inputs, after which memory must not grow any more."""

_NUM_ATTACKERS = 3
_PERIOD_S = 0.25
_DRAIN_S = 10.0


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


def fuzz_parser(frames: Sequence[bytes], num_inputs: int, seed: int, deadline_s: float = 600.0) -> Outcome:
    """Mutated frames for the parser, in a process of its own."""
    with Peer("parser", FuzzedParser, list(frames), seed) as parser:
        began = time.monotonic()
        warm = round(num_inputs * WARM_SHARE)
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
        if warm is None and num_done >= WARM_SHARE * num_inputs:
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
