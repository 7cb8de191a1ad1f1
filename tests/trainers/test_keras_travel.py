"""A model's way to another process: what a program defined is there, what cannot travel is said on the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.keras import Structure
from tensorspark.trainers.keras_model import as_keras_model, keras

ROOT = Path(__file__).parents[2]
COLUMNS = (Column("x", (6,), "float32"), Column("y", (), "float32"))

PREAMBLE = """
import json, pickle, sys
import numpy as np
import keras
random = np.random.default_rng(3)
x = random.normal(size=(44, 6)).astype(np.float32)
y = random.normal(size=44).astype(np.float32)
"""

# Classes, functions and globals of a program: nothing here can be imported elsewhere.
PROGRAM = """
from keras import ops
from tensorspark.trainers.keras_model import as_keras_model

FACTOR = 1.5

@keras.saving.register_keras_serializable("mine")
class Scale(keras.layers.Layer):
    def __init__(self, start, **options):
        super().__init__(**options)
        self.start = start
    def build(self, shape):
        start = keras.initializers.Constant(self.start)
        self.scale = self.add_weight(shape=(shape[-1],), initializer=start, name="scale")
    def call(self, inputs):
        return inputs * self.scale * FACTOR
    def get_config(self):
        return {**super().get_config(), "start": self.start}

class Halfway(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.full(shape, 0.5, dtype)

class Steeper(keras.losses.Loss):
    def __init__(self, power=2, **options):
        super().__init__(**options)
        self.power = power
    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** self.power, axis=-1)
    def get_config(self):
        return {**super().get_config(), "power": self.power}

class Below(keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(ops.cast(ops.reshape(y_pred, [-1]) < ops.reshape(y_true, [-1]), "float32"))

class Slowing(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.01 / (1.0 + FACTOR * ops.cast(step, "float32"))
    def get_config(self):
        return {}

def squash(values):
    return ops.tanh(values) * FACTOR

def off(y_true, y_pred):
    return ops.abs(y_true - y_pred)

class Twice(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(4, activation=squash)
        self.last = keras.layers.Dense(1, kernel_initializer=Halfway())
        self.norm = keras.metrics.Mean(name="norm")
    def call(self, inputs):
        return self.last(self.first(inputs))
    def train_step(self, data):
        logs = super().train_step(data)
        self.norm.update_state(ops.norm(self.last.kernel))
        return {**logs, "norm": self.norm.result()}

def layered():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(4, activation=squash, kernel_regularizer="l2"),
        Scale(0.7),
        keras.layers.Lambda(lambda values: values * FACTOR + ops.sin(values)),
        keras.layers.Dense(1, kernel_initializer=Halfway(), activation=lambda values: values * FACTOR),
    ])
    model.compile(keras.optimizers.SGD(Slowing()), Steeper(1.5), metrics=[Below(), off, lambda t, p: ops.square(t - p)])
    return model

def subclassed():
    keras.utils.set_random_seed(1)
    model = Twice()
    model.compile("adam", off, metrics=["mae"])
    return model

def built_by_function():
    return layered

from tensorspark.data.columns import Column
from tensorspark.trainers.keras import Structure
parts = []
for given in (layered(), subclassed(), built_by_function()):
    driver = as_keras_model(given)
    captured = driver.capture([Column("x", (6,), "float32"), Column("y", (), "float32")], Structure(0, 1))
    model = driver.model
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    weights = [variable.numpy().tolist() for variable in model.trainable_variables]
    totals = [float(variable.numpy()) for variable in model.metrics_variables]
    assert np.isfinite(totals).all()
    parts.append((captured.spec, captured.content, captured.weights.tobytes(), weights, totals))
with open(sys.argv[1], "wb") as file:
    pickle.dump(parts, file)
"""

WORKER = """
with open(sys.argv[1], "rb") as file:
    parts = pickle.load(file)
for spec, content, loaded, weights, totals in parts:
    trainer = spec.build(content)
    trainer.reset(0, 5)
    trainer.load(np.frombuffer(loaded, np.uint8))
    trainer.train((x, y), 8)
    out = spec.layout.allocate()
    trainer.read(out)
    views = spec.layout.views(out)
    for tensor, expected in zip(spec.layout.specs, weights, strict=True):
        np.testing.assert_allclose(views[tensor.name], np.array(expected), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trainer.take_totals(), totals, rtol=1e-4)
print(json.dumps([len(parts), "__main__" if hasattr(sys.modules["__main__"], "Scale") else "elsewhere"]))
"""


def _run(script: Path, code: str, *arguments: str) -> str:
    script.write_text(PREAMBLE + code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error::UserWarning", str(script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_what_a_program_defines_trains_the_same_in_another_process(tmp_path: Path) -> None:
    parts = str(tmp_path / "parts")
    _run(tmp_path / "program.py", PROGRAM, parts)
    assert json.loads(_run(tmp_path / "worker.py", WORKER, parts)) == [3, "elsewhere"]


MODULE = """
import keras
class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return inputs * 2
"""


def test_a_class_of_a_module_that_executors_lack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_layers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_layers  # type: ignore[import-not-found]

    model = keras.Sequential([keras.Input((6,)), my_layers.Doubled(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    driver = as_keras_model(model)
    captured = driver.capture(driver.expected_columns(), driver.structure())
    captured.spec.build(captured.content).close()  # as long as it can be imported
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "my_layers")
    with pytest.raises(ModelError, match=r"Doubled of module my_layers.*--py-files"):
        captured.spec.build(captured.content)


class Unconfigured(keras.Model):  # type: ignore[misc]
    """Takes a layer, which Keras cannot write down by itself."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def call(self, inputs: Any) -> Any:
        return self.layer(inputs)


class SecretlyCompiled(keras.Sequential):  # type: ignore[misc]
    def compile(self, rate: float) -> None:
        super().compile(keras.optimizers.SGD(rate), "mse")


class Defaulted(keras.Model):  # type: ignore[misc]
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.drop, self.last = keras.layers.Dropout(rate), keras.layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.last(self.drop(inputs))


def _dense(**options: Any) -> Any:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, **options)])


def _unconfigured() -> Any:
    keras.utils.set_random_seed(6)
    model = Unconfigured(keras.layers.Dense(1))
    model.compile("sgd", "mse")
    model(np.zeros((1, 6), np.float32))
    return model


def test_a_model_without_a_config_is_told_what_to_write() -> None:
    driver = as_keras_model(_unconfigured())
    with pytest.raises(ModelError, match=r"Unconfigured.*get_config.*function without arguments"):
        driver.capture(COLUMNS, Structure(0, 1))


def test_a_models_options_are_not_replaced_by_their_defaults() -> None:
    model = Defaulted(rate=0.9)
    model.compile("sgd", "mse")
    driver = as_keras_model(model)
    with pytest.raises(ModelError, match=r"Defaulted takes rate, .*get_config"):
        driver.capture(COLUMNS, Structure(0, 1))


def test_a_builder_of_a_test_module_travels_where_its_model_cannot() -> None:
    driver = as_keras_model(_unconfigured)
    captured = driver.capture(COLUMNS, Structure(0, 1))
    trainer = captured.spec.build(captured.content)
    trainer.load(captured.weights)
    x = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_allclose(trainer.predict((x,), 2)[0], driver.model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


def test_a_compile_of_its_own_needs_a_way_back() -> None:
    model = SecretlyCompiled([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(0.1)
    driver = as_keras_model(model)
    with pytest.raises(ModelError, match=r"SecretlyCompiled overrides compile.*compile_from_config"):
        driver.capture(driver.expected_columns(), driver.structure())


def test_an_uncompiled_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"is not compiled: call model\.compile"):
        as_keras_model(_dense())
    with pytest.raises(ModelError, match=r"is not compiled"):
        as_keras_model(_dense)


@pytest.mark.parametrize("given", ["model.keras", keras.Model, lambda: "model"], ids=["path", "class", "wrong builder"])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(ModelError, match=r"keras\.Model"):
        as_keras_model(given)


def test_columns_that_the_model_does_not_take_are_named() -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    driver = as_keras_model(model)
    assert driver.capture(COLUMNS, Structure(0, 1)).spec.layout.specs[0].shape == (6, 1)
    two_heads = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    two_heads.compile("sgd", "mse")
    other = as_keras_model(two_heads)
    columns = other.expected_columns(labels=[((5,), "float32")])
    with pytest.raises(ModelError, match=r"cannot be built for the columns .*float32 of shape \[5\]"):
        other.capture(columns, other.structure())


def test_weights_that_are_no_numbers_are_found_before_training() -> None:
    model = _dense()
    model.compile("sgd", "mse")
    model.set_weights([np.full((6, 1), np.nan, np.float32), np.zeros(1, np.float32)])
    driver = as_keras_model(model)
    with pytest.raises(ModelError, match=r"kernel holds NaN"):
        driver.capture(driver.expected_columns(), driver.structure())


def test_what_cannot_be_pickled_is_named() -> None:
    lock = __import__("threading").Lock()

    def locked(y_true: Any, y_pred: Any) -> Any:
        with lock:
            return keras.ops.square(y_true - y_pred)

    model = _dense()
    model.compile("sgd", locked)
    driver = as_keras_model(model)
    with pytest.raises(ModelError, match=r"locked cannot travel.*inside the function"):
        driver.capture(driver.expected_columns(), driver.structure())
