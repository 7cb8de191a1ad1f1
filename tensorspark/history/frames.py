"""A run's numbers as DataFrames of pandas."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorspark.errors import ConfigError
from tensorspark.history.reports import WorkerReport

if TYPE_CHECKING:
    from tensorspark.history.course import History


def of_points(history: History) -> Any:
    """See `History.to_pandas`."""
    columns: dict[str, Any] = {
        "seconds": np.array([point.seconds for point in history.points], np.float64),
        "num_steps": history.steps,
        "num_samples": np.array([point.num_samples for point in history.points], np.int64),
    }
    own = tuple(columns)
    for name, values in history.scalars.items():
        columns[f"scalars.{name}" if name in own else name] = values
    return _pandas().DataFrame(columns)


def of_workers(history: History) -> Any:
    """See `History.workers_to_pandas`."""
    columns = {
        field.name: [getattr(worker, field.name) for worker in history.workers] for field in fields(WorkerReport)
    }
    return _pandas().DataFrame(columns).set_index("partition")


def of_epochs(history: History) -> Any:
    """See `History.epochs_to_pandas`."""
    pandas = _pandas()
    return pandas.DataFrame(dict(history.history), index=pandas.Index(history.epoch, dtype="int64", name="epoch"))


def _pandas() -> Any:
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ConfigError(f"DataFrames need pandas ({error}): pip install 'tensorspark[spark]'") from error
