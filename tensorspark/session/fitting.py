"""`fit`, `evaluate`, `predict`, `save` and `export`, for Keras models and `FunctionTrainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyspark.sql import DataFrame

from tensorspark.driver.arguments import checked_count
from tensorspark.driver.fitting import FitPlan, as_validation_data, fit
from tensorspark.driver.inputs import Names
from tensorspark.driver.rows import Data
from tensorspark.driver.scoring import evaluate, export, predict, save
from tensorspark.errors import ConfigError
from tensorspark.history import History
from tensorspark.session.base import Session
from tensorspark.weights.combiners import WeightCombiner


class FittingSession(Session):
    """A session's methods for Keras models and training functions."""

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        features: str | Sequence[Any] | Mapping[str, Any] | None = None,
        label: str | Sequence[str] | Mapping[str, str] | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        validation_data: Any = None,
        validation_split: float = 0.0,
        callbacks: Sequence[Any] = (),
        shuffle: bool = True,
        seed: int | None = None,
        weight_combiner: WeightCombiner | None = None,
        average_optimizer_state: bool = False,
        scale_learning_rate: bool = True,
        nan_is_error: bool = True,
        progress: bool = True,
    ) -> History:
        """Trains the model on all workers, epoch by epoch.

        An epoch ends when all workers have trained their partitions once. Then the model here gets the weights, the
        held-out rows are evaluated, by all workers, the callbacks are called, and the next epoch begins. In every mode
        there are as many partitions as slots, or fewer: more are coalesced, and all of them train at once.

        Args:
            x: a DataFrame; an RDD of rows (flat tuples: the model's inputs, labels, and maybe a sample weight) or of
                blocks of rows (the same tuples of arrays); an array, or a list or dict of them for several inputs; or a
                function from a `DatasetContext` to a `tf.data.Dataset` of single rows ``(x, y)`` or
                ``(x, y, sample_weight)``, which each worker calls once, to read its own part of the data.
            y: labels, where `x` is an array.
            features: of a DataFrame: the column that is the input; several scalar columns, side by side; or, by input,
                a dict of either. Arrays, ML vectors, numbers, strings, and binary columns with a tensor's raw bytes.
                None: columns named as the model's inputs.
            label: the column of the labels; one for each output, as a list or a dict.
            sample_weight: the column of the rows' weights; with arrays, an array.
            batch_size: rows of a worker's step; None: the session's.
            validation_data: held-out rows, as `x`; or ``(x, y)`` or ``(x, y, sample_weight)`` of arrays.
            validation_split: the part of each partition's rows that is held out: every so manieth, evenly spread.
            callbacks: `keras.callbacks.Callback` objects; called on the driver at the begin and end of training and
                epochs, not for single batches. ``stop_training`` ends the run, and a learning rate that one sets
                reaches all workers.
            shuffle: shuffles each partition's rows anew in every epoch.
            seed: of shuffles, and of what is random in the model on the workers; None draws one.
            weight_combiner: how the workers' changes are merged; None takes their mean (`MeanDeltaCombiner`). State
                that is not trained (batch statistics) is averaged, whatever the rule for changes.
            average_optimizer_state: also averages the optimizer's slots; otherwise each worker has its own.
            scale_learning_rate: where workers' changes are averaged, multiplies the learning rate of a Keras optimizer
                by their number, by 8 at most: n workers take an n-th of the steps that one process does in an epoch,
                and come as far with steps n times as long (the linear scaling rule of Goyal et al., "Accurate, Large
                Minibatch SGD", 2017). The model's own rate stays; False leaves the workers' as it is, too.
            nan_is_error: whether a loss that is NaN or infinite ends the training. If not, an interval whose steps make
                such weights counts for nothing: the worker goes on from the weights and slots that it began with.
            progress: shows a line on stderr.

        Returns:
            A `History`; its `history` holds Keras's: a list of each metric's values by epoch.

        Raises:
            SessionClosedError: after `close`.
            ConfigError, FeedError, ModelError: what cannot work, before a task starts; no rows; a callback that raises.
            CheckpointError: the checkpoint that a restored session continues is of another model.
            ServerUnreachableError, StagingError: executors that cannot take part, within seconds.
            WorkerFailedError: a worker raised, or its task was given up; the weights are those of the last epoch whose
                end was reached.
        """
        names = Names(features, label, sample_weight if isinstance(x, DataFrame) else None)
        data = Data(x, y, None if isinstance(x, DataFrame) else sample_weight, names)
        plan = FitPlan(
            data=data,
            batch_size=self._engine.config.batch_size if batch_size is None else batch_size,
            epochs=epochs,
            validation_data=as_validation_data(validation_data, names),
            validation_split=validation_split,
            callbacks=tuple(callbacks or ()) if isinstance(callbacks, Iterable | None) else (callbacks,),
            shuffle=bool(shuffle),
            seed=seed,
            combiner=weight_combiner,
            average_optimizer_state=bool(average_optimizer_state),
            scale_learning_rate=bool(scale_learning_rate),
            nan_is_error=bool(nan_is_error),
        )
        model = self._fit_model("fit")
        self._names = names
        return fit(self._engine, model, plan, num_threads=self._num_threads, progress=progress)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        *,
        features: Any = None,
        label: Any = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """The loss and metrics over all rows, computed by all workers.

        Args:
            x, y, features, label, sample_weight, batch_size: as for `fit`, whose columns are the default.

        Returns:
            As `keras.Model.evaluate` with ``return_dict=True``.

        Raises:
            SessionClosedError, ConfigError, FeedError, ModelError, WorkerFailedError: as `fit`.
        """
        names = self._named(x, features, label, sample_weight)
        data = Data(x, y, None if isinstance(x, DataFrame) else sample_weight, names)
        model = self._fit_model("evaluate")
        return evaluate(
            self._engine, model, data, batch_size=self._batch_size(batch_size), num_threads=self._num_threads
        )

    def predict(
        self,
        df: DataFrame,
        output: Any = "prediction",
        *,
        features: Any = None,
        batch_size: int | None = None,
    ) -> DataFrame:
        """Appends the model's outputs to a DataFrame, lazily: the model is the one of this moment, and still there when
        the session is closed.

        Args:
            df: a DataFrame, also a streaming one.
            output: name of the new column: numbers where the model makes one a row, else arrays; a list of names, or a
                dict by output, for a model with several outputs.
            features: as for `fit`, whose columns are the default.
            batch_size: rows that the model computes at once.

        Raises:
            SessionClosedError, ConfigError, FeedError, ModelError: before a task starts. What rows a task cannot take,
                the DataFrame's own actions tell.
        """
        names = self._named(df, features, None, None)
        model = self._fit_model("predict")
        size = self._batch_size(batch_size)
        return predict(model, df, names, output, batch_size=size, num_threads=self._num_threads)

    def save(self, url: str) -> None:
        """Writes the model as a ``.keras`` file, to any filesystem that fsspec knows; one that is there is replaced.

        Raises:
            StagingError: it cannot be written. ModelError: the model cannot be saved.
        """
        save(self._fit_model("save").to_bytes(), url, self._engine.user)

    def export(self, url: str) -> None:
        """Writes the model as a SavedModel, a directory, for TensorFlow Serving and the like.

        Raises:
            ConfigError: the directory is there already. StagingError: it cannot be written.
        """
        export(self._fit_model("export").export, url, self._engine.user)

    def _named(self, x: Any, features: Any, label: Any, sample_weight: Any) -> Names:
        """The columns of a DataFrame: those given, else those of the last `fit`."""
        if not isinstance(x, DataFrame):
            return Names(features, label)
        before = self._names
        return Names(
            before.features if features is None else features,
            before.label if label is None else label,
            before.sample_weight if sample_weight is None else sample_weight,
        )

    def _batch_size(self, given: int | None) -> int:
        return self._engine.config.batch_size if given is None else checked_count("batch_size", given)

    def _fit_model(self, method: str) -> Any:
        self._require_open()
        if hasattr(self._model, "session"):
            raise ConfigError(f"{method} is for Keras models and FunctionTrainers, got a TensorFlow session: call run")
        return self._model
