"""What a user may hand to `SparkSession`, told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorspark.errors import ConfigError

if TYPE_CHECKING:
    from tensorspark.trainers.fitting import KerasFit
    from tensorspark.trainers.function_fit import FunctionFit
    from tensorspark.trainers.graph_model import GraphModel


def open_model(model: Any, graph: Any, config: Any, num_threads: int) -> GraphModel | KerasFit | FunctionFit:
    """The driver's side of a TensorFlow 1 session, a compiled Keras model, a function that builds one, or a
    `FunctionTrainer`.

    Args:
        graph, config, num_threads: of sessions; see `SparkSession`.

    Raises:
        ConfigError: none of these.
        ModelError: a Keras model that is not compiled.
    """
    if callable(getattr(model, "run", None)) and hasattr(model, "graph"):
        if graph is not None and graph is not model.graph:
            raise ConfigError(
                "graph must be the session's own: a session runs no other; make a session with that graph"
            )
        from tensorspark.trainers.graph_model import GraphModel

        return GraphModel(model, config, num_threads)
    if graph is not None or config is not None:
        raise ConfigError(
            f"graph and config are for a tf.compat.v1.Session, got them with {type(model).__name__}: leave them out"
        )
    from tensorspark.trainers.function import FunctionTrainer

    if isinstance(model, FunctionTrainer):
        from tensorspark.trainers.function_fit import FunctionFit

        return FunctionFit(model)
    if not callable(model):  # Keras models are callable, as are functions that build one
        raise ConfigError(
            f"session must be a compiled keras.Model, a function that builds one, a FunctionTrainer or a "
            f"tf.compat.v1.Session, got {type(model).__name__}"
        )
    from tensorspark.trainers.fitting import KerasFit
    from tensorspark.trainers.keras_model import as_keras_model

    return KerasFit(as_keras_model(model))
