"""The compiled functions of a Keras trainer: a loop of steps over stacked batches, and what makes a step cheaper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column
from tensorspark.trainers.flat import FlatVariables, batch_spec, owned_tensor, stacked_spec
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

# Traces of one function for as many batch sizes.
_NUM_KEPT = 8


class GlobalSteps(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule that is asked for the step of all workers, not the optimizer's own, which Adam's bias correction
    goes on to count; or a function without arguments. `scale` multiplies what it says."""

    def __init__(self, schedule: Callable[..., Any]) -> None:
        self.schedule = schedule
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="global_step")
        self.scale = tf.Variable(1.0, trainable=False, name="learning_rate_scale")

    def __call__(self, step: Any) -> Any:
        del step
        is_schedule = isinstance(self.schedule, keras.optimizers.schedules.LearningRateSchedule)
        rate = tf.convert_to_tensor(self.schedule(self.step) if is_schedule else self.schedule())
        return rate * tf.cast(self.scale, rate.dtype)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}


def adopt_global_steps(optimizer: Any) -> GlobalSteps | None:
    """Makes a schedule of the optimizer's learning rate count global steps; None where the rate is a number."""
    inner = _innermost(optimizer)
    schedule = getattr(inner, "_learning_rate", None)
    if isinstance(schedule, keras.Variable) or not callable(schedule):
        return None
    clock = GlobalSteps(schedule)
    inner.learning_rate = clock
    return clock


def fuse_optimizer(optimizer: Any) -> None:
    """Lets Keras's Adam take a variable's step in one operation, which computes the same in a fifth of the time."""
    inner = _innermost(optimizer)
    if type(inner) is not keras.optimizers.Adam or inner.amsgrad:
        return
    one_by_one = inner.update_step

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        dtype = tf.as_dtype(variable.dtype)
        if isinstance(gradient, tf.IndexedSlices) or dtype not in (tf.float32, tf.float64):
            one_by_one(gradient, variable, learning_rate)
            return
        native = variable.value if isinstance(variable, keras.Variable) else variable
        index = inner._get_variable_index(variable)
        step = tf.cast(inner.iterations + 1, dtype)  # no variable where gradients are accumulated
        beta_1, beta_2 = tf.cast(inner.beta_1, dtype), tf.cast(inner.beta_2, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=native.handle,
            m=inner._momentums[index].value.handle,
            v=inner._velocities[index].value.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=tf.cast(learning_rate, dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.cast(inner.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )

    inner.update_step = update_step


class CompiledSteps:
    """A model's steps, many in one call.

    Args:
        data: what `train_step` takes, of one batch's columns.
        flat: the synchronized variables.
        clock: to be set to the global step before each step, if given.
        loss_total: the metric variable that is no number from the first step on whose loss is none.
    """

    def __init__(
        self,
        model: keras.Model,
        columns: Sequence[Column],
        data: Callable[[Sequence[Any]], tuple[Any, ...]],
        flat: FlatVariables,
        clock: GlobalSteps | None,
        loss_total: tf.Variable | None,
    ) -> None:
        self._model = model
        self._columns = columns
        self._data = data
        self._flat = flat
        self._clock = clock
        self._loss_total = loss_total
        self._metrics = [variable.value for variable in model.metrics_variables]
        self._nothing = flat.nothing()
        # Keras weighs the losses of several outputs by the rows of a batch only where it knows their number.
        self._needs_sizes = model._compile_loss is not None and bool(model._compile_loss.metrics)
        self._kept: OrderedDict[tuple[str, int | None], Callable[..., Any]] = OrderedDict()
        self._drops_totals = True

    def train(
        self, weights: Sequence[tf.Tensor] | None, start: int, stride: int, stacked: Sequence[NDArray[Any]], size: int
    ) -> tuple[list[tf.Tensor], int, NDArray[np.float64]]:
        """Takes a step on each of the batches.

        Args:
            weights: set first, if given.
            start, stride: the first step's global number, and how many steps on the next one is.
            stacked: the batches, `[num_batches, batch_size, ...]` each.
            size: the usual batch size.

        Returns:
            The weights after the last step, how many steps come before the first whose loss is no number, the totals.
        """
        order = owned_tensor(np.array([self._take_drop(), weights is not None, start, stride], np.int64))
        tensors = [owned_tensor(array) for array in stacked]
        function = self._function("train", self._size(stacked[0].shape[1], size))
        *flat, numbers = function(order, *(self._nothing if weights is None else weights), *tensors)
        numbers = numbers.numpy()
        return flat, int(numbers[0]), numbers[1:]

    def evaluate(self, stacked: Sequence[NDArray[Any]], size: int) -> NDArray[np.float64]:
        """Adds the batches to the totals, and returns these."""
        tensors = [owned_tensor(array) for array in stacked]
        order = owned_tensor(np.array([self._take_drop()], np.int64))
        totals: tf.Tensor = self._function("evaluate", self._size(stacked[0].shape[1], size))(order, *tensors)
        return totals.numpy()  # type: ignore[no-any-return]

    def predict(self, batch: Sequence[NDArray[Any]], size: int) -> list[tf.Tensor]:
        """The flat outputs for one batch, given the inputs' columns alone."""
        tensors = [owned_tensor(array) for array in batch]
        outputs: list[tf.Tensor] = self._function("predict", self._size(len(batch[0]), size))(*tensors)
        return outputs

    def drop_totals(self) -> None:
        """Zeroes the metric variables before the next step: in its call, as one of its own costs half a step."""
        self._drops_totals = True

    def _take_drop(self) -> bool:
        drops, self._drops_totals = self._drops_totals, False
        return drops

    def _size(self, num_rows: int, usual: int) -> int | None:
        """The size to compile for: a known one computes some percent faster, one for all spares compiling."""
        return num_rows if num_rows == usual or self._needs_sizes else None

    def _function(self, name: str, size: int | None) -> Callable[..., Any]:
        """The compiled function for batches of `size` rows; of any size, if None."""
        function = self._kept.pop((name, size), None)
        if function is None:
            function = self._make(name, size)
            known = [key for key in self._kept if key[0] == name and key[1] is not None]
            if size is not None and len(known) >= _NUM_KEPT:
                del self._kept[known[0]]
        self._kept[name, size] = function
        return function

    def _make(self, name: str, size: int | None) -> Callable[..., Any]:
        specs = [batch_spec(column, size) for column in self._columns]
        stacked = [stacked_spec(column, size) for column in self._columns]
        if name == "train":
            signature = [tf.TensorSpec([4], tf.int64), *self._flat.signature, *stacked]
            return self._compiled(self._train_body, signature)
        if name == "evaluate":
            return self._compiled(self._evaluate_body, [tf.TensorSpec([1], tf.int64), *stacked])
        num_inputs = 1 + max(keras.tree.flatten(self._data(range(len(specs)))[0]))
        return self._compiled(self._predict_body, specs[:num_inputs])

    def _compiled(self, body: Callable[..., Any], signature: list[tf.TensorSpec]) -> Callable[..., Any]:
        if self._model.run_eagerly:
            return body
        return tf.function(body, autograph=False).get_concrete_function(*signature)  # type: ignore[no-any-return]

    def _train_body(self, order: tf.Tensor, *tensors: tf.Tensor) -> list[tf.Tensor]:
        num_segments = len(self._nothing)
        weights, stacked = tensors[:num_segments], tensors[num_segments:]
        tf.cond(order[0] > 0, self._zero_totals, lambda: False)
        tf.cond(order[1] > 0, lambda: self._assign(weights), lambda: False)
        num_finite = self._loop(self._step(self._model.train_step), stacked, order[2:])
        return [*self._flat.concat(), tf.concat([[tf.cast(num_finite, tf.float64)], self._totals()], axis=0)]

    def _assign(self, weights: Sequence[tf.Tensor]) -> bool:
        self._flat.assign(weights)
        return True

    def _zero_totals(self) -> bool:
        for variable in self._metrics:
            variable.assign(tf.zeros_like(variable))
        return True

    def _evaluate_body(self, order: tf.Tensor, *stacked: tf.Tensor) -> tf.Tensor:
        tf.cond(order[0] > 0, self._zero_totals, lambda: False)
        self._loop(self._step(self._model.test_step), stacked)
        return self._totals()

    def _predict_body(self, *columns: tf.Tensor) -> list[tf.Tensor]:
        missing = [None] * (len(self._columns) - len(columns))
        outputs = self._model.predict_step(self._data([*columns, *missing])[:1])
        return [tf.convert_to_tensor(output) for output in keras.tree.flatten(outputs)]

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        if self._model.jit_compile:
            return tf.function(step, jit_compile=True, autograph=False)  # type: ignore[no-any-return]
        return step

    def _loop(
        self, step: Callable[..., Any], stacked: Sequence[tf.Tensor], steps: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Steps over all batches, one after the other; says how many come before the first whose loss is no number.

        Args:
            steps: the first step's global number, and how many steps on the next one is.
        """

        def body(index: tf.Tensor, num_finite: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            if self._clock is not None and steps is not None:
                self._clock.step.assign(steps[0] + tf.cast(index, tf.int64) * steps[1])
            logs = step(self._data([column[index] for column in stacked]))
            is_finite = tf.equal(num_finite, index)
            for loss in self._losses(logs):
                is_finite &= tf.reduce_all(tf.math.is_finite(loss))
            return index + 1, num_finite + tf.cast(is_finite, tf.int32)

        num_batches = tf.shape(stacked[0])[0]
        zero = tf.constant(0)
        # One at a time: the next step begins from this one's weights.
        return tf.while_loop(lambda index, _: index < num_batches, body, [zero, zero], parallel_iterations=1)[1]

    def _losses(self, logs: Any) -> list[Any]:
        """Where a step's loss shows: in the metric, and in what a `train_step` of its own returns, which need not keep
        that metric."""
        losses = [] if self._loss_total is None else [self._loss_total]
        is_own = type(self._model).train_step is not keras.Model.train_step
        return [*losses, logs["loss"]] if is_own and isinstance(logs, dict) and "loss" in logs else losses

    def _totals(self) -> tf.Tensor:
        return tf.concat([tf.reshape(tf.cast(v, tf.float64), [-1]) for v in self._metrics] or [[]], axis=0)


def _innermost(optimizer: Any) -> Any:
    """Without a LossScaleOptimizer around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)
