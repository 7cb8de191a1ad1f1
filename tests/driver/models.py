"""The classifier and the rows that predictions and evaluation are tried with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorspark.trainers.keras_model import keras

ROWS, WIDTH = 43, 4


def make_model(units: int = 3, seed: int = 5) -> Any:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(units, activation="softmax")]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def make_data(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(ROWS, WIDTH)).astype(np.float32), random.integers(0, 3, ROWS)
