"""What `SparkSession.fit` asks of a model on the driver, for Keras models and for `FunctionTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column
from tensorspark.trainers.base import Captured
from tensorspark.trainers.datasets import DatasetDecoder, dataset_decoder
from tensorspark.trainers.keras_callbacks import EpochCallbacks
from tensorspark.trainers.keras_files import for_predictions, known_input_columns, output_columns, to_keras_bytes
from tensorspark.trainers.keras_model import KerasDriverModel, as_keras_model
from tensorspark.weights.layout import Buffer, WeightLayout

if TYPE_CHECKING:
    from tensorspark.trainers.keras import Structure


class FedRows(Protocol):
    """What is to be fed; see `driver.rows`."""

    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def input_names(self) -> Any: ...
    @property
    def weighted(self) -> bool: ...


class KerasFit:
    """A Keras model, to be fitted."""

    is_free = False

    def __init__(self, model: KerasDriverModel) -> None:
        self.model = model
        self._num_steps_more = 0  # than the optimizer has counted
        self._began_at = 0

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        self.model.assign(layout, weights)

    def difference(self, layout: WeightLayout) -> str:
        return self.model.difference(layout)

    def logs(self, totals: NDArray[np.float64]) -> dict[str, Any]:
        return self.model.logs(totals)

    def expected_columns(
        self,
        names: Any = None,
        labels: Sequence[tuple[tuple[int | None, ...], str] | None] | None = None,
        *,
        weighted: bool = False,
    ) -> tuple[Column, ...]:
        return self.model.expected_columns(names, labels, weighted=weighted)

    def dataset_decoder(self, dataset_fn: Callable[[Any], Any], context: Any) -> tuple[DatasetDecoder, bool]:
        inputs = self.model.expected_columns(None, [])
        outputs = self.model.expected_columns()[len(inputs) :]
        return dataset_decoder(dataset_fn, context, inputs, outputs)

    def structure(self, rows: FedRows) -> Structure:
        num_inputs = len(self.model.expected_columns(rows.input_names, []))
        num_labels = len(rows.columns) - num_inputs - rows.weighted
        return self.model.structure(rows.input_names, num_labels=num_labels, weighted=rows.weighted)

    def captured(
        self, rows: FedRows, *, average_optimizer_state: bool, nan_is_error: bool, num_threads: int
    ) -> tuple[Captured, int | None]:
        """What executors need, and how many tensors are trained, where not all of them are."""
        captured = self.model.capture(
            rows.columns,
            self.structure(rows),
            average_optimizer_state=average_optimizer_state,
            nan_is_error=nan_is_error,
            num_threads=num_threads,
        )
        num_trained: int = captured.spec.num_trainable  # type: ignore[attr-defined]
        return captured, num_trained if num_trained < len(captured.spec.layout.specs) else None

    def predictor(self, input_names: Any, num_threads: int) -> tuple[Captured, tuple[Column, ...], tuple[Column, ...]]:
        """The model without what training needs, its inputs, and its outputs."""
        own = self.model.model
        inputs = known_input_columns(own, input_names)
        model = as_keras_model(for_predictions(own))
        structure = model.structure(input_names, num_labels=0)
        outputs = output_columns(own, inputs, structure)
        return model.capture(inputs, structure, num_threads=num_threads), inputs, outputs

    def to_bytes(self) -> bytes:
        """As a ``.keras`` file."""
        return to_keras_bytes(self.model.model)

    def export(self, directory: str) -> None:
        """As a SavedModel."""
        self.model.model.export(directory, verbose=False)

    def callbacks(self, callbacks: Sequence[Any], num_epochs: int, max_learning_rate_scale: float) -> EpochCallbacks:
        self._began_at = self.model.iterations
        told = {
            "num_steps_before": float(self._began_at + self._num_steps_more),
            "max_learning_rate_scale": max_learning_rate_scale,
        }
        return EpochCallbacks(self.model, callbacks, num_epochs, told)

    def advance(self, num_steps: int) -> None:
        """Counts the steps of all workers, for a learning-rate schedule to go on there in the next fit.

        The optimizer's own `iterations` are other steps: Adam corrects the bias of its slots by them. They begin anew
        with the slots, and come back with them from workers.
        """
        self._num_steps_more += num_steps - (self.model.iterations - self._began_at)

    def resume(self, values: Mapping[str, float]) -> None:
        """Takes over what an interrupted fit told its workers: see `EpochCallbacks.values`."""
        self._num_steps_more = int(values.get("num_steps_before", 0)) - self.model.iterations
        if "learning_rate" in values and self.model.learning_rate is not None:
            self.model.learning_rate = values["learning_rate"]
