"""What a worker does between its local steps: pulls and loads, reads and pushes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from tensorspark.data.feed import Stretch
from tensorspark.ps.client import ParameterClient
from tensorspark.ps.messages import Cursor, Order, OrderKind, Push
from tensorspark.trainers.base import Trainer
from tensorspark.weights.elastic import elastic_difference
from tensorspark.weights.layout import Buffer, WeightLayout


class EpochClock:
    """How long steps took, and epochs: each from the end of the one before, so with reading and waiting."""

    def __init__(self) -> None:
        self.epoch_samples: list[int] = []
        self.epoch_seconds: list[float] = []
        self.step_s = 0.0
        self._num_rows = 0
        self._epoch_began = time.perf_counter()

    def count(self, stretch: Stretch) -> None:
        self._num_rows += stretch.num_rows
        if stretch.is_last_of_epoch:
            now = time.perf_counter()
            self.epoch_samples.append(self._num_rows)
            self.epoch_seconds.append(now - self._epoch_began)
            self._num_rows, self._epoch_began = 0, now


class Steps:
    """The local steps between a pull and a push, and their sums."""

    def __init__(self, trainer: Trainer, num_epochs: int, clock: EpochClock) -> None:
        self._trainer = trainer
        self._num_epochs = num_epochs
        self._clock = clock
        self._sums = np.zeros(len(trainer.scalar_names))
        self._last: Stretch | None = None
        self.num_steps = 0
        self.num_samples = 0

    def run(self, stretch: Stretch) -> None:
        began = time.perf_counter()
        self._sums += self._trainer.train(stretch.columns, stretch.batch_size)
        self._clock.step_s += time.perf_counter() - began
        self.num_steps += stretch.num_batches
        self.num_samples += stretch.num_rows
        self._last = stretch
        self._clock.count(stretch)

    @property
    def has_ended_epoch(self) -> bool:
        return self._last is not None and self._last.is_last_of_epoch

    def as_push(self, sequence: int, version: int) -> Push:
        last = self._last
        assert last is not None
        following = last.index + last.num_batches
        cursor = Cursor(last.epoch + 1, 0) if last.is_last_of_epoch else Cursor(last.epoch, following)
        in_epoch = 1.0 if last.is_last_of_epoch else following / last.epoch_batches if last.epoch_batches else None
        return Push(
            sequence=sequence,
            cursor=cursor,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            version=version,
            sums=dict(zip(self._trainer.scalar_names, self._sums.tolist(), strict=True)),
            progress=None if in_epoch is None else (last.epoch + in_epoch) / self._num_epochs,
            totals=self._trainer.take_totals().astype("<f8").tobytes(),
        )


class Exchange:
    """Trains on from what is pulled, and pushes what came of it."""

    def __init__(self, client: ParameterClient, trainer: Trainer, sequence: int) -> None:
        self._client = client
        self._trainer = trainer
        self._sequence = sequence
        self._order: Order | None = None
        self._pulled = trainer.layout.allocate()
        self._local = trainer.layout.allocate()
        self.sync_s = 0.0

    def before(self) -> Order:
        """Before an interval's steps: asks what to do, and makes the weights ready for it."""
        began = time.perf_counter()
        order = self._pull()
        if order.kind is not OrderKind.FINISH:
            self._load(order)
        self.sync_s += time.perf_counter() - began
        return order

    def after(self, steps: Steps) -> None:
        """After an interval's steps."""
        began = time.perf_counter()
        self._trainer.read(self._local)
        self._push(self._outgoing(), steps)
        self.sync_s += time.perf_counter() - began

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While the pulled weights are evaluated."""
        yield

    def _outgoing(self) -> Buffer:
        """What is pushed; it stays as it is until the next pull."""
        return self._local

    def _pull(self) -> Order:
        self._order = self._client.pull(self._pulled)
        return self._order

    def _load(self, order: Order) -> None:
        self._trainer.load(self._pulled)
        self._guide(order)

    def _guide(self, order: Order) -> None:
        self._trainer.guide(order.num_steps, order.num_workers, order.values)

    def _push(self, buffer: Buffer, steps: Steps) -> None:
        assert self._order is not None
        self._sequence += 1
        self._client.push(buffer, steps.as_push(self._sequence, self._order.version))


class _DeltaExchange(Exchange):
    """Pushes how the steps changed what was pulled."""

    def _outgoing(self) -> Buffer:
        subtract(self._trainer.layout, self._local, self._pulled)
        return self._local


class _ElasticExchange(Exchange):
    """Keeps weights of its own, which it and the server draw to each other: see `weights.elastic`.

    A successor of a worker that died has lost them, and begins at the server's.
    """

    def __init__(
        self, client: ParameterClient, trainer: Trainer, sequence: int, moving_rate: float, has_epochs: bool
    ) -> None:
        super().__init__(client, trainer, sequence)
        self._moving_rate = moving_rate
        self._difference = trainer.layout.allocate()
        self._has_epochs = has_epochs
        self._has_begun = False
        self._is_between_epochs = True

    def before(self) -> Order:
        if self._order is not None and not (self._has_epochs and self._is_between_epochs):
            self._guide(self._order)  # it came with the pull at the end of the interval before
            return self._order
        return super().before()

    def after(self, steps: Steps) -> None:
        super().after(steps)
        self._is_between_epochs = steps.has_ended_epoch

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self._trainer.load(self._pulled)
        yield
        if self._has_begun:
            self._trainer.load(self._local)

    def _load(self, order: Order) -> None:
        if order.kind is OrderKind.TRAIN and not self._has_begun:
            self._trainer.load(self._pulled)
            self._has_begun = True
        self._guide(order)

    def _outgoing(self) -> Buffer:
        self._pull()
        elastic_difference(self._trainer.layout, self._local, self._pulled, self._moving_rate, self._difference)
        self._trainer.load(self._local)
        return self._difference


def exchange_for(
    pushes: str, moving_rate: float, client: ParameterClient, trainer: Trainer, sequence: int, *, has_epochs: bool
) -> Exchange:
    """How a run's combiner wants it.

    Args:
        pushes: "weights", "delta" or "elastic".
        moving_rate: of elastic averaging.
        has_epochs: whether workers wait for each other at the end of an epoch.
    """
    if pushes == "elastic":
        return _ElasticExchange(client, trainer, sequence, moving_rate, has_epochs)
    return (_DeltaExchange if pushes == "delta" else Exchange)(client, trainer, sequence)


def subtract(layout: WeightLayout, new: Buffer, base: Buffer) -> None:
    """Turns weights into their change, in place: new - base."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is the server's to refuse, by name
        for segment in layout.segments:
            values = segment.of(new)
            np.subtract(values, segment.of(base), out=values)
