"""Trains TensorFlow models on Apache Spark: workers on the executors, a parameter server on the driver.

`SparkSession` is where to begin. Importing this package imports neither TensorFlow nor pyspark.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tensorspark import data
from tensorspark.history import History, Point, WorkerReport
from tensorspark.weights.averaging import MeanDeltaCombiner, StalenessScaledCombiner
from tensorspark.weights.combiners import (
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)
from tensorspark.weights.elastic import ElasticAveragingCombiner
from tensorspark.weights.server_optimizers import ServerAdagrad, ServerAdam, ServerSGD

if TYPE_CHECKING:
    from tensorspark.data.tfrecord.source.data_source import register_tfrecord
    from tensorspark.driver.inputs import DatasetContext
    from tensorspark.session import SparkSession
    from tensorspark.trainers.function import FunctionTrainer
    from tensorspark.trainers.tfrecord_dataset import tfrecord_dataset

__version__ = "2.0.0"

__all__ = [
    "DatasetContext",
    "DeltaWeightCombiner",
    "ElasticAveragingCombiner",
    "FunctionTrainer",
    "History",
    "MeanDeltaCombiner",
    "MeanWeightCombiner",
    "Point",
    "ServerAdagrad",
    "ServerAdam",
    "ServerSGD",
    "SparkSession",
    "StalenessScaledCombiner",
    "UpdateMeanWeightCombiner",
    "WeightCombiner",
    "WorkerReport",
    "__version__",
    "data",
    "register_tfrecord",
    "tfrecord_dataset",
]


# What needs TensorFlow, pyspark or an extra, by the module that it is in.
_LAZY = {
    "DatasetContext": "tensorspark.driver.inputs",
    "FunctionTrainer": "tensorspark.trainers.function",
    "SparkSession": "tensorspark.session",
    "register_tfrecord": "tensorspark.data.tfrecord.source.data_source",
    "tfrecord_dataset": "tensorspark.trainers.tfrecord_dataset",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
