"""Training runs on a Spark cluster: server, executors, checkpoints and job, whatever the model."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pyspark import SparkContext

from tensorspark.config import Config
from tensorspark.driver.arguments import RunPlan
from tensorspark.driver.checkpoints import CheckpointDirectory
from tensorspark.driver.continuing import continued, planned_values
from tensorspark.driver.describing import label_of, run_began
from tensorspark.driver.jobs import settled_slots
from tensorspark.driver.preflight import require_ready
from tensorspark.driver.progress import ProgressLine
from tensorspark.driver.publishing import Publisher
from tensorspark.driver.resources import Resources, address_of
from tensorspark.driver.shard_tasks import ShardTasks
from tensorspark.driver.training import EpochDriver, JobLabel, exclusively, require_trained, run_job
from tensorspark.driver.watching import RunWatch, Watchers
from tensorspark.errors import (
    CheckpointError,
    ConfigError,
    SessionClosedError,
    ShardLostError,
    StagingError,
    WorkerFailedError,
)
from tensorspark.history import History
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import EpochPlan
from tensorspark.ps.sync import SyncPlan
from tensorspark.shards.processes import ShardProcesses
from tensorspark.shards.sharded_server import AnyServer, ShardedServer
from tensorspark.telemetry.records import mode_of
from tensorspark.weights.compression import Compression
from tensorspark.worker import WorkerJob

if TYPE_CHECKING:
    from tensorspark.trainers.base import Captured, DriverModel


logger = logging.getLogger(__name__)

_MAX_RECOVERIES = 3


class Engine:
    """What a session trains with: one parameter server, one directory of files, one run after the other.

    Args:
        name: shown in progress, history and Spark's web page.
        user: who to write to HDFS as.
        restored_url: directory of the checkpoints that the session goes on from, and to which more go.
        wants_checkpoints: whether the user asked for them, so that it is an error where they have no place.

    Raises:
        ConfigError: checkpoints are asked for, and have no place.
    """

    def __init__(
        self,
        spark_context: SparkContext,
        config: Config,
        *,
        name: str,
        user: str,
        restored_url: str | None = None,
        wants_checkpoints: bool = False,
    ) -> None:
        self.spark_context = spark_context
        self.config = config
        self._compression = Compression(config.compression, config.pull_compression)
        self.restored: RunCheckpoint | None = None
        self.name = name
        self.user = user
        self._run_id = secrets.token_hex(8)
        self.checkpoint_dir = self._choose_checkpoint_dir(restored_url)
        if wants_checkpoints and self.checkpoint_dir is None:
            raise ConfigError("checkpoint_interval_s needs hdfs_dir (or spark.hdfs.dir): checkpoints go there")
        host = config.server_host or spark_context.getConf().get("spark.driver.host", "localhost")
        self._checked: tuple[ServerAddress, ...] = ()
        self._num_recoveries = 0
        self._is_recovering = False
        self._attempt_of = ""  # the run: what its checkpoints are known by, of all its attempts
        self._num_jobs = 0
        self._running = threading.Lock()
        self.watchers = Watchers(config, user=user, run_id=self._run_id)
        self.watch: RunWatch | None = None
        self._publisher = Publisher(spark_context, self._run_id, config.hdfs_dir, config.tmp_dir, user)
        start_shards: Any = ShardProcesses
        if config.num_task_shards:
            start_shards = functools.partial(ShardTasks, spark_context, f"tensorspark-{self._run_id}-shards")
        self._resources = Resources(
            self._publisher, config, host or "localhost", user, start_shards, self.watchers.site
        )
        # Runs at exit too, and when the session is forgotten: who makes it anew in a shell finds its port free.
        self.close = weakref.finalize(self, self._resources.close)

    @property
    def server(self) -> AnyServer | None:
        return self._resources.server

    def num_slots(self, wanted: int) -> int:
        """How many tasks can run at once, once there are as many as `wanted`, or no more will come."""
        taken = self.config.num_task_shards
        num = settled_slots(self.spark_context, wanted + taken, self.config.start_timeout_s)
        if taken and num <= taken:
            raise ConfigError(
                f"shards_on='executors' with num_shards={self.config.num_shards} takes {taken} slots, and the cluster "
                f"has {num}: none is left to train on; use fewer shards, more executors, or shards_on='driver'"
            )
        return num - taken

    def recover(self, model: DriverModel, error: ShardLostError) -> None:
        """Has the next run go on from the newest checkpoint, as an executor that served a shard has died.

        Raises:
            ShardLostError: `error`, where that is not so, there is none, or it has happened too often.
        """
        if not self.config.num_task_shards or self.checkpoint_dir is None or self._num_recoveries >= _MAX_RECOVERIES:
            raise error
        self._num_recoveries += 1
        try:
            checkpoint = CheckpointDirectory(self.checkpoint_dir, user=self.user).read_newest()
        except (CheckpointError, StagingError) as problem:
            raise error from problem
        if checkpoint.is_complete or checkpoint.plan.get("attempt_of") != self._attempt_of:  # of a run before
            raise error
        self._is_recovering = True
        logger.warning("%s; the run goes on from its checkpoint of version %d", error, checkpoint.version)
        self.take_over(checkpoint, model)

    def take_over(self, checkpoint: RunCheckpoint, model: DriverModel) -> None:
        """Gives the model a checkpoint's weights; the next run continues the one that wrote it, if that was not over.

        Raises:
            CheckpointError: it is of another model: says which tensors differ.
        """
        difference = model.difference(checkpoint.layout)
        if difference:
            raise CheckpointError(
                f"the checkpoint in {self.checkpoint_dir} is of another model: {difference}; make the session with the "
                f"model that was trained"
            )
        model.assign(checkpoint.layout, checkpoint.weights)
        self.restored = None if checkpoint.is_complete else checkpoint

    def train(
        self,
        model: DriverModel,
        captured: Captured,
        plan: RunPlan,
        *,
        progress: bool,
        keeps_server: bool = False,
        epochs: EpochDriver | None = None,
        planned: Mapping[str, Any] | None = None,
    ) -> History:
        """Trains in one Spark job; the model holds the trained weights then, or, after an error, what it held before
        or was given at the end of an epoch.

        Args:
            keeps_server: for the next run.
            epochs: what is done at the end of each epoch, where `plan.has_epochs`.
            planned: more for checkpoints to say of the run, read anew for each.

        Raises:
            See `SparkSession.run`.
        """
        self._compression.require_fit(plan.combiner)
        if self.config.overlap and plan.combiner.pushes == "elastic":
            raise ConfigError(
                f"overlap is not for {type(plan.combiner).__name__}: what a worker pushes depends on what it pulls at "
                f"that moment; leave overlap out, or take MeanDeltaCombiner"
            )
        with exclusively(self._running, plan.combiner):
            try:
                history = self._train(model, captured, plan, progress, epochs, planned or {})
                if not keeps_server:
                    self._retire_server()
                return history
            except BaseException as error:
                plan.combiner.reset_value()  # what it has seen is in no weights
                try:
                    if self.watch is not None:
                        self.watch.end(error)
                finally:
                    self._retire_server()
                if isinstance(error, Exception) and not self.close.alive:
                    raise SessionClosedError("this SparkSession was closed while it trained") from error
                raise

    def stop_server(self) -> None:
        self._resources.stop_server()

    def _retire_server(self) -> None:
        """The run is over: nothing of it is kept but, where there is a dashboard, the page that shows how it ended."""
        if self.watchers.has_dashboard:
            self._resources.retire_server()
        else:
            self.stop_server()

    def _train(
        self,
        model: DriverModel,
        captured: Captured,
        plan: RunPlan,
        progress: bool,
        epochs: EpochDriver | None,
        planned: Mapping[str, Any],
    ) -> History:
        if not self._is_recovering:
            self._attempt_of, self._num_recoveries = secrets.token_hex(8), 0
        self._is_recovering = False
        layout = captured.spec.layout
        resume = self.restored and continued(self.restored, plan, self.config, layout)
        self._num_jobs += 1
        label = label_of(self.name, f"{self._run_id}-{self._num_jobs}", plan, self.config)
        server, job, watch = self._begin(captured, plan, resume, label)
        began = time.monotonic()
        line = ProgressLine(self.name, progress)
        for note in (*self.watchers.notes(server), *plan.notes):
            line.note(note)
        with self._checkpoints(server, plan, planned, line, watch) as write_last:
            with _blaming_lost_shards(server), watch.timed("Spark job"):
                run_job(plan.feed_rdd, job, server, line, label, epochs)
            write_last()
        seconds = time.monotonic() - began + (resume.seconds if resume else 0.0)
        points, workers = server.records()
        weights = layout.allocate()
        was_stopped = epochs is not None and epochs.wants_stop
        require_trained(workers, server.read_weights(weights), was_stopped=was_stopped)
        model.assign(layout, weights)
        watch.end(None, was_stopped=was_stopped)
        if isinstance(server, ShardedServer):
            server.end_run()
        self.restored = None
        return History(
            name=self.name,
            num_steps=sum(worker.num_steps for worker in workers),
            num_samples=sum(worker.num_samples for worker in workers),
            seconds=seconds,
            seed=plan.seed,
            points=points,
            workers=workers,
            mode=mode_of(self.config.staleness),
            dashboard_url=self.watchers.url(server),
            log_dir=watch.log_dir,
            trace=watch.trace_url,
        )

    def _begin(
        self, captured: Captured, plan: RunPlan, resume: RunCheckpoint | None, label: JobLabel
    ) -> tuple[AnyServer, WorkerJob, RunWatch]:
        config, spec = self.config, captured.spec
        content = self._publisher.publish(captured.content, spec.content_hash)
        server = self._resources.server_for(spec.layout, plan.combiner)
        if resume and not isinstance(server, ShardedServer):
            resume = resume.without_parts()
        run = server.begin_run(
            resume.weights if resume else captured.weights,
            plan.combiner,
            plan.num_partitions,
            sync=SyncPlan(config.gate_staleness, plan.num_first, config.start_timeout_s, config.recovery_timeout_s),
            resume=resume,
            epochs=_epoch_plan(plan, spec.num_totals),
            compression=self._compression,
            keeps_spans=self.watchers.keeps_spans,
            traces=self.watchers.traces,
        )
        began = run_began(self.spark_context, self.name, config, plan, spec.layout, self._num_jobs, resume, label)
        self.watch = watch = self.watchers.watch(server, began, captured.graph)
        address = address_of(server, config)
        shards = server.places if isinstance(server, ShardedServer) else ()
        with watch.timed("preflight"):
            self._check_executors(address, tuple(place.address for place in shards[1:]))
        job = WorkerJob(
            address=address,
            run=run,
            spec=spec,
            content=content,
            decoder=plan.decoder,
            pushes=plan.combiner.pushes,
            moving_rate=plan.combiner.moving_rate,
            batch_size=plan.batch_size,
            sync_interval=config.sync_interval,
            num_epochs=plan.num_epochs,
            shuffle=plan.shuffle,
            seed=plan.seed,
            cache_memory_bytes=config.cache_memory_bytes,
            tmp_dir=config.tmp_dir,
            has_epochs=plan.has_epochs,
            validation_split=plan.validation_split,
            overlap=config.overlap,
            compression=self._compression,
            shards=shards,
            traces=self.watchers.traces,
        )
        return server, job, watch

    def _check_executors(self, address: ServerAddress, others: tuple[ServerAddress, ...]) -> None:
        """Whether they can train. Shards are elsewhere in each run, so with them each is checked."""
        if self._checked != (address, *others):
            config = self.config
            require_ready(
                self.spark_context,
                address,
                hdfs_dir=config.hdfs_dir,
                tmp_dir=config.tmp_dir,
                run_id=self._run_id,
                user=self.user,
                shards=others,
            )
            self._checked = (address, *others)

    @contextlib.contextmanager
    def _checkpoints(
        self, server: AnyServer, plan: RunPlan, planned: Mapping[str, Any], line: ProgressLine, watch: RunWatch
    ) -> Iterator[Callable[[], object]]:
        def described() -> dict[str, Any]:
            return {"name": self.name, "attempt_of": self._attempt_of, **planned_values(plan, self.config), **planned}

        with self._resources.checkpoints(
            server, self.checkpoint_dir, described, watch.checkpoint_written
        ) as checkpointer:
            if self.checkpoint_dir is not None:
                line.note(f"checkpoints, for SparkSession.restore, go to {self.checkpoint_dir}")
            yield (lambda: None) if checkpointer is None else checkpointer.write_last

    def _choose_checkpoint_dir(self, restored_url: str | None) -> str | None:
        if not self.config.checkpoint_interval_s:
            return None
        if restored_url or self.config.hdfs_dir is None:
            return restored_url
        return CheckpointDirectory.url_of_run(self.config.hdfs_dir, self._run_id)


@contextlib.contextmanager
def _blaming_lost_shards(server: AnyServer) -> Iterator[None]:
    """Where workers failed as a shard is gone, raises that: they may notice it before the driver does.

    Raises:
        ShardLostError: names the shard, and comes from the workers' error.
    """
    try:
        yield
    except WorkerFailedError as error:
        lost = server.lost_shard() if isinstance(server, ShardedServer) else None
        if lost is not None:
            raise lost from error
        raise


def _epoch_plan(plan: RunPlan, num_totals: int) -> EpochPlan | None:
    return EpochPlan(plan.num_epochs, plan.validates, num_totals, plan.values) if plan.has_epochs else None
