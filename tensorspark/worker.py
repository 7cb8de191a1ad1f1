"""The executor's side of a run: `run_partition` trains one partition. Read it first.

It runs inside a Spark task: registers with the server, obtains the trainer, and repeats: pull, `sync_interval` local
steps, push. Whatever goes wrong in it is reported to the server, and so to the driver, before the task fails.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorspark.data.batches import Batch, PartitionFeed
from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedLostError, LeaseLostError, RunStoppedError
from tensorspark.ps.client import Granted, ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.trainers.base import Trainer, TrainerSpec, obtain
from tensorspark.weights.elastic import elastic_difference
from tensorspark.weights.layout import Buffer, WeightLayout

_MAX_REPORTED_EPOCHS = 1000  # they must fit into a frame's header


@dataclass(frozen=True)
class WorkerJob:
    """All that a task needs to know; picklable, the same for all tasks of a run.

    Attributes:
        run: number of the run on its server.
        content: fetches the trainer's content on the executor.
        pushes: "weights", "delta" or "elastic", as the run's combiner wants.
        moving_rate: of elastic averaging.
    """

    address: ServerAddress
    run: int
    spec: TrainerSpec
    content: Callable[[], bytes] = field(repr=False)
    pushes: str
    moving_rate: float
    batch_size: int
    sync_interval: int
    num_epochs: int
    shuffle: bool
    seed: int
    cache_memory_bytes: int
    tmp_dir: str


def run_partition(job: WorkerJob, partition: int, attempt: int, rows: Iterable[Any]) -> None:
    """Trains one partition to its end.

    Args:
        partition: its index in the feed.
        attempt: Spark's ``taskAttemptId``, which no other task of the application has.
        rows: read to their end, so that Spark keeps this process and with it the trainer.

    Raises:
        TensorsparkError: whatever stopped the training; the server has been told.
    """
    rows = iter(rows)
    with ParameterClient(job.address) as client:
        try:
            registration = Registration(job.run, partition, attempt, job.spec.layout.fingerprint, socket.gethostname())
            granted = client.register(registration)
            if not granted.finished:
                _train(job, partition, rows, client, granted)
        except (RunStoppedError, FeedLostError, LeaseLostError):  # nothing to report: Spark tries again where it may
            raise
        except (Exception, SystemExit) as error:  # code that makes the rows may call sys.exit
            client.report(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
    for _ in rows:
        pass


def _train(job: WorkerJob, partition: int, rows: Iterator[Any], client: ParameterClient, granted: Granted) -> None:
    trainer = obtain(job.spec, job.content)
    with EpochCache(job.cache_memory_bytes, job.tmp_dir) as cache:
        feed = PartitionFeed(
            rows,
            trainer.columns,
            partition=partition,
            batch_size=job.batch_size,
            num_epochs=job.num_epochs,
            shuffle=job.shuffle,
            seed=job.seed,
            cache=cache,
        )
        exchange = _exchange_for(job, client, trainer, granted.sequence)
        clock = _EpochClock()
        for interval in _intervals(feed.batches(granted.cursor.epoch, granted.cursor.batch), job.sync_interval):
            exchange.before()
            steps = _Steps(trainer, job.num_epochs, clock)
            for batch in interval:
                steps.run(batch)
            exchange.after(steps)
        client.finish(
            epoch_samples=clock.epoch_samples[-_MAX_REPORTED_EPOCHS:],
            epoch_seconds=clock.epoch_seconds[-_MAX_REPORTED_EPOCHS:],
            step_s=clock.step_s,
            sync_s=exchange.sync_s,
        )


def _intervals(batches: Iterator[Batch], sync_interval: int) -> Iterator[Iterator[Batch]]:
    """Cuts the batches into runs of `sync_interval`, lazily: the first batch of each is at hand before the pull."""
    first = next(batches, None)
    while first is not None:
        yield _interval(first, batches, sync_interval)
        first = next(batches, None)


def _interval(first: Batch, batches: Iterator[Batch], sync_interval: int) -> Iterator[Batch]:
    yield first
    for _ in range(sync_interval - 1):
        batch = next(batches, None)
        if batch is None:
            return
        yield batch


class _EpochClock:
    """How long steps and epochs took; an epoch begins with its first batch at hand."""

    def __init__(self) -> None:
        self.epoch_samples: list[int] = []
        self.epoch_seconds: list[float] = []
        self.step_s = 0.0
        self._num_rows = 0
        self._epoch_began = time.perf_counter()

    def count(self, batch: Batch) -> None:
        self._num_rows += batch.num_rows
        if batch.is_last_of_epoch:
            now = time.perf_counter()
            self.epoch_samples.append(self._num_rows)
            self.epoch_seconds.append(now - self._epoch_began)
            self._num_rows, self._epoch_began = 0, now


class _Steps:
    """The local steps between a pull and a push, and their sums."""

    def __init__(self, trainer: Trainer, num_epochs: int, clock: _EpochClock) -> None:
        self._trainer = trainer
        self._num_epochs = num_epochs
        self._clock = clock
        self._sums = np.zeros(len(trainer.scalar_names))
        self._last: Batch | None = None
        self.num_steps = 0
        self.num_samples = 0

    def run(self, batch: Batch) -> None:
        began = time.perf_counter()
        scalars = self._trainer.step(batch.columns)
        self._clock.step_s += time.perf_counter() - began
        if scalars:
            self._sums += np.multiply(scalars, batch.num_rows)
        self.num_steps += 1
        self.num_samples += batch.num_rows
        self._last = batch
        self._clock.count(batch)

    def as_push(self, sequence: int, version: int) -> Push:
        last = self._last
        assert last is not None
        cursor = Cursor(last.epoch + 1, 0) if last.is_last_of_epoch else Cursor(last.epoch, last.index + 1)
        in_epoch = 1.0 if last.is_last_of_epoch else (last.index + 1) / last.num_batches if last.num_batches else None
        return Push(
            sequence=sequence,
            cursor=cursor,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            version=version,
            sums=dict(zip(self._trainer.scalar_names, self._sums.tolist(), strict=True)),
            progress=None if in_epoch is None else (last.epoch + in_epoch) / self._num_epochs,
        )


class _Exchange:
    """What a worker does between its local steps: here it trains on from what it pulled, and pushes what came of it."""

    def __init__(self, client: ParameterClient, trainer: Trainer, sequence: int) -> None:
        self._client = client
        self._trainer = trainer
        self._sequence = sequence
        self._version = 0
        self._pulled = trainer.layout.allocate()
        self._local = trainer.layout.allocate()
        self.sync_s = 0.0

    def before(self) -> None:
        """Before an interval's steps."""
        began = time.perf_counter()
        self._pull()
        self._trainer.load(self._pulled)
        self.sync_s += time.perf_counter() - began

    def after(self, steps: _Steps) -> None:
        """After an interval's steps."""
        began = time.perf_counter()
        self._trainer.read(self._local)
        self._push(self._outgoing(), steps)
        self.sync_s += time.perf_counter() - began

    def _outgoing(self) -> Buffer:
        """What is pushed; it stays as it is until the next pull."""
        return self._local

    def _pull(self) -> None:
        self._version = self._client.pull(self._pulled)

    def _push(self, buffer: Buffer, steps: _Steps) -> None:
        self._sequence += 1
        self._client.push(buffer, steps.as_push(self._sequence, self._version))


class _DeltaExchange(_Exchange):
    """Pushes how the steps changed what was pulled."""

    def _outgoing(self) -> Buffer:
        subtract(self._trainer.layout, self._local, self._pulled)
        return self._local


class _ElasticExchange(_Exchange):
    """Keeps weights of its own, which it and the server draw to each other: see `weights.elastic`.

    A successor of a worker that died has lost them, and begins at the server's.
    """

    def __init__(self, client: ParameterClient, trainer: Trainer, sequence: int, moving_rate: float) -> None:
        super().__init__(client, trainer, sequence)
        self._moving_rate = moving_rate
        self._difference = trainer.layout.allocate()
        self._has_begun = False

    def before(self) -> None:
        if not self._has_begun:
            super().before()
        self._has_begun = True

    def _outgoing(self) -> Buffer:
        self._pull()
        elastic_difference(self._trainer.layout, self._local, self._pulled, self._moving_rate, self._difference)
        self._trainer.load(self._local)
        return self._difference


def _exchange_for(job: WorkerJob, client: ParameterClient, trainer: Trainer, sequence: int) -> _Exchange:
    if job.pushes == "elastic":
        return _ElasticExchange(client, trainer, sequence, job.moving_rate)
    return (_DeltaExchange if job.pushes == "delta" else _Exchange)(client, trainer, sequence)


def subtract(layout: WeightLayout, new: Buffer, base: Buffer) -> None:
    """Turns weights into their change, in place: new - base."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is the server's to refuse, by name
        for segment in layout.segments:
            values = segment.of(new)
            np.subtract(values, segment.of(base), out=values)
