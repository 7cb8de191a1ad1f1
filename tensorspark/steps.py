"""A worker's local steps, and how long they and epochs take."""

from __future__ import annotations

import time

import numpy as np

from tensorspark.data.feed import Stretch
from tensorspark.ps.messages import Cursor, Push
from tensorspark.trainers.base import Trainer


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

    @property
    def has_ended_training(self) -> bool:
        """Whether none of the partition's steps is left."""
        return self.has_ended_epoch and self._last is not None and self._last.epoch + 1 == self._num_epochs

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
