"""Keras training: what a trainer computes is what Keras computes, step for step and metric for metric."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.keras import KerasTrainer, Structure
from tensorspark.trainers.keras_model import KerasDriverModel, as_keras_model, keras
from tensorspark.weights.layout import Buffer

ROWS, BATCH = 44, 8  # five full batches and one of four
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.02),
    "amsgrad": lambda: keras.optimizers.Adam(0.02, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.02),
    "clipped adam": lambda: keras.optimizers.Adam(0.02, clipnorm=0.1),
    "accumulating adam": lambda: keras.optimizers.Adam(0.02, gradient_accumulation_steps=2),
}


def _rows(seed: int = 3, num_rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(num_rows, 6)).astype(np.float32), random.integers(0, 3, num_rows)


def _classifier(optimizer: Any = "sgd", *extra: Any, seed: int = 5, **compile_options: Any) -> Any:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(5, activation="tanh"), *extra, keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    options = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]} | compile_options
    model.compile(optimizer, **options)
    return model


def _trainer(model: Any, structure: Structure | None = None, columns: Any = None, **options: Any) -> KerasTrainer:
    """The model's trainer, as a worker gets it: built from a pickled spec and bytes, reset and loaded."""
    driver = as_keras_model(model)
    structure = structure or driver.structure()
    captured = driver.capture(columns or driver.expected_columns(), structure, **options)
    trainer = pickle.loads(pickle.dumps(captured.spec)).build(captured.content)
    trainer.reset(partition=0, seed=11)
    trainer.load(captured.weights)
    return trainer


def _tensors(trainer: KerasTrainer) -> list[np.ndarray]:
    out = trainer.layout.allocate()
    trainer.read(out)
    return [np.array(trainer.layout.views(out)[spec.name]) for spec in trainer.layout.specs]


def _train_in_keras(model: Any, x: Any, y: Any, weights: Any = None, batch: int = BATCH) -> None:
    """One epoch in order: the metrics are those of all its rows."""
    model.fit(x, y, sample_weight=weights, batch_size=batch, shuffle=False, verbose=0)


def _expected(model: Any) -> list[np.ndarray]:
    return [variable.numpy() for variable in [*model.trainable_variables, *model.non_trainable_variables]]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_stretch_trains_as_batches_of_keras_do(make_optimizer: Callable[[], Any]) -> None:
    x, y = _rows()
    model = _classifier(make_optimizer(), keras.layers.BatchNormalization())
    trainer = _trainer(model)
    trainer.train((x, y), BATCH)
    _train_in_keras(model, x, y)
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    totals = np.array([variable.numpy() for variable in model.metrics_variables], np.float64)
    np.testing.assert_allclose(trainer.take_totals(), totals, rtol=1e-5)
    assert not trainer.take_totals().any()


def test_two_stretches_go_on_where_one_ended() -> None:
    x, y = _rows()
    once, twice = _trainer(_classifier("adam")), _trainer(_classifier("adam"))
    whole = once.train((x, y), BATCH)
    parts = twice.train((x[:16], y[:16]), BATCH), twice.train((x[16:], y[16:]), BATCH)
    for got, expected in zip(_tensors(twice), _tensors(once), strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-5)


def test_live_scalars_are_sums_over_rows() -> None:
    x, y = _rows()
    model = _classifier("sgd", metrics=["accuracy", keras.metrics.AUC(name="area")], loss="categorical_crossentropy")
    y = np.eye(3, dtype=np.float32)[y]
    trainer = _trainer(model)
    sums = trainer.train((x, y), BATCH)
    _train_in_keras(model, x, y)
    logs = model.get_metrics_result()
    assert trainer.scalar_names == ("loss", "accuracy")  # an area under a curve is no mean
    np.testing.assert_allclose(sums / ROWS, [float(logs["loss"]), float(logs["accuracy"])], rtol=1e-5)


def test_totals_of_workers_add_up_to_keras_metrics_with_sample_weights() -> None:
    x, y = _rows()
    weights = np.random.default_rng(8).uniform(0.5, 2.0, ROWS).astype(np.float32)
    options = {
        "weighted_metrics": ["accuracy"],
        "metrics": [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")],
    }
    model = _classifier("sgd", **options)
    driver = as_keras_model(model)
    structure = driver.structure(weighted=True)
    columns = driver.expected_columns(weighted=True)
    assert columns[-1] == Column("sample_weight", (), "float32")
    totals = []
    for rows in (slice(0, 16), slice(16, ROWS)):
        worker = _trainer(model, structure, columns)
        worker.evaluate((x[rows], y[rows], weights[rows]), BATCH)
        totals.append(worker.take_totals())
    logs = driver.logs(totals[0] + totals[1])
    expected = model.evaluate(x, y, sample_weight=weights, batch_size=BATCH, verbose=0, return_dict=True)
    assert logs == pytest.approx(expected, rel=1e-5)


def test_predictions_are_keras_own_for_any_number_of_rows() -> None:
    x, _ = _rows()
    model = _classifier("sgd")
    trainer = _trainer(model)
    for num_rows in (1, BATCH, ROWS):
        (got,) = trainer.predict((x[:num_rows],), BATCH)
        np.testing.assert_allclose(got, model.predict(x[:num_rows], verbose=0), rtol=1e-4, atol=1e-6)
    assert trainer.predict((x[:0],), BATCH)[0].shape == (0, 3)


def test_loaded_weights_are_a_copy() -> None:
    trainer = _trainer(_classifier("sgd"))
    weights = trainer.layout.allocate()
    trainer.read(weights)
    before = _tensors(trainer)
    for settle in (lambda: None, lambda: trainer.evaluate(_rows(), BATCH)):
        trainer.load(weights)
        settle()
        kept, weights[...] = weights.copy(), 255
        for got, expected in zip(_tensors(trainer), before, strict=True):
            np.testing.assert_array_equal(got, expected)
        weights[...] = kept


def test_what_was_read_does_not_change_with_more_training() -> None:
    x, y = _rows()
    trainer = _trainer(_classifier("sgd"))
    trainer.train((x, y), BATCH)
    out = trainer.layout.allocate()
    trainer.read(out)
    kept = out.copy()
    trainer.train((x, y), BATCH)
    np.testing.assert_array_equal(out, kept)


def test_read_gives_back_what_was_loaded_in_every_dtype() -> None:
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(3, dtype="float64"),
            keras.layers.Dense(1, dtype="bfloat16"),
            keras.layers.Dense(3),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    trainer = _trainer(model)
    loaded = trainer.layout.allocate()
    for number, view in enumerate(trainer.layout.views(loaded).values()):
        view[...] = number + 1.5
    trainer.load(loaded)
    trainer.evaluate(_rows(), BATCH)
    out = trainer.layout.allocate()
    trainer.read(out)
    np.testing.assert_array_equal(out, loaded)


def test_reset_brings_back_all_local_state() -> None:
    x, y = _rows()
    model = _classifier("adam", keras.layers.Dropout(0.4))
    _train_in_keras(model, x, y)  # slots and counter are not zero where the run begins
    trainer = _trainer(model)
    weights = trainer.layout.allocate()
    trainer.read(weights)

    def run(partition: int) -> tuple[Any, ...]:
        trainer.reset(partition, seed=11)
        trainer.load(weights)
        trainer.guide(100, 2, {"learning_rate": 0.5} if partition else {})
        sums = trainer.train((x, y), BATCH)
        return *(tensor.tobytes() for tensor in _tensors(trainer)), sums.tobytes()

    first = run(0)
    assert run(1) != first
    assert run(0) == first


def test_slots_travel_from_the_driver() -> None:
    x, y = _rows()
    model = _classifier("adam")
    _train_in_keras(model, x, y)
    trainer = _trainer(model)
    trainer.train((x, y), BATCH)
    _train_in_keras(model, x, y)
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_averaged_slots_are_part_of_the_weights() -> None:
    x, y = _rows()
    model = _classifier("adam")
    trainer = _trainer(model, average_optimizer_state=True)
    assert trainer._spec.num_trainable == 4
    assert len(trainer.layout.specs) == 4 + 8 + 1
    assert trainer.layout.specs[-1].name == "adam/iteration"
    trainer.train((x, y), BATCH)
    _train_in_keras(model, x, y)
    slots = [v.numpy() for v in model.optimizer.variables if v.path.endswith(("momentum", "velocity"))]
    *tensors, iterations = _tensors(trainer)
    for got, expected in zip(tensors[4:], slots, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-7)
    assert iterations == model.optimizer.iterations.numpy()


def test_the_layout_holds_trainable_weights_then_statistics_and_nothing_frozen() -> None:
    model = _classifier("adam", keras.layers.BatchNormalization(), keras.layers.Dropout(0.1))
    model.layers[0].trainable = False
    model.compile("adam", "sparse_categorical_crossentropy")
    trainer = _trainer(model)
    names = [spec.name.rpartition("/")[2] for spec in trainer.layout.specs]
    assert names == ["gamma", "beta", "kernel", "bias", "moving_mean", "moving_variance"]
    assert trainer._spec.num_trainable == 4
    x, _ = _rows()
    (got,) = trainer.predict((x,), BATCH)  # frozen weights are the driver's
    np.testing.assert_allclose(got, model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


def test_a_schedule_is_asked_for_global_steps_and_adam_counts_its_own() -> None:
    x, y = _rows(num_rows=3 * BATCH)
    rates = [0.03, 0.01, 0.002]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([41, 43], rates)
    trainer = _trainer(_classifier(keras.optimizers.Adam(schedule)))
    trainer.guide(num_steps=40, num_workers=2, values={})
    trainer.train((x[:BATCH], y[:BATCH]), BATCH)
    trainer.train((x[BATCH:], y[BATCH:]), BATCH)
    model = _classifier("adam")
    for index, rate in enumerate(rates):  # steps 40, 42, 44
        model.optimizer.learning_rate = rate
        rows = slice(index * BATCH, (index + 1) * BATCH)
        model.train_on_batch(x[rows], y[rows])
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_the_drivers_learning_rate_holds() -> None:
    x, y = _rows()
    model = _classifier(keras.optimizers.SGD(0.1))
    trainer = _trainer(model)
    trainer.guide(0, 1, {"learning_rate": 0.003})
    trainer.train((x, y), BATCH)
    assert as_keras_model(model).learning_rate == pytest.approx(0.1)
    model.optimizer.learning_rate = 0.003
    _train_in_keras(model, x, y)
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def _two_headed(optimizer: Any = "sgd") -> Any:
    keras.utils.set_random_seed(4)
    left, right = keras.Input((6,), name="left"), keras.Input((2,), name="right")
    both = keras.layers.Concatenate()([keras.layers.Dense(4, activation="relu")(left), right])
    outputs = {"kind": keras.layers.Dense(3, activation="softmax")(both), "size": keras.layers.Dense(1)(both)}
    model = keras.Model({"right": right, "left": left}, outputs)
    losses = {"size": "mse", "kind": "sparse_categorical_crossentropy"}
    model.compile(
        optimizer, losses, metrics={"kind": ["accuracy"], "size": ["mae"]}, loss_weights={"kind": 1.0, "size": 0.3}
    )
    return model


def test_several_inputs_and_outputs_go_by_name() -> None:
    x, kinds = _rows()
    right, sizes = _rows(seed=9)[0][:, :2].copy(), _rows(seed=10)[0][:, 0].copy()
    model = _two_headed()
    driver = as_keras_model(model)
    columns = driver.expected_columns()
    assert [(column.name, column.shape, column.dtype) for column in columns] == [
        ("right", (2,), "float32"),
        ("left", (6,), "float32"),
        ("kind", (), "int64"),
        ("size", (), "float32"),
    ]
    trainer = _trainer(model)
    trainer.train((right, x, kinds, sizes), BATCH)
    expected_logs = dict.fromkeys(("loss", "kind_loss", "size_loss", "kind_accuracy", "size_mae"), 0.0)
    for start in range(0, ROWS, BATCH):
        rows = slice(start, start + BATCH)
        inputs, labels = {"left": x[rows], "right": right[rows]}, {"kind": kinds[rows], "size": sizes[rows]}
        logs = model.train_on_batch(inputs, labels, return_dict=True)
        for name, value in logs.items():
            expected_logs[name] += float(value) * len(x[rows]) / ROWS
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    assert driver.logs(trainer.take_totals()) == pytest.approx(expected_logs, rel=1e-5)
    predictions = trainer.predict((right, x), BATCH)
    expected_predictions = model.predict({"left": x, "right": right}, verbose=0)
    for got, name in zip(predictions, ("kind", "size"), strict=True):
        np.testing.assert_allclose(got, expected_predictions[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_as_in_keras(policy: str) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = _classifier(keras.optimizers.SGD(0.1))
    finally:
        keras.config.set_dtype_policy(before)
    x, y = _rows()
    trainer = _trainer(model)
    assert type(trainer._model.optimizer) is type(model.optimizer)
    trainer.train((x, y), BATCH)
    _train_in_keras(model, x, y)
    for got, expected in zip(_tensors(trainer), _expected(model), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-3)
    assert keras.config.dtype_policy() is before


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}], ids=["eager", "xla"])
def test_eager_and_xla_models_train_the_same(options: dict[str, Any]) -> None:
    x, y = _rows()
    trainer, plain = _trainer(_classifier("adam", **options)), _trainer(_classifier("adam"))
    assert (trainer._model.run_eagerly, trainer._model.jit_compile) == (
        options == {"run_eagerly": True},
        "jit_compile" in options,
    )
    got, expected = trainer.train((x, y), BATCH), plain.train((x, y), BATCH)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    for tensor, same in zip(_tensors(trainer), _tensors(plain), strict=True):
        np.testing.assert_allclose(tensor, same, rtol=1e-4, atol=1e-6)


def test_a_nan_loss_names_the_step() -> None:
    x, y = _rows()
    x[3 * BATCH + 1, 2] = np.nan
    trainer = _trainer(_classifier("sgd"))
    with pytest.raises(ModelError, match=r"local step 3 .*learning rate"):
        trainer.train((x, y), BATCH)


class Echo(keras.Model):  # type: ignore[misc]
    """Trains nothing, and keeps no metric of the loss that it returns."""

    def train_step(self, data: Any) -> dict[str, Any]:
        return {"loss": keras.ops.sum(data[0])}


def test_a_nan_loss_that_later_steps_do_not_share_names_its_step() -> None:
    x, y = _rows()
    x[3 * BATCH + 1, 2] = np.nan
    given = keras.Input((6,))
    model = Echo(given, keras.layers.Dense(1)(given))
    model.compile("sgd")
    with pytest.raises(ModelError, match=r"local step 3 "):
        _trainer(model, Structure(0, 1), (Column("x", (6,), "float32"), Column("y", (), "int64"))).train((x, y), BATCH)


def test_a_nan_loss_goes_on_where_it_may() -> None:
    x, y = _rows()
    x[5] = np.nan
    trainer = _trainer(_classifier("sgd"), nan_is_error=False)
    assert np.isnan(trainer.train((x, y), BATCH)[0])


def test_trained_weights_come_back_into_the_drivers_model() -> None:
    x, y = _rows()
    model = _classifier("sgd", keras.layers.BatchNormalization())
    driver = as_keras_model(model)
    trainer = _trainer(model)
    trainer.train((x, y), BATCH)
    out: Buffer = trainer.layout.allocate()
    trainer.read(out)
    assert not driver.difference(trainer.layout)
    driver.assign(trainer.layout, out)
    out[...] = 0
    np.testing.assert_allclose(trainer.predict((x,), BATCH)[0], model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)
    other = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    other.compile("sgd", "mse")
    assert "expected" in KerasDriverModel(other).difference(trainer.layout)


def test_specs_of_different_models_have_different_keys() -> None:
    def key(model: Any, **options: Any) -> str:
        driver = as_keras_model(model)
        return driver.capture(driver.expected_columns(), driver.structure(), **options).spec.key

    model = _classifier("sgd")
    assert key(model) == key(model)
    keys = {key(model), key(model, nan_is_error=False), key(_classifier("adam")), key(_classifier("sgd", metrics=[]))}
    assert len(keys) == 4


@pytest.mark.parametrize("scale", [1.0, 2.0, 8.0])
def test_a_rate_that_is_a_function_is_scaled_as_a_number_is(scale: float) -> None:
    x, y = _rows()
    weights = []
    for rate in (0.05, lambda: 0.05):
        trainer = _trainer(_classifier(keras.optimizers.SGD(rate)))
        told = {"max_learning_rate_scale": scale} | ({} if callable(rate) else {"learning_rate": 0.05})
        trainer.guide(0, num_workers=4, values=told)
        trainer.train((x, y), BATCH)
        weights.append(_tensors(trainer))
    model = _classifier(keras.optimizers.SGD(0.05 * min(scale, 4)))
    _train_in_keras(model, x, y)
    for by_number, by_function, expected in zip(*weights, _expected(model), strict=True):
        np.testing.assert_array_equal(by_number, by_function)
        np.testing.assert_allclose(by_number, expected, rtol=2e-5, atol=2e-6)
