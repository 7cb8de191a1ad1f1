"""What the simulation says of clusters that are not here: where one server saturates, what moves that, two curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.measuring.report import Report, say
from benchmarks.scale.model import Cluster, Codec, Costs, Outcome, Plan, Steps
from benchmarks.scale.simulation import simulate

SIZES_MB = (0.4, 10.0, 100.0, 500.0)
SYNC_INTERVALS = (1, 16, 100)
STALENESS = (0, 1, 2, 4, 8, 16)

# So many workers that do nothing but push and pull keep any server busy.
_NUM_FLOODING = 48
_NUM_FLOODING_ROUNDS = 6
# Li et al. 2014 say that machines slow down at random, not how often: so many intervals, to twice their length.
_SLOW_SHARE, _SLOW_FACTOR = 0.02, 2.0
_STRAGGLER_SPREAD = 0.1
_STALENESS_WORKERS, _STALENESS_ROUNDS = 100, 120
_STALENESS_INTERVAL_S = 1.0
_STALENESS_MB = 0.4


@dataclass(frozen=True)
class Setting:
    """A cluster that is planned for.

    Attributes:
        step: of one worker.
        num_workers: that the curves over workers go through.
    """

    costs: Costs
    cluster: Cluster
    step: Steps
    codecs: Mapping[str, Codec]
    num_workers: tuple[int, ...]
    batch_size: int = 64

    def plan(self, num_workers: int, size_mb: float, sync_interval: int, staleness: int | None, **more: object) -> Plan:
        steps = self.step
        return replace(
            Plan(num_workers, size_mb * 1e6, steps, staleness, sync_interval, self.batch_size),
            **more,  # type: ignore[arg-type]
        )


def saturation(setting: Setting, plan: Plan) -> float:
    """The number of workers at which an asynchronous run's server has no time left.

    So many workers would need all that it can do, if none of them waited: with fewer, rates grow with the workers, with
    more they do not grow.
    """
    alone = simulate(replace(plan, num_workers=1, staleness=None, num_rounds=8), setting.costs, setting.cluster)
    flooded = simulate(
        replace(
            plan,
            num_workers=_NUM_FLOODING,
            staleness=None,
            num_rounds=_NUM_FLOODING_ROUNDS,
            steps=Steps(0.0),
        ),
        setting.costs,
        setting.cluster,
    )
    return flooded.steady_samples_per_s / alone.steady_samples_per_s


def options(setting: Setting, plan: Plan) -> dict[str, Plan]:
    """One server, and what may be bought instead."""

    def coded(spec: str, pull: str | None = None) -> Plan:
        return replace(plan, push_codec=setting.codecs[spec], pull_codec=setting.codecs[pull or spec])

    return {
        "one server": plan,
        "2 shards on the driver": replace(plan, num_shards=2),
        "2 shards, own machines": replace(plan, num_shards=2, has_own_machines=True),
        "4 shards, own machines": replace(plan, num_shards=4, has_own_machines=True),
        "8 shards, own machines": replace(plan, num_shards=8, has_own_machines=True),
        **{f"{spec} both ways": coded(spec) for spec in ("bfloat16", "int8") if spec in setting.codecs},
        **{
            f"push {spec}, pull bfloat16": coded(spec, "bfloat16")
            for spec in setting.codecs
            if spec.startswith("topk") and "bfloat16" in setting.codecs
        },
    }


def add_saturation(report: Report, setting: Setting) -> None:
    """At how many workers one server saturates, by size and interval, and what the options make of it."""
    for size_mb in SIZES_MB:
        say(f"planning: {size_mb:g} MB")
        for sync_interval in SYNC_INTERVALS:
            plan = setting.plan(1, size_mb, sync_interval, None)
            name = f"saturates: {size_mb:g} MB, interval {sync_interval}"
            report.add(name, saturation(setting, plan), "workers")
        plan = setting.plan(1, size_mb, SYNC_INTERVALS[0], None)
        for option, changed in options(setting, plan).items():
            if option != "one server":
                name = f"saturates: {size_mb:g} MB, interval {SYNC_INTERVALS[0]}, {option}"
                report.add(name, saturation(setting, changed), "workers")


def rates(
    setting: Setting, size_mb: float, sync_interval: int, staleness: int | None, **more: object
) -> dict[int, Outcome]:
    """What comes of it, by the number of workers."""
    return {
        num_workers: simulate(
            setting.plan(num_workers, size_mb, sync_interval, staleness, **{"num_rounds": 12, **more}),
            setting.costs,
            setting.cluster,
        )
        for num_workers in setting.num_workers
    }


def add_rates(report: Report, setting: Setting, size_mb: float, sync_interval: int) -> dict[str, dict[int, Outcome]]:
    """Samples/s, idle share and staleness against the number of workers, by mode; returns the curves."""
    curves = {}
    for staleness in (0, 4, None):
        say(f"planning: {size_mb:g} MB, interval {sync_interval}, staleness {staleness}, to 1,000 workers")
        curve = curves[f"staleness {staleness}"] = rates(setting, size_mb, sync_interval, staleness)
        for num_workers, outcome in curve.items():
            name = f"{num_workers} workers, {size_mb:g} MB, interval {sync_interval}, staleness {staleness}"
            report.add(name, outcome.steady_samples_per_s, "samples/s")
            report.add(f"{name}: idle", outcome.idle_share, "share")
            report.add(f"{name}: versions late", outcome.staleness, "versions")
    asynchronous = curves["staleness None"]
    fewest, most = min(asynchronous), max(asynchronous)
    speedup = asynchronous[most].steady_samples_per_s / asynchronous[fewest].steady_samples_per_s
    report.add(f"{most} workers / {fewest}, {size_mb:g} MB, interval {sync_interval}, staleness None", speedup, "x")
    return curves


def idle_by_staleness(setting: Setting) -> dict[int, float]:
    """The idle share of workers of which some are slow at random, by staleness (after Li et al., OSDI 2014)."""
    steps = Steps(_STALENESS_INTERVAL_S, _STALENESS_INTERVAL_S * _STRAGGLER_SPREAD, _SLOW_SHARE, _SLOW_FACTOR)
    return {
        staleness: simulate(
            Plan(_STALENESS_WORKERS, _STALENESS_MB * 1e6, steps, staleness, num_rounds=_STALENESS_ROUNDS),
            setting.costs,
            setting.cluster,
        ).idle_share
        for staleness in STALENESS
    }


def add_idle_by_staleness(report: Report, setting: Setting) -> dict[int, float]:
    """Adds the curve's rows and its targets, and returns it."""
    say(f"idle share against staleness, {_STALENESS_WORKERS} workers")
    shares = idle_by_staleness(setting)
    name = f"idle, {_STALENESS_WORKERS} workers, {_SLOW_SHARE:.0%} of intervals {_SLOW_FACTOR:g} x as long, staleness"
    report.add(f"{name} 0", shares[0], "share", at_least=0.3)
    report.add(f"{name} 0, upper bound", shares[0], "share", below=0.7)
    for staleness in STALENESS[1:]:
        below = 0.02 if staleness == STALENESS[-1] else None
        report.add(f"{name} {staleness}", shares[staleness], "share", below=below)
    values = list(shares.values())
    falls = all(later <= earlier for earlier, later in itertools.pairwise(values))
    report.add("the idle share falls with every step of staleness", float(falls), "yes", at_least=1)
    return shares


def idle_of_a_barrier(num_workers: int, slow_share: float, slow_factor: float) -> float:
    """Idle share at staleness 0, of steps that are all equal but for the slow ones, where nothing else takes time.

    >>> round(idle_of_a_barrier(100, 0.02, 2.0), 3)
    0.454
    """
    all_fast = (1 - slow_share) ** num_workers
    return 1 - (1 + slow_share * (slow_factor - 1)) / (all_fast + (1 - all_fast) * slow_factor)
