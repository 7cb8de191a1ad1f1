"""The model that Keras trains on digits in all of these benchmarks: 784-128-10.

Keras is imported where a model is made; elephas's environment has it without tensorspark.
"""

from __future__ import annotations

from typing import Any

NUM_PIXELS, NUM_HIDDEN, NUM_CLASSES = 784, 128, 10
NUM_WEIGHTS = NUM_PIXELS * NUM_HIDDEN + NUM_HIDDEN + NUM_HIDDEN * NUM_CLASSES + NUM_CLASSES
MODEL_BYTES = 4 * NUM_WEIGHTS
"""Of the weights, float32."""
SGD_LEARNING_RATE = 0.1


def make_model(seed: int = 1) -> Any:
    """Compiled as the documentation's first example has it, with Adam."""
    import keras

    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((NUM_PIXELS,), name="image"),
            keras.layers.Dense(NUM_HIDDEN, "relu"),
            keras.layers.Dense(NUM_CLASSES, "softmax"),
        ]
    )
    return _compiled(model, "adam")


def make_sgd_model(seed: int) -> Any:
    """With plain SGD, whose steps elephas and ours take alike."""
    import keras

    return _compiled(make_model(seed), keras.optimizers.SGD(SGD_LEARNING_RATE))


def exchanged_bytes(num_pushes: int, model_bytes: int = MODEL_BYTES) -> int:
    """What workers and server exchange: all weights with each push, and with the pull before it."""
    return 2 * num_pushes * model_bytes


def _compiled(model: Any, optimizer: Any) -> Any:
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
