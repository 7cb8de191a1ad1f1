"""`KerasEstimator`: trains a Keras model in Spark ML pipelines."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pyspark import keyword_only
from pyspark.ml import Estimator
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf
from pyspark.sql.types import FractionalType, StringType

from tensorspark.errors import ConfigError, FeedError
from tensorspark.ml.model import KerasModel
from tensorspark.ml.params import KerasTrainingParams
from tensorspark.ml.persistence import KerasReader, KerasWriter
from tensorspark.session import SparkSession

logger = logging.getLogger(__name__)

# Two runs at once, as a parallel CrossValidator starts them, would wait for each other's slots.
_training = threading.Lock()


class KerasEstimator(Estimator[KerasModel], KerasTrainingParams, MLWritable, MLReadable["KerasEstimator"]):
    """Trains a compiled Keras model on a DataFrame, with `tensorspark.SparkSession.fit`.

    Each `fit` trains a copy: the model that was passed stays as it is, and all folds and Param maps of a CrossValidator
    start from its weights (of a model that is not built yet, from weights that `seed`, or else the estimator's uid,
    determine). Fits take turns, also from several threads.

    Args:
        model: a compiled `keras.Model`, or a function without arguments that builds and compiles one.
        featuresCol: a vector, array, number or string column, for the model's one input.
        inputCols: for several inputs, instead: a column, or a list of number columns, for each input's name.
        labelCol: numbers; strings go through a StringIndexer first.
        predictionCol, probabilityCol, rawPredictionCol, task, predictionBatchSize: see `KerasModel`.
        batchSize, epochs, syncInterval, staleness, shuffle, scaleLearningRate, seed, callbacks, progress: see
            `SparkSession.fit`.
        validationFraction: part of each partition that is held out and evaluated at the end of each epoch.
        weightCol: weights of the rows.
        sessionOptions: more arguments of `SparkSession`, such as ``{"hdfs_dir": "hdfs:///staging"}``.

    ::

        estimator = KerasEstimator(model=model, featuresCol="features", labelCol="label", epochs=3)
        fitted = Pipeline(stages=[StringIndexer(inputCol="kind", outputCol="label"), assembler, estimator]).fit(df)
        fitted.transform(df).select("prediction", "probability")
    """

    @keyword_only
    def __init__(
        self,
        *,
        model: Any = None,
        featuresCol: str = "features",
        inputCols: Mapping[str, Any] | None = None,
        labelCol: str = "label",
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        batchSize: int = 32,
        epochs: int = 1,
        syncInterval: int = 16,
        staleness: int | None = 0,
        validationFraction: float = 0.0,
        seed: int | None = None,
        weightCol: str | None = None,
        shuffle: bool = True,
        scaleLearningRate: bool = True,
        callbacks: Sequence[Any] | None = None,
        sessionOptions: Mapping[str, Any] | None = None,
        task: str = "auto",
        predictionBatchSize: int = 256,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self._set(**self._input_kwargs)

    @keyword_only
    def setParams(
        self,
        *,
        model: Any = None,
        featuresCol: str = "features",
        inputCols: Mapping[str, Any] | None = None,
        labelCol: str = "label",
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        batchSize: int = 32,
        epochs: int = 1,
        syncInterval: int = 16,
        staleness: int | None = 0,
        validationFraction: float = 0.0,
        seed: int | None = None,
        weightCol: str | None = None,
        shuffle: bool = True,
        scaleLearningRate: bool = True,
        callbacks: Sequence[Any] | None = None,
        sessionOptions: Mapping[str, Any] | None = None,
        task: str = "auto",
        predictionBatchSize: int = 256,
        progress: bool = True,
    ) -> Self:
        """Sets the Params that are given; see the class."""
        return self._set(**self._input_kwargs)

    def write(self) -> KerasWriter:
        """Saves Params and model, but no callbacks; instead of a function that builds a model, what it builds."""
        from tensorspark.trainers.keras_files import clone, to_keras_bytes

        if self.getCallbacks():
            logger.warning("callbacks of %s are not saved: set them again after loading it", self.uid)
        return KerasWriter(
            self, lambda: to_keras_bytes(clone(self._required(), self._model_seed())), {}, ("model", "callbacks")
        )

    @classmethod
    def read(cls) -> KerasReader[KerasEstimator]:
        """Loads what `write` saved. Custom classes and functions must be registered with Keras, or importable."""
        from tensorspark.trainers.keras_files import from_keras_bytes

        return KerasReader(cls, lambda content, _: cls(model=from_keras_bytes(content)))

    def _fit(self, dataset: DataFrame) -> KerasModel:
        from tensorspark.trainers.keras_files import clone

        with _training:
            model = clone(self._required(), self._model_seed())
            rows = self._labelled(dataset, model)
            with SparkSession(
                dataset.sparkSession,
                model,
                name=self.uid,
                batch_size=self.getBatchSize(),
                sync_interval=self.getSyncInterval(),
                staleness=self.getStaleness(),
                **(self.getSessionOptions()),
            ) as session:
                trained = session.fit(
                    rows,
                    features=self.features(),
                    label=self.getLabelCol(),
                    sample_weight=self.getWeightCol(),
                    batch_size=self.getBatchSize(),
                    epochs=self.getEpochs(),
                    validation_split=self.getValidationFraction(),
                    callbacks=self.getCallbacks() or (),
                    shuffle=self.getShuffle(),
                    scale_learning_rate=self.getScaleLearningRate(),
                    seed=self.getSeed(),
                    progress=self.getProgress(),
                )
        fitted = KerasModel(model=model, history=trained.history)
        fitted._resetUid(self.uid)
        return self._copyValues(fitted)

    def _labelled(self, dataset: DataFrame, model: Any) -> DataFrame:
        """The rows, with class numbers as integers: Spark ML's indexers make doubles of them."""
        from tensorspark.trainers.keras_columns import label_columns

        name = self.getLabelCol()
        if name not in dataset.columns:
            return dataset  # the session says so, with the names that there are
        data_type = dataset.schema[name].dataType
        if isinstance(data_type, StringType):
            raise FeedError(
                f"labelCol {name!r} holds strings: turn them into numbers first, with pyspark.ml.feature.StringIndexer("
                f"inputCol={name!r}, outputCol=...)"
            )
        labels = label_columns(model)
        if len(labels) != 1:
            raise ConfigError(
                f"the model has {len(labels)} outputs, and KerasEstimator trains one: use tensorspark.SparkSession.fit"
            )
        if labels[0].dtype == "int64" and isinstance(data_type, FractionalType):
            return dataset.withColumn(name, _whole(name))
        return dataset

    def _required(self) -> Any:
        model = self.getModel()
        if model is None:
            raise ConfigError("this KerasEstimator has no model: pass KerasEstimator(model=...) or call setModel")
        return model

    def _model_seed(self) -> int:
        seed = self.getOrDefault(self.seed)
        return zlib.crc32(self.uid.encode()) if seed is None else int(seed)


def _whole(name: str) -> Column:
    """The column as integers; a number that is none fails the task."""
    value = sf.col(f"`{name}`")
    whole = value.cast("bigint")
    text = sf.concat(sf.lit(f"label {name}: expected whole class numbers, got "), value.cast("string"))
    return sf.when(value.isNull() | (value == whole), whole).otherwise(sf.raise_error(text))
