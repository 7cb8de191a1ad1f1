"""What `SparkSession.fit` says of labels, losses and callbacks that do not fit, and what it makes of odd ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as SqlSession

from tensorspark import ServerAdam, SparkSession
from tensorspark.errors import ConfigError, ModelError, WorkerFailedError
from tensorspark.trainers.startup import importing

with importing():
    import keras

NUM_ROWS = 40
OPTIONS: dict[str, Any] = {"features": "x", "label": "y", "batch_size": 5, "epochs": 2, "shuffle": False}


def frame(spark: SqlSession, labels: Sequence[float], num_partitions: int = 2, first: float = 0.0) -> DataFrame:
    """Rows of two numbers and a label; the first of them is `first`."""
    x = np.random.default_rng(4).normal(size=(len(labels), 2))
    x[0, 0] = first
    rows = [(values.tolist(), label) for values, label in zip(x, labels, strict=True)]
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, num_partitions), "x array<double>, y double")


def network(num_units: int, loss: str, optimizer: Any = "sgd", metrics: Sequence[Any] = ()) -> keras.Model:
    keras.utils.set_random_seed(3)
    activation = "sigmoid" if loss == "binary_crossentropy" else "softmax" if num_units > 1 else None
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(num_units, activation=activation)])
    model.compile(optimizer, loss, metrics=list(metrics))
    return model


def fit(spark: SqlSession, model: keras.Model, df: DataFrame, **options: Any) -> dict[str, list[float]]:
    with SparkSession(spark, model, staleness=0, sync_interval=2) as session:
        return session.fit(df, progress=False, **{**OPTIONS, **options}).history


def test_a_label_that_is_no_class_is_named_with_partition_and_row(spark: SqlSession) -> None:
    labels = [float(index % 3) for index in range(NUM_ROWS)]
    labels[27] = 1.5
    message = r"partition 1, row 7: label y is 1\.5, but the model's output has 3 classes"
    with pytest.raises(WorkerFailedError, match=message):
        fit(spark, network(3, "sparse_categorical_crossentropy"), frame(spark, labels), shuffle=True)
    df = frame(spark, [0.0] * NUM_ROWS)
    with pytest.raises(WorkerFailedError, match=message.replace("row", "validation row")):
        fit(spark, network(3, "sparse_categorical_crossentropy"), df, validation_data=frame(spark, labels))
    with (
        pytest.raises(WorkerFailedError, match=message),
        SparkSession(spark, network(3, "sparse_categorical_crossentropy")) as session,
    ):
        session.evaluate(frame(spark, labels), features="x", label="y")


def test_binary_labels_are_no_other_numbers_than_0_and_1(spark: SqlSession) -> None:
    df = frame(spark, [1.0, 2.0] * (NUM_ROWS // 2))
    with pytest.raises(WorkerFailedError, match=r"partition \d, row 1: label y is 2.0, but the loss takes 0, 1"):
        fit(spark, network(1, "binary_crossentropy"), df)


def test_intervals_that_make_nan_are_left_out_where_nan_is_no_error(spark: SqlSession) -> None:
    df = frame(spark, [1.0] * NUM_ROWS, first=float("nan"))
    model = network(1, "mse", keras.optimizers.Adam(0.01))
    before = model.get_weights()
    history = fit(spark, model, df, nan_is_error=False, epochs=3)
    assert np.isnan(history["loss"]).all()
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    # Of partition 0's two intervals an epoch one is left out; the other and partition 1 go on.
    assert not np.array_equal(before[0], model.get_weights()[0])
    with pytest.raises(WorkerFailedError, match=r"partition 0 .* local step 0 of the interval .* after 0 steps of all"):
        fit(spark, network(1, "mse"), df)


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_averages_of_the_weights_become_the_weights_as_in_keras(spark: SqlSession, optimizer: Any) -> None:
    df = frame(spark, np.linspace(0, 1, NUM_ROWS).tolist(), num_partitions=1)
    options = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.9}
    model, alone = (network(1, "mse", optimizer(**options)) for _ in range(2))
    rows = df.collect()
    alone.fit(
        np.array([row.x for row in rows], np.float32),
        np.array([row.y for row in rows], np.float32),
        batch_size=OPTIONS["batch_size"],
        epochs=OPTIONS["epochs"],
        shuffle=False,
        verbose=0,
    )
    fit(spark, model, df)
    for got, expected in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_one_callback_needs_no_list(spark: SqlSession) -> None:
    seen: list[int] = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    fit(spark, network(1, "mse"), frame(spark, [1.0] * NUM_ROWS), callbacks=callback)
    assert seen == [0, 1]
    with pytest.raises(ModelError, match=r"callbacks must be keras.callbacks.Callback objects"):
        fit(spark, network(1, "mse"), frame(spark, [1.0] * NUM_ROWS), callbacks=print)


class Asserting(keras.metrics.Mean):  # type: ignore[misc]
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        import tensorflow as tf

        with tf.control_dependencies(
            [tf.debugging.assert_less(tf.reduce_max(y_pred), -1e9, message="an assertion of ours")]
        ):
            return super().update_state(y_pred)


def test_a_metric_that_fails_in_a_step_says_in_the_first_lines_what_and_why(spark: SqlSession) -> None:
    model = network(1, "mse", metrics=[Asserting(name="asserting")])
    with pytest.raises(WorkerFailedError) as info:
        fit(spark, model, frame(spark, [1.0] * NUM_ROWS))
    head = str(info.value).partition("Traceback")[0]
    assert "raised InvalidArgumentError: " in head
    assert "an assertion of ours" in head


def test_array_labels_reach_metrics_that_want_a_column(spark: SqlSession) -> None:
    """A loss of one unit takes numbers; `F1Score` wants arrays of one."""
    labels = [float(index % 2) for index in range(NUM_ROWS)]
    df = frame(spark, labels).selectExpr("x", "array(y) as y")
    model = network(1, "binary_crossentropy", metrics=[keras.metrics.F1Score(threshold=0.5)])
    assert fit(spark, model, df)["f1_score"][-1] > 0
    with SparkSession(spark, model) as session:
        scores = session.evaluate(df, features="x", label="y")
    rows = df.collect()
    expected = model.evaluate(np.array([row.x for row in rows]), np.array([row.y for row in rows]), verbose=0)
    assert [scores["loss"], scores["f1_score"]] == [pytest.approx(value, rel=1e-5) for value in expected[:2]]


def test_a_rule_that_cannot_be_kept_from_untrained_state_is_refused(spark: SqlSession) -> None:
    inputs = keras.Input((2,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float64")(hidden))
    model.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="ServerAdam cannot be kept from weights that are not trained"):
        fit(spark, model, frame(spark, [1.0] * NUM_ROWS), weight_combiner=ServerAdam(0.1))


def test_a_rule_of_the_servers_goes_with_averaged_slots(spark: SqlSession) -> None:
    model = network(1, "mse", optimizer=keras.optimizers.Adam(0.01))
    df = frame(spark, [1.0] * NUM_ROWS)
    losses = fit(spark, model, df, weight_combiner=ServerAdam(0.1), average_optimizer_state=True, epochs=6)["loss"]
    assert losses[-1] < losses[0] / 2
    assert int(model.optimizer.iterations.numpy()) == 6 * NUM_ROWS // 2 // OPTIONS["batch_size"]
