"""What all sessions share: settings, restoring, closing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tensorspark import config as configuration
from tensorspark.driver.arguments import as_spark_context
from tensorspark.driver.checkpoints import CheckpointDirectory
from tensorspark.driver.engine import Engine
from tensorspark.driver.inputs import Names
from tensorspark.errors import CheckpointError, SessionClosedError
from tensorspark.ps.messages import Status
from tensorspark.shards.sharded_server import AnyServer

logger = logging.getLogger(__name__)

# Settings of a restored run, where they are not given.
_TAKEN_OVER = ("batch_size", "sync_interval", "staleness")


class Session:
    """A model and the engine that trains it. `SparkSession` documents the arguments."""

    _defaults: Mapping[str, Any] = {}

    def __init__(
        self,
        spark_context: Any,
        session: Any,
        user: str | None = "",
        name: str = "",
        target: str = "",
        server_host: str | None = None,
        server_port: int | None = None,
        graph: Any = None,
        config: Any = None,
        sync_interval: int | None = None,
        batch_size: int | None = None,
        *,
        staleness: int | str | configuration.NotSet | None = configuration.NOT_SET,
        hdfs_dir: str | None = None,
        tmp_dir: str | None = None,
        **settings: Any,
    ) -> None:
        context = as_spark_context(spark_context)
        restored_url: str | None = settings.pop("_restored_url", None)
        arguments = {
            "server_host": server_host,
            "server_port": server_port,
            "sync_interval": sync_interval,
            "batch_size": batch_size,
            "staleness": staleness,
            "hdfs_dir": hdfs_dir,
            "tmp_dir": tmp_dir,
            **settings,
        }
        spark_conf = dict(context.getConf().getAll())
        resolved = configuration.resolve(arguments, spark_conf, self._defaults)
        self._num_threads = int(spark_conf.get("spark.task.cpus", "1"))
        self._model = self._open(session, graph, config)
        self._session = session
        self._names = Names()
        self._engine = Engine(
            context,
            resolved,
            name=name,
            user=user or "",
            restored_url=restored_url,
            wants_checkpoints=bool(settings.get("checkpoint_interval_s")),
        )
        if target:
            logger.warning("target=%r is ignored: workers run sessions of their own process", target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def restore(cls, spark_context: Any, url: str, session: Any, **arguments: Any) -> Self:
        """A session that goes on from the newest checkpoint in `url` that is whole.

        The variables that the checkpoint holds get its values at once. If the run that wrote it was not over, the first
        `fit` or `run` (with the same feed, combiner and other arguments) continues it: no batch that is in the weights
        is trained again, and what came after the checkpoint is. Further checkpoints go to `url` too.

        Args:
            url: directory of the checkpoints, as the interrupted session named it: `checkpoint_dir`.
            session: the model, as for the constructor. Variables that are not in the checkpoint (an optimizer's slots,
                say) keep the values that they have there.
            arguments: of `SparkSession`. Batch size, sync interval, staleness and name are the checkpoint's where they
                are not given.

        Raises:
            CheckpointError: no checkpoint is whole, or it is of another model: says which tensors differ.
            ConfigError: `url` is no string, or an argument that cannot work.
            StagingError: `url` cannot be read.
        """
        directory = CheckpointDirectory(url, user=arguments.get("user") or "")
        checkpoint = directory.read_newest()
        if missing := {*_TAKEN_OVER, "seed"} - checkpoint.plan.keys():
            raise CheckpointError(
                f"the checkpoint in {url} does not say its run's {', '.join(sorted(missing))}: it was written by "
                f"something else than a SparkSession"
            )
        planned = {name: checkpoint.plan[name] for name in _TAKEN_OVER}
        planned["name"] = str(checkpoint.plan.get("name", ""))
        restored = cls(spark_context, session, **{**planned, **arguments, "_restored_url": url})
        try:
            restored._engine.take_over(checkpoint, restored._model)
        except BaseException:
            restored.close()
            raise
        return restored

    @property
    def checkpoint_dir(self) -> str | None:
        """Where this session's runs write checkpoints, for `restore`; None where they write none."""
        return self._engine.checkpoint_dir

    @property
    def dashboard_url(self) -> str | None:
        """The live page's address, with its token; None where there is no page, or no server yet."""
        server = self._engine.server
        return None if server is None else self._engine.watchers.url(server)

    def status(self) -> Status | None:
        """How the run stands at this moment, for other threads to ask; None where there is none."""
        server = self._engine.server
        if server is None:
            return None
        with contextlib.suppress(RuntimeError):  # the run has ended, or the session was closed, meanwhile
            return server.status()
        return None

    def get_session(self) -> Any:
        """The TensorFlow session or model that was passed in."""
        return self._session

    def stop_param_server(self) -> None:
        """Ends the parameter server, if one runs. The next run starts another."""
        self._engine.stop_server()

    def close(self) -> None:
        """Ends the server and removes the temporary files, on the executors' hosts too. Idempotent."""
        self._engine.close()

    @property
    def _server(self) -> AnyServer | None:
        return self._engine.server

    def _open(self, session: Any, graph: Any, config: Any) -> Any:
        from tensorspark.trainers.opening import open_model

        return open_model(session, graph, config, self._num_threads)

    def _require_open(self) -> None:
        if not self._engine.close.alive:
            raise SessionClosedError("this SparkSession is closed: make a new one to train on")
