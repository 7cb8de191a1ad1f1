"""A model's outputs as Spark ML has them: prediction, probability and raw prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.ml.linalg import VectorUDT
from pyspark.sql.types import ArrayType, DataType, DoubleType, StructField

from tensorspark.driver.prediction_schema import numbers


@dataclass(frozen=True)
class ClassColumns:
    """Columns of a classifier; one whose name is empty is left out.

    The raw prediction is what the model makes, the probability is the same or, of logits, their softmax or sigmoid, and
    the prediction is the most likely class. One unit stands for the second of two classes: predicted if p > 0.5.
    """

    raw: str
    probability: str
    prediction: str
    is_logits: bool

    @property
    def fields(self) -> tuple[StructField, ...]:
        types = [(self.raw, VectorUDT()), (self.probability, VectorUDT()), (self.prediction, DoubleType())]
        return tuple(StructField(name, data_type) for name, data_type in types if name)

    def arrays(self, outputs: tuple[NDArray[Any], ...]) -> list[pa.Array]:
        scores = np.asarray(outputs[0], np.float64)
        raw, probability, prediction = _classified(scores.reshape(len(scores), -1), self.is_logits)
        made = [(self.raw, raw), (self.probability, probability), (self.prediction, prediction)]
        return [numbers(values) for name, values in made if name]


@dataclass(frozen=True)
class NumberColumns:
    """The column of a regression: a double, or an array of them where the output has several.

    Attributes:
        shape: of a row's output.
    """

    prediction: str
    shape: tuple[int | None, ...]

    @property
    def fields(self) -> tuple[StructField, ...]:
        data_type: DataType = DoubleType()
        for _ in () if self._is_scalar else self.shape:
            data_type = ArrayType(data_type, containsNull=False)
        return (StructField(self.prediction, data_type),) if self.prediction else ()

    def arrays(self, outputs: tuple[NDArray[Any], ...]) -> list[pa.Array]:
        values = np.asarray(outputs[0], np.float64)
        return [numbers(values.reshape(-1) if self._is_scalar else values)] if self.prediction else []

    @property
    def _is_scalar(self) -> bool:
        return self.shape in ((), (1,))


def _classified(scores: NDArray[np.float64], is_logits: bool) -> tuple[NDArray[np.float64], ...]:
    """Raw predictions and probabilities, `[rows, classes]`, and predictions, `[rows]`.

    Args:
        scores: `[rows, units]`; one unit stands for the second of two classes.
    """
    if scores.shape[1] == 1 and is_logits:
        raw = np.hstack([-scores, scores])
        with np.errstate(over="ignore"):
            second = 1 / (1 + np.exp(-scores))
        return raw, np.hstack([1 - second, second]), (scores[:, 0] > 0).astype(np.float64)
    if scores.shape[1] == 1:
        probability = np.hstack([1 - scores, scores])
        return probability, probability, (scores[:, 0] > 0.5).astype(np.float64)
    prediction = scores.argmax(axis=1).astype(np.float64)
    if not is_logits:
        return scores, scores, prediction
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores, exponentials / exponentials.sum(axis=1, keepdims=True), prediction
