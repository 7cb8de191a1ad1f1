"""A run as Prometheus reads it: ``/metrics``.

`METRICS` is the one table of what there is: the collector and ``docs/metrics.md`` are made of it. Every series has the
label ``run`` besides those in the table, so the counters of a server's next run are series of their own. What is the
same all through a run, its name for example, is told once, by ``tensorspark_run_info``.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tensorspark.errors import ConfigError
from tensorspark.telemetry.records import Activity, Sample, WorkerSample, WorkerState
from tensorspark.telemetry.view import RunView

RUN_LABEL = "run"
"""The run's number in its session, which every series has."""
MAX_PARTITIONS = 200
"""A run of more has no series with the label ``partition``."""
MAX_TENSORS = 100
"""Tensors after these have no series."""

STALENESS_BOUNDS = (*range(17), 20, 24, 28, 32, 40, 48, 56, 63)
"""Upper bounds of the staleness histogram's buckets, in versions: one a version where pushes are, then wider."""

_OUTCOMES = ("finished", "stopped", "failed")
_LEVELS = ("warning", "error", "critical")


class Buckets(NamedTuple):
    """A histogram: how many values are at most each bound, the last being ``+Inf``, and the values' sum."""

    counts: tuple[tuple[str, float], ...]
    total: float


Reading = tuple[tuple[str, ...], float | Buckets]
"""Values of a metric's own labels, and the metric's value for them."""
Read = Callable[[RunView], Iterable[Reading]]


@dataclass(frozen=True)
class Metric:
    """A family of series.

    Attributes:
        name: as Prometheus stores it; a histogram's series have ``_bucket``, ``_sum`` and ``_count`` behind it.
        kind: ``counter``, ``gauge``, ``histogram`` or ``info``.
        labels: beside `RUN_LABEL`.
        help: one sentence or two, with the unit.
        read: the series of a run; none where nothing is known.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    read: Read


def exposition(view: RunView | None, accept: str | None = None) -> tuple[bytes, str]:
    """A run's metrics, in the format that the scraper prefers.

    Without a run, and before its first record, there are the families' names and no series. Any thread may call this;
    it holds `view.lock` while it reads, not while it writes text.

    Args:
        view: of the run.
        accept: the request's ``Accept`` header; None for the plain text format.

    Returns:
        The body, and its content type.

    Raises:
        ConfigError: the client library is not installed.
    """
    client = _client()
    registry = client.CollectorRegistry()
    registry.register(_RunCollector(view, client.metrics_core))
    encode, content_type = client.exposition.choose_encoder(accept or "")
    return encode(registry), content_type


def _client() -> Any:
    """The client library, which is loaded when somebody scrapes for the first time."""
    try:
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise ConfigError(
            "/metrics needs the package prometheus_client on the driver: pip install 'tensorspark[prometheus]'"
        ) from error


class _RunCollector:
    """What the client library's registry asks for families: one run's, as they are now."""

    def __init__(self, view: RunView | None, families: Any) -> None:
        self._view = view
        self._kinds: Mapping[str, Callable[..., Any]] = {
            "counter": families.CounterMetricFamily,
            "gauge": families.GaugeMetricFamily,
            "histogram": families.HistogramMetricFamily,
            "info": families.InfoMetricFamily,
        }

    def collect(self) -> list[Any]:
        """The families of `METRICS`, in their order; a list, so that the lock is not held while it is encoded."""
        if self._view is None:
            return [self._family(metric) for metric in METRICS]
        with self._view.lock:
            return [self._read(metric, self._view) for metric in METRICS]

    def _family(self, metric: Metric) -> Any:
        # The library adds the suffix itself, in the text where it belongs.
        name = metric.name.removesuffix("_info") if metric.kind == "info" else metric.name
        return self._kinds[metric.kind](name, metric.help, labels=(RUN_LABEL, *metric.labels))

    def _read(self, metric: Metric, view: RunView) -> Any:
        family = self._family(metric)
        if view.began is None:
            return family
        run = str(view.began.run)
        for labels, value in metric.read(view):
            if isinstance(value, Buckets):
                family.add_metric((run, *labels), value.counts, value.total)
            elif metric.kind == "info":
                family.add_metric((run, *labels), {})
            else:
                family.add_metric((run, *labels), value)
        return family


def staleness_buckets(bins: Sequence[int]) -> Buckets:
    """The histogram of `Sample.staleness`, of which bin i has the pushes that were i versions stale.

    The last bin is of all above it: those are in the bucket ``+Inf`` alone, and count as its lower bound in the sum.

    >>> staleness_buckets([5, 2, 1])
    Buckets(counts=(('0.0', 5), ('1.0', 7), ('+Inf', 8)), total=4)
    """
    cumulative = list(itertools.accumulate(bins))
    bounds = STALENESS_BOUNDS[: bisect.bisect_left(STALENESS_BOUNDS, len(bins) - 1)]
    counts = [(f"{bound:.1f}", cumulative[bound]) for bound in bounds]
    return Buckets((*counts, ("+Inf", cumulative[-1])), sum(i * count for i, count in enumerate(bins)))


# What a metric reads. Each is called with the view's lock held, after the run has begun.


def _one(value: float | None) -> list[Reading]:
    return [] if value is None else [((), value)]


def _by(values: Iterable[tuple[str, float | None]]) -> list[Reading]:
    """One series a label's value; None has none."""
    return [((label,), value) for label, value in values if value is not None]


def _of_sample(read: Callable[[Sample], float | None]) -> Read:
    return lambda view: [] if view.sample is None else _one(read(view.sample))


def _of_workers(read: Callable[[WorkerSample], float]) -> Read:
    """One series a partition, if there are not too many."""

    def series(view: RunView) -> list[Reading]:
        return _by((str(partition), read(worker)) for partition, worker in _few_workers(view))

    return series


def _few_workers(view: RunView) -> list[tuple[int, WorkerSample]]:
    is_too_many = view.began is None or view.began.num_partitions > MAX_PARTITIONS
    return [] if is_too_many else sorted(view.workers.items())


def _run_info(view: RunView) -> list[Reading]:
    began = view.began
    return [((began.name, began.mode, began.combiner, began.tensorspark_version, began.app_id), 1)] if began else []


def _began(name: str) -> Read:
    return lambda view: _one(getattr(view.began, name))


def _run_duration(view: RunView) -> list[Reading]:
    newest = view.ended or view.sample
    return _one(newest.seconds if newest else None)


def _run_ended(view: RunView) -> list[Reading]:
    outcome = view.ended.outcome if view.ended else None
    return _by((each, float(each == outcome)) for each in _OUTCOMES)


def _eta(view: RunView) -> list[Reading]:
    """The rows that are left, as far as progress tells, at the newest pace."""
    sample, pace = view.sample, view.samples_per_s
    if view.ended or sample is None or not sample.progress or pace <= 0:
        return []
    return _one(sample.num_samples * (1 - sample.progress) / sample.progress / pace)


def _pushes(view: RunView) -> list[Reading]:
    workers = view.workers.values()
    refused = sum(worker.num_refused for worker in workers)
    return _by((("applied", sum(worker.num_applied for worker in workers)), ("refused", refused)))


def _reconnects(view: RunView) -> list[Reading]:
    return _one(sum(worker.num_reconnects for worker in view.workers.values()))


def _workers(view: RunView) -> list[Reading]:
    states = Counter(worker.state for worker in view.workers.values())
    known = states.total()
    counts = {state.value: states[state.value] for state in WorkerState}
    counts[WorkerState.PENDING.value] += max(0, (view.began.num_partitions if view.began else 0) - known)
    counts["standby"] = view.sample.num_standby if view.sample else 0
    return _by(counts.items())


def _activities(view: RunView) -> list[Reading]:
    seconds = dict.fromkeys((activity.value for activity in Activity), 0.0)
    for worker in view.workers.values():
        for activity, busy_s in worker.busy_s.items():
            seconds[activity] = seconds.get(activity, 0.0) + busy_s
    return _by(seconds.items())


def _worker_activities(view: RunView) -> list[Reading]:
    return [
        ((str(partition), activity), busy_s)
        for partition, worker in _few_workers(view)
        for activity, busy_s in worker.busy_s.items()
    ]


def _worker_info(view: RunView) -> list[Reading]:
    return [((str(partition), worker.host), 1) for partition, worker in _few_workers(view)]


def _scalars(view: RunView) -> list[Reading]:
    point = view.points.last()
    return _numbers(point.scalars if point else {})


def _epoch_scalars(view: RunView) -> list[Reading]:
    return _numbers(view.epochs[-1].logs if view.epochs else {})


def _numbers(scalars: Mapping[str, float | None]) -> list[Reading]:
    """None stands for what is not finite: the series goes on, so that an alert may see it."""
    return _by((name, float("nan") if value is None else value) for name, value in scalars.items())


def _staleness(view: RunView) -> list[Reading]:
    return [((), staleness_buckets(view.sample.staleness))] if view.sample and view.sample.staleness else []


def _norms(attribute: str) -> Read:
    def series(view: RunView) -> list[Reading]:
        tensors = view.weights.tensors[:MAX_TENSORS] if view.weights else ()
        return _by((tensor.name, getattr(tensor, attribute)) for tensor in tensors)

    return series


def _num_checkpoints(view: RunView) -> list[Reading]:
    return _one(view.num_checkpoints)


def _checkpoint(attribute: str) -> Read:
    return lambda view: _one(getattr(view.checkpoints[-1], attribute)) if view.checkpoints else []


def _checkpoint_time(view: RunView) -> list[Reading]:
    return _one(view.began.started_at + view.checkpoints[-1].seconds) if view.began and view.checkpoints else []


def _log_lines(view: RunView) -> list[Reading]:
    counts = dict.fromkeys(_LEVELS, 0)
    for level, count in view.num_log_lines.items():
        counts[_level(level)] += count
    return _by(counts.items())


def _level(level: int) -> str:
    return _LEVELS[(level >= logging.ERROR) + (level >= logging.CRITICAL)]


METRICS: tuple[Metric, ...] = (
    Metric("tensorspark_run_info", "info", ("name", "mode", "combiner", "version", "app_id"), "The run: its "
           "session's name, how workers are kept in step, how pushes are merged, the library's version, Spark's "
           "application. Always 1.", _run_info),
    Metric("tensorspark_run_start_timestamp_seconds", "gauge", (), "When the run began, as UNIX time.",
           _began("started_at")),
    Metric("tensorspark_run_duration_seconds", "gauge", (), "How long the run has gone on, or went on.",
           _run_duration),
    Metric("tensorspark_run_ended", "gauge", ("outcome",), "1 for the outcome of a run that has ended: finished, "
           "stopped (by a callback, say) or failed. 0 for the others, and while the run goes on.", _run_ended),
    Metric("tensorspark_partitions", "gauge", (), "Partitions of the feed.", _began("num_partitions")),
    Metric("tensorspark_epochs", "gauge", (), "Epochs that the run is to go through.", _began("num_epochs")),
    Metric("tensorspark_model_size_bytes", "gauge", (), "Size of the synchronized weights in memory.",
           _began("model_bytes")),
    Metric("tensorspark_progress_ratio", "gauge", (), "How much of the run is done, from 0 to 1. No series where the "
           "feed's length is not known yet.", _of_sample(lambda sample: sample.progress)),
    Metric("tensorspark_eta_seconds", "gauge", (), "Time until the run's end at the pace of the last ten seconds. No "
           "series where that cannot be told.", _eta),
    Metric("tensorspark_epoch", "gauge", (), "Epoch that is being trained, from 0.",
           _of_sample(lambda sample: sample.epoch)),
    Metric("tensorspark_steps_total", "counter", (), "Local steps of all workers.",
           _of_sample(lambda sample: sample.num_steps)),
    Metric("tensorspark_samples_total", "counter", (), "Rows trained on by all workers.",
           _of_sample(lambda sample: sample.num_samples)),
    Metric("tensorspark_scalar", "gauge", ("scalar",), "A fetched scalar, such as the loss: its mean over the newest "
           "rows. NaN where it is not finite.", _scalars),
    Metric("tensorspark_epoch_scalar", "gauge", ("scalar",), "A metric of the last epoch that ended; those of "
           "held-out rows begin with val_. NaN where it is not finite.", _epoch_scalars),
    Metric("tensorspark_weight_publications_total", "counter", (), "How often new weights were published: their "
           "version.", _of_sample(lambda sample: sample.version)),
    Metric("tensorspark_pushes_total", "counter", ("result",), "Pushes that are in the weights (applied), or that "
           "the server refused (refused).", _pushes),
    Metric("tensorspark_staleness", "histogram", ("le",), "How many versions were published between a push's pull "
           "and the push: whole numbers, of pushes that were applied.", _staleness),
    Metric("tensorspark_pushed_bytes_total", "counter", (), "Weights pushed, as they went over the wire.",
           _of_sample(lambda sample: sample.num_bytes_pushed)),
    Metric("tensorspark_pulled_bytes_total", "counter", (), "Weights pulled, as they went over the wire.",
           _of_sample(lambda sample: sample.num_bytes_pulled)),
    Metric("tensorspark_pushed_raw_bytes_total", "counter", (), "Weights pushed, before compression.",
           _of_sample(lambda sample: sample.num_raw_bytes_pushed)),
    Metric("tensorspark_pulled_raw_bytes_total", "counter", (), "Weights pulled, after decompression.",
           _of_sample(lambda sample: sample.num_raw_bytes_pulled)),
    Metric("tensorspark_workers", "gauge", ("state",), "Partitions by how they stand: pending (nobody has come yet), "
           "live (being trained), waiting (for others), lost (no successor yet) or finished; and the attempts that "
           "stand by for a partition that another has (standby).", _workers),
    Metric("tensorspark_reconnects_total", "counter", (), "How often workers lost their connection and came back.",
           _reconnects),
    Metric("tensorspark_activity_seconds_total", "counter", ("activity",), "What all workers' time went into: "
           "compute, pull, push, wait, evaluate, standby.", _activities),
    Metric("tensorspark_worker_activity_seconds_total", "counter", ("partition", "activity"), "The same by "
           "partition, of what its workers have been at so far.", _worker_activities),
    Metric("tensorspark_worker_steps_total", "counter", ("partition",), "Local steps of a partition's workers.",
           _of_workers(lambda worker: worker.num_steps)),
    Metric("tensorspark_worker_lag_rounds", "gauge", ("partition",), "Synchronizations that a partition is behind the "
           "fastest.", _of_workers(lambda worker: worker.lag)),
    Metric("tensorspark_worker_info", "info", ("partition", "host"), "Where a partition's worker runs, or ran last. "
           "Always 1.", _worker_info),
    Metric("tensorspark_weight_norm", "gauge", ("tensor",), "Euclidean norm of a variable, while "
           "`log_dir` is set or a page is open.", _norms("norm")),
    Metric("tensorspark_update_norm", "gauge", ("tensor",), "Euclidean norm of a variable's change between the two "
           "newest measurements.", _norms("update_norm")),
    Metric("tensorspark_checkpoints_total", "counter", (), "Checkpoints written.", _num_checkpoints),
    Metric("tensorspark_checkpoint_last_timestamp_seconds", "gauge", (), "When the newest checkpoint was whole, as "
           "UNIX time.", _checkpoint_time),
    Metric("tensorspark_checkpoint_last_duration_seconds", "gauge", (), "How long the newest checkpoint took.",
           _checkpoint("duration_s")),
    Metric("tensorspark_checkpoint_last_size_bytes", "gauge", (), "Size of the newest checkpoint.",
           _checkpoint("num_bytes")),
    Metric("tensorspark_log_lines_total", "counter", ("level",), "Lines of the executors' logs: warning, error and "
           "critical.", _log_lines),
)  # fmt: skip
