"""Callbacks on the driver: whoever waits for single steps is told that nobody calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.trainers.keras_callbacks import EpochCallbacks
from tensorspark.trainers.keras_model import as_keras_model, keras


class StepCounter(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise AssertionError("never called")


WAITING = {
    "a class of its own": (StepCounter, "on_train_batch_end of StepCounter"),
    "lambda": (
        lambda: keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: None),
        "on_train_batch_begin of LambdaCallback",
    ),
    "saved every so many steps": (
        lambda: keras.callbacks.ModelCheckpoint("x.keras", save_freq=100),
        "on_train_batch_end of ModelCheckpoint",
    ),
    "not a number": (keras.callbacks.TerminateOnNaN, "on_batch_end of TerminateOnNaN"),
}
CONTENT = {
    "lambda": lambda: keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    "saved by epochs": lambda: keras.callbacks.ModelCheckpoint("x.keras"),
    "tensorboard": lambda: keras.callbacks.TensorBoard("logs"),
    "early stopping": keras.callbacks.EarlyStopping,
}


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard writes as soon as it knows its model


def _begin_with(callback: Any) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    EpochCallbacks(as_keras_model(model), [callback], num_epochs=1, told={})


@pytest.mark.parametrize(("make", "named"), WAITING.values(), ids=WAITING)
def test_a_callback_that_waits_for_steps_is_named(
    make: Callable[[], Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    _begin_with(make())
    assert caplog.messages == [
        f"{named} will not be called: workers train batches by themselves, and the driver sees ends of epochs"
    ]


@pytest.mark.parametrize("make", CONTENT.values(), ids=CONTENT)
def test_a_callback_of_epochs_is_not(make: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    _begin_with(make())
    assert not caplog.records
