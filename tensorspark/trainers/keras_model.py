"""The driver's side of Keras training: what of a compiled model is shipped, and what comes back into it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.base import Captured
from tensorspark.trainers.flat import pack_content
from tensorspark.trainers.keras import KerasSpec, Scalar, Structure, build
from tensorspark.trainers.keras_columns import (
    checked_labels,
    flat_names,
    input_columns,
    input_names,
    label_columns,
    numbered,
    output_names,
)
from tensorspark.trainers.keras_graph import graph_def
from tensorspark.trainers.keras_objects import (
    built_model,
    pack_builder,
    pack_model,
    require_compiled,
    require_tensorflow,
    unpack_model,
    variables_of,
)
from tensorspark.trainers.startup import importing
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

with importing():
    import keras

WEIGHT_COLUMN = "sample_weight"


def as_keras_model(model_or_builder: Any) -> KerasDriverModel:
    """The driver's side of a compiled model, or of the one that a function without arguments builds and compiles.

    Raises:
        ModelError: neither of these, a model that is not compiled, or Keras on another backend than TensorFlow.
    """
    require_tensorflow()
    if isinstance(model_or_builder, keras.Model):
        require_compiled(model_or_builder)
        return KerasDriverModel(model_or_builder)
    if isinstance(model_or_builder, type) or not callable(model_or_builder):
        raise ModelError(
            f"expected a compiled keras.Model, or a function without arguments that returns one; got "
            f"{model_or_builder!r}"
        )
    return KerasDriverModel(built_model(model_or_builder), model_or_builder)


class KerasDriverModel:
    """A compiled model on the driver. Not thread-safe, as Keras is not.

    Attributes:
        model: the user's own: trained weights come back into it.
    """

    def __init__(self, model: keras.Model, builder: Callable[[], Any] | None = None) -> None:
        self.model = model
        self._builder = builder
        self._has_travelled = False

    def structure(self, inputs: Any = None, *, num_labels: int | None = None, weighted: bool = False) -> Structure:
        """How `expected_columns` feed the model.

        Args:
            inputs: for a model that does not say itself: a name, or a list or tuple of them, or a dict by the keys that
                the model's `call` expects.
            num_labels: 0 for none; None for one an output.
        """
        x, num_inputs = numbered(input_names(self.model, inputs), 0)
        if num_labels == 0:
            return Structure(x)
        outputs = output_names(self.model)
        if num_labels not in (None, len(flat_names(outputs))):
            outputs = [""] * num_labels
        y, stop = numbered(outputs, num_inputs)
        return Structure(x, y, stop if weighted else None)

    def expected_columns(
        self,
        names: Any = None,
        labels: Sequence[tuple[tuple[int | None, ...], str] | None] | None = None,
        *,
        weighted: bool = False,
    ) -> tuple[Column, ...]:
        """The columns that a row has to have: inputs, one label an output, and maybe the sample weight.

        Args:
            names: the `inputs` of `structure`; such a model's inputs may have any shape, in Keras's default float type.
            labels: shape and dtype of each output's labels where the data tells; None leaves it to the losses, and so
                does an unknown length, but that it is an array. Empty for none, as predictions need.
        """
        inputs = input_columns(self.model, names)
        if labels is not None and not labels:
            return tuple(inputs)
        guessed = label_columns(self.model)
        given = labels if labels is not None else [None] * len(guessed)
        if len(given) != len(guessed):
            raise ModelError(f"the model has {len(guessed)} outputs, but {len(given)} labels were given")
        chosen = [_label_column(column, label) for column, label in zip(guessed, given, strict=True)]
        weight = [Column(WEIGHT_COLUMN, (), "float32")] if weighted else []
        return (*inputs, *chosen, *weight)

    def capture(
        self,
        columns: Sequence[Column],
        structure: Structure,
        *,
        average_optimizer_state: bool = False,
        nan_is_error: bool = True,
        num_threads: int = 1,
    ) -> Captured:
        """Reads off the model all that executors need; builds what of it is not built.

        Args:
            average_optimizer_state: synchronize the optimizer's slots too, instead of each worker keeping its own.

        Raises:
            ModelError: a model that cannot be built for the columns, has no weights, or cannot travel.
        """
        build(self.model, columns, structure)
        variables = variables_of(self.model)
        synchronized = _named(variables.synchronized(with_slots=average_optimizer_state))
        layout = self._layout(synchronized)
        packed = pack_model(self.model) if self._builder is None else pack_builder(self._builder)
        content = pack_content(packed, [v.numpy() for v in variables.own(with_slots=average_optimizer_state)])
        weights = layout.pack({name: np.asarray(variable.numpy()) for name, variable in synchronized.items()})
        if (name := layout.find_non_finite(weights)) is not None:
            raise ModelError(f"weight {name} holds NaN or infinity before training: initialize the model anew")
        spec = KerasSpec(
            layout=layout,
            columns=tuple(columns),
            structure=structure,
            num_trainable=len(variables.trainable),
            with_slots=average_optimizer_state,
            scalars=self._scalars(),
            num_totals=sum(int(np.prod(v.shape)) for v in self.model.metrics_variables),
            nan_is_error=nan_is_error,
            num_threads=num_threads,
            content_hash=hashlib.sha256(content).hexdigest(),
        )
        self._require_return(packed)
        return Captured(
            spec,
            content,
            weights,
            checked_labels(self.model, structure),
            graph=lambda: graph_def(self.model, columns, structure),
        )

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        """Sets the model's variables to `weights`, which may be reused at once."""
        known = self._known()
        for name, view in layout.views(weights).items():
            known[name].assign(view.copy())

    def difference(self, layout: WeightLayout) -> str:
        """Says which of the layout's tensors are not, as they stand there, variables of the model.

        Raises:
            ModelError: it has no variables yet.
        """
        if not self.model.built:
            raise ModelError(
                f"model {self.model.name} is not built, so that weights have no place in it: begin it with a "
                f"keras.Input, or call model.build(input_shape)"
            )
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built:  # its slots may be among the tensors
            optimizer.build(self.model.trainable_variables)
        known = self._known()
        have = {name: TensorSpec(name, tuple(v.shape), v.dtype) for name, v in known.items()}
        return "; ".join(
            f"expected {spec}, got {have.get(spec.name, 'none')}"
            for spec in layout.specs
            if have.get(spec.name) != spec
        )

    def logs(self, totals: NDArray[np.float64]) -> dict[str, Any]:
        """The metrics as Keras would log them, a float each, or an array where a metric has several values.

        Args:
            totals: what workers' `take_totals` returned, added up.
        """
        start = 0
        for variable in self.model.metrics_variables:
            stop = start + int(np.prod(variable.shape))
            variable.assign(totals[start:stop].reshape(variable.shape).astype(_numpy_dtype(variable)))
            start = stop
        if start != len(totals):
            raise ModelError(f"the model's metrics have {start} numbers, but workers reported {len(totals)}")
        return dict(_flat_logs(self.model.get_metrics_result()))

    @property
    def iterations(self) -> int:
        """Steps that the optimizer counts."""
        optimizer = self.model.optimizer
        return int(optimizer.iterations.numpy()) if optimizer is not None else 0

    @property
    def learning_rate(self) -> float | None:
        """The optimizer's; None where it is a schedule or a function of its own."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        rate = getattr(optimizer, "_learning_rate", None)
        return float(rate.numpy()) if isinstance(rate, keras.Variable) else None

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        optimizer.learning_rate = rate

    def _layout(self, synchronized: Mapping[str, Any]) -> WeightLayout:
        if not synchronized:
            raise ModelError(f"model {self.model.name} has no weights: there is nothing to synchronize or broadcast")
        try:
            return WeightLayout(TensorSpec(name, tuple(v.shape), v.dtype) for name, v in synchronized.items())
        except ValueError as error:
            raise ModelError(f"the weights of model {self.model.name} cannot be synchronized: {error}") from error

    def _known(self) -> dict[str, Any]:
        # Names are made unique in this order, so those of a layout without slots are the first of these.
        return _named(variables_of(self.model).synchronized(with_slots=True))

    def _require_return(self, packed: bytes) -> None:
        """Makes the model again here, once: what fails then would fail on every executor, later."""
        if not self._has_travelled and self._builder is None:
            unpack_model(packed)
        self._has_travelled = True

    def _scalars(self) -> tuple[Scalar, ...]:
        """The logs that are plain means, found by giving each such metric a value that no other has."""
        places: dict[int, int] = {}
        num_totals = 0
        for variable in self.model.metrics_variables:
            places[id(variable)] = num_totals
            num_totals += int(np.prod(variable.shape))
        rest = self.logs(np.zeros(num_totals))
        scalars = []
        for mean in _plain_means(self.model.metrics):
            total, count = places.get(id(mean.total)), places.get(id(mean.count))
            if total is None or count is None:
                continue
            totals = np.zeros(num_totals)
            totals[total], totals[count] = 3.0, 2.0
            logs = self.logs(totals)
            scalars += [
                Scalar(name, total, count) for name in logs if np.all(logs[name] == 1.5) and np.all(rest[name] != 1.5)
            ]
        self.logs(np.zeros(num_totals))
        return tuple(scalars)


def _named(variables: Sequence[Any]) -> dict[str, Any]:
    """Variables by path, the same for each model of this architecture, whatever was built before it in the process.

    Args:
        variables: an optimizer's slots come after what they are of.
    """
    counts: Counter[str] = Counter()
    joined: dict[str, str] = {}  # paths as they stand in the names of slots
    renumbered: dict[tuple[str, str], str] = {}
    num_called: Counter[tuple[str, str]] = Counter()
    named = {}
    for variable in variables:
        *layers, last = variable.path.split("/")
        parent = ""
        for layer in layers:
            if (parent, layer) not in renumbered:
                # Keras numbers layers without a name of their own through the process: dense_26 is here the first.
                base = re.sub(r"_\d+$", "", layer)
                number = num_called[parent, base]
                num_called[parent, base] += 1
                renumbered[parent, layer] = f"{parent}{base}_{number}/" if number else f"{parent}{base}/"
            parent = renumbered[parent, layer]
        path = parent + _renamed_slot(last, joined)
        joined[variable.path.replace("/", "_")] = path.replace("/", "_")
        number = counts[path]
        counts[path] += 1
        named[f"{path}#{number}" if number else path] = variable
    return named


def _renamed_slot(name: str, joined: Mapping[str, str]) -> str:
    """A slot is called as its variable, and what it is to it: dense_26_kernel_momentum."""
    end = len(name)
    while (end := name.rfind("_", 0, end)) > 0:
        if name[:end] in joined:
            return joined[name[:end]] + name[end:]
    return name


def _label_column(guessed: Column, label: tuple[tuple[int | None, ...], str] | None) -> Column:
    if label is None:
        return guessed
    if None not in label[0]:
        return Column(guessed.name, *label)
    return guessed if guessed.shape != () else Column(guessed.name, (1,), guessed.dtype)


def _plain_means(metrics: Sequence[Any]) -> list[Any]:
    """All metrics in `metrics` whose result is their total over their count."""
    means = []
    for metric in metrics:
        means += _plain_means(getattr(metric, "metrics", []))
        if isinstance(metric, keras.metrics.Mean) and type(metric).result is keras.metrics.Mean.result:
            means.append(metric)
    return means


def _flat_logs(logs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in logs.items():
        if isinstance(value, Mapping):
            flat += _flat_logs(value)
            continue
        array = np.asarray(keras.ops.convert_to_numpy(value))
        flat.append((name, float(array.reshape(())) if array.size == 1 else array))
    return flat


def _numpy_dtype(variable: Any) -> Any:
    return variable.numpy().dtype
