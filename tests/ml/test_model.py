"""`KerasModel` appends what Keras predicts, as Spark ML's evaluators and pipelines expect it."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    MulticlassClassificationEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.linalg import DenseVector
from pyspark.sql.types import ArrayType, DoubleType

from tensorspark.errors import ConfigError, FeedError, ModelError
from tensorspark.ml import KerasModel
from tensorspark.trainers.keras_files import meaning_of
from tensorspark.trainers.keras_model import Column, keras
from tests.ml.models import Registered, Scaled, classifier, doubled_error, features, sequential, vectors


def _column(df: Any, name: str) -> np.ndarray:
    values = [row[0] for row in df.select(name).collect()]
    return np.array([value.toArray() if isinstance(value, DenseVector) else value for value in values])


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def test_a_classifier_appends_raw_prediction_probability_and_class(spark: Any) -> None:
    x, model = features(), classifier()
    df = vectors(spark, x)
    rows = KerasModel(model=model).transform(df)
    assert rows.columns == ["features", "rawPrediction", "probability", "prediction"]
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(_column(rows, "probability"), expected, rtol=1e-5)
    np.testing.assert_array_equal(_column(rows, "rawPrediction"), _column(rows, "probability"))
    np.testing.assert_array_equal(_column(rows, "prediction"), expected.argmax(axis=1))


def test_logits_become_probabilities(spark: Any) -> None:
    x = features()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = sequential(keras.layers.Dense(3), loss=loss)
    rows = KerasModel(model=model).transform(vectors(spark, x))
    logits = model.predict(x, verbose=0)
    np.testing.assert_allclose(_column(rows, "rawPrediction"), logits, rtol=1e-5)
    np.testing.assert_allclose(_column(rows, "probability"), _softmax(logits), rtol=1e-5)


@pytest.mark.parametrize("is_logits", [False, True])
def test_one_unit_is_the_second_of_two_classes(spark: Any, is_logits: bool) -> None:
    x = features()
    loss = keras.losses.BinaryCrossentropy(from_logits=is_logits)
    model = sequential(keras.layers.Dense(1, activation=None if is_logits else "sigmoid"), loss=loss)
    rows = KerasModel(model=model, rawPredictionCol="").transform(vectors(spark, x))
    outputs = model.predict(x, verbose=0)[:, 0].astype(np.float64)
    second = 1 / (1 + np.exp(-outputs)) if is_logits else outputs
    assert rows.columns == ["features", "probability", "prediction"]
    np.testing.assert_allclose(_column(rows, "probability"), np.stack([1 - second, second], axis=1), rtol=1e-5)
    predictions = _column(rows, "prediction")
    np.testing.assert_array_equal(predictions, second > 0.5)
    assert set(predictions) == {0.0, 1.0}


@pytest.mark.parametrize("units", [1, 3])
def test_a_regression_predicts_a_double_or_an_array_of_them(spark: Any, units: int) -> None:
    x = features()
    model = sequential(keras.layers.Dense(units), loss="mse")
    rows = KerasModel(model=model, predictionCol="y").transform(vectors(spark, x))
    assert rows.columns == ["features", "y"]
    assert rows.schema["y"].dataType == (DoubleType() if units == 1 else ArrayType(DoubleType(), containsNull=False))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(_column(rows, "y"), expected[:, 0] if units == 1 else expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "units", "expected"),
    [
        ("sparse_categorical_crossentropy", 3, ("classification", False)),
        (keras.losses.CategoricalCrossentropy(from_logits=True), 3, ("classification", True)),
        (keras.losses.CategoricalFocalCrossentropy(), 3, ("classification", False)),
        (keras.losses.sparse_categorical_crossentropy, 3, ("classification", False)),
        ("crossentropy", 3, ("classification", False)),
        ("binary_crossentropy", 1, ("classification", False)),
        (keras.losses.BinaryFocalCrossentropy(from_logits=True), 1, ("classification", True)),
        ("binary_crossentropy", 3, ("regression", False)),
        ("mse", 1, ("regression", False)),
        (doubled_error, 3, ("regression", False)),
        (None, 3, ("regression", False)),
    ],
    ids=lambda value: str(getattr(value, "name", None) or getattr(value, "__name__", value)),
)
def test_the_loss_says_what_the_output_means(loss: Any, units: int, expected: tuple[str, bool]) -> None:
    model = sequential(keras.layers.Dense(units), loss=loss)
    meaning = meaning_of(model, Column("y", (units,), "float32"))
    assert (meaning.task, meaning.is_logits) == expected


def test_the_task_overrules_the_loss(spark: Any) -> None:
    x = features()
    model = sequential(keras.layers.Dense(3, activation="softmax"), loss=doubled_error)
    keras_model = KerasModel(model=model)
    assert keras_model.transform(vectors(spark, x)).columns == ["features", "prediction"]
    rows = keras_model.setTask("classification").transform(vectors(spark, x))
    np.testing.assert_array_equal(_column(rows, "prediction"), model.predict(x, verbose=0).argmax(axis=1))


def test_named_inputs_take_vectors_scalars_side_by_side_and_strings(spark: Any) -> None:
    lookup = keras.layers.StringLookup(vocabulary=["red", "green"])
    wide, pair = keras.Input((4,), name="wide"), keras.Input((2,), name="pair")
    colour = keras.Input((), name="colour", dtype="string")
    number = keras.layers.Reshape((1,))(keras.ops.cast(lookup(colour), "float32"))
    model = keras.Model([wide, pair, colour], keras.layers.Dense(1)(keras.layers.Concatenate()([wide, pair, number])))
    model.compile("sgd", "mse")
    x = features(6)
    colours = ["red", "green", "blue", "green", "red", "red"]
    df = vectors(spark, x, x[:, 0].tolist(), x[:, 1].tolist(), colours, names=("a", "b", "c"))
    keras_model = KerasModel(model=model, inputCols={"colour": "c", "wide": "features", "pair": ["b", "a"]})
    expected = model.predict([x, x[:, [1, 0]], np.array(colours, object)], verbose=0)
    np.testing.assert_allclose(_column(keras_model.transform(df), "prediction"), expected[:, 0], rtol=1e-5)


def test_a_subclassed_model_predicts_for_the_shapes_that_it_was_built_for(spark: Any) -> None:
    class Doubler(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return 2.0 * self.dense(x)

    x, model = features(), Doubler()
    model.compile("sgd", "mse")
    with pytest.raises(ModelError, match="call it once on a batch"):
        KerasModel(model=model).transform(vectors(spark, x))
    expected = model.predict(x, verbose=0)
    rows = KerasModel(model=model).transform(vectors(spark, x))
    np.testing.assert_allclose(_column(rows, "prediction"), expected, rtol=1e-5)


def test_transform_leaves_the_model_as_it_is(spark: Any) -> None:
    model = classifier(optimizer="adam")
    optimizer, weights = model.optimizer, [weight.copy() for weight in model.get_weights()]
    KerasModel(model=model).transform(vectors(spark, features()))
    assert model.optimizer is optimizer
    assert model.loss == "sparse_categorical_crossentropy"
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)


def test_several_outputs_are_refused(spark: Any) -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(2)(inputs)])
    model.compile("sgd", ["mse", "mse"])
    with pytest.raises(ConfigError, match="2 outputs"):
        KerasModel(model=model).transform(vectors(spark, features()))


def test_a_missing_column_is_named_with_a_near_one(spark: Any) -> None:
    with pytest.raises(FeedError, match="no column 'feature': did you mean 'features'"):
        KerasModel(model=classifier(), featuresCol="feature").transform(vectors(spark, features()))


def test_sparks_evaluators_take_the_columns(spark: Any) -> None:
    x = features()
    labels = np.random.default_rng(4).integers(0, 3, len(x))
    model = classifier()
    rows = KerasModel(model=model).transform(vectors(spark, x, labels.astype(float).tolist()))
    probability = model.predict(x, verbose=0)
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(rows)
    assert accuracy == pytest.approx((probability.argmax(axis=1) == labels).mean())
    log_loss = MulticlassClassificationEvaluator(metricName="logLoss").evaluate(rows)
    assert log_loss == pytest.approx(-np.log(probability[np.arange(len(x)), labels]).mean(), rel=1e-5)


def test_sparks_binary_and_regression_evaluators_take_the_columns(spark: Any) -> None:
    x = features()
    model = sequential(keras.layers.Dense(1, activation="sigmoid"), loss="binary_crossentropy")
    outputs = model.predict(x, verbose=0)[:, 0]
    labels = (outputs + np.random.default_rng(4).normal(size=len(x)) > 0.5).astype(float)
    df = vectors(spark, x, labels.tolist())
    rows = KerasModel(model=model).transform(df)
    pairs = outputs[labels == 1][:, None] > outputs[labels == 0][None]
    assert BinaryClassificationEvaluator().evaluate(rows) == pytest.approx(pairs.mean(), abs=1e-6)
    numbers = KerasModel(model=model, task="regression").transform(df)
    expected = np.sqrt(((outputs - labels) ** 2).mean())
    assert RegressionEvaluator(metricName="rmse").evaluate(numbers) == pytest.approx(expected, rel=1e-5)


def test_a_streaming_dataframe_is_transformed(spark: Any, tmp_path: Path) -> None:
    x, model = features(), classifier()
    rows = spark.createDataFrame([(i, row.tolist()) for i, row in enumerate(x)], "id int, features array<float>")
    rows.repartition(2).write.parquet(str(tmp_path / "rows"))
    stream = spark.readStream.schema(rows.schema).parquet(str(tmp_path / "rows"))
    predictions = KerasModel(model=model).transform(stream)
    assert predictions.isStreaming
    query = predictions.writeStream.format("memory").queryName("predicted").trigger(availableNow=True).start()
    try:
        assert query.awaitTermination(120)
    finally:
        query.stop()
    got = spark.table("predicted").orderBy("id")
    np.testing.assert_allclose(_column(got, "probability"), model.predict(x, verbose=0), rtol=1e-5)


# Saving ---------------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_with_params_history_and_weights(spark: Any, tmp_path: Path) -> None:
    x, model = features(), classifier(optimizer="adam")
    saved = KerasModel(model=model, history={"loss": [2.0, 1.5]}, predictionCol="class", task="classification")
    saved.save(str(tmp_path / "model"))
    loaded = KerasModel.load(f"file://{tmp_path}/model")
    assert loaded.uid == saved.uid
    assert loaded.history == {"loss": [2.0, 1.5]}
    assert (loaded.getPredictionCol(), loaded.getTask(), loaded.getFeaturesCol()) == (
        "class",
        "classification",
        "features",
    )
    rows = loaded.transform(vectors(spark, x))
    np.testing.assert_allclose(_column(rows, "probability"), model.predict(x, verbose=0), rtol=1e-5)


def test_a_path_that_exists_is_overwritten_only_when_asked(spark: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    KerasModel(model=classifier()).save(path)
    other = KerasModel(model=sequential(keras.layers.Dense(1), loss="mse"))
    with pytest.raises(ConfigError, match="overwrite"):
        other.save(path)
    assert KerasModel.load(path).keras_model.output_shape == (None, 3)
    other.write().overwrite().save(path)
    assert KerasModel.load(path).keras_model.output_shape == (None, 1)


def test_custom_classes_come_from_their_modules(spark: Any, tmp_path: Path) -> None:
    x = features()
    model = sequential(Registered(), Scaled(0.25), keras.layers.Dense(1), loss=doubled_error)
    KerasModel(model=model).save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"))
    assert isinstance(loaded.keras_model.layers[-2], Scaled)
    np.testing.assert_allclose(loaded.keras_model.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


def test_a_custom_class_that_is_nowhere_is_named(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KerasModel(model=sequential(Scaled(0.25), loss="mse")).save(str(tmp_path / "model"))
    monkeypatch.delattr("tests.ml.models.Scaled")
    with pytest.raises(ModelError, match=r"Not found here: tests\.ml\.models\.Scaled"):
        KerasModel.load(str(tmp_path / "model"))


@pytest.mark.hdfs
def test_a_model_is_saved_on_hdfs(spark: Any, hdfs: Any) -> None:
    hdfs.make_directory("/keras-models", owner=getpass.getuser())
    url = f"{hdfs.url}/keras-models/digits"
    model = classifier()
    KerasModel(model=model).save(url)
    KerasModel(model=model).write().overwrite().save(url)
    for now, before in zip(KerasModel.load(url).keras_model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, before)
