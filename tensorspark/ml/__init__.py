"""Keras models as stages of Spark ML pipelines: `KerasEstimator` and `KerasModel`."""

from tensorspark.ml.estimator import KerasEstimator
from tensorspark.ml.model import KerasModel

__all__ = ["KerasEstimator", "KerasModel"]
