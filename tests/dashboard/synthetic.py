"""A run that never was: records of workers who compute, push, wait for each other, are lost and come back."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    Record,
    RunBegan,
    RunEnded,
    Sample,
    Span,
    Spans,
    Tensor,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
    WorkerSample,
)

TENSORS = (
    Tensor("conv2d/kernel", (3, 3, 1, 32), "float32"),
    Tensor("conv2d/bias", (32,), "float32"),
    Tensor("dense/kernel", (5408, 128), "float32"),
    Tensor("dense/bias", (128,), "float32"),
    Tensor("dense_1/kernel", (128, 10), "float32"),
    Tensor("dense_1/bias", (10,), "float32"),
)


@dataclass
class _Worker:
    partition: int
    speed: float
    state: str = "live"
    host: str = ""
    attempt: int = 0
    num_attempts: int = 1
    num_rounds: int = 0
    num_samples: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)

    def sample(self, lag: int, progress: float) -> WorkerSample:
        return WorkerSample(
            partition=self.partition,
            state=self.state,
            host=self.host,
            attempt=self.attempt,
            num_attempts=self.num_attempts,
            num_steps=self.num_rounds * 10,
            num_samples=self.num_samples,
            num_applied=self.num_rounds,
            num_refused=0,
            num_reconnects=0,
            num_bytes_pushed=self.num_rounds * 260_000,
            num_bytes_pulled=self.num_rounds * 1_400_000,
            progress=progress,
            lag=lag,
            busy_s=dict(self.busy_s),
        )


class SyntheticRun:
    """Bulk-synchronous rounds of `num_workers`, some slower than others.

    Args:
        lost: which partition is lost at `lost_at` seconds, and comes back at `back_at`.
        round_s: how long a round takes the fastest.
    """

    def __init__(
        self,
        num_workers: int = 6,
        *,
        name: str = "mnist-cnn",
        duration_s: float = 300.0,
        lost: int = 4,
        lost_at: float = math.inf,
        back_at: float = math.inf,
        round_s: float = 1.1,
        host: str = "worker-{}.example.internal",
        seed: int = 7,
        run: int = 1,
    ) -> None:
        self._random = random.Random(seed)
        self._workers = [
            _Worker(
                i,
                1.0 + 0.07 * (i % 3) + (0.6 if i == 2 else 0.0),
                host=host.replace("{}", str(i // 2 + 1)),
                attempt=100 + i,
            )
            for i in range(num_workers)
        ]
        self._name, self._run, self._duration_s = name, run, duration_s
        self._lost, self._lost_at, self._back_at, self._round_s = lost, lost_at, back_at, round_s
        self._seconds = 0.0
        self._num_rounds = 0
        self._staleness = [0] * 9

    def began(self, **changes: object) -> RunBegan:
        fields: dict[str, object] = {
            "seconds": 0.0,
            "run": self._run,
            "name": self._name,
            "started_at": 1_790_000_000.0,
            "mode": "bulk-synchronous",
            "num_partitions": len(self._workers),
            "num_epochs": 5,
            "combiner": "DeltaWeightCombiner",
            "settings": {
                "sync_interval": "10",
                "batch_size": "64",
                "staleness": "0",
                "codec": "float16",
                "seed": "7",
                "hdfs_dir": "hdfs://namenode:8020/user/spark/tensorspark",
                "server_host": "driver.example.internal",
                "checkpoint_interval_s": "30",
            },
            "tensors": TENSORS,
            "model_bytes": 2_780_456,
            "tensorspark_version": "2.0.0",
            "app_id": "app-20261121215419-0007",
            "spark_url": "http://driver.example.internal:4040",
            "job_group": "tensorspark-mnist-cnn",
        }
        return RunBegan(**(fields | changes))  # type: ignore[arg-type]

    def rounds(self) -> Iterator[list[Record]]:
        """Each round's records, in the order of time."""
        yield [self.began(), *(self._event(worker, "granted") for worker in self._workers)]
        while self._seconds < self._duration_s:
            yield self._round()
        yield [self._sample(), RunEnded(self._seconds, "finished", "", self._num_steps, self._num_samples)]

    @property
    def seconds(self) -> float:
        """Up to where the run has been told."""
        return self._seconds

    @property
    def _num_steps(self) -> int:
        return sum(worker.num_rounds * 10 for worker in self._workers)

    @property
    def _num_samples(self) -> int:
        return sum(worker.num_samples for worker in self._workers)

    def _event(self, worker: _Worker, what: str, text: str = "") -> WorkerEvent:
        return WorkerEvent(self._seconds, worker.partition, what, worker.host, worker.attempt, text)

    def _round(self) -> list[Record]:
        records: list[Record] = list(self._come_and_go())
        began, spans, arrivals = self._seconds, [], {}
        for worker in self._workers:
            if worker.state == "lost":
                continue
            at = began
            for activity, part in (("pull", 0.07), ("compute", 0.6), ("push", 0.09)):
                duration_s = self._round_s * part * worker.speed * self._random.uniform(0.88, 1.15)
                at = self._spend(worker, activity, at, duration_s, spans)
            arrivals[worker.partition] = at
        over = max([*arrivals.values(), began + 0.05]) + 0.012
        for worker in self._workers:
            if worker.state == "lost":
                continue
            self._spend(worker, "wait", arrivals[worker.partition], over - arrivals[worker.partition], spans)
            worker.num_rounds += 1
            worker.num_samples += 640
        self._seconds = over
        self._num_rounds += 1
        self._staleness[min(int(self._random.expovariate(1.4)), 8)] += len(arrivals)
        records += [Spans(over, tuple(sorted(spans, key=lambda span: span.seconds))), self._point(), self._sample()]
        return records + list(self._now_and_then())

    def _spend(self, worker: _Worker, activity: str, at: float, duration_s: float, spans: list[Span]) -> float:
        spans.append(Span(at, worker.partition, activity, duration_s))
        worker.busy_s[activity] = worker.busy_s.get(activity, 0.0) + duration_s
        return at + duration_s

    def _come_and_go(self) -> Iterator[Record]:
        worker = self._workers[self._lost % len(self._workers)]
        if self._lost_at <= self._seconds < self._back_at and worker.state == "live":
            yield self._event(worker, "lost", "the connection closed")
            yield LogLine(
                self._seconds,
                worker.partition,
                worker.host,
                40,
                "tensorspark.worker",
                "the server closed the connection",
            )
            worker.state = "lost"
        elif self._seconds >= self._back_at and worker.state == "lost":
            worker.state, worker.attempt, worker.num_attempts = "live", worker.attempt + 50, 2
            yield self._event(worker, "granted", "attempt 2")

    def _point(self) -> TrainingPoint:
        x = self._num_rounds
        noise = self._random.gauss(0, 1)
        loss = 0.09 + 2.1 * math.exp(-x / 22) + 0.35 * math.exp(-x / 140) + 0.025 * noise
        accuracy = 0.985 - 0.8 * math.exp(-x / 26) - 0.06 * math.exp(-x / 150) + 0.006 * self._random.gauss(0, 1)
        return TrainingPoint(
            self._seconds, self._num_steps, self._num_samples, {"loss": max(loss, 0.01), "accuracy": min(accuracy, 1.0)}
        )

    def _sample(self) -> Sample:
        fastest = max(worker.num_rounds for worker in self._workers)
        progress = min(self._seconds / self._duration_s, 1.0)
        states = [worker.state for worker in self._workers]
        pushed = sum(worker.num_rounds for worker in self._workers) * 260_000
        pulled = sum(worker.num_rounds for worker in self._workers) * 1_400_000
        return Sample(
            seconds=self._seconds,
            num_steps=self._num_steps,
            num_samples=self._num_samples,
            num_live=states.count("live") + states.count("waiting"),
            num_lost=states.count("lost"),
            num_standby=0,
            num_waiting=int(self._num_rounds % 3 == 0),
            num_finished=0,
            progress=progress,
            epoch=min(int(progress * 5) + 1, 5),
            version=self._num_rounds,
            num_bytes_pushed=pushed,
            num_bytes_pulled=pulled,
            num_raw_bytes_pushed=int(pushed * 3.4),
            num_raw_bytes_pulled=int(pulled * 1.98),
            staleness=tuple(self._staleness),
            workers=tuple(worker.sample(fastest - worker.num_rounds, progress) for worker in self._workers),
        )

    def _now_and_then(self) -> Iterator[Record]:
        if self._num_rounds % 5 == 1:
            yield self._weights()
        if self._num_rounds % 24 == 0:
            epoch = self._num_rounds // 24
            loss = 0.12 + 1.9 * math.exp(-epoch / 1.1)
            logs = {"loss": loss * 0.95, "accuracy": 0.97 - 0.3 * math.exp(-epoch), "val_loss": loss}
            logs["val_accuracy"] = 0.968 - 0.33 * math.exp(-epoch)
            yield EpochEnded(self._seconds, epoch, self._num_steps, logs)
        if self._num_rounds % 20 == 0:
            url = f"hdfs://namenode:8020/user/spark/tensorspark/checkpoints/{self._num_rounds:06d}"
            yield CheckpointWritten(self._seconds, self._num_rounds, url, 2_795_000, 0.21)
        if self._num_rounds % 33 == 5:
            worker = self._workers[self._num_rounds % len(self._workers)]
            yield LogLine(
                self._seconds,
                worker.partition,
                worker.host,
                30,
                "py.warnings",
                "UserWarning: 3 rows were shorter than a batch",
            )

    def _weights(self) -> WeightStats:
        x = self._num_rounds
        stats = []
        for index, tensor in enumerate(TENSORS):
            norm = 4.0 + index + 2.4 * (1 - math.exp(-x / (30 + 5 * index)))
            update = 0.9 * math.exp(-x / 40) + 0.08 + 0.02 * self._random.random()
            stats.append(TensorStats(tensor.name, norm, update if x > 1 else None, *_bell(0.22), *_bell(0.01 * update)))
        return WeightStats(self._seconds, x, self._num_steps, tuple(stats))


def _bell(width: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
    edges = tuple(width * (i - 15) / 5 for i in range(31))
    return edges, tuple(int(22_000 * math.exp(-(((i + 0.5 - 15) / 5) ** 2) / 2)) for i in range(30))
