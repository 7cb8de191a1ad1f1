"""A Keras model's graph, for who wants to look at it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tensorspark.data.columns import Column
from tensorspark.trainers.keras import Structure

logger = logging.getLogger(__name__)


def graph_def(model: Any, columns: Sequence[Column], structure: Structure) -> bytes | None:
    """The serialized GraphDef of the model's call, with a batch of any size; None for a model that cannot be traced.

    Args:
        columns: what the model is fed, of which `structure` says what is an input.
    """
    specs = [tf.TensorSpec(None if column.shape is None else (None, *column.shape), column.dtype) for column in columns]
    try:
        inputs = structure.data(specs)[0]
        traced = tf.function(lambda x: model(x, training=False)).get_concrete_function(inputs)
        content: bytes = traced.graph.as_graph_def().SerializeToString()
    except Exception as error:  # the user's own code, which is not made for it
        logger.info("the model's graph is not in the log: %s: %s", type(error).__name__, error)
        return None
    return content
