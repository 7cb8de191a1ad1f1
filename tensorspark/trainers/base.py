"""What the worker loop needs of a model, whatever computes it. Free of TensorFlow."""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.data.labels import Labels
from tensorspark.weights.layout import Buffer, WeightLayout

# A process that alternates between training and, say, evaluation graphs keeps both.
_NUM_KEPT = 4


class Trainer(ABC):
    """A model in this process, ready to take weights, run steps and give weights back.

    Attributes:
        layout: of the synchronized weights.
        columns: what a row feeds.
        scalar_names: names of the numbers whose sums `train` returns.
        num_totals: length of the vector that `take_totals` returns.
    """

    layout: WeightLayout
    columns: tuple[Column, ...]
    scalar_names: tuple[str, ...]
    num_totals: int = 0

    @abstractmethod
    def reset(self, partition: int, seed: int) -> None:
        """Sets all state that is not synchronized (optimizer slots, counters) to the driver's values.

        Args:
            partition, seed: what random streams (dropout, say) begin from, where the model has any of its own.
        """

    @abstractmethod
    def load(self, weights: Buffer) -> None:
        """Sets the synchronized weights; `weights` may be reused at once."""

    @abstractmethod
    def read(self, out: Buffer) -> None:
        """Writes the synchronized weights to `out`."""

    def read_blocks(self, wanted: Sequence[slice]) -> Iterator[Buffer]:
        """The bytes that `read` would write to these parts of a buffer, one after the other.

        A trainer that can spares the memory of all of them at once. Nothing else is asked of it meanwhile.

        Args:
            wanted: in order, none of them in two of the layout's segments.

        Yields:
            `[num_bytes] uint8`, which stays as it is until the next is asked for.
        """
        whole = self.layout.allocate()
        self.read(whole)
        for block in wanted:
            yield whole[block]

    def guide(self, num_steps: int, num_workers: int, values: Mapping[str, float]) -> None:  # noqa: B027
        """Is told how the run stands, before an interval's steps.

        Args:
            num_steps: of all workers, in the weights that were loaded.
            num_workers: that train now.
            values: what the driver set for all, such as ``{"learning_rate": 0.01}``.
        """

    @abstractmethod
    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        """Trains on consecutive batches, one step each.

        Args:
            columns: the batches' rows, one after the other: `[num_rows, ...]` each.
            batch_size: rows of a batch; only the last may have fewer.

        Returns:
            For each of `scalar_names` the sum over the rows, `[len(scalar_names)] float64`.
        """

    def evaluate(self, columns: Columns, batch_size: int) -> None:
        """Adds these rows' losses and metrics to the totals, and trains nothing."""
        raise NotImplementedError(f"{type(self).__name__} evaluates nothing")

    def take_totals(self) -> NDArray[np.float64]:
        """What `train` or `evaluate` added up since the last call, `[num_totals] float64`: sums that are additive over
        batches and workers."""
        return np.zeros(self.num_totals)

    def predict(self, columns: Columns, batch_size: int) -> tuple[NDArray[Any], ...]:
        """The model's outputs, one `[num_rows, ...]` array each."""
        raise NotImplementedError(f"{type(self).__name__} predicts nothing")

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

    @property
    def content_hash(self) -> str:
        """Of what `build` takes."""

    @property
    def num_totals(self) -> int:
        """Length of the vectors that `Trainer.take_totals` returns."""

    def build(self, content: bytes) -> Trainer: ...


@dataclass(frozen=True)
class Captured:
    """A model on the driver as it is now: how to make a trainer of it, what to ship, and the weights to begin with.

    Attributes:
        labels: those that rows are looked at for.
        graph: makes the serialized GraphDef of what is trained, for who looks at it; None: there is none to show.
    """

    spec: TrainerSpec
    content: bytes = field(repr=False)
    weights: Buffer = field(repr=False)
    labels: tuple[Labels, ...] = ()
    graph: Callable[[], bytes | None] = field(default=lambda: None, repr=False)


class DriverModel(Protocol):
    """The user's model on the driver: what trained weights come back into."""

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        """Sets the model's variables to `weights`, which may be reused at once."""

    def difference(self, layout: WeightLayout) -> str:
        """Says which of the layout's tensors are not, as they stand there, variables of the model; empty if all are."""


_kept: OrderedDict[str, Trainer] = OrderedDict()


def obtain(spec: TrainerSpec, content: Callable[[], bytes]) -> Trainer:
    """The process's trainer for `spec`: made once, then reused by later tasks and runs. To be reset before it trains.

    Args:
        content: fetches what `TrainerSpec.build` needs; called only if the trainer is not here yet.
    """
    trainer = _kept.pop(spec.key, None)
    if trainer is None:
        _spare_collector()
        trainer = spec.build(content())
        while len(_kept) >= _NUM_KEPT:
            _kept.popitem(last=False)[1].close()
    _kept[spec.key] = trainer
    return trainer


@functools.cache
def _spare_collector() -> None:
    """Has Python's garbage collector pass over all that is here: TensorFlow, most of it, half a million objects.

    pyspark collects garbage after every task, which would take 0.3 s of each. A trainer is made later, and collected.
    """
    gc.freeze()
