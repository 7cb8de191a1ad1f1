"""`KerasEstimator` trains copies of a model, alone and in Spark ML's pipelines and searches."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import StringIndexer, VectorAssembler
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder, TrainValidationSplit

from tensorspark.errors import ConfigError, FeedError, WorkerFailedError
from tensorspark.ml import KerasEstimator, KerasModel
from tensorspark.trainers.keras_files import clone
from tensorspark.trainers.keras_model import keras
from tests.ml.models import classifier, features, sequential, vectors

# Every Param that a constructor takes, with a value that is not its default.
PARAMS = {
    "featuresCol": "x",
    "inputCols": {"a": "b", "c": ["d", "e"]},
    "labelCol": "y",
    "predictionCol": "p",
    "probabilityCol": "q",
    "rawPredictionCol": "r",
    "batchSize": 7,
    "epochs": 3,
    "syncInterval": 5,
    "staleness": 2,
    "validationFraction": 0.25,
    "seed": 11,
    "weightCol": "w",
    "shuffle": False,
    "sessionOptions": {"tmp_dir": "/tmp"},
    "task": "regression",
    "predictionBatchSize": 64,
    "progress": False,
}


# A search of pyspark leaves its thread pool to the garbage collector.
leaves_a_pool = pytest.mark.filterwarnings("ignore:unclosed running multiprocessing pool:ResourceWarning")


def _labels(x: np.ndarray) -> np.ndarray:
    """A class that the first features tell."""
    return np.where(x[:, 0] > 0.4, 2, np.where(x[:, 1] > 0, 1, 0))


def _values(model: Any) -> list[np.ndarray]:
    return [np.array(weight) for weight in model.get_weights()]


def _equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", PARAMS)
def test_each_param_has_a_setter_and_a_getter(sc: Any, name: str) -> None:
    capital = name[0].upper() + name[1:]
    by_setter, by_constructor, by_params = KerasEstimator(), KerasEstimator(**{name: PARAMS[name]}), KerasEstimator()
    assert getattr(by_setter, f"set{capital}")(PARAMS[name]) is by_setter
    by_params.setParams(**{name: PARAMS[name]})
    for estimator in (by_setter, by_constructor, by_params):
        assert getattr(estimator, f"get{capital}")() == PARAMS[name]
    assert getattr(KerasEstimator(), f"get{capital}")() != PARAMS[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batchSize", 0),
        ("batchSize", "many"),
        ("staleness", -1),
        ("validationFraction", 1.0),
        ("task", "ranking"),
        ("inputCols", ["a"]),
        ("model", 3),
        ("sessionOptions", 3),
    ],
)
def test_a_param_that_cannot_work_is_refused_when_it_is_set(sc: Any, name: str, value: Any) -> None:
    with pytest.raises((ConfigError, TypeError), match=name if name != "batchSize" else None):
        KerasEstimator(**{name: value})


def test_staleness_of_none_is_asynchronous_and_survives_copies(sc: Any) -> None:
    estimator = KerasEstimator(staleness=None)
    assert estimator.getStaleness() is None
    copied = estimator.copy({estimator.epochs: 9})
    assert (copied.getStaleness(), copied.getEpochs(), estimator.getEpochs()) == (None, 9, 1)


def test_a_fit_trains_a_copy_and_tells_its_course(spark: Any) -> None:
    x = features(240)
    model = classifier(optimizer=keras.optimizers.Adam(0.05))
    before = _values(model)
    df = vectors(spark, x, _labels(x).astype(float).tolist())
    estimator = KerasEstimator(
        model=model, batchSize=10, epochs=6, syncInterval=2, validationFraction=0.2, seed=3, progress=False
    )
    fitted = estimator.fit(df)
    assert _equal(_values(model), before)
    assert fitted.uid == estimator.uid
    assert fitted.keras_model is not model
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= fitted.history.keys()
    assert len(fitted.history["val_loss"]) == 6
    rows = fitted.transform(df)
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(rows)
    assert accuracy == pytest.approx((fitted.keras_model.predict(x, verbose=0).argmax(axis=1) == _labels(x)).mean())
    assert accuracy > 0.85


def test_param_maps_and_fits_begin_at_the_models_weights(spark: Any) -> None:
    x = features(20)
    model = classifier(optimizer=keras.optimizers.SGD(0.0))
    estimator = KerasEstimator(model=model, progress=False)
    df = vectors(spark, x, _labels(x).tolist())
    fitted = estimator.fit(df, [{estimator.batchSize: 5}, {estimator.predictionCol: "p"}])
    assert [_equal(_values(f.keras_model), _values(model)) for f in fitted] == [True, True]
    assert [f.getPredictionCol() for f in fitted] == ["prediction", "p"]


def test_copies_of_a_model_that_is_not_built_or_built_by_a_function_begin_alike() -> None:
    def build() -> Any:
        model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        return model

    unbuilt = build()
    for source in (unbuilt, build):
        first, second, other = clone(source, 5), clone(source, 5), clone(source, 6)
        for model in (first, second, other):
            model.build((None, 4))
        assert _equal(_values(first), _values(second))
        assert not _equal(_values(first), _values(other))
    assert not unbuilt.built


def test_a_clone_has_an_optimizer_of_its_own_that_has_not_stepped() -> None:
    x = features()
    model = classifier(optimizer=keras.optimizers.Adam(0.03))
    model.fit(x, _labels(x), verbose=0)
    copy = clone(model, 0)
    assert _equal(_values(copy), _values(model))
    assert (int(model.optimizer.iterations), int(copy.optimizer.iterations)) == (1, 0)
    assert float(copy.optimizer.learning_rate) == pytest.approx(0.03)


@leaves_a_pool
@pytest.mark.slow
def test_a_cross_validated_pipeline_is_saved_and_loaded(spark: Any, tmp_path: Path) -> None:
    x = features(150)
    kinds = [("c", "a", "b")[label] for label in _labels(x)]
    df = spark.createDataFrame([(*row.tolist(), kind) for row, kind in zip(x, kinds, strict=True)], [*"wxyz", "kind"])
    estimator = KerasEstimator(
        model=classifier(optimizer=keras.optimizers.Adam(0.05)), batchSize=10, syncInterval=2, seed=3, progress=False
    )
    stages = [
        StringIndexer(inputCol="kind", outputCol="label"),
        VectorAssembler(inputCols=[*"wxyz"], outputCol="features"),
    ]
    search = CrossValidator(
        estimator=Pipeline(stages=[*stages, estimator]),
        estimatorParamMaps=ParamGridBuilder().addGrid(estimator.epochs, [1, 5]).build(),
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=2,
        parallelism=2,
        seed=1,
    ).fit(df)
    one, five = search.avgMetrics
    gc.collect()
    assert five > one
    best = search.bestModel
    assert len(best.stages[-1].history["loss"]) == 5
    best.write().overwrite().save(str(tmp_path / "pipeline"))
    search.save(str(tmp_path / "search"))
    expected = [row.probability for row in best.transform(df).collect()]
    for loaded in (PipelineModel.load(str(tmp_path / "pipeline")), CrossValidatorModel.load(str(tmp_path / "search"))):
        assert [row.probability for row in loaded.transform(df).collect()] == expected


@leaves_a_pool
def test_a_regression_with_row_weights_is_searched(spark: Any) -> None:
    x = features(80)
    y = x @ np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    model = sequential(keras.layers.Dense(1), loss="mse", optimizer=keras.optimizers.Adam(0.05))
    df = vectors(spark, x, y.tolist(), [1.0 + i % 2 for i in range(80)], names=("label", "weight"))
    estimator = KerasEstimator(model=model, weightCol="weight", batchSize=8, syncInterval=2, seed=3, progress=False)
    search = TrainValidationSplit(
        estimator=estimator,
        estimatorParamMaps=ParamGridBuilder().addGrid(estimator.epochs, [1, 6]).build(),
        evaluator=RegressionEvaluator(metricName="rmse"),
        seed=1,
    ).fit(df)
    one, six = search.validationMetrics
    gc.collect()
    assert six < one


def test_an_unfitted_pipeline_is_saved_and_loaded(spark: Any, tmp_path: Path, caplog: Any) -> None:
    model = classifier(optimizer=keras.optimizers.Adam(0.05))
    settings = {k: v for k, v in PARAMS.items() if k not in ("inputCols", "task")}
    estimator = KerasEstimator(model=model, callbacks=[keras.callbacks.EarlyStopping()], **settings)
    Pipeline(stages=[estimator]).save(str(tmp_path / "pipeline"))
    assert "callbacks" in caplog.text
    (loaded,) = Pipeline.load(str(tmp_path / "pipeline")).getStages()
    assert isinstance(loaded, KerasEstimator)
    assert loaded.uid == estimator.uid
    assert {name: loaded.getOrDefault(name) for name in settings} == settings
    assert loaded.getCallbacks() is None
    assert _equal(_values(loaded.getModel()), _values(model))
    assert float(loaded.getModel().optimizer.learning_rate) == pytest.approx(0.05)


def test_another_classs_file_is_not_loaded(spark: Any, tmp_path: Path) -> None:
    KerasEstimator(model=classifier()).save(str(tmp_path / "estimator"))
    with pytest.raises(ConfigError, match=r"holds a tensorspark\.ml\.estimator\.KerasEstimator"):
        KerasModel.load(str(tmp_path / "estimator"))


def test_string_labels_are_refused_naming_the_indexer(spark: Any) -> None:
    df = vectors(spark, features(4), ["a", "b", "a", "b"])
    with pytest.raises(FeedError, match="StringIndexer"):
        KerasEstimator(model=classifier()).fit(df)


def test_class_numbers_that_are_not_whole_are_named(spark: Any) -> None:
    df = vectors(spark, features(4), [0.0, 1.0, 1.5, 2.0])
    with pytest.raises(WorkerFailedError, match=r"label label: expected whole class numbers, got 1\.5"):
        KerasEstimator(model=classifier(), progress=False).fit(df)


def test_an_estimator_without_a_model_says_so(spark: Any) -> None:
    with pytest.raises(ConfigError, match="pass KerasEstimator"):
        KerasEstimator().fit(vectors(spark, features(4), [0, 1, 1, 2]))
