"""The executor's side of a run: `run_partition` trains one partition. Read it first.

It runs inside a Spark task: registers with the server, obtains the trainer, and repeats: pull, `sync_interval` local
steps, push. What comes back with each pull says whether to train on, to evaluate the held-out rows, or to end. Whatever
goes wrong is reported to the server, and so to the driver, before the task fails.
"""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tensorspark.data.decoders import Decoder
from tensorspark.data.feed import PartitionFeed, Stretch
from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedLostError, LeaseLostError, RunStoppedError
from tensorspark.exchange import Client, Exchange, exchange_for
from tensorspark.ps.client import Granted, ParameterClient, ServerAddress
from tensorspark.ps.messages import Order, OrderKind, Registration, TimeSpent
from tensorspark.shards.client import ShardedClient
from tensorspark.shards.places import ShardPlace
from tensorspark.steps import EpochClock, Steps
from tensorspark.telemetry.notes import Notebook, Timed, logged
from tensorspark.trainers.base import Trainer, TrainerSpec, obtain
from tensorspark.weights.compression import NO_COMPRESSION, Compression

_MAX_REPORTED_EPOCHS = 1000  # they must fit into a frame's header


@dataclass(frozen=True)
class WorkerJob:
    """All that a task needs to know; picklable, the same for all tasks of a run.

    Attributes:
        run: number of the run on its server.
        content: fetches the trainer's content on the executor.
        decoder: reads the feed's rows.
        pushes: "weights", "delta" or "elastic", as the run's combiner wants.
        moving_rate: of elastic averaging.
        has_epochs: whether the server keeps all workers in one epoch, at whose end they evaluate.
        validation_split: part of the rows that is held out.
        overlap: whether steps go on while a push and a pull are under way.
        compression: how weights travel.
        shards: where the parts of the weights are served; empty: all at `address`.
        traces: whether the server is told what took how long.
    """

    address: ServerAddress
    run: int
    spec: TrainerSpec
    content: Callable[[], bytes] = field(repr=False)
    decoder: Decoder
    pushes: str
    moving_rate: float
    batch_size: int
    sync_interval: int
    num_epochs: int
    shuffle: bool
    seed: int
    cache_memory_bytes: int
    tmp_dir: str
    has_epochs: bool = False
    validation_split: float = 0.0
    overlap: bool = False
    compression: Compression = NO_COMPRESSION
    shards: tuple[ShardPlace, ...] = ()
    traces: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether what a lossy codec leaves out of a push stays in the buffer that the next change is added to."""
        return self.compression.is_push_lossy and self.pushes != "elastic"


def run_partition(job: WorkerJob, partition: int, attempt: int, rows: Iterable[Any]) -> None:
    """Trains one partition to its end.

    Args:
        partition: its index in the feed.
        attempt: Spark's ``taskAttemptId``, which no other task of the application has.
        rows: read to their end, so that Spark keeps this process and with it the trainer; not after a stop, as that may
            take long.

    Raises:
        TensorsparkError: whatever stopped the training; the server has been told.
    """
    rows, was_stopped = iter(rows), False
    with _client(job) as client, Notebook(client.note, times=job.traces) as notebook, logged(notebook):
        try:
            registration = Registration(job.run, partition, attempt, job.spec.layout.fingerprint, socket.gethostname())
            granted = client.register(registration)
            if not granted.finished:
                was_stopped = _train(job, partition, rows, client, granted, notebook.timing)
        except (RunStoppedError, FeedLostError, LeaseLostError):  # nothing to report: Spark tries again where it may
            raise
        except (Exception, SystemExit) as error:  # code that makes the rows may call sys.exit
            client.report(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
    if not was_stopped:
        for _ in rows:
            pass


def _client(job: WorkerJob) -> ParameterClient | ShardedClient:
    compression = replace(job.compression, leaves_error=job.accumulates)
    if job.shards:
        return ShardedClient(job.shards, compression)
    return ParameterClient(job.address, job.spec.layout, compression)


def _train(job: WorkerJob, partition: int, rows: Iterator[Any], client: Client, granted: Granted, timed: Timed) -> bool:
    """Returns whether the run was stopped in the middle of an epoch."""
    with timed("make the model"):
        trainer = obtain(job.spec, job.content)
        trainer.reset(partition, job.seed)
    with _cache(job) as cache, _cache(job) as validation_cache:
        feed = PartitionFeed(
            rows,
            job.decoder,
            partition=partition,
            batch_size=job.batch_size,
            num_epochs=job.num_epochs,
            shuffle=job.shuffle,
            seed=job.seed,
            cache=cache,
            validation_cache=validation_cache,
            validation_split=job.validation_split,
        )
        feed.seek(granted.cursor.epoch, granted.cursor.batch)
        exchange = exchange_for(
            job.pushes,
            job.moving_rate,
            client,
            trainer,
            granted.sequence,
            has_epochs=job.has_epochs,
            overlap=job.overlap,
            accumulates=job.accumulates,
            timed=timed,
        )
        with contextlib.closing(exchange):
            loop = _Loop(job, client, trainer, feed, exchange, timed)
            clock = loop.run()
            exchange.end()
        client.finish(
            TimeSpent(
                epoch_samples=tuple(clock.epoch_samples[-_MAX_REPORTED_EPOCHS:]),
                epoch_seconds=tuple(clock.epoch_seconds[-_MAX_REPORTED_EPOCHS:]),
                step_s=clock.step_s,
                sync_s=exchange.sync_s,
                hidden_s=exchange.hidden_s,
            )
        )
        return loop.was_stopped


def _cache(job: WorkerJob) -> EpochCache:
    return EpochCache(job.cache_memory_bytes, job.tmp_dir)


class _Loop:
    """A partition's intervals, as the server orders them."""

    def __init__(
        self,
        job: WorkerJob,
        client: Client,
        trainer: Trainer,
        feed: PartitionFeed,
        exchange: Exchange,
        timed: Timed,
    ) -> None:
        self._job = job
        self._client = client
        self._trainer = trainer
        self._feed = feed
        self._exchange = exchange
        self._timed = timed
        self._clock = EpochClock()
        self.was_stopped = False
        """Whether the run ended in the middle of an epoch."""

    def run(self) -> EpochClock:
        # The first batches of an interval are at hand before the pull, so that its weights are fresh.
        stretch = self._take(self._job.sync_interval)
        while stretch is not None or self._job.has_epochs:
            order = self._exchange.before()
            if order.kind is OrderKind.FINISH:
                self.was_stopped = stretch is not None and stretch.epoch <= order.epoch
                break
            if order.kind is OrderKind.EVALUATE:
                self._evaluate(order)
            elif stretch is None or (self._job.has_epochs and stretch.epoch > order.epoch):
                self._client.skip_epoch(order.epoch)  # this partition has no rows to train on
            else:
                self._train(stretch)
                stretch = self._take(self._job.sync_interval)
        return self._clock

    def _take(self, num_batches: int) -> Stretch | None:
        with self._timed("read rows"):
            return self._feed.take(num_batches)

    def _train(self, stretch: Stretch) -> None:
        """One interval: the stretch that is at hand, and more as far as it goes on."""
        steps = Steps(self._trainer, self._job.num_epochs, self._clock)
        following: Stretch | None = stretch
        while following is not None:
            with self._timed("steps"):
                steps.run(following)
            num_left = self._job.sync_interval - steps.num_steps
            is_over = num_left <= 0 or (self._job.has_epochs and following.is_last_of_epoch)
            following = None if is_over else self._take(num_left)
        self._exchange.after(steps)

    def _evaluate(self, order: Order) -> None:
        num_samples = 0
        with self._exchange.evaluating(), self._timed("evaluate"):
            for columns in self._feed.validation():
                num_samples += len(columns[0])
                self._trainer.evaluate(columns, self._job.batch_size)
        self._client.report_evaluation(order.epoch, self._trainer.take_totals().astype("<f8").tobytes(), num_samples)
