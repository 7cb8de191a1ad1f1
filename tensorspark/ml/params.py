"""The Params of `KerasEstimator` and `KerasModel`, with their converters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasFeaturesCol,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasWeightCol,
)

from tensorspark.errors import ConfigError

TASKS = ("auto", "classification", "regression")


def _param(name: str, doc: str, converter: Any) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=converter)


def _optional(converter: Any) -> Any:
    return lambda value: None if value is None else converter(value)


def _count(name: str, doc: str) -> Param[Any]:
    def convert(value: Any) -> int:
        count = TypeConverters.toInt(value)
        if count < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        return count

    return _param(name, doc, convert)


def _to_staleness(value: Any) -> int:
    staleness = TypeConverters.toInt(value)
    if staleness < 0:
        raise ConfigError(f"staleness must be None, 0 or more, got {value!r}")
    return staleness


def _to_fraction(value: Any) -> float:
    fraction = TypeConverters.toFloat(value)
    if not 0 <= fraction < 1:
        raise ConfigError(f"validationFraction must be at least 0 and less than 1, got {value!r}")
    return fraction


def _to_task(value: Any) -> str:
    if value not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {value!r}")
    return str(value)


def _to_input_cols(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"inputCols must be a dict from the model's inputs to columns or lists of them, got {value!r}")
    return {
        TypeConverters.toString(name): TypeConverters.toString(columns)
        if isinstance(columns, str)
        else TypeConverters.toListString(columns)
        for name, columns in value.items()
    }


def _to_options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"sessionOptions must be a dict of arguments of tensorspark.SparkSession, got {value!r}")
    return dict(value)


def _to_model(value: Any) -> Any:
    if isinstance(value, type) or not callable(value):  # Keras models are callable
        raise TypeError(f"model must be a compiled keras.Model or a function that builds one, got {value!r}")
    return value


class KerasParams(HasFeaturesCol, HasPredictionCol, HasProbabilityCol, HasRawPredictionCol):
    """What estimator and model share: which columns go in and come out."""

    inputCols = _param("inputCols", "columns by the model's inputs, instead of featuresCol", _optional(_to_input_cols))
    task = _param(
        "task",
        "what the output means: classification, regression, or auto, which goes by the compiled loss",
        _to_task,
    )
    predictionBatchSize = _count("predictionBatchSize", "rows that transform computes at once")

    _input_kwargs: dict[str, Any]  # of pyspark's keyword_only

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(inputCols=None, task="auto", predictionBatchSize=256)

    def features(self) -> Any:
        """The columns as `SparkSession.fit` takes them."""
        return self.getInputCols() or self.getFeaturesCol()

    def getInputCols(self) -> dict[str, Any] | None:
        cols: dict[str, Any] | None = self.getOrDefault(self.inputCols)
        return cols

    def getTask(self) -> str:
        return str(self.getOrDefault(self.task))

    def getPredictionBatchSize(self) -> int:
        return int(self.getOrDefault(self.predictionBatchSize))

    def setFeaturesCol(self, value: str) -> Self:
        return self._set(featuresCol=value)

    def setInputCols(self, value: Mapping[str, Any] | None) -> Self:
        return self._set(inputCols=value)

    def setPredictionCol(self, value: str) -> Self:
        return self._set(predictionCol=value)

    def setProbabilityCol(self, value: str) -> Self:
        return self._set(probabilityCol=value)

    def setRawPredictionCol(self, value: str) -> Self:
        return self._set(rawPredictionCol=value)

    def setTask(self, value: str) -> Self:
        return self._set(task=value)

    def setPredictionBatchSize(self, value: int) -> Self:
        return self._set(predictionBatchSize=value)


class KerasTrainingParams(KerasParams, HasLabelCol, HasWeightCol, HasSeed):
    """What the estimator has more: how it trains."""

    model = _param("model", "the compiled Keras model, or a function that builds one", _optional(_to_model))
    batchSize = _count("batchSize", "rows of a local step")
    epochs = _count("epochs", "passes over the rows")
    syncInterval = _count("syncInterval", "local steps between two synchronizations")
    staleness = _param(
        "staleness", "synchronizations that a worker may lead by; None: any number", _optional(_to_staleness)
    )
    validationFraction = _param("validationFraction", "part of the rows that is held out", _to_fraction)
    shuffle = _param("shuffle", "whether each partition's rows are shuffled in every epoch", TypeConverters.toBoolean)
    scaleLearningRate = _param(
        "scaleLearningRate",
        "whether the learning rate is multiplied by the number of workers, as SparkSession.fit describes",
        TypeConverters.toBoolean,
    )
    callbacks = _param("callbacks", "Keras callbacks, called on the driver; not saved", _optional(list))
    sessionOptions = _param("sessionOptions", "more arguments of tensorspark.SparkSession", _to_options)
    progress = _param("progress", "whether training shows a line on stderr", TypeConverters.toBoolean)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(
            model=None,
            batchSize=32,
            epochs=1,
            syncInterval=16,
            staleness=0,
            validationFraction=0.0,
            seed=None,
            weightCol=None,
            shuffle=True,
            scaleLearningRate=True,
            callbacks=None,
            sessionOptions={},
            progress=True,
        )

    def getModel(self) -> Any:
        """The user's own model or function; training leaves it as it is."""
        return self.getOrDefault(self.model)

    def getBatchSize(self) -> int:
        return int(self.getOrDefault(self.batchSize))

    def getEpochs(self) -> int:
        return int(self.getOrDefault(self.epochs))

    def getSyncInterval(self) -> int:
        return int(self.getOrDefault(self.syncInterval))

    def getStaleness(self) -> int | None:
        staleness: int | None = self.getOrDefault(self.staleness)
        return staleness

    def getValidationFraction(self) -> float:
        return float(self.getOrDefault(self.validationFraction))

    def getShuffle(self) -> bool:
        return bool(self.getOrDefault(self.shuffle))

    def getScaleLearningRate(self) -> bool:
        return bool(self.getOrDefault(self.scaleLearningRate))

    def getCallbacks(self) -> list[Any] | None:
        callbacks: list[Any] | None = self.getOrDefault(self.callbacks)
        return callbacks

    def getSessionOptions(self) -> dict[str, Any]:
        return dict(self.getOrDefault(self.sessionOptions) or {})

    def getProgress(self) -> bool:
        return bool(self.getOrDefault(self.progress))

    def setModel(self, value: Any) -> Self:
        return self._set(model=value)

    def setLabelCol(self, value: str) -> Self:
        return self._set(labelCol=value)

    def setWeightCol(self, value: str | None) -> Self:
        return self._set(weightCol=value)

    def setSeed(self, value: int | None) -> Self:
        return self._set(seed=value)

    def setBatchSize(self, value: int) -> Self:
        return self._set(batchSize=value)

    def setEpochs(self, value: int) -> Self:
        return self._set(epochs=value)

    def setSyncInterval(self, value: int) -> Self:
        return self._set(syncInterval=value)

    def setStaleness(self, value: int | None) -> Self:
        return self._set(staleness=value)

    def setValidationFraction(self, value: float) -> Self:
        return self._set(validationFraction=value)

    def setShuffle(self, value: bool) -> Self:
        return self._set(shuffle=value)

    def setScaleLearningRate(self, value: bool) -> Self:
        return self._set(scaleLearningRate=value)

    def setCallbacks(self, value: list[Any] | None) -> Self:
        return self._set(callbacks=value)

    def setSessionOptions(self, value: Mapping[str, Any]) -> Self:
        return self._set(sessionOptions=value)

    def setProgress(self, value: bool) -> Self:
        return self._set(progress=value)
