"""A `FunctionTrainer` as `SparkSession.fit` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.base import Captured
from tensorspark.trainers.function import FunctionTrainer
from tensorspark.weights.layout import Buffer, WeightLayout


class FunctionFit:
    """A training function, fitted on columns as they come: inputs, labels and weights are its step's arguments."""

    is_free = True

    def __init__(self, trainer: FunctionTrainer) -> None:
        self.trainer = trainer
        self._scalar_names: tuple[str, ...] = ()

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        self.trainer.assign(layout, weights)

    def difference(self, layout: WeightLayout) -> str:
        return self.trainer.difference(layout)

    def logs(self, totals: NDArray[np.float64]) -> dict[str, Any]:
        """Means over the epoch's rows: the totals are their sums, and the number of rows."""
        return {name: float(total / totals[-1]) for name, total in zip(self._scalar_names, totals[:-1], strict=True)}

    def expected_columns(self, names: Any = None, labels: Any = None, *, weighted: bool = False) -> tuple[Column, ...]:
        return ()

    def captured(
        self, rows: Any, *, average_optimizer_state: bool, nan_is_error: bool, num_threads: int
    ) -> tuple[Captured, int | None]:
        if average_optimizer_state:
            raise ModelError("average_optimizer_state is for Keras models: return the slots among build's variables")
        captured = self.trainer.capture(rows.columns, nan_is_error=nan_is_error, num_threads=num_threads)
        self._scalar_names = captured.spec.scalar_names  # type: ignore[attr-defined]
        return captured, None

    def callbacks(self, callbacks: Sequence[Any], num_epochs: int, max_learning_rate_scale: float) -> NoCallbacks:
        if callbacks:
            raise ModelError("callbacks are for Keras models: a FunctionTrainer has none")
        return NoCallbacks()

    def advance(self, num_steps: int) -> None:
        """Steps count from 0 in each fit."""

    def resume(self, values: Mapping[str, float]) -> None:
        """Workers are told nothing."""

    def dataset_decoder(self, dataset_fn: Callable[[Any], Any], context: Any) -> NoReturn:
        raise ModelError("dataset_fn is for Keras models: give a FunctionTrainer a DataFrame, an RDD or arrays")


class NoCallbacks:
    """Nothing is called, and nobody asks to stop."""

    wants_stop = False

    def begin(self) -> None: ...
    def begin_epoch(self, epoch: int) -> None: ...
    def end_epoch(self, epoch: int, logs: Any, evaluation: Any) -> None: ...
    def end(self, logs: Any) -> None: ...

    @property
    def values(self) -> dict[str, float]:
        return {}
