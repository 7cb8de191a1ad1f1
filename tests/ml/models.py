"""Small models and rows for them; one custom layer and loss, which a program would define."""

from __future__ import annotations

from typing import Any

import numpy as np
from pyspark.ml.linalg import Vectors

from tensorspark.trainers.keras_model import keras

WIDTH = 4


@keras.saving.register_keras_serializable("tests_ml")
class Registered(keras.layers.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x * 2.0


class Scaled(keras.layers.Layer):  # type: ignore[misc]
    """Known to Keras by nothing but its module."""

    def __init__(self, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x: Any) -> Any:
        return x * self.factor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}


def doubled_error(y_true: Any, y_pred: Any) -> Any:
    return 2.0 * keras.losses.mean_squared_error(y_true, y_pred)


def sequential(*layers: Any, loss: Any, optimizer: Any = "sgd", seed: int = 5, **options: Any) -> Any:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(6, activation="tanh"), *layers])
    model.compile(optimizer, loss, **options)
    return model


def classifier(**options: Any) -> Any:
    settings = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]} | options
    return sequential(keras.layers.Dense(3, activation="softmax"), **settings)


def features(num_rows: int = 24, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, WIDTH)).astype(np.float32)


def vectors(spark: Any, x: np.ndarray, *labels: Any, names: tuple[str, ...] = ("label",)) -> Any:
    """A DataFrame of an ML vector, `features`, and more columns."""
    rows = [(Vectors.dense(row.tolist()), *values) for row, *values in zip(x, *labels, strict=True)]
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), ["features", *names[: len(labels)]])
