"""What the worker loop needs of a model, whatever computes it. Free of TensorFlow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from tensorspark.data.batches import Column, Columns
from tensorspark.weights.layout import Buffer, WeightLayout

# A process that alternates between training and, say, evaluation graphs keeps both.
_NUM_KEPT = 4


class Trainer(ABC):
    """A model in this process, ready to take weights, run steps and give weights back.

    Attributes:
        layout: of the synchronized weights.
        columns: what a row feeds.
        scalar_names: names of the numbers that `step` returns.
    """

    layout: WeightLayout
    columns: tuple[Column, ...]
    scalar_names: tuple[str, ...]

    @abstractmethod
    def reset(self) -> None:
        """Sets all state that is not synchronized (optimizer slots, counters) to the driver's values."""

    @abstractmethod
    def load(self, weights: Buffer) -> None:
        """Sets the synchronized weights; `weights` may be reused at once."""

    @abstractmethod
    def read(self, out: Buffer) -> None:
        """Writes the synchronized weights to `out`."""

    @abstractmethod
    def step(self, columns: Columns) -> tuple[float, ...]:
        """Trains on one batch and returns the step's scalars, in the order of `scalar_names`."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model."""


class TrainerSpec(Protocol):
    """How to make a trainer in an executor's process. Picklable, and small: the model itself travels as `content`."""

    @property
    def key(self) -> str:
        """Equal for specs that make the same trainer."""

    @property
    def layout(self) -> WeightLayout: ...

    def build(self, content: bytes) -> Trainer: ...


_kept: OrderedDict[str, Trainer] = OrderedDict()


def obtain(spec: TrainerSpec, content: Callable[[], bytes]) -> Trainer:
    """The process's trainer for `spec`: made once, then reused by later tasks and runs; reset to the driver's state.

    Args:
        content: fetches what `TrainerSpec.build` needs; called only if the trainer is not here yet.
    """
    trainer = _kept.pop(spec.key, None)
    if trainer is None:
        trainer = spec.build(content())
        while len(_kept) >= _NUM_KEPT:
            _kept.popitem(last=False)[1].close()
    _kept[spec.key] = trainer
    trainer.reset()
    return trainer
