"""Keras models on executors: many steps of the model's own `train_step` in one compiled call.

A stretch of batches goes to TensorFlow as `[num_batches, batch_size, ...]` tensors, and a loop inside the compiled
function takes one step a batch. Weights come and go as one flat tensor per dtype in that same call where they can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.errors import ModelError
from tensorspark.trainers.flat import FlatTrainer, FlatVariables, stacked_batches, unpack_content
from tensorspark.trainers.keras_objects import require_tensorflow, unpack_model, variables_of
from tensorspark.trainers.keras_steps import CompiledSteps, adopt_global_steps, fuse_optimizer
from tensorspark.trainers.keras_tables import is_built
from tensorspark.trainers.startup import importing, start
from tensorspark.weights.layout import Buffer, WeightLayout

with importing():
    import keras
    import tensorflow as tf


@dataclass(frozen=True)
class Structure:
    """What `train_step` gets, as positions of columns: an int, or a list, tuple or dict of them.

    >>> Structure(x={"image": 0, "size": 1}, y=2).data(["images", "sizes", "labels"])
    ({'image': 'images', 'size': 'sizes'}, 'labels')
    """

    x: Any
    y: Any = None
    weight: Any = None

    def data(self, columns: Sequence[Any]) -> tuple[Any, ...]:
        """The columns as Keras takes them: `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""
        parts = [self.x, self.y, self.weight]
        while len(parts) > 1 and parts[-1] is None:
            parts.pop()
        return tuple(_pick(part, columns) for part in parts)

    @property
    def num_inputs(self) -> int:
        return len(keras.tree.flatten(self.x))


@dataclass(frozen=True)
class Scalar:
    """A metric that is a mean over rows: its name in the logs, and where its sum and count are in the totals."""

    name: str
    total: int
    count: int


@dataclass(frozen=True)
class KerasSpec:
    """How an executor rebuilds the driver's model. See `KerasDriverModel.capture`.

    Attributes:
        num_trainable: tensors of the layout that training moves; the server averages the others.
        num_totals: numbers in all of the model's metric variables.
        nan_is_error: whether a loss of NaN or infinity ends the run.
        num_threads: of TensorFlow in an executor's process, where nothing else has set them.
        content_hash: of what `build` takes.
    """

    layout: WeightLayout
    columns: tuple[Column, ...]
    structure: Structure
    num_trainable: int
    with_slots: bool
    scalars: tuple[Scalar, ...]
    num_totals: int
    nan_is_error: bool
    num_threads: int
    content_hash: str

    @cached_property
    def key(self) -> str:
        described = [
            "keras",
            self.content_hash,
            self.layout.fingerprint,
            repr((self.columns, self.structure, self.scalars)),
            self.with_slots,
            self.nan_is_error,
        ]
        packed: bytes = msgpack.packb(described)
        return hashlib.sha256(packed).hexdigest()

    def build(self, content: bytes) -> KerasTrainer:
        return KerasTrainer(self, content)


class KerasTrainer(FlatTrainer):
    """A compiled model in an executor's process, rebuilt from `KerasSpec.build`'s content.

    Raises:
        ModelError: the model cannot be made again here, or becomes another one.
    """

    def __init__(self, spec: KerasSpec, content: bytes) -> None:
        require_tensorflow()
        start(spec.num_threads)
        self._spec = spec
        self.layout = spec.layout
        self.columns = spec.columns
        self.scalar_names = tuple(scalar.name for scalar in spec.scalars)
        self.num_totals = spec.num_totals
        packed, self._values = unpack_content(content)
        self._model = unpack_model(packed)
        build(self._model, spec.columns, spec.structure)
        synchronized, self._own, self._seeds = self._take_variables()
        flat = FlatVariables(spec.layout, [variable.value for variable in synchronized])
        self._hold(flat, reverts=not spec.nan_is_error)
        self._clock = clock = adopt_global_steps(self._model.optimizer)
        fuse_optimizer(self._model.optimizer)
        self._steps = CompiledSteps(
            self._model, spec.columns, spec.structure.data, self._flat, clock, self._loss_total()
        )
        self._totals = np.zeros(spec.num_totals)
        self._num_steps, self._num_workers, self._num_local_steps = 0, 1, 0
        self._learning_rate: float | None = None
        self._scale = 1.0

    def reset(self, partition: int, seed: int) -> None:
        self._reset_own()
        for index, variable in enumerate(self._seeds):
            state = np.random.SeedSequence((seed, partition, index)).generate_state(int(np.prod(variable.shape)))
            variable.assign(state.reshape(variable.shape).astype(variable.dtype))
        self._num_steps, self._num_workers, self._num_local_steps = 0, 1, 0
        self.take_totals()

    def load(self, weights: Buffer) -> None:
        super().load(weights)
        self._num_local_steps = 0

    def guide(self, num_steps: int, num_workers: int, values: Mapping[str, float]) -> None:
        """See `Trainer.guide`; a learning-rate schedule is asked for the step number `num_steps` plus those that all
        workers are thought to have done since. ``"learning_rate"`` in `values` replaces a constant one. Either is
        multiplied by the number of workers, or by ``"max_learning_rate_scale"`` where that is less."""
        self._num_steps, self._num_workers, self._num_local_steps = num_steps, num_workers, 0
        self._num_steps += int(values.get("num_steps_before", 0))
        self._scale = scale = min(num_workers, values.get("max_learning_rate_scale", 1.0))
        if self._clock is not None:
            self._clock.scale.assign(scale)
        rate = values.get("learning_rate")
        if rate is not None and rate * scale != self._learning_rate:
            self._learning_rate = rate * scale
            self._model.optimizer.learning_rate = self._learning_rate

    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        """See `Trainer.train`.

        Raises:
            ModelError: the loss became NaN or infinite.
        """
        before = self._totals
        for stacked in stacked_batches(columns, batch_size):
            start = self._num_steps + self._num_local_steps * self._num_workers
            self._trained, num_finite, self._totals = self._steps.train(
                self._take_pending(), start, self._num_workers, stacked, batch_size
            )
            if self._spec.nan_is_error and num_finite < len(stacked[0]):
                self._raise_not_finite(self._num_local_steps + num_finite)
            self._num_local_steps += len(stacked[0])
        return self._means(self._totals - before) * len(columns[0])

    def evaluate(self, columns: Columns, batch_size: int) -> None:
        self._settle()
        for stacked in stacked_batches(columns, batch_size):
            self._totals = self._steps.evaluate(stacked, batch_size)

    def take_totals(self) -> NDArray[np.float64]:
        totals, self._totals = self._totals, np.zeros(self.num_totals)
        self._steps.drop_totals()
        return totals

    def predict(self, columns: Columns, batch_size: int) -> tuple[NDArray[Any], ...]:
        """See `Trainer.predict`; `columns` may be the inputs' alone."""
        self._settle()
        inputs = columns[: self._spec.structure.num_inputs]
        starts = range(0, max(len(inputs[0]), 1), batch_size)
        batches = [self._steps.predict([c[i : i + batch_size] for c in inputs], batch_size) for i in starts]
        return tuple(np.concatenate([output.numpy() for output in parts]) for parts in zip(*batches, strict=True))

    def close(self) -> None:
        del self._steps, self._model, self._flat, self._own, self._seeds
        self._pending = self._trained = self._loaded = None

    def _reset_own(self) -> None:
        for variable, value in zip(self._own, self._values, strict=True):
            variable.assign(value)
        self._learning_rate = None

    def _take_variables(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Synchronized, own and seeds, checked to be what the driver's model has."""
        variables = variables_of(self._model)
        synchronized = variables.synchronized(with_slots=self._spec.with_slots)
        own = variables.own(with_slots=self._spec.with_slots)
        # A slot's name has its layer's, which may be counted on from process to process.
        num_named = len(variables.trainable) + len(variables.state)
        expected = [_kind(spec.name, spec.shape, spec.dtype, i < num_named) for i, spec in enumerate(self.layout.specs)]
        got = [_kind(v.path, tuple(v.shape), v.dtype, i < num_named) for i, v in enumerate(synchronized)]
        if expected != got or [value.shape for value in self._values] != [tuple(v.shape) for v in own]:
            raise ModelError(
                f"the model became another one in this process: expected weights {expected}, got {got}; get_config() "
                f"and from_config() must keep all that the constructor was given, or pass a function that builds it"
            )
        return synchronized, own, variables.seeds

    def _loss_total(self) -> tf.Variable | None:
        position = next((scalar.total for scalar in self._spec.scalars if scalar.name == "loss"), -1)
        for variable in self._model.metrics_variables:
            if position == 0:
                return variable.value
            position -= int(np.prod(variable.shape))
        return None

    def _means(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.array([totals[scalar.total] for scalar in self._spec.scalars])
        counts = np.array([totals[scalar.count] for scalar in self._spec.scalars])
        means: NDArray[np.float64] = np.divide(sums, counts, out=np.zeros_like(sums), where=counts != 0)
        return means

    def _raise_not_finite(self, step: int) -> None:
        scaled = f", which is multiplied by {self._scale:g} (fit(scale_learning_rate=False) leaves it as it is)"
        raise ModelError(
            f"the loss became NaN or infinite at local step {step} of the interval (counted from 0) that began after "
            f"{self._num_steps} steps of all workers: lower the learning rate{scaled if self._scale > 1 else ''}, clip "
            f"gradients (clipnorm=1.0 of the optimizer) or look for NaN and huge values in the rows; "
            f"fit(nan_is_error=False) leaves such intervals out"
        )


def build(model: keras.Model, columns: Sequence[Column], structure: Structure) -> None:
    """Makes all variables of the model, its metrics and its optimizer that are not there yet; computes nothing.

    Without labels for a model that wants some, metrics stay as they are: it will do for predictions.

    Raises:
        ModelError: the model does not take such columns.
    """
    tensors = [keras.KerasTensor((None, *(column.shape or ())), _keras_dtype(column)) for column in columns]
    data = structure.data(tensors)
    try:
        if structure.y is None and model.loss is not None:
            if not is_built(model):
                model(data[0], training=False)
            if model.optimizer is not None and not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
        else:
            model._symbolic_build(data_batch=data)
    except Exception as error:  # what a model's own code raises
        described = ", ".join(f"{column.name} ({column})" for column in columns)
        raise ModelError(f"model {model.name} cannot be built for the columns {described}: {error}") from error


def _kind(path: str, shape: tuple[int, ...], dtype: str, has_name: bool) -> str:
    name = path.rpartition("/")[2].partition("#")[0] if has_name else ""
    return f"{name} {dtype}{list(shape)}".strip()


def _pick(part: Any, columns: Sequence[Any]) -> Any:
    if isinstance(part, Mapping):
        return {key: _pick(value, columns) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(_pick(value, columns) for value in part)
    return None if part is None else columns[part]


def _keras_dtype(column: Column) -> str:
    return "string" if np.dtype(column.dtype).kind == "O" else column.dtype
