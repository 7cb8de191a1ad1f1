"""Training steps written with `tf.function` or plain TensorFlow operations, without Keras.

What travels is the function that makes variables and step, by value where executors cannot import it, and the values
of all variables that it makes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.errors import ModelError
from tensorspark.trainers.base import Captured
from tensorspark.trainers.flat import (
    FlatTrainer,
    FlatVariables,
    batch_spec,
    owned_tensor,
    pack_content,
    stacked_batches,
    stacked_spec,
    unpack_content,
)
from tensorspark.trainers.keras_objects import pack_builder, unpack_builder
from tensorspark.trainers.startup import importing, start
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

with importing():
    import tensorflow as tf

_EXPECTED = (
    "expected (variables, step) or (variables, step, predict): the tf.Variables to synchronize, a step(*columns of a "
    "batch) that trains and returns a scalar loss or a dict of scalars, and maybe a predict(*columns) that returns "
    "tensors"
)


class FunctionTrainer:
    """A training step that `build` makes, to be trained as a session's model is. This is its driver's side.

    Args:
        build: makes the model anew in each process; see `_EXPECTED`. All variables have to be made in it, optimizer
            slots included: those that it does not return stay local to a worker, and begin from the driver's values.

    >>> def build():
    ...     w = tf.Variable([1.0, 2.0], name="w")
    ...     def step(x, y):
    ...         with tf.GradientTape() as tape:
    ...             loss = tf.reduce_mean((tf.linalg.matvec(x, w) - y) ** 2)
    ...         w.assign_sub(0.1 * tape.gradient(loss, w))
    ...         return loss
    ...     return [w], step
    >>> FunctionTrainer(build).variables[0].numpy().tolist()
    [1.0, 2.0]

    Raises:
        ModelError: `build` returns something else.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        if not callable(build):
            raise ModelError(f"FunctionTrainer takes a function without arguments; got {build!r}")
        self._build = build
        self._made = _Made(build)

    @property
    def variables(self) -> list[tf.Variable]:
        """The synchronized ones, on the driver: trained weights come back into them."""
        return list(self._made.variables)

    def capture(self, columns: Sequence[Column], *, nan_is_error: bool = True, num_threads: int = 1) -> Captured:
        """Reads off all that executors need.

        Raises:
            ModelError: a step that does not take such columns or returns no scalars; variables that are not numbers.
        """
        named = _named(self._made.variables)
        layout = _layout(named)
        weights = layout.pack({name: variable.numpy() for name, variable in named.items()})
        if (name := layout.find_non_finite(weights)) is not None:
            raise ModelError(f"variable {name} holds NaN or infinity before training: initialize it anew")
        content = pack_content(pack_builder(self._build), [v.numpy() for v in self._made.local])
        spec = FunctionSpec(
            layout=layout,
            columns=tuple(columns),
            scalar_names=self._made.scalar_names(columns),
            nan_is_error=nan_is_error,
            num_threads=num_threads,
            content_hash=hashlib.sha256(content).hexdigest(),
        )
        return Captured(spec, content, weights)

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        """Sets the driver's variables to `weights`, which may be reused at once."""
        named = _named(self._made.variables)
        for name, view in layout.views(weights).items():
            named[name].assign(view.copy())

    def difference(self, layout: WeightLayout) -> str:
        """Says which of the layout's tensors are not, as they stand there, among the variables."""
        return layout.difference(_layout(_named(self._made.variables)))


@dataclass(frozen=True)
class FunctionSpec:
    """How an executor makes the step again. See `FunctionTrainer.capture`; the fields are `KerasSpec`'s."""

    layout: WeightLayout
    columns: tuple[Column, ...]
    scalar_names: tuple[str, ...]
    nan_is_error: bool
    num_threads: int
    content_hash: str

    @cached_property
    def key(self) -> str:
        described = ["function", self.content_hash, self.layout.fingerprint, repr(self.columns), self.nan_is_error]
        packed: bytes = msgpack.packb(described)
        return hashlib.sha256(packed).hexdigest()

    @property
    def num_totals(self) -> int:
        """Sums of the scalars over rows, and the number of rows."""
        return len(self.scalar_names) + 1

    @property
    def num_trainable(self) -> int:
        return len(self.layout.specs)

    def build(self, content: bytes) -> FunctionWorker:
        return FunctionWorker(self, content)


class FunctionWorker(FlatTrainer):
    """A step in an executor's process, made again from `FunctionSpec.build`'s content."""

    def __init__(self, spec: FunctionSpec, content: bytes) -> None:
        start(spec.num_threads)
        self._spec = spec
        self.layout, self.columns, self.scalar_names = spec.layout, spec.columns, spec.scalar_names
        builder, self._values = unpack_content(content)
        self._made = _Made(unpack_builder(builder))
        self._require_same()
        self._hold(FlatVariables(spec.layout, self._made.variables), reverts=not spec.nan_is_error)
        self._nothing = self._flat.nothing()
        self._functions: dict[int | None, Any] = {}
        self.num_totals = spec.num_totals
        self._totals = np.zeros(self.num_totals)
        self._num_local_steps = 0

    def reset(self, partition: int, seed: int) -> None:
        self._reset_own()
        tf.random.set_seed(int(np.random.SeedSequence((seed, partition)).generate_state(1)[0]))
        self._num_local_steps = 0
        self.take_totals()

    def load(self, weights: Buffer) -> None:
        super().load(weights)
        self._num_local_steps = 0

    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        sums = np.zeros(len(self.scalar_names))
        for stacked in stacked_batches(columns, batch_size):
            function = self._function(batch_size if stacked[0].shape[1] == batch_size else None)
            weights = self._take_pending()
            order = tf.constant(weights is not None)
            tensors = [owned_tensor(array) for array in stacked]
            *self._trained, num_finite, by_batch = function(order, *(weights or self._nothing), *tensors)
            if self._spec.nan_is_error and int(num_finite) < len(stacked[0]):
                raise ModelError(
                    f"{self.scalar_names[0]} became NaN or infinite at local step "
                    f"{self._num_local_steps + int(num_finite)} of the interval (counted from 0): lower the learning "
                    f"rate, clip gradients, or look for NaN and huge values in the rows"
                )
            self._num_local_steps += len(stacked[0])
            sums += by_batch.numpy() * stacked[0].shape[1]
        self._totals += [*sums, len(columns[0])]
        return sums

    def take_totals(self) -> NDArray[np.float64]:
        totals, self._totals = self._totals, np.zeros(self.num_totals)
        return totals

    def predict(self, columns: Columns, batch_size: int) -> tuple[NDArray[Any], ...]:
        if self._made.predict is None:
            raise ModelError(f"build returns nothing to predict with; {_EXPECTED}")
        self._settle()
        starts = range(0, max(len(columns[0]), 1), batch_size)
        batches = [
            tf.nest.flatten(self._made.predict(*[owned_tensor(column[i : i + batch_size]) for column in columns]))
            for i in starts
        ]
        return tuple(np.concatenate([output.numpy() for output in parts]) for parts in zip(*batches, strict=True))

    def close(self) -> None:
        self._functions.clear()
        self._pending = self._trained = self._loaded = None

    def _reset_own(self) -> None:
        for variable, value in zip(self._made.local, self._values, strict=True):
            variable.assign(value)

    def _function(self, size: int | None) -> Any:
        """The compiled loop for batches of `size` rows, or of any size: known ones compute some percent faster."""
        if size not in self._functions:
            if size is not None and len(self._functions) > 2:
                size = None
            stacked = [stacked_spec(column, size) for column in self.columns]
            function = tf.function(self._train_body, autograph=False)
            self._functions[size] = function.get_concrete_function(
                tf.TensorSpec([], tf.bool), *self._flat.signature, *stacked
            )
        return self._functions[size]

    def _train_body(self, has_weights: tf.Tensor, *tensors: tf.Tensor) -> list[tf.Tensor]:
        weights, stacked = tensors[: len(self._nothing)], tensors[len(self._nothing) :]

        def assign() -> bool:
            self._flat.assign(weights)
            return True

        def body(index: tf.Tensor, num_finite: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, ...]:
            scalars = _scalars(self._made.step(*[column[index] for column in stacked]))
            values = tf.stack([tf.cast(scalars[name], tf.float64) for name in self.scalar_names])
            is_finite = tf.cast(tf.math.is_finite(values[0]), tf.int32)
            # Counts up to the first loss that is none: the others come after it.
            return index + 1, num_finite + is_finite * tf.cast(tf.equal(num_finite, index), tf.int32), sums + values

        tf.cond(has_weights, assign, lambda: False)
        zeros = tf.zeros([len(self.scalar_names)], tf.float64)
        num_batches = tf.shape(stacked[0])[0]
        _, num_finite, sums = tf.while_loop(
            lambda index, *_: index < num_batches,
            body,
            [tf.constant(0), tf.constant(0), zeros],
            parallel_iterations=1,
        )
        return [*self._flat.concat(), num_finite, sums]

    def _require_same(self) -> None:
        made = [(tuple(v.shape), v.dtype.name) for v in self._made.variables]
        local = [tuple(v.shape) for v in self._made.local]
        if made != [(s.shape, s.dtype) for s in self.layout.specs] or local != [v.shape for v in self._values]:
            raise ModelError(
                f"build made other variables in this process: expected {', '.join(map(str, self.layout.specs))}, got "
                f"{made}; it must make the same ones each time, in one order"
            )


class _Made:
    """What `build` returned, and the variables it made besides."""

    def __init__(self, build: Callable[[], Any]) -> None:
        created: list[tf.Variable] = []

        def remember(next_creator: Callable[..., Any], **arguments: Any) -> Any:
            variable = next_creator(**arguments)
            created.append(variable)
            return variable

        with tf.variable_creator_scope(remember):
            made = build()
        if not isinstance(made, list | tuple) or len(made) not in (2, 3) or not all(map(callable, made[1:])):
            raise ModelError(f"build returned {made!r}; {_EXPECTED}")
        self.variables = list(made[0])
        if not self.variables or not all(isinstance(variable, tf.Variable) for variable in self.variables):
            raise ModelError(f"build returned {made[0]!r} as its variables; {_EXPECTED}")
        self.step: Callable[..., Any] = made[1]
        self.predict: Callable[..., Any] | None = made[2] if len(made) == 3 else None
        returned = {variable.ref() for variable in self.variables}
        self.local = [variable for variable in created if variable.ref() not in returned]

    def scalar_names(self, columns: Sequence[Column]) -> tuple[str, ...]:
        """The names of what the step returns; raises ModelError where it does not take such columns."""
        try:
            function = tf.function(lambda *batch: _scalars(self.step(*batch)), autograph=False)
            traced = function.get_concrete_function(*[batch_spec(column, None) for column in columns])
        except ModelError:
            raise
        except Exception as error:  # whatever the user's step raises
            described = ", ".join(f"{column.name} ({column})" for column in columns)
            raise ModelError(f"the step cannot take the columns {described}: {error}") from error
        return tuple(traced.structured_outputs)


def _scalars(returned: Any) -> dict[str, tf.Tensor]:
    """By name, the loss first."""
    scalars = dict(returned) if isinstance(returned, Mapping) else {"loss": returned}
    for name, value in scalars.items():
        if value is None or tf.convert_to_tensor(value).shape.rank != 0:
            raise ModelError(f"the step returned {value!r} as {name}; expected a scalar loss, or a dict of scalars")
    if "loss" in scalars:
        scalars = {"loss": scalars["loss"], **scalars}
    return scalars


def _named(variables: Sequence[tf.Variable]) -> dict[str, tf.Variable]:
    counts: Counter[str] = Counter()
    named = {}
    for variable in variables:
        name = variable.name.partition(":")[0]
        number = counts[name]
        counts[name] += 1
        named[f"{name}#{number}" if number else name] = variable
    return named


def _layout(named: Mapping[str, tf.Variable]) -> WeightLayout:
    try:
        return WeightLayout(TensorSpec(n, tuple(v.shape), v.dtype.name) for n, v in named.items())
    except ValueError as error:
        raise ModelError(f"the variables that build returns cannot be synchronized: {error}") from error
