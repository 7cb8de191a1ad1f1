"""What the timeline shows of all workers: of many partitions the most telling, of many spans as much as one can see,
and of a wait for whom it was."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter

from tensorspark.telemetry.records import Activity, Span, WorkerSample, WorkerState

# A wait ends when the push that it was for has been merged: that takes a moment, in which nobody is at anything.
_MERGE_S = 0.25
_KEPT_S = 20.0


def most_telling(workers: Mapping[int, WorkerSample], limit: int) -> list[int]:
    """At most `limit` partitions, in order: the lost, then by turns who has waited longest and who is slowest.

    Args:
        workers: by partition.
    """
    if len(workers) <= limit:
        return sorted(workers)
    lost = [worker.partition for worker in workers.values() if worker.state == WorkerState.LOST]
    others = [worker for worker in workers.values() if worker.state != WorkerState.LOST]
    waited = sorted(others, key=lambda worker: -worker.busy_s.get(Activity.WAIT, 0.0))
    slowest = sorted(others, key=_speed)
    chosen = dict.fromkeys(sorted(lost)[:limit])
    for waiter, slow in zip(waited, slowest, strict=True):
        for worker in (waiter, slow):
            if len(chosen) < limit:
                chosen[worker.partition] = None
    return sorted(chosen)


def _speed(worker: WorkerSample) -> tuple[bool, int, float]:
    done = worker.state in (WorkerState.FINISHED, WorkerState.PENDING)
    return (done, -worker.lag, worker.num_steps if worker.progress is None else worker.progress)


def who_waits(workers: Iterable[WorkerSample]) -> tuple[list[int], list[int]]:
    """The partitions that wait at this moment, and those that they wait for: the ones furthest behind.

    >>> waiting = dict(state="waiting", host="a", attempt=1, num_attempts=1, num_steps=9, num_samples=9, num_applied=3,
    ...     num_refused=0, num_reconnects=0, num_bytes_pushed=0, num_bytes_pulled=0, progress=None, lag=0, busy_s={})
    >>> who_waits([WorkerSample(0, **waiting), WorkerSample(1, **waiting | {"state": "live", "lag": 1})])
    ([0], [1])
    """
    waiting: list[int] = []
    working: list[WorkerSample] = []
    for worker in workers:
        if worker.state == WorkerState.WAITING:
            waiting.append(worker.partition)
        elif worker.state in (WorkerState.LIVE, WorkerState.LOST):
            working.append(worker)
    if not waiting or not working:
        return sorted(waiting), []
    behind = max(worker.lag for worker in working)
    return sorted(waiting), sorted(worker.partition for worker in working if worker.lag == behind)


class Blame:
    """Finds for whom a wait was: whose work was done last before the wait was over.

    >>> blame = Blame()
    >>> blame.learn([Span(0.0, 0, "compute", 1.0), Span(0.0, 1, "compute", 3.0), Span(1.0, 0, "wait", 2.0)])
    >>> blame.of(Span(1.0, 0, "wait", 2.0))
    1
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []

    def learn(self, spans: Iterable[Span]) -> None:
        """Takes note of spans that have ended."""
        ends = (
            (span.seconds + span.duration_s, span.partition)
            for span in spans
            if span.activity in (Activity.COMPUTE, Activity.PUSH) and not span.is_sum
        )
        self._ends = sorted([*self._ends, *ends])

    def forget(self) -> None:
        """Drops what is too old for any wait that is told from now on."""
        if self._ends:
            del self._ends[: bisect_right(self._ends, (self._ends[-1][0] - _KEPT_S, -1))]

    def of(self, span: Span) -> int:
        """The partition that `span` waited for; -1 where it is no wait, or there is none to be seen."""
        if span.activity != Activity.WAIT or span.is_sum:
            return -1
        over = span.seconds + span.duration_s
        # Waits end in the order in which the server answers: whoever computed on before that has not been waited for.
        index = bisect_right(self._ends, (over, 1 << 62)) - 1
        if index < 0:
            return -1
        end, partition = self._ends[index]
        is_other = partition != span.partition and end > max(span.seconds, over - max(_MERGE_S, span.duration_s / 2))
        return partition if is_other else -1


def thinned(spans: Sequence[Span], partitions: Collection[int], limit: int) -> list[Span]:
    """The spans of `partitions`; where there are more than `limit`, those that follow each other become sums.

    The sums of a partition lie end to end, each as long as all of its activity within a slice of time.
    """
    chosen = [span for span in spans if span.partition in partitions]
    if len(chosen) <= limit:
        return chosen
    began = min(span.seconds for span in chosen)
    over = max(span.seconds + span.duration_s for span in chosen)
    # Each slice has about three activities.
    num_slices = max(limit // (3 * max(len(partitions), 1)), 1)
    slice_s = (over - began) / num_slices or 1.0
    long = [span for span in chosen if span.duration_s >= slice_s]
    sums: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    begins: dict[tuple[int, int], float] = {}
    for span in chosen:
        if span.duration_s < slice_s:
            key = (span.partition, int((span.seconds - began) / slice_s))
            sums[key][span.activity] += span.duration_s
            begins[key] = min(begins.get(key, span.seconds), span.seconds)
    for (partition, piece), activities in sums.items():
        at = begins[partition, piece]
        for activity, duration_s in activities.items():
            long.append(Span(at, partition, activity, duration_s, is_sum=True))
            at += duration_s
    return sorted(long, key=attrgetter("seconds"))
