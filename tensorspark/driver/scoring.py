"""`SparkSession.evaluate`, `predict`, `save` and `export`: what is done with a trained model."""

from __future__ import annotations

import posixpath
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyspark.sql import DataFrame

from tensorspark.data.columns import Column
from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem, write_then_rename
from tensorspark.data.labels import CheckedDecoder
from tensorspark.driver.engine import Engine
from tensorspark.driver.evaluation import evaluated
from tensorspark.driver.fitting import FitModel, Logs
from tensorspark.driver.inputs import Names, as_sources
from tensorspark.driver.prediction_schema import OutputColumns
from tensorspark.driver.predictions import predicted
from tensorspark.driver.rows import Data, rows_of
from tensorspark.errors import ConfigError, FeedError

if TYPE_CHECKING:
    from tensorspark.trainers.base import Captured

_SETTING = "the url"


class PredictingModel(FitModel, Protocol):
    """What `predict` needs of a model on the driver."""

    def predictor(
        self, input_names: Any, num_threads: int
    ) -> tuple[Captured, tuple[Column, ...], tuple[Column, ...]]: ...


def evaluate(engine: Engine, model: FitModel, data: Data, *, batch_size: int, num_threads: int) -> Logs:
    """See `SparkSession.evaluate`."""
    rows = rows_of(data, model, engine.spark_context, lambda: engine.num_slots(1))
    captured, _ = model.captured(rows, average_optimizer_state=False, nan_is_error=True, num_threads=num_threads)
    decoder = CheckedDecoder(rows.feed.decoder, captured.labels)
    totals, num_samples = evaluated(rows.feed.rdd, decoder, captured, batch_size, name=engine.name)
    if not num_samples:
        raise FeedError("there are no rows to evaluate: look at what filters them")
    return model.logs(totals)


def predict(
    model: PredictingModel, df: Any, names: Names, output: Any, *, batch_size: int, num_threads: int
) -> DataFrame:
    """See `SparkSession.predict`."""
    if not isinstance(df, DataFrame):
        raise ConfigError(
            f"predict takes a DataFrame, got {type(df).__name__}: for arrays call the model's own predict"
        )
    given = {name: name for name in names.features} if isinstance(names.features, Mapping) else None
    captured, inputs, outputs = model.predictor(given, num_threads)
    sources = as_sources(replace(names, label=None, sample_weight=None), [column.name for column in inputs], [])
    columns = OutputColumns(_renamed(outputs, output))
    return predicted(df, captured, inputs, sources, columns, batch_size)


def _renamed(outputs: Sequence[Column], given: Any) -> tuple[Column, ...]:
    """The outputs, called as the user would have them."""
    if isinstance(given, Mapping):
        if given.keys() != {column.name for column in outputs}:
            raise ConfigError(
                f"output must have the model's outputs as keys: {sorted(c.name for c in outputs)}, got {sorted(given)}"
            )
        names = [given[column.name] for column in outputs]
    elif isinstance(given, str):
        names = [given] if len(outputs) == 1 else [f"{given}_{column.name}" for column in outputs]
    else:
        names = list(given) if isinstance(given, list | tuple) else []
    if len(names) != len(outputs) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"output must name a column for each of the model's {len(outputs)} outputs, as a name, a list or a dict by "
            f"output; got {given!r}"
        )
    return tuple(replace(column, name=name) for column, name in zip(outputs, names, strict=True))


def save(content: bytes, url: str, user: str) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        ConfigError: `url` does not end with ``.keras``.
        StagingError: `url` cannot be written.
    """
    if not _checked(url).endswith(".keras"):
        raise ConfigError(f"expected a path or URL that ends with .keras, got {url!r}")
    filesystem, path = open_filesystem(url, user, _SETTING)

    def write() -> None:
        filesystem.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
        write_then_rename(filesystem, path, [content])

    attempt("save the model to", url, write, TRANSFER_DEADLINE_S, _SETTING)


def export(write_to: Callable[[str], None], url: str, user: str) -> None:
    """Writes a directory that appears whole or not at all, where the filesystem can rename one (S3 cannot): made here
    first, copied file by file under another name beside it, and renamed.

    Args:
        write_to: makes the files in a local directory.

    Raises:
        ConfigError: something is there already.
        StagingError: `url` cannot be written.
    """
    filesystem, path = open_filesystem(_checked(url), user, _SETTING)
    with tempfile.TemporaryDirectory(prefix="tensorspark-export-") as made:
        directory = Path(made, "model")
        write_to(str(directory))

        def copy() -> None:
            if filesystem.exists(path):
                raise ConfigError(f"{url} exists already: name another directory, or remove it")
            parent, _, name = path.rstrip("/").rpartition("/")
            temporary = f"{parent}/.{name}.{uuid.uuid4().hex}"
            try:
                filesystem.makedirs(temporary, exist_ok=True)
                for file in sorted(directory.rglob("*")):
                    target = posixpath.join(temporary, file.relative_to(directory).as_posix())
                    if file.is_dir():
                        filesystem.makedirs(target, exist_ok=True)
                    else:
                        filesystem.pipe_file(target, file.read_bytes())
                filesystem.mv(temporary, path, recursive=True)
            except Exception:
                with suppress(Exception):
                    filesystem.rm(temporary, recursive=True)
                raise

        attempt("export the model to", url, copy, TRANSFER_DEADLINE_S, _SETTING)


def _checked(url: Any) -> str:
    if not isinstance(url, str) or not url.strip():
        raise ConfigError(f"expected a path or URL as a string, got {url!r}")
    return url
