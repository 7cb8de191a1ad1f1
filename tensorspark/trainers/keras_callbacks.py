"""Keras callbacks on the driver, called at the ends of epochs that workers train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensorspark.errors import ModelError
from tensorspark.trainers.startup import importing

if TYPE_CHECKING:
    from tensorspark.trainers.keras_model import KerasDriverModel

with importing():
    import keras

logger = logging.getLogger(__name__)

# Hooks of single steps: those are made on the workers, thousands in a second.
_NEVER_CALLED = (
    *("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_batch_begin", "on_test_batch_end", "on_predict_begin", "on_predict_end"),
)


class EpochCallbacks:
    """The callbacks of one `fit`.

    Called are ``on_train_begin``, ``on_epoch_begin``, ``on_test_begin`` and ``on_test_end`` (around the evaluation of
    held-out rows), ``on_epoch_end`` and ``on_train_end``; the model holds the epoch's weights from ``on_test_begin``
    on. Those of single batches are not: a warning names the callbacks that define one.

    Args:
        told: values for the workers that stay as they are.

    Raises:
        ModelError: (any method) a callback raised: names it.
    """

    def __init__(
        self, model: KerasDriverModel, callbacks: Sequence[Any], num_epochs: int, told: Mapping[str, float]
    ) -> None:
        self._model = model.model
        self._driver_model = model
        for callback in callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise ModelError(f"callbacks must be keras.callbacks.Callback objects, got {callback!r}")
            _warn_of_batch_hooks(callback)
        try:
            self._list = keras.callbacks.CallbackList(list(callbacks), model=self._model, epochs=num_epochs, verbose=0)
        except Exception as error:  # whatever set_model and set_params raise
            raise ModelError(
                f"a callback raised {type(error).__name__} when it was given the model: {error}"
            ) from error
        self._told = told

    def begin(self) -> None:
        self._model.stop_training = False
        self._call("on_train_begin")

    def begin_epoch(self, epoch: int) -> None:
        self._call("on_epoch_begin", epoch)

    def end_epoch(self, epoch: int, logs: dict[str, Any], evaluation: Mapping[str, Any] | None) -> None:
        """Callbacks may add to `logs`, as `keras.callbacks.ReduceLROnPlateau` does."""
        if evaluation is not None:
            self._call("on_test_begin")
            self._call("on_test_end", dict(evaluation))
        self._call("on_epoch_end", epoch, logs)

    def end(self, logs: Mapping[str, Any]) -> None:
        if isinstance(self._model.optimizer, keras.optimizers.Optimizer):  # averages become the weights, as in Keras
            self._model.optimizer.finalize_variable_values(self._model.trainable_weights)
        self._call("on_train_end", dict(logs))

    @property
    def wants_stop(self) -> bool:
        return bool(self._model.stop_training)

    @property
    def values(self) -> dict[str, float]:
        """What workers are told with their weights: what stays, and what callbacks may have changed."""
        rate = self._driver_model.learning_rate
        return dict(self._told) if rate is None else {**self._told, "learning_rate": rate}

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self._list.callbacks:
            try:
                getattr(callback, hook)(*arguments)
            except Exception as error:
                raise ModelError(
                    f"the callback {type(callback).__name__} raised {type(error).__name__} in {hook}: {error}"
                ) from error


def _warn_of_batch_hooks(callback: Any) -> None:
    if hooks := [name for name in _NEVER_CALLED if _needs(callback, name)]:
        logger.warning(
            "%s of %s will not be called: workers train batches by themselves, and the driver sees ends of epochs",
            ", ".join(hooks),
            type(callback).__name__,
        )


def _needs(callback: Any, hook: str) -> bool:
    if hook in vars(callback):  # as LambdaCallback keeps what it is given
        return True
    if getattr(type(callback), hook) is getattr(keras.callbacks.Callback, hook):
        return False
    # Keras's own do without them, or count steps for display; but for these.
    is_own = type(callback).__module__.startswith("keras.")
    saves_by_steps = isinstance(getattr(callback, "save_freq", None), int)
    return not is_own or saves_by_steps or isinstance(callback, keras.callbacks.TerminateOnNaN)
