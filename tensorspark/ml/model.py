"""`KerasModel`: a Keras model that predicts in Spark ML pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyspark import keyword_only
from pyspark.ml import Model
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import DataFrame

from tensorspark.driver.inputs import Names, as_sources
from tensorspark.driver.prediction_schema import Appended
from tensorspark.driver.predictions import predicted
from tensorspark.errors import ConfigError
from tensorspark.ml.outputs import ClassColumns, NumberColumns
from tensorspark.ml.params import KerasParams
from tensorspark.ml.persistence import KerasReader, KerasWriter

_MAX_CLASS_RANK = 1


class KerasModel(Model, KerasParams, MLWritable, MLReadable["KerasModel"]):
    """A Keras model as a Spark ML transformer: what `KerasEstimator.fit` returns, or a model trained elsewhere.

    `transform` is lazy, works on streaming DataFrames too, and appends

    - of a classifier: ``rawPredictionCol``, what the model makes, and ``probabilityCol``, both vectors of a value a
      class (an empty name leaves a column out), and ``predictionCol``, the most likely class as a double. One sigmoid
      unit stands for the second of two classes: predicted if p > 0.5.
    - of a regression: ``predictionCol``, a double, or an array of doubles where the output has several units.

    Which it is, the compiled loss says: categorical cross-entropies over several units and binary ones over one unit
    are classification, all others regression (several sigmoid units, as for multi-label problems, too). The Param
    ``task`` overrules it.

    Args:
        model: compiled, and built.
        history: of its training, as `history`.

    ::

        model = KerasModel(model=keras.saving.load_model("digits.keras"), featuresCol="image")
        model.transform(images).select("prediction", "probability")
    """

    @keyword_only
    def __init__(
        self,
        *,
        model: Any = None,
        history: Mapping[str, Sequence[Any]] | None = None,
        featuresCol: str = "features",
        inputCols: Mapping[str, Any] | None = None,
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        task: str = "auto",
        predictionBatchSize: int = 256,
    ) -> None:
        super().__init__()
        params = dict(self._input_kwargs)
        self._keras_model = params.pop("model", None)
        self._history = {name: list(values) for name, values in (params.pop("history", None) or {}).items()}
        self._set(**params)

    @property
    def keras_model(self) -> Any:
        """The `keras.Model`, with the trained weights."""
        return self._keras_model

    @property
    def history(self) -> dict[str, list[Any]]:
        """The training's loss and metrics by name, a value an epoch, as Keras's `history.history`; empty if unknown."""
        return self._history

    def write(self) -> KerasWriter:
        """Saves Params, history and a ``.keras`` file, on any filesystem that Spark and fsspec both know."""
        from tensorspark.trainers.keras_files import to_keras_bytes

        return KerasWriter(self, lambda: to_keras_bytes(self._required()), {"history": _plain(self._history)})

    @classmethod
    def read(cls) -> KerasReader[KerasModel]:
        """Loads what `write` saved. Custom classes and functions must be registered with Keras, or importable."""
        from tensorspark.trainers.keras_files import from_keras_bytes

        def make(content: bytes, metadata: dict[str, Any]) -> KerasModel:
            return cls(model=from_keras_bytes(content), history=metadata["history"])

        return KerasReader(cls, make)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        from tensorspark.trainers.keras_files import for_predictions, known_input_columns, output_columns
        from tensorspark.trainers.keras_model import as_keras_model

        own = self._required()
        input_cols = self.getInputCols()
        names = None if input_cols is None else {name: name for name in input_cols}
        columns = known_input_columns(own, names)
        sources = as_sources(Names(self.features()), [column.name for column in columns], [])
        driver_model = as_keras_model(for_predictions(own))
        structure = driver_model.structure(names, num_labels=0)
        outputs = output_columns(own, columns, structure)
        captured = driver_model.capture(columns, structure, num_threads=_num_threads(dataset))
        appended = self._appended(own, outputs)
        return predicted(dataset, captured, columns, sources, appended, self.getPredictionBatchSize())

    def _appended(self, model: Any, outputs: Sequence[Any]) -> Appended:
        from tensorspark.trainers.keras_files import meaning_of

        if len(outputs) != 1 or outputs[0].shape is None:
            raise ConfigError(
                f"the model has {len(outputs)} outputs, expected one of known shape: take the output that is to be "
                f"predicted with keras.Model(inputs, output), or use tensorspark.SparkSession.predict"
            )
        (output,) = outputs
        task = self.getTask()
        meaning = meaning_of(model, output, None if task == "auto" else task)  # type: ignore[arg-type]
        if meaning.task == "regression":
            return NumberColumns(self.getPredictionCol(), output.shape)
        if len(output.shape) > _MAX_CLASS_RANK:
            raise ConfigError(
                f"a classifier's output must be of shape [classes], got {output}: use setTask('regression') for arrays "
                f"of scores"
            )
        return ClassColumns(
            self.getRawPredictionCol(), self.getProbabilityCol(), self.getPredictionCol(), meaning.is_logits
        )

    def _required(self) -> Any:
        if self._keras_model is None:
            raise ConfigError("this KerasModel has no model: pass KerasModel(model=...)")
        return self._keras_model


def _num_threads(dataset: DataFrame) -> int:
    return int(dataset.sparkSession.sparkContext.getConf().get("spark.task.cpus", "1") or 1)


def _plain(history: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """As JSON can hold it: metrics may be numpy's numbers, or arrays of them."""
    return {name: [value.tolist() if hasattr(value, "tolist") else value for value in h] for name, h in history.items()}
