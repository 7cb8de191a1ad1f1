"""Trains TensorFlow models on Apache Spark: workers on the executors, a parameter server on the driver.

`SparkSession` is where to begin. Importing this package imports neither TensorFlow nor pyspark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    from tensorspark.driver.inputs import DatasetContext
    from tensorspark.session import SparkSession
    from tensorspark.trainers.function import FunctionTrainer

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
]


def __getattr__(name: str) -> Any:
    if name == "SparkSession":
        from tensorspark.session import SparkSession

        return SparkSession
    if name == "FunctionTrainer":
        from tensorspark.trainers.function import FunctionTrainer

        return FunctionTrainer
    if name == "DatasetContext":
        from tensorspark.driver.inputs import DatasetContext

        return DatasetContext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
