"""The driver's side: `SparkSession`. Read `SparkSession.run` first, then `tensorspark.worker.run_partition`."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyspark import RDD, TaskContext

from tensorspark import config as configuration
from tensorspark.driver.arguments import RunPlan, as_spark_context, as_tensorflow_session, check_feed, make_plan
from tensorspark.driver.feeding import require_whole_partitions
from tensorspark.driver.jobs import SparkJob, num_slots, summary
from tensorspark.driver.preflight import check_executors
from tensorspark.driver.progress import ProgressLine
from tensorspark.driver.publishing import Publisher
from tensorspark.errors import ConfigError, SessionClosedError, WorkerFailedError
from tensorspark.history import History
from tensorspark.ps.client import ServerAddress
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.worker import WorkerJob, run_partition

if TYPE_CHECKING:
    from tensorspark.trainers.graph import Captured

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_FAILED_JOB_GRACE_S = 1.0


class SparkSession:
    """Trains a TensorFlow session's graph on a Spark cluster, through a parameter server on the driver.

    Args:
        spark_context: a SparkContext, or a pyspark SparkSession.
        session: the `tf.compat.v1.Session` that holds the initialized variables. After a run it holds the trained ones.
        user: who to write to HDFS as (staging only); empty stands for the process's own user.
        name: shown in progress, history and Spark's web page.
        target: accepted for the original's programs; workers always run sessions of their own process.
        server_host, server_port, sync_interval, batch_size: see `tensorspark.config.SETTINGS`, as for all from
            `hdfs_dir` on; None takes the Spark configuration's value, then the default.
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
        hdfs_dir: str | None = None,
        tmp_dir: str | None = None,
        connect_timeout_s: float | None = None,
        io_timeout_s: float | None = None,
        receive_buffer_bytes: int | None = None,
        cache_memory_bytes: int | None = None,
    ) -> None:
        self._spark_context = as_spark_context(spark_context)
        self._session = as_tensorflow_session(session, graph)
        self._name = name
        self._session_config = config
        arguments = {
            "server_host": server_host,
            "server_port": server_port,
            "sync_interval": sync_interval,
            "batch_size": batch_size,
            "hdfs_dir": hdfs_dir,
            "tmp_dir": tmp_dir,
            "connect_timeout_s": connect_timeout_s,
            "io_timeout_s": io_timeout_s,
            "receive_buffer_bytes": receive_buffer_bytes,
            "cache_memory_bytes": cache_memory_bytes,
        }
        spark_conf = dict(self._spark_context.getConf().getAll())
        self._config = configuration.resolve(arguments, spark_conf, self._defaults)
        self._server_host = self._config.server_host or spark_conf.get("spark.driver.host", "localhost")
        self._num_threads = int(spark_conf.get("spark.task.cpus", "1"))
        self._run_id = secrets.token_hex(8)
        self._checked: tuple[ServerAddress, Callable[[], bytes]] | None = None
        self._running = threading.Lock()
        self._publisher = Publisher(
            self._spark_context, self._run_id, self._config.hdfs_dir, self._config.tmp_dir, user or ""
        )
        self._lasting = _Lasting(self._publisher)
        # Runs at exit too, and when the session is forgotten: who makes it anew in a shell finds its port free.
        self._finalizer = weakref.finalize(self, self._lasting.close)
        if target:
            logger.warning("target=%r is ignored: workers run sessions of their own process", target)

    def __enter__(self) -> SparkSession:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
            weight_combiner: how pushes are merged; None takes `MeanWeightCombiner` over the feed's
                partitions.
            shuffle_within_partition: shuffles each partition's rows anew in every epoch.
            options: `RunOptions` for every step.
            run_metadata: only without `feed_rdd`; workers collect none.
            server_reusable: keeps the server for the next run; `stop_param_server` or `close` ends it.
            num_epochs: passes over the feed in one job; rows are decoded once.
            seed: of the shuffles; None draws one (it is in the history).
            progress: shows a line on stderr.

        Returns:
            With `feed_rdd` a `History`, else what the session's `run` returns.

        Raises:
            SessionClosedError: after `close`.
            ConfigError, FeedError, GraphError: arguments that cannot work, before a task starts.
            ServerUnreachableError, StagingError: executors that cannot take part, within seconds.
            WorkerFailedError: a worker raised or its task was given up; the session's variables are as they were.
            CombinerError: the combiner raised, or returned weights of the wrong shape.
        """
        self._require_open()
        if feed_rdd is None:
            return self._session.run(fetches, feed_dict, options, run_metadata)
        check_feed(feed_rdd, feed_name_list, param_list, run_metadata)
        plan = make_plan(feed_rdd, weight_combiner, shuffle_within_partition, num_epochs, seed)
        captured = self._capture(fetches, feed_name_list or (), param_list or (), feed_dict, options)
        if not self._running.acquire(blocking=False):
            raise ConfigError("this SparkSession is training already: one feed at a time, or a session for each thread")
        try:
            history = self._train(feed_rdd, captured, plan, progress)
            if not server_reusable:
                self.stop_param_server()
            return history
        except BaseException as error:
            self.stop_param_server()
            plan.combiner.reset_value()  # what it has seen is in no weights
            if isinstance(error, Exception) and not self._finalizer.alive:
                raise SessionClosedError("this SparkSession was closed while it trained") from error
            raise
        finally:
            self._running.release()

    def get_session(self) -> Any:
        """The TensorFlow session that was passed in."""
        return self._session

    def stop_param_server(self) -> None:
        """Ends the parameter server, if one runs. The next run starts another."""
        self._lasting.stop_server()

    def close(self) -> None:
        """Ends the server and removes the temporary files, on the executors' hosts too. Idempotent."""
        self._finalizer()

    @property
    def _server(self) -> ParameterServer | None:
        return self._lasting.server

    # One run

    def _train(self, feed_rdd: RDD[Any], captured: Captured, plan: RunPlan, progress: bool) -> History:
        content = self._publisher.publish(captured.content, captured.spec.content_hash)
        server = self._server_for(captured)
        run = server.begin_run(captured.weights, plan.combiner, plan.num_partitions)
        config = self._config
        address = ServerAddress(
            self._server_host, server.port, server.token, config.connect_timeout_s, config.io_timeout_s
        )
        self._check_executors(address, content, plan)
        job = WorkerJob(
            address=address,
            run=run,
            spec=captured.spec,
            content=content,
            pushes=plan.combiner.pushes,
            batch_size=config.batch_size,
            sync_interval=config.sync_interval,
            num_epochs=plan.num_epochs,
            shuffle=plan.shuffle,
            seed=plan.seed,
            cache_memory_bytes=config.cache_memory_bytes,
            tmp_dir=config.tmp_dir,
        )
        began = time.monotonic()
        self._run_job(feed_rdd, job, server, run, progress)
        return self._conclude(server, captured, plan, time.monotonic() - began)

    def _check_executors(self, address: ServerAddress, content: Callable[[], bytes], plan: RunPlan) -> None:
        if self._checked == (address, content):
            return
        num_tasks = max(1, min(plan.num_partitions, num_slots(self._spark_context)))
        check_executors(self._spark_context, address, content, self._config.tmp_dir, self._run_id, num_tasks)
        self._checked = (address, content)

    def _run_job(self, feed_rdd: RDD[Any], job: WorkerJob, server: ParameterServer, run: int, progress: bool) -> None:
        tasks = feed_rdd.mapPartitionsWithIndex(_task(job))
        require_whole_partitions(tasks)
        line = ProgressLine(self._name, progress)
        group = f"tensorspark-{self._run_id}-{run}"
        description = f"tensorspark {self._name}: run {run}, {job.num_epochs} epoch(s)"
        try:
            with SparkJob(self._spark_context, tasks.count, group=group, description=description) as spark_job:
                while not spark_job.wait(_POLL_S):
                    line.show(server.status())
                    if server.failure() is not None:
                        spark_job.cancel()
                        spark_job.wait(_FAILED_JOB_GRACE_S)
                        break
            _raise_failure(server, spark_job.error)
        except BaseException:
            line.abandon()
            raise
        line.show(server.status(), last=True)

    def _conclude(self, server: ParameterServer, captured: Captured, plan: RunPlan, seconds: float) -> History:
        from tensorspark.trainers import graph

        layout = captured.spec.layout
        weights = layout.allocate()
        server.read_weights(weights)
        graph.assign(self._session, layout, weights)
        points, workers = server.records()
        history = History(
            name=self._name,
            num_steps=sum(worker.num_steps for worker in workers),
            num_samples=sum(worker.num_samples for worker in workers),
            seconds=seconds,
            seed=plan.seed,
            points=points,
            workers=workers,
        )
        if not history.num_samples:
            logger.warning("%s: the feed has no rows: nothing was trained", self._name or "run")
        return history

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

    # What lasts longer than a run

    def _server_for(self, captured: Captured) -> ParameterServer:
        layout = captured.spec.layout
        if self._server is not None and self._server.layout.fingerprint != layout.fingerprint:
            self.stop_param_server()
        if self._server is None:
            self._lasting.server = ParameterServer(
                layout,
                self._server_host,
                self._config.server_port,
                receive_buffer_bytes=self._config.receive_buffer_bytes,
                io_timeout_s=self._config.io_timeout_s,
            )
        assert self._server is not None
        return self._server

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise SessionClosedError("this SparkSession is closed: make a new one to train on")
        if getattr(self._session, "_closed", False):
            raise SessionClosedError("the TensorFlow session is closed: make a new one, and a SparkSession for it")


class _Lasting:
    """What outlasts a run and must not outlast the session, which it does not know, so that it can be forgotten."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.server: ParameterServer | None = None

    def stop_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()

    def close(self) -> None:
        try:
            self.stop_server()
        finally:
            self._publisher.remove()


def _task(job: WorkerJob) -> Callable[[int, Iterable[Any]], Iterator[None]]:
    def train(partition: int, rows: Iterable[Any]) -> Iterator[None]:
        context = TaskContext.get()
        assert context is not None
        run_partition(job, partition, context.taskAttemptId(), rows)
        return iter(())

    return train


def _raise_failure(server: ParameterServer, job_error: BaseException | None) -> None:
    """Raises what went wrong: what a worker or the combiner reported, else what Spark says."""
    reported = server.failure()
    if reported is not None:
        raise reported from job_error
    if job_error is not None:
        raise WorkerFailedError(f"Spark gave the training job up: {summary(job_error)}") from job_error
