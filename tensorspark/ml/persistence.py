"""Saving and loading: metadata as Spark ML writes it, and the model as a ``.keras`` file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pyspark.ml.param import Params
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReadable, MLReader, MLWriter
from pyspark.sql import SparkSession

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem, write_then_rename
from tensorspark.errors import ConfigError

P = TypeVar("P", bound=MLReadable[Any])

_MODEL_FILE = "model.keras"
_SETTING = "path"


class KerasWriter(MLWriter):
    """Writes a stage and its model.

    Args:
        content: of the ``.keras`` file; called while saving.
        extra: more for the metadata.
        skipped: names of Params that no JSON can hold.
    """

    def __init__(
        self,
        stage: Params,
        content: Callable[[], bytes],
        extra: Mapping[str, Any],
        skipped: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._stage = stage
        self._content = content
        self._extra = dict(extra)
        self._skipped = skipped

    def saveImpl(self, path: str) -> None:
        """Raises ConfigError where something is there already, or a Param is no JSON; StagingError; ModelError."""
        params = {p.name: value for p, value in self._stage._paramMap.items() if p.name not in self._skipped}
        try:
            json.dumps(params)
        except TypeError as error:
            raise ConfigError(f"{self._stage.uid} cannot be saved: a Param holds what JSON cannot: {error}") from error
        content = self._content()
        url = _qualified(self.sparkSession, path)
        filesystem, directory = open_filesystem(url, setting=_SETTING)

        def write() -> None:
            if filesystem.exists(directory):
                raise ConfigError(f"{path} exists: choose another path, or save with write().overwrite().save(path)")
            filesystem.makedirs(directory, exist_ok=True)
            write_then_rename(filesystem, f"{directory}/{_MODEL_FILE}", [content])

        attempt("save the model to", url, write, TRANSFER_DEADLINE_S, _SETTING)
        # Last: what has metadata is whole.
        DefaultParamsWriter.saveMetadata(
            self._stage, path, self.sparkSession, extraMetadata=self._extra, paramMap=params
        )


class KerasReader(MLReader[P]):
    """Reads what `KerasWriter` wrote.

    Args:
        make: the stage of the file's content and the metadata, its Params not yet set.
    """

    def __init__(self, cls: type[P], make: Callable[[bytes, dict[str, Any]], P]) -> None:
        super().__init__()
        self._cls = cls
        self._make = make

    def load(self, path: str) -> P:
        """Raises ConfigError for another class's metadata; StagingError; ModelError for a model that cannot be made."""
        metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession)
        expected = f"{self._cls.__module__}.{self._cls.__name__}"
        if metadata["class"] != expected:
            raise ConfigError(f"{path} holds a {metadata['class']}, not a {expected}: load it with its own class")
        url = _qualified(self.sparkSession, path)
        filesystem, directory = open_filesystem(url, setting=_SETTING)
        file = f"{directory}/{_MODEL_FILE}"
        content = attempt("load the model from", url, lambda: filesystem.cat_file(file), TRANSFER_DEADLINE_S, _SETTING)
        stage = self._make(content, metadata)
        assert isinstance(stage, Params)
        stage._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(stage, metadata)
        return stage


def _qualified(spark: SparkSession, path: str) -> str:
    """The URL that Spark itself means by `path`: without a scheme it is on the cluster's default filesystem."""
    hadoop_path = spark.sparkContext._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
    filesystem = hadoop_path.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf())
    qualified = str(filesystem.makeQualified(hadoop_path).toString())
    return "file://" + qualified.removeprefix("file:") if qualified.startswith("file:/") else qualified
