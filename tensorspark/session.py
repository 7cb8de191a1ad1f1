"""The driver's side: `SparkSession`. Read `SparkSession.run` first, then `tensorspark.worker.run_partition`."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pyspark import RDD

from tensorspark import config as configuration
from tensorspark.driver.arguments import RunPlan, as_spark_context, as_tensorflow_session, check_feed, make_plan
from tensorspark.driver.checkpoints import CheckpointDirectory
from tensorspark.driver.continuing import continued, planned_values
from tensorspark.driver.jobs import settled_slots
from tensorspark.driver.preflight import require_ready
from tensorspark.driver.progress import ProgressLine
from tensorspark.driver.publishing import Publisher
from tensorspark.driver.resources import Resources, address_of
from tensorspark.driver.training import exclusively, require_trained, run_job
from tensorspark.errors import CheckpointError, ConfigError, SessionClosedError
from tensorspark.history import History
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import Status
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.worker import WorkerJob

if TYPE_CHECKING:
    from tensorspark.trainers.graph import Captured

logger = logging.getLogger(__name__)


class SparkSession:
    """Trains a TensorFlow session's graph on a Spark cluster, through a parameter server on the driver.

    Args:
        spark_context: a SparkContext, or a pyspark SparkSession.
        session: the `tf.compat.v1.Session` that holds the initialized variables. After a run it holds the trained ones.
        user: who to write to HDFS as (staging only); empty stands for the process's own user.
        name: shown in progress, history and Spark's web page.
        target: accepted for the original's programs; workers always run sessions of their own process.
        server_host, server_port, sync_interval, batch_size, hdfs_dir, tmp_dir: see `tensorspark.config.SETTINGS`; None
            takes the Spark configuration's value, then the default, as does what is not given.
        staleness: how workers are kept in step: 0 is bulk-synchronous, k > 0 stale-synchronous (the fastest worker
            leads the slowest by at most k synchronizations), None asynchronous.
        settings: any other row of `SETTINGS`, by its field.
        graph: the session's graph, or None.
        config: `tf.compat.v1.ConfigProto` of the workers' sessions. Thread counts that it leaves open become
            ``spark.task.cpus``.

    Raises:
        ConfigError: a setting that cannot work.

    ::

        with tensorspark.SparkSession(sc, sess, name="mnist", sync_interval=100, batch_size=100) as session:
            history = session.run(train_step, feed_rdd=rows, feed_name_list=["x:0", "y_:0"], param_list=[W, b],
                                  weight_combiner=DeltaWeightCombiner(), shuffle_within_partition=True)

    `close` runs at exit too. It ends the server and removes the temporary files; the TensorFlow session and the Spark
    context stay open: they are yours.
    """

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
        self._spark_context = as_spark_context(spark_context)
        self._session = as_tensorflow_session(session, graph)
        self._name = name
        self._session_config = config
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
        spark_conf = dict(self._spark_context.getConf().getAll())
        self._config = configuration.resolve(arguments, spark_conf, self._defaults)
        self._run_id = secrets.token_hex(8)
        self._checkpoint_dir = self._choose_checkpoint_dir(restored_url)
        if settings.get("checkpoint_interval_s") and self._checkpoint_dir is None:
            raise ConfigError("checkpoint_interval_s needs hdfs_dir (or spark.hdfs.dir): checkpoints go there")
        self._server_host = self._config.server_host or spark_conf.get("spark.driver.host", "localhost")
        self._num_threads = int(spark_conf.get("spark.task.cpus", "1"))
        self._user = user or ""
        self._restored: RunCheckpoint | None = None
        self._checked: ServerAddress | None = None
        self._running = threading.Lock()
        self._publisher = Publisher(
            self._spark_context, self._run_id, self._config.hdfs_dir, self._config.tmp_dir, self._user
        )
        self._resources = Resources(self._publisher, self._config, self._server_host, self._user)
        # Runs at exit too, and when the session is forgotten: who makes it anew in a shell finds its port free.
        self._finalizer = weakref.finalize(self, self._resources.close)
        if target:
            logger.warning("target=%r is ignored: workers run sessions of their own process", target)

    def __enter__(self) -> SparkSession:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def restore(cls, spark_context: Any, url: str, session: Any, **arguments: Any) -> Self:
        """A session that goes on from the newest checkpoint in `url` that is whole.

        The variables that the checkpoint holds get its values at once. If the run that wrote it was not over, the first
        `run` (with the same feed, `param_list` and combiner) continues it: no batch that is in the weights is trained
        again, and what came after the checkpoint is. Further checkpoints go to `url` too.

        Args:
            url: directory of the checkpoints, as the interrupted session named it: `checkpoint_dir`.
            session: the `tf.compat.v1.Session`, its variables initialized. Those that are not in the checkpoint (an
                optimizer's slots, say) keep the values that they have there.
            arguments: of `SparkSession`. Batch size, sync interval, staleness and name are the checkpoint's where they
                are not given.

        Raises:
            CheckpointError: no checkpoint is whole, or it is of another model: says which tensors differ.
            ConfigError: `url` is no string, or an argument that cannot work.
            StagingError: `url` cannot be read.
        """
        directory = CheckpointDirectory(url, user=arguments.get("user") or "")
        checkpoint = directory.read_newest()
        planned = {name: checkpoint.plan[name] for name in ("batch_size", "sync_interval", "staleness")}
        planned["name"] = str(checkpoint.plan.get("name", ""))
        restored = cls(spark_context, session, **{**planned, **arguments, "_restored_url": url})
        try:
            restored._take_over(checkpoint, url)
        except BaseException:
            restored.close()
            raise
        return restored

    def run(
        self,
        fetches: Any,
        feed_rdd: RDD[Any] | None = None,
        feed_name_list: Sequence[str] | None = None,
        param_list: Iterable[Any] | None = None,
        feed_dict: Mapping[Any, Any] | None = None,
        weight_combiner: WeightCombiner | None = None,
        shuffle_within_partition: bool = False,
        options: Any = None,
        run_metadata: Any = None,
        server_reusable: bool = False,
        *,
        num_epochs: int = 1,
        seed: int | None = None,
        progress: bool = True,
    ) -> Any:
        """Trains on `feed_rdd`; without one it is the TensorFlow session's `run`.

        Args:
            fetches: what to run on each batch: an operation, a tensor, or a list or dict of them. Scalars are averaged
                into the history.
            feed_rdd: rows: tuples with one value for each name in `feed_name_list`. With `num_epochs` over 1, have as
                many partitions as slots or fewer: a partition is trained for all its epochs at once.
            feed_name_list: names of the tensors that a row feeds, such as ``["x:0", "y_:0"]``.
            param_list: the variables to synchronize. Others (an optimizer's slots, say) start from the driver's values
                on each worker and stay there.
            feed_dict: with `feed_rdd`: values fed with every batch, such as ``{keep_prob: 0.5}``.
            weight_combiner: how pushes are merged; None takes `MeanDeltaCombiner` where the run is bulk-synchronous,
                else `MeanWeightCombiner` over the feed's partitions; of a run that is continued, over those that it
                began with.
            shuffle_within_partition: shuffles each partition's rows anew in every epoch.
            options: `RunOptions` for every step.
            run_metadata: only without `feed_rdd`; workers collect none.
            server_reusable: keeps the server for the next run; `stop_param_server` or `close` ends it.
            num_epochs: passes over the feed in one job; rows are decoded once.
            seed: of the shuffles; None draws one (it is in the history), or takes that of the run that is continued.
            progress: shows a line on stderr.

        Returns:
            With `feed_rdd` a `History`, else what the session's `run` returns.

        Raises:
            SessionClosedError: after `close`.
            ConfigError, FeedError, GraphError: arguments that cannot work, before a task starts; a feed without rows.
            CheckpointError: a restored session's first run has another `param_list` than the checkpoint.
            ServerUnreachableError, StagingError: executors that cannot take part, within seconds.
            WorkerFailedError: a worker raised or its task was given up; the session's variables are as they were.
            CombinerError: the combiner raised, or returned weights of the wrong shape.
        """
        self._require_open()
        if feed_rdd is None:
            return self._session.run(fetches, feed_dict, options, run_metadata)
        check_feed(feed_rdd, feed_name_list, param_list, run_metadata)
        plan = make_plan(
            feed_rdd,
            weight_combiner,
            shuffle_within_partition,
            num_epochs,
            seed,
            staleness=self._config.staleness,
            num_slots=lambda wanted: settled_slots(self._spark_context, wanted, self._config.start_timeout_s),
            restored=self._restored,
        )
        captured = self._capture(fetches, feed_name_list or (), param_list or (), feed_dict, options)
        with exclusively(self._running, plan.combiner):
            try:
                history = self._train(captured, plan, progress)
                if not server_reusable:
                    self.stop_param_server()
                return history
            except BaseException as error:
                self.stop_param_server()
                plan.combiner.reset_value()  # what it has seen is in no weights
                if isinstance(error, Exception) and not self._finalizer.alive:
                    raise SessionClosedError("this SparkSession was closed while it trained") from error
                raise

    @property
    def checkpoint_dir(self) -> str | None:
        """Where this session's runs write checkpoints, for `restore`; None where they write none."""
        return self._checkpoint_dir

    def status(self) -> Status | None:
        """How the run stands at this moment, for other threads to ask; None while no server runs."""
        server = self._server
        return None if server is None else server.status()

    def get_session(self) -> Any:
        """The TensorFlow session that was passed in."""
        return self._session

    def stop_param_server(self) -> None:
        """Ends the parameter server, if one runs. The next run starts another."""
        self._resources.stop_server()

    def close(self) -> None:
        """Ends the server and removes the temporary files, on the executors' hosts too. Idempotent."""
        self._finalizer()

    @property
    def _server(self) -> ParameterServer | None:
        return self._resources.server

    # One run

    def _train(self, captured: Captured, plan: RunPlan, progress: bool) -> History:
        config, layout = self._config, captured.spec.layout
        resume = self._restored and continued(self._restored, plan, config, layout)
        content = self._publisher.publish(captured.content, captured.spec.content_hash)
        server = self._resources.server_for(layout)
        weights = resume.weights if resume else captured.weights
        sync = SyncPlan(config.staleness, plan.num_first, config.start_timeout_s, config.recovery_timeout_s)
        run = server.begin_run(weights, plan.combiner, plan.num_partitions, sync=sync, resume=resume)
        address = address_of(server, config)
        self._check_executors(address)
        job = WorkerJob(
            address=address,
            run=run,
            spec=captured.spec,
            content=content,
            pushes=plan.combiner.pushes,
            moving_rate=plan.combiner.moving_rate,
            batch_size=config.batch_size,
            sync_interval=config.sync_interval,
            num_epochs=plan.num_epochs,
            shuffle=plan.shuffle,
            seed=plan.seed,
            cache_memory_bytes=config.cache_memory_bytes,
            tmp_dir=config.tmp_dir,
        )
        began = time.monotonic()
        planned = {"name": self._name, **planned_values(plan, config)}
        with self._resources.checkpoints(server, self._checkpoint_dir, planned) as checkpointer:
            line = ProgressLine(self._name, progress)
            if self._checkpoint_dir is not None:
                line.note(f"checkpoints, for SparkSession.restore, go to {self._checkpoint_dir}")
            group, description = f"tensorspark-{self._run_id}-{run}", f"tensorspark {self._name}: run {run}"
            run_job(
                plan.feed_rdd, job, server, line, group=group, description=f"{description}, {plan.num_epochs} epoch(s)"
            )
            if checkpointer is not None:
                checkpointer.write_last()
        seconds = time.monotonic() - began + (resume.seconds if resume else 0.0)
        return self._conclude(server, captured, plan, seconds)

    def _check_executors(self, address: ServerAddress) -> None:
        if self._checked != address:
            config = self._config
            require_ready(
                self._spark_context,
                address,
                hdfs_dir=config.hdfs_dir,
                tmp_dir=config.tmp_dir,
                run_id=self._run_id,
                user=self._user,
            )
            self._checked = address

    def _conclude(self, server: ParameterServer, captured: Captured, plan: RunPlan, seconds: float) -> History:
        from tensorspark.trainers import graph

        points, workers = server.records()
        layout = captured.spec.layout
        weights = layout.allocate()
        require_trained(workers, server.read_weights(weights))
        graph.assign(self._session, layout, weights)
        self._restored = None
        return History(
            name=self._name,
            num_steps=sum(worker.num_steps for worker in workers),
            num_samples=sum(worker.num_samples for worker in workers),
            seconds=seconds,
            seed=plan.seed,
            points=points,
            workers=workers,
        )

    # Checkpoints

    def _choose_checkpoint_dir(self, restored_url: str | None) -> str | None:
        if not self._config.checkpoint_interval_s or restored_url or self._config.hdfs_dir is None:
            return restored_url if self._config.checkpoint_interval_s else None
        return CheckpointDirectory.url_of_run(self._config.hdfs_dir, self._run_id)

    def _take_over(self, checkpoint: RunCheckpoint, url: str) -> None:
        from tensorspark.trainers import graph

        difference = graph.difference(self._session, checkpoint.layout)
        if difference:
            raise CheckpointError(
                f"the checkpoint in {url} is of another model: {difference}; make the session with the graph that was "
                f"trained"
            )
        graph.assign(self._session, checkpoint.layout, checkpoint.weights)
        self._restored = None if checkpoint.is_complete else checkpoint

    def _capture(
        self,
        fetches: Any,
        feed_names: Sequence[str],
        params: Iterable[Any],
        feed_dict: Mapping[Any, Any] | None,
        options: Any,
    ) -> Captured:
        from tensorspark.trainers import graph

        return graph.capture(
            self._session,
            fetches,
            feed_names,
            params,
            constants=feed_dict,
            config=self._session_config,
            options=options,
            num_threads=self._num_threads,
        )

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise SessionClosedError("this SparkSession is closed: make a new one to train on")
        if getattr(self._session, "_closed", False):
            raise SessionClosedError("the TensorFlow session is closed: make a new one, and a SparkSession for it")
