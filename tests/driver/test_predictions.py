"""Predictions on Spark are what Keras predicts in this process, in the columns that were announced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from pyspark.errors import PySparkException
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import SparkSession
from pyspark.sql import functions as sql
from pyspark.sql.types import (
    ArrayType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
)

from tensorspark.data.columns import Column
from tensorspark.driver.prediction_schema import OutputColumns, numbers
from tensorspark.driver.predictions import predicted
from tensorspark.errors import ConfigError, FeedError, ModelError
from tensorspark.trainers.keras_files import for_predictions, output_columns
from tensorspark.trainers.keras_model import as_keras_model, keras
from tests.driver.models import ROWS, WIDTH, make_data, make_model


def _frame(spark: SparkSession, x: np.ndarray, num_partitions: int = 3) -> Any:
    """Rows in order, in types that must come through as they are."""
    schema = StructType(
        [
            StructField("id", IntegerType(), nullable=False),
            StructField("name", StringType()),
            StructField("x", ArrayType(FloatType())),
            StructField("vector", VectorUDT()),
        ]
    )
    rows = [(i, f"row {i}" if i % 3 else None, row.tolist(), Vectors.dense(row.tolist())) for i, row in enumerate(x)]
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, num_partitions), schema)


def _predicted(df: Any, model: Any, outputs: tuple[str, ...] = ("p",), source: str = "x", batch_size: int = 8) -> Any:
    driver_model = as_keras_model(for_predictions(model))
    structure, columns = driver_model.structure(num_labels=0), driver_model.expected_columns(labels=[])
    made = output_columns(model, columns, structure)
    named = [Column(name, column.shape, column.dtype) for name, column in zip(outputs, made, strict=True)]
    captured = driver_model.capture(columns, structure)
    return predicted(df, captured, columns, [(source,)], OutputColumns(tuple(named)), batch_size)


def test_predictions_are_keras_predictions_and_the_rows_are_untouched(spark: SparkSession) -> None:
    x, _ = make_data()
    model, df = make_model(), _frame(spark, x)
    predictions = _predicted(df, model)
    rows = predictions.collect()
    assert [row[:4] for row in rows] == [tuple(row) for row in df.collect()]
    np.testing.assert_allclose([row.p for row in rows], model.predict(x, verbose=0), rtol=1e-5)


def test_the_schema_is_the_announced_one_before_and_after(spark: SparkSession) -> None:
    x, _ = make_data()
    df = _frame(spark, x)
    predictions = _predicted(df, make_model(), source="vector")
    expected = [*df.schema.fields, StructField("p", ArrayType(FloatType(), containsNull=False))]
    assert predictions.schema == StructType(expected)
    arrow = predictions.toArrow().schema
    assert [(f.name, f.nullable) for f in arrow] == [(f.name, f.nullable) for f in expected]


def test_partitions_without_rows_and_batches_of_one_row_predict(spark: SparkSession) -> None:
    x, _ = make_data()
    model = make_model()
    df = _frame(spark, x[:2], num_partitions=5)
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "1")
    try:
        rows = _predicted(df, model).collect()
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    np.testing.assert_allclose([row.p for row in rows], model.predict(x[:2], verbose=0), rtol=1e-5)
    assert _predicted(df.filter("id < 0"), model).collect() == []


def test_wide_rows_are_predicted_in_parts(spark: SparkSession) -> None:
    width = 2**20
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    df = spark.range(0, 9, 1, 1).selectExpr("id", f"array_repeat(cast(id as float) / {width}, {width}) as x")
    x = np.repeat(np.arange(9, dtype=np.float32)[:, None] / width, width, axis=1)
    rows = _predicted(df, model).drop("x").collect()
    np.testing.assert_allclose([row.p for row in rows], model.predict(x, verbose=0), rtol=1e-4)


def test_several_outputs_of_every_rank_become_columns(spark: SparkSession) -> None:
    inputs = keras.Input((WIDTH,))
    score = keras.layers.Dense(1, dtype="float64", name="score")(inputs)
    grid = keras.layers.Reshape((2, 3))(keras.layers.Dense(6)(inputs))
    index = keras.ops.argmax(grid, axis=(-1))
    model = keras.Model(inputs, [score, grid, index])
    model.compile("sgd", ["mse", "mse", None])
    x, _ = make_data()
    predictions = _predicted(_frame(spark, x), model, ("score", "grid", "index"))
    nested = ArrayType(ArrayType(FloatType(), containsNull=False), containsNull=False)
    types = {field.name: field.dataType for field in predictions.schema.fields[4:]}
    assert types["score"] == DoubleType()
    assert types["grid"] == nested
    assert types["index"] in (ArrayType(IntegerType(), containsNull=False), ArrayType(LongType(), containsNull=False))
    rows = predictions.collect()
    for name, expected in zip(("score", "grid", "index"), model.predict(x, verbose=0), strict=True):
        values = np.array([row[name] for row in rows])
        np.testing.assert_allclose(values, expected[:, 0] if name == "score" else expected, rtol=1e-5)


def test_a_dataframe_keeps_the_weights_it_was_made_with(spark: SparkSession) -> None:
    x, _ = make_data()
    model, df = make_model(), _frame(spark, x)
    before = _predicted(df, model)
    first = model.predict(x, verbose=0)
    model.set_weights([weight * -2.0 for weight in model.get_weights()])
    after = _predicted(df, model)
    second = model.predict(x, verbose=0)
    assert np.abs(first - second).max() > 0.1
    for frame, expected in ((before, first), (after, second), (before, first)):  # in the same Python workers, in turn
        np.testing.assert_allclose([row.p for row in frame.collect()], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["name", "NAME"])
def test_a_column_that_is_there_already_is_refused(spark: SparkSession, name: str) -> None:
    x, _ = make_data()
    with pytest.raises(ConfigError, match=f"has a column '{name}' already"):
        _predicted(_frame(spark, x), make_model(), (name,))


def test_columns_that_share_a_name_are_refused(spark: SparkSession) -> None:
    x, _ = make_data()
    df = _frame(spark, x)
    with pytest.raises(ConfigError, match="2 columns 'id'"):
        _predicted(df.select("id", "id", "x"), make_model())


def test_a_missing_or_unfit_column_fails_before_a_task(spark: SparkSession) -> None:
    x, _ = make_data()
    with pytest.raises(FeedError, match="no column 'vectr': did you mean 'vector'"):
        _predicted(_frame(spark, x), make_model(), source="vectr")
    with pytest.raises(FeedError, match="column 'name'"):
        _predicted(_frame(spark, x), make_model(), source="name")


def test_a_row_that_does_not_fit_is_named(spark: SparkSession) -> None:
    x, _ = make_data()
    rows = [(row.tolist()[: WIDTH - (i == 7)],) for i, row in enumerate(x[:10])]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), "x array<float>")
    with pytest.raises(PySparkException, match=r"partition 1, row 2.*length 3 instead of 4"):
        _predicted(df, make_model()).collect()


def test_an_output_without_a_spark_type_is_refused() -> None:
    with pytest.raises(ModelError, match="output 'p' of the model is complex64"):
        OutputColumns((Column("p", (2,), "complex64"),))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bool", "uint8", "uint32", "int64"])
def test_arrays_reach_arrow_with_their_values(dtype: str) -> None:
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    assert numbers(values).to_pylist() == values.tolist()
    assert numbers(values[::2]).to_pylist() == values[::2].tolist()
    assert numbers(values[:0]).to_pylist() == []


def test_numbers_share_the_memory_of_the_array() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert numbers(values).flatten().buffers()[1].address == values.ctypes.data


def test_strings_reach_arrow_as_text() -> None:
    assert numbers(np.array([b"caf\xc3\xa9", "b"], object)).to_pylist() == ["café", "b"]


def test_predictions_are_computed_once_however_often_they_are_used(spark: SparkSession) -> None:
    x, _ = make_data()
    model = make_model()
    predictions = _predicted(_frame(spark, x), model)
    likely = predictions.filter("p[0] > 0.2 and p[1] > 0").selectExpr("p[0] + p[1] as q", "p").filter("q > 0.1")
    plan = likely._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 1
    expected = [row for row in model.predict(x, verbose=0) if row[0] > 0.2 and row[1] > 0 and row[0] + row[1] > 0.1]
    np.testing.assert_allclose([row.p for row in likely.collect()], expected, rtol=1e-5)


def test_predictions_that_nobody_uses_are_not_computed(spark: SparkSession) -> None:
    x, _ = make_data()
    predictions = _predicted(_frame(spark, x), make_model()).select("id")
    assert "ArrowEvalPython" not in predictions._jdf.queryExecution().executedPlan().toString()
    assert predictions.count() == ROWS


def test_other_columns_may_be_of_types_that_arrow_cannot_carry(spark: SparkSession) -> None:
    x, _ = make_data()
    model = make_model()
    df = _frame(spark, x).withColumn("odd.`name`", sql.expr("make_ym_interval(1, id)"))
    predictions = _predicted(df, model)
    assert predictions.columns == [*df.columns, "p"]
    np.testing.assert_allclose(
        [row.p for row in predictions.select("p").collect()], model.predict(x, verbose=0), rtol=1e-5
    )
    with pytest.raises(ConfigError, match="column 'id' cannot go through Arrow"):
        _predicted(df.withColumn("id", sql.expr("make_ym_interval(1, id)")), model, source="id")


@pytest.mark.parametrize("name", ["x.y", "a `b`", "sum(x)"])
def test_columns_of_any_name_are_read(spark: SparkSession, name: str) -> None:
    x, _ = make_data()
    model = make_model()
    predictions = _predicted(_frame(spark, x).withColumnRenamed("x", name), model, source=name)
    np.testing.assert_allclose([row.p for row in predictions.collect()], model.predict(x, verbose=0), rtol=1e-5)
