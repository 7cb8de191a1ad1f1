"""Steps without Keras: what the workers' loop trains is what the step computes alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.function import FunctionTrainer, tf

COLUMNS = (Column("x", (3,), "float32"), Column("y", (), "float32"))
ROWS, BATCH, RATE, KEEP = 22, 4, 0.1, 0.9


def _build() -> Any:
    """A linear model with momentum, whose velocity begins at one."""
    w = tf.Variable([0.5, -1.0, 2.0], name="w")
    b = tf.Variable(0.25, name="b")
    velocity = tf.Variable([1.0, 1.0, 1.0], name="velocity", trainable=False)

    def step(x: Any, y: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.linalg.matvec(x, w) + b - y) ** 2)
        dw, db = tape.gradient(loss, [w, b])
        velocity.assign(KEEP * velocity - RATE * dw)
        w.assign_add(velocity)
        b.assign_sub(RATE * db)
        return {"size": tf.reduce_sum(tf.abs(w)), "loss": loss}

    return [w, b], tf.function(step), lambda x: tf.linalg.matvec(x, w) + b


def _rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.normal(size=(ROWS, 3)).astype(np.float32), random.normal(size=ROWS).astype(np.float32)


def _by_hand(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The same in numpy: weights, bias, and the loss summed over rows."""
    w, b, velocity, total = np.array([0.5, -1.0, 2.0]), 0.25, np.ones(3), 0.0
    for start in range(0, len(y), BATCH):
        rows, labels = x[start : start + BATCH].astype(float), y[start : start + BATCH]
        error = rows @ w + b - labels
        total += float((error**2).sum())
        velocity = KEEP * velocity - RATE * 2 * rows.T @ error / len(labels)
        w, b = w + velocity, b - RATE * 2 * float(error.mean())
    return w, b, total


def _worker(**options: Any) -> Any:
    captured = FunctionTrainer(_build).capture(COLUMNS, **options)
    worker = pickle.loads(pickle.dumps(captured.spec)).build(captured.content)
    worker.reset(0, 5)
    worker.load(captured.weights)
    return worker


def _weights(worker: Any) -> dict[str, np.ndarray]:
    out = worker.layout.allocate()
    worker.read(out)
    return {name: np.array(view) for name, view in worker.layout.views(out).items()}


def test_a_stretch_trains_as_the_step_does_by_hand() -> None:
    x, y = _rows()
    worker = _worker()
    sums = worker.train((x, y), BATCH)
    w, b, total = _by_hand(x, y)
    got = _weights(worker)
    np.testing.assert_allclose(got["w"], w, rtol=1e-4)
    np.testing.assert_allclose(got["b"], b, rtol=1e-4)
    assert worker.scalar_names == ("loss", "size")
    assert sums[0] == pytest.approx(total, rel=1e-4)


def test_reset_brings_back_what_build_made_besides() -> None:
    x, y = _rows()
    worker = _worker()
    first = worker.layout.allocate()
    worker.read(first)
    worker.train((x, y), BATCH)
    trained = _weights(worker)
    worker.reset(0, 5)
    worker.load(first)
    worker.train((x, y), BATCH)
    again = _weights(worker)
    worker.load(first)  # without a reset the velocity goes on
    worker.train((x, y), BATCH)
    assert not np.array_equal(_weights(worker)["w"], trained["w"])
    for name, value in trained.items():
        np.testing.assert_array_equal(again[name], value)


def test_loaded_weights_are_a_copy_and_predict() -> None:
    x, _ = _rows()
    worker = _worker()
    weights = worker.layout.allocate()
    views = worker.layout.views(weights)
    views["w"][...], views["b"][...] = [1.0, 2.0, 3.0], -0.5
    worker.load(weights)
    weights[...] = 255
    np.testing.assert_allclose(worker.predict((x,), BATCH)[0], x @ [1.0, 2.0, 3.0] - 0.5, rtol=1e-4, atol=1e-5)


def test_trained_weights_come_back_into_the_drivers_variables() -> None:
    trainer = FunctionTrainer(_build)
    layout = trainer.capture(COLUMNS).spec.layout
    assert not trainer.difference(layout)
    weights = layout.pack({"w": np.array([3.0, 4.0, 5.0], np.float32), "b": np.array(7.0, np.float32)})
    trainer.assign(layout, weights)
    weights[...] = 0
    assert [variable.numpy().tolist() for variable in trainer.variables] == [[3.0, 4.0, 5.0], 7.0]


def test_a_nan_loss_names_the_step_unless_it_may_go_on() -> None:
    x, y = _rows()
    x[2 * BATCH] = np.inf
    with pytest.raises(ModelError, match="loss became NaN or infinite at local step 2 "):
        _worker().train((x, y), BATCH)
    assert not np.isfinite(_worker(nan_is_error=False).train((x, y), BATCH)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("build", "takes a function"),
        (lambda: 3, "expected \\(variables, step\\)"),
        (lambda: ([], lambda x: x), "as its variables"),
        (lambda: ([tf.Variable("text")], lambda x, y: 0.0), "cannot be synchronized"),
        (lambda: ([tf.Variable(1.0)], lambda x: 0.0), "cannot take the columns x \\(float32"),
        (lambda: ([tf.Variable(1.0)], lambda x, y: x), "expected a scalar loss"),
        (lambda: ([tf.Variable(np.nan)], lambda x, y: 0.0), "holds NaN"),
    ],
    ids=["no function", "no pair", "no variables", "no numbers", "other columns", "no scalar", "not finite"],
)
def test_what_cannot_be_trained_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        FunctionTrainer(build).capture(COLUMNS)
