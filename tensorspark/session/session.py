"""`SparkSession`. Read its `fit` (in `session.fitting`) and `run` first, then `tensorspark.worker.run_partition`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyspark import RDD

from tensorspark.data.decoders import RowDecoder
from tensorspark.driver.arguments import RunPlan, arrange, as_combiner, as_seed, check_feed, checked_count
from tensorspark.errors import ConfigError, SessionClosedError, ShardLostError
from tensorspark.session.fitting import FittingSession
from tensorspark.weights.combiners import WeightCombiner


class SparkSession(FittingSession):
    """Trains a Keras model, or a TensorFlow session's graph, on a Spark cluster, through a parameter server.

    Args:
        spark_context: a SparkContext, or a pyspark SparkSession.
        session: what is trained: a compiled `keras.Model`, a function without arguments that builds one, a
            `FunctionTrainer`, or a `tf.compat.v1.Session` that holds the initialized variables. It holds the trained
            weights after `fit` or `run`.
        user: who to write to HDFS as (staging only); empty stands for the process's own user.
        name: shown in progress, history and Spark's web page.
        target: accepted for the original's programs; workers always run sessions of their own process.
        server_host, server_port, sync_interval, batch_size, hdfs_dir, tmp_dir: see `tensorspark.config.SETTINGS`; None
            takes the Spark configuration's value, then the default, as does what is not given.
        staleness: how workers are kept in step: 0 is bulk-synchronous, k > 0 stale-synchronous (the fastest worker
            leads the slowest by at most k synchronizations), None asynchronous.
        settings: any other row of `SETTINGS`, by its field, such as `log_dir` or `dashboard`.
        graph: the TensorFlow session's graph, or None.
        config: `tf.compat.v1.ConfigProto` of the workers' sessions. Thread counts that it leaves open become
            ``spark.task.cpus``.

    Raises:
        ConfigError: a setting that cannot work.
        ModelError: a Keras model that is not compiled.

    ::

        with tensorspark.SparkSession(spark, model, sync_interval=16, staleness=0) as session:
            history = session.fit(df, features="image", label="label", batch_size=64, epochs=3)

        with tensorspark.SparkSession(sc, sess, name="mnist", sync_interval=100, batch_size=100) as session:
            history = session.run(train_step, feed_rdd=rows, feed_name_list=["x:0", "y_:0"], param_list=[W, b],
                                  weight_combiner=DeltaWeightCombiner(), shuffle_within_partition=True)

    `close` runs at exit too. It ends the server and removes the temporary files; the model and the Spark context stay
    open: they are yours.
    """

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
            server_reusable: keeps the server for the next run; `stop_param_server` or `close` ends it. Without, it
                forgets the weights at the end, and closes its port unless that has the dashboard.
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
        model = self._graph_model("run")
        if feed_rdd is None:
            return self._session.run(fetches, feed_dict, options, run_metadata)
        check_feed(feed_rdd, feed_name_list, param_list, run_metadata)
        engine, staleness = self._engine, self._engine.config.gate_staleness
        checked_count("num_epochs", num_epochs)
        captured = model.capture(fetches, feed_name_list or (), param_list or (), feed_dict, options)
        arranged = arrange(feed_rdd, engine.num_slots, at_once=staleness == 0, restored=engine.restored)
        plan = RunPlan(
            feed_rdd=arranged.feed_rdd,
            decoder=RowDecoder(captured.spec.columns, engine.config.batch_size),
            num_partitions=arranged.num_partitions,
            num_first=arranged.num_first,
            combiner=as_combiner(weight_combiner, arranged, staleness, engine.restored),
            batch_size=engine.config.batch_size,
            shuffle=bool(shuffle_within_partition),
            num_epochs=num_epochs,
            seed=as_seed(seed, engine.restored),
        )
        while True:
            try:
                return engine.train(model, captured, plan, progress=progress, keeps_server=server_reusable)
            except ShardLostError as error:
                engine.recover(model, error)

    def _graph_model(self, method: str) -> Any:
        if not hasattr(self._model, "session"):
            raise ConfigError(f"{method} is for a tf.compat.v1.Session, got {type(self._session).__name__}: call fit")
        if self._model.is_closed:
            raise SessionClosedError("the TensorFlow session is closed: make a new one, and a SparkSession for it")
        return self._model
