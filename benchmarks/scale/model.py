"""What the scale simulation is told: what work costs, what a cluster is made of, and how a run is to be done."""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Curve = Sequence[tuple[float, float]]
"""Seconds by bytes, sizes ascending."""


def at_size(curve: Curve, num_bytes: float) -> float:
    """The curve's value between its points, in a straight line; beyond the last, as steep as before it.

    >>> at_size([(0, 1.0), (10, 2.0), (20, 5.0)], 5), at_size([(0, 1.0), (10, 2.0), (20, 5.0)], 30)
    (1.5, 8.0)
    """
    if len(curve) == 1:
        return curve[0][1]
    above = min(max(1, bisect.bisect_left(curve, num_bytes, key=lambda point: point[0])), len(curve) - 1)
    (low, at_low), (high, at_high) = curve[above - 1 : above + 1]
    return at_low + (at_high - at_low) * (num_bytes - low) / (high - low)


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, by the bytes that are sent or folded. The first point of a curve is an almost empty message.

    Attributes:
        client_push, server_push: of a push: the worker's thread, the server's loop; the loop folds small weights too.
        fold: on the server's thread for arithmetic.
        client_pull, server_pull: of a pull.
        prepare: what a worker does to its weights between its steps and the push.
        decide_s: of a push and its pull on the loop, for each worker of the run.
    """

    client_push: Curve
    server_push: Curve
    fold: Curve
    client_pull: Curve
    server_pull: Curve
    prepare: Curve = ((0.0, 0.0),)
    decide_s: float = 0.0


@dataclass(frozen=True)
class Codec:
    """How weights are packed. Times are seconds of a core for each byte of the weights, not of what is sent.

    Attributes:
        ratio: bytes sent for each byte of the weights.
        feedback_s: what a worker needs more than `encode_s`, to keep what was lost of its push.
    """

    name: str = "none"
    ratio: float = 1.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    feedback_s: float = 0.0


@dataclass(frozen=True)
class Steps:
    """How long a local step takes, in seconds of a core: a gamma distribution, so that sums of steps are one too.

    Attributes:
        spread_s: standard deviation of one step.
        slow_share: how many of a worker's intervals are slow, from 0 to 1, at random.
        slow_factor: how many times as long those take.
    """

    mean_s: float
    spread_s: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0

    def draw(self, random_numbers: random.Random, num_steps: int) -> float:
        """Seconds of an interval of so many steps."""
        seconds = self.mean_s * num_steps
        if self.spread_s and self.mean_s:
            scale = self.spread_s**2 / self.mean_s
            seconds = random_numbers.gammavariate(seconds / scale, scale)
        is_slow = self.slow_share > 0 and random_numbers.random() < self.slow_share
        return seconds * self.slow_factor if is_slow else seconds


@dataclass(frozen=True)
class Cluster:
    """The machines and what connects them.

    Attributes:
        is_one_machine: workers and servers share `server_cores`, and there is no link; else each worker has a core.
        server_cores: of the driver, or of each machine with a shard.
        link_bytes_per_s: of a server's link, in each direction; workers' links are taken to be no slower.
        window_bytes: of a message, that are under way at most.
        chunk_bytes, max_chunks: how finely a message is cut; finer is slower to simulate.
    """

    is_one_machine: bool = False
    server_cores: int = 4
    link_bytes_per_s: float | None = 1.25e9
    latency_s: float = 1e-4
    window_bytes: int = 4 * 2**20
    chunk_bytes: int = 2**20
    max_chunks: int = 4

    def chunks(self, num_bytes: float) -> tuple[int, int]:
        """Into how many chunks a message is cut, and how many may be under way."""
        num_chunks = min(self.max_chunks, max(1, round(num_bytes / self.chunk_bytes)))
        return num_chunks, max(2, int(self.window_bytes * num_chunks / max(1.0, num_bytes)))


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        num_bytes: of the weights.
        staleness: 0 is bulk-synchronous, None asynchronous.
        num_rounds: that each worker does.
        has_own_machines: whether each shard has a machine and a link of its own; else they share the driver's.
        receive_buffer_bytes: of each shard, see `tensorspark.ps.buffers`.
    """

    num_workers: int
    num_bytes: float
    steps: Steps
    staleness: int | None = None
    sync_interval: int = 1
    batch_size: int = 64
    num_rounds: int = 20
    num_shards: int = 1
    has_own_machines: bool = False
    push_codec: Codec = field(default_factory=Codec)
    pull_codec: Codec = field(default_factory=Codec)
    receive_buffer_bytes: int = 2**28
    seed: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a simulated run, or of a real one.

    Attributes:
        seconds: from the first worker's begin to the last one's end.
        samples_per_s: of all workers, over all that time.
        steady_samples_per_s: the same from a quarter of the pushes on, where all is in motion.
        idle_share: of the workers' time, what is not spent in steps.
        staleness: versions published between a pull and the fold of the push based on it, mean over the pushes.
        max_lead: rounds that a worker was ahead of the slowest when it began one.
        busy: by resource, the share of the time in which it was busy; of several, the mean.
    """

    num_pushes: int
    seconds: float
    samples_per_s: float
    steady_samples_per_s: float
    idle_share: float
    staleness: float = 0.0
    max_lead: int = 0
    busy: Mapping[str, float] = field(default_factory=dict)
