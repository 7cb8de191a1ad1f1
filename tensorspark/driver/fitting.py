"""`SparkSession.fit` and `evaluate`: what a Keras model or a `FunctionTrainer` is trained on, epoch by epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.labels import CheckedDecoder
from tensorspark.driver.arguments import RunPlan, arrange, as_seed, checked_combiner, checked_count
from tensorspark.driver.engine import Engine
from tensorspark.driver.inputs import MarkedDecoder, Names
from tensorspark.driver.rows import Data, FedModel, Rows, decoder_alike, rows_of
from tensorspark.errors import ConfigError, FeedError, ShardLostError
from tensorspark.history import History
from tensorspark.ps.messages import EpochEnd
from tensorspark.shards.sharded_server import AnyServer
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.weights.layout import WeightLayout
from tensorspark.weights.state_averaging import StateAveragingCombiner

if TYPE_CHECKING:
    from tensorspark.trainers.base import Captured

logger = logging.getLogger(__name__)

Logs = dict[str, Any]

_MAX_LEARNING_RATE_SCALE = 8.0
"""More workers than this were not measured, and larger steps want a warm-up (Goyal et al. 2017, section 2.2)."""


class Callbacks(Protocol):
    """What is called at the ends of epochs; see `trainers.keras_callbacks`."""

    def begin(self) -> None: ...
    def begin_epoch(self, epoch: int) -> None: ...
    def end_epoch(self, epoch: int, logs: Logs, evaluation: Mapping[str, Any] | None) -> None: ...
    def end(self, logs: Mapping[str, Any]) -> None: ...
    @property
    def wants_stop(self) -> bool: ...
    @property
    def values(self) -> dict[str, float]: ...


class FitModel(FedModel, Protocol):
    """What `fit` needs of a model on the driver."""

    def assign(self, layout: Any, weights: Any) -> None: ...
    def difference(self, layout: Any) -> str: ...
    def logs(self, totals: NDArray[np.float64]) -> Logs: ...
    def captured(
        self, rows: Any, *, average_optimizer_state: bool, nan_is_error: bool, num_threads: int
    ) -> tuple[Captured, int | None]: ...
    def callbacks(self, callbacks: Sequence[Any], num_epochs: int, max_learning_rate_scale: float) -> Callbacks: ...
    def advance(self, num_steps: int) -> None: ...
    def resume(self, values: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class FitPlan:
    """The arguments of `SparkSession.fit`, checked as far as no model is needed for it."""

    data: Data
    batch_size: int
    epochs: int
    validation_data: Data | None
    validation_split: float
    callbacks: tuple[Any, ...]
    shuffle: bool
    seed: int | None
    combiner: WeightCombiner | None
    average_optimizer_state: bool
    scale_learning_rate: bool
    nan_is_error: bool

    def __post_init__(self) -> None:
        checked_count("epochs", self.epochs)
        checked_count("batch_size", self.batch_size)
        if self.seed is not None:
            checked_count("seed", self.seed, minimum=0)
        split = self.validation_split
        if isinstance(split, bool) or not isinstance(split, int | float) or not 0 <= split < 1:
            raise ConfigError(f"validation_split must be a number from 0 to below 1, got {split!r}")
        if split and self.validation_data is not None:
            raise ConfigError("validation_split and validation_data are both given: hold out rows by one of them")

    @property
    def max_learning_rate_scale(self) -> float:
        """What a learning rate is multiplied by at most: 1 where the rule is another than the mean."""
        takes_mean = self.combiner is None or isinstance(self.combiner, MeanDeltaCombiner)
        return _MAX_LEARNING_RATE_SCALE if self.scale_learning_rate and takes_mean else 1.0

    @property
    def validates(self) -> bool:
        return self.validation_data is not None or self.validation_split > 0


def as_validation_data(given: Any, names: Names) -> Data | None:
    """`validation_data` of `fit`: like its `x`, or a tuple ``(x, y)`` or ``(x, y, sample_weight)`` of arrays."""
    if given is None or isinstance(given, Data):
        return given
    if isinstance(given, tuple):
        if len(given) not in (2, 3):
            raise ConfigError(f"validation_data must be (x, y) or (x, y, sample_weight), got a tuple of {len(given)}")
        return Data(*given)
    return Data(given, names=names)


def fit(engine: Engine, model: FitModel, plan: FitPlan, *, num_threads: int, progress: bool) -> History:
    """Trains; see `SparkSession.fit`."""
    rows = rows_of(plan.data, model, engine.spark_context, lambda: engine.num_slots(1))
    captured, num_trained = model.captured(
        rows,
        average_optimizer_state=plan.average_optimizer_state,
        nan_is_error=plan.nan_is_error,
        num_threads=num_threads,
    )
    run_plan = _run_plan(engine, model, plan, rows, captured, num_trained)
    while True:
        epochs = _Epochs(engine, model, plan, captured)
        values = epochs.begin()
        run_plan = replace(run_plan, values=values, notes=_notes(values, run_plan.num_first))
        try:
            history = engine.train(model, captured, run_plan, progress=progress, epochs=epochs, planned=epochs.planned)
            break
        except ShardLostError as error:
            engine.recover(model, error)
    model.advance(history.num_steps)
    epochs.end()
    return replace(history, history=epochs.history, epoch=tuple(range(len(epochs.logs))))


def _run_plan(
    engine: Engine, model: FitModel, plan: FitPlan, rows: Rows, captured: Captured, num_trained: int | None
) -> RunPlan:
    decoder, validation_rdd = rows.feed.decoder, None
    if plan.validation_data is not None:
        held_out = rows_of(plan.validation_data, model, engine.spark_context, lambda: engine.num_slots(1))
        if len(held_out.columns) != len(rows.columns):
            raise ConfigError(
                f"validation_data has {len(held_out.columns)} columns ({_names(held_out)}), the training rows "
                f"{len(rows.columns)} ({_names(rows)}): give both a sample weight, or neither"
            )
        validation_rdd, decoder = held_out.feed.rdd, MarkedDecoder(decoder, decoder_alike(held_out, rows.columns))
    restored = engine.restored
    arranged = arrange(rows.feed.rdd, engine.num_slots, at_once=True, restored=restored, validation_rdd=validation_rdd)
    _warn_of_idle_slots(engine, arranged.num_partitions)
    return RunPlan(
        feed_rdd=arranged.feed_rdd,
        decoder=CheckedDecoder(decoder, captured.labels),
        num_partitions=arranged.num_partitions,
        num_first=arranged.num_first,
        combiner=_combiner(plan.combiner, arranged.num_first, captured.spec.layout, num_trained),
        shuffle=plan.shuffle,
        num_epochs=plan.epochs,
        batch_size=plan.batch_size,
        seed=as_seed(plan.seed, restored),
        has_epochs=True,
        validates=plan.validates,
        validation_split=float(plan.validation_split),
    )


def _names(rows: Rows) -> str:
    return ", ".join(column.name for column in rows.columns)


def _warn_of_idle_slots(engine: Engine, num_partitions: int) -> None:
    num_slots = engine.num_slots(num_partitions)
    if 0 < num_partitions < num_slots:
        logger.warning(
            "the feed has %d partition(s) for %d slots: repartition(%d) it to train on all of them",
            num_partitions,
            num_slots,
            num_slots,
        )


def _notes(values: Mapping[str, float], num_workers: int) -> tuple[str, ...]:
    scale = min(values.get("max_learning_rate_scale", 1.0), num_workers)
    if scale <= 1:
        return ()
    return (f"{num_workers} workers, learning rate times {scale:g} (scale_learning_rate=False leaves it as it is)",)


def _combiner(
    given: WeightCombiner | None, num_workers: int, layout: WeightLayout, num_trained: int | None
) -> WeightCombiner:
    """The mean of deltas by default, in all modes. With any rule of deltas, state that is not trained is averaged.

    Raises:
        ConfigError: the rule cannot be kept from the state, as they lie among each other.
    """
    if given is None:
        return MeanDeltaCombiner()
    combiner = checked_combiner(given, num_workers)
    if num_trained is None or combiner.pushes != "delta" or isinstance(combiner, MeanDeltaCombiner):
        return combiner
    try:
        layout.split(num_trained)
    except ValueError as error:
        raise ConfigError(
            f"{type(combiner).__name__} cannot be kept from weights that are not trained: {error}; leave out "
            f"weight_combiner, which takes the mean of all"
        ) from error
    return StateAveragingCombiner(combiner, num_trained)


class _Epochs:
    """What the driver does at the end of each epoch: metrics, callbacks, and the word to go on."""

    def __init__(self, engine: Engine, model: FitModel, plan: FitPlan, captured: Captured) -> None:
        self._engine = engine
        self._model = model
        self._plan = plan
        self._layout = captured.spec.layout
        if engine.restored is not None and engine.restored.epochs is not None:
            model.resume(engine.restored.epochs.values)
        self._callbacks = model.callbacks(plan.callbacks, plan.epochs, plan.max_learning_rate_scale)
        self.logs: list[Logs] = []
        # Read for checkpoints, on another thread: replaced whole.
        self.planned: dict[str, Any] = {"epoch_logs": "[]"}
        if engine.restored is not None:
            self.logs = json.loads(str(engine.restored.plan.get("epoch_logs", "[]")))
            self.planned["epoch_logs"] = json.dumps(self.logs)

    @property
    def history(self) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for logs in self.logs for name in logs)
        return {name: [logs.get(name, float("nan")) for logs in self.logs] for name in names}

    def begin(self) -> dict[str, float]:
        """Returns what workers are told in the first epoch."""
        self._callbacks.begin()
        self._callbacks.begin_epoch(len(self.logs))
        return self._callbacks.values

    def end_epoch(self, server: AnyServer, end: EpochEnd) -> None:
        """See `EpochDriver.end_epoch`."""
        self._take_weights(server)
        if end.epoch >= len(self.logs):
            self._log(end)
        is_over = self.wants_stop or end.epoch + 1 >= self._plan.epochs
        if not is_over:
            self._callbacks.begin_epoch(end.epoch + 1)
        server.release_epoch(end.epoch, self._callbacks.values, finish=is_over)

    @property
    def wants_stop(self) -> bool:
        """See `EpochDriver.wants_stop`."""
        return self._callbacks.wants_stop

    def end(self) -> None:
        self._callbacks.end(self.logs[-1] if self.logs else {})

    def _take_weights(self, server: AnyServer) -> None:
        weights = self._layout.allocate()
        server.read_weights(weights)
        self._model.assign(self._layout, weights)

    def _log(self, end: EpochEnd) -> None:
        logs = self._model.logs(_added(end.totals)) if end.num_samples else {}
        evaluation = None
        if self._plan.validates:
            self._require_held_out(end)
            evaluation = self._model.logs(_added(end.evaluation))
            logs |= {f"val_{name}": value for name, value in evaluation.items()}
        self._callbacks.end_epoch(end.epoch, logs, evaluation)
        if self._engine.watch is not None:
            self._engine.watch.epoch_ended(end.epoch, logs)
        self.logs.append(logs)
        self.planned["epoch_logs"] = json.dumps(self.logs, default=_as_list)

    def _require_held_out(self, end: EpochEnd) -> None:
        if end.evaluation_samples:
            return
        if self._plan.validation_data is not None:
            raise FeedError("validation_data has no rows: look at what filters it, or leave it out")
        raise FeedError(
            f"validation_split={self._plan.validation_split:g} holds out none of {end.num_samples} rows: hold out more"
        )


def _added(totals: Sequence[tuple[int, NDArray[np.float64]]]) -> NDArray[np.float64]:
    """The sum over partitions, in their order."""
    total = np.zeros_like(totals[0][1])
    for _, one in totals:
        total = total + one
    return total


def _as_list(value: Any) -> Any:
    return np.asarray(value).tolist()
