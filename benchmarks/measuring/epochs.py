"""What a worker tells of its epochs, and the rate that follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorspark.history import WorkerReport


@dataclass(frozen=True)
class Epochs:
    """Rows and seconds of every epoch that a worker trained."""

    samples: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def samples_per_s(self) -> float:
        """From the second epoch on: the first one warms up."""
        return sum(self.samples[1:]) / sum(self.seconds[1:])


def epochs_of(workers: Iterable[WorkerReport]) -> list[Epochs]:
    """Of each of tensorspark's workers."""
    return [Epochs(worker.epoch_samples, worker.epoch_seconds) for worker in workers]


def samples_per_s(workers: Sequence[Epochs]) -> float:
    """Of all workers together."""
    return sum(worker.samples_per_s for worker in workers)
