"""Trains TensorFlow models on Apache Spark: workers on the executors, a parameter server on the driver.

`SparkSession` is where to begin. Importing this package imports neither TensorFlow nor pyspark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorspark.history import History, Point, WorkerReport
from tensorspark.weights.combiners import (
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)

if TYPE_CHECKING:
    from tensorspark.session import SparkSession

__version__ = "2.0.0"

__all__ = [
    "DeltaWeightCombiner",
    "History",
    "MeanWeightCombiner",
    "Point",
    "SparkSession",
    "UpdateMeanWeightCombiner",
    "WeightCombiner",
    "WorkerReport",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "SparkSession":
        from tensorspark.session import SparkSession

        return SparkSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
