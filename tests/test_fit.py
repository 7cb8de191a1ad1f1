"""`SparkSession.fit`, `evaluate`, `predict`, `save` and `export` on a real local Spark with two slots."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame
from pyspark.sql import SparkSession as SqlSession

from tensorspark import DeltaWeightCombiner, FunctionTrainer, MeanDeltaCombiner, ServerAdam, SparkSession
from tensorspark.driver.checkpoints import CheckpointDirectory
from tensorspark.errors import CheckpointError, ConfigError, FeedError, ModelError, WorkerFailedError
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

if TYPE_CHECKING:
    pass

NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 240, 6, 3
SETTINGS: dict[str, Any] = {"staleness": 0, "sync_interval": 2, "batch_size": 10}


def data(num_rows: int = NUM_ROWS, seed: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows `[num_rows, 6]`, and their classes by the largest of three sums."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(num_rows, NUM_FEATURES)).astype(np.float32)
    return x, (x.reshape(num_rows, NUM_CLASSES, -1).sum(axis=2)).argmax(axis=1)


def frame(spark: SqlSession, x: Any, y: Any, num_partitions: int = 2, **more: Any) -> DataFrame:
    names = ["x", "y", *more]
    rows = [(a.tolist(), int(b), *rest) for a, b, *rest in zip(x, y, *more.values(), strict=True)]
    schema = "x array<float>, y long" + "".join(f", {name} double" for name in more)
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, num_partitions), schema)
    assert df.columns == names
    return df


def classifier(optimizer: Any = None, metrics: Any = ("accuracy",), **more: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((NUM_FEATURES,)), keras.layers.Dense(NUM_CLASSES, "softmax")])
    optimizer = optimizer or keras.optimizers.SGD(0.5)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=list(metrics), **more)
    return model


def bits(model: keras.Model) -> list[bytes]:
    return [weight.tobytes() for weight in model.get_weights()]


def fit(spark: SqlSession, model: Any, *args: Any, settings: Any = None, **options: Any) -> Any:
    with SparkSession(spark, model, **{**SETTINGS, **(settings or {})}) as session:
        return session.fit(*args, **{"progress": False, "seed": 3, **options})


# What is learned


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_a_dataframe_is_learned_and_what_is_reported_is_what_keras_reports(
    spark: SqlSession, staleness: int | None
) -> None:
    x, y = data()
    x_test, y_test = data(60, seed=2)
    model = classifier()
    history = fit(
        spark, model, frame(spark, x, y), features="x", label="y", epochs=4,
        validation_data=frame(spark, x_test, y_test, 3), settings={"staleness": staleness},
    )  # fmt: skip
    assert list(history.history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert [len(values) for values in history.history.values()] == [4] * 4
    assert history.epoch == (0, 1, 2, 3)
    expected = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
    assert history.history["val_loss"][-1] == pytest.approx(expected["loss"], rel=1e-5)
    assert history.history["val_accuracy"][-1] == pytest.approx(expected["accuracy"])
    assert expected["accuracy"] > 0.8 > history.history["accuracy"][0]
    assert history.num_samples == 4 * NUM_ROWS


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
def test_bulk_synchronous_steps_of_two_workers_are_single_process_sgd_on_the_joined_batches(
    spark: SqlSession, scale: int, schedule: bool
) -> None:
    """With the learning rate as it is, or multiplied by the number of workers."""
    x, y = data()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([10_000], [0.3, 0.1]) if schedule else 0.3
    model, single = classifier(keras.optimizers.SGD(rate)), classifier(keras.optimizers.SGD(0.3 * scale))
    fit(
        spark, model, frame(spark, x, y), features="x", label="y", shuffle=False, scale_learning_rate=scale == 2,
        settings={"sync_interval": 1},
    )  # fmt: skip
    half = NUM_ROWS // 2
    for start in range(0, half, 10):
        rows = [*range(start, start + 10), *range(half + start, half + start + 10)]
        single.train_on_batch(x[rows], y[rows])
    for ours, theirs in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    if not schedule:
        assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("combiner", "expected"), [(None, True), (MeanDeltaCombiner(), True), (DeltaWeightCombiner(), False)]
)
def test_who_takes_the_mean_is_told_of_the_scaled_learning_rate(
    spark: SqlSession, capfd: pytest.CaptureFixture[str], combiner: Any, expected: bool
) -> None:
    x, y = data(40)
    fit(spark, classifier(), frame(spark, x, y), features="x", label="y", weight_combiner=combiner, progress=True)
    assert ("2 workers, learning rate times 2" in capfd.readouterr().err) == expected


def test_bulk_synchronous_fits_are_equal_to_the_last_bit_also_when_a_worker_dies(
    spark: SqlSession, tmp_path: Path
) -> None:
    x, y = data(250)
    marker = tmp_path / "died"

    def die_once(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            if (index, number) == (1, 60) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    rows = [(a, int(b)) for a, b in zip(x, y, strict=True)]
    undisturbed, killed = classifier(), classifier()
    options: dict[str, Any] = {"epochs": 3, "shuffle": False, "validation_split": 0.1}
    expected = fit(spark, undisturbed, spark.sparkContext.parallelize(rows, 2), **options)
    feed = spark.sparkContext.parallelize(rows, 2).mapPartitionsWithIndex(die_once)
    history = fit(spark, killed, feed, **options)
    assert marker.exists()
    assert bits(killed) == bits(undisturbed)
    assert bits(killed) != bits(classifier())
    assert history.history == expected.history


def test_metrics_are_those_over_all_rows_though_partitions_differ_in_size(spark: SqlSession) -> None:
    x, y = data(100)
    parts = [(a, float(b == 0)) for a, b in zip(x, y, strict=True)]
    sizes = [(0, 83), (83, 100)]
    rdd = spark.sparkContext.parallelize(sizes, 2).flatMap(lambda bounds: parts[bounds[0] : bounds[1]])
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((NUM_FEATURES,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    history = fit(spark, model, rdd, epochs=1, validation_data=rdd, settings={"batch_size": 7})
    expected = model.evaluate(x, (y == 0).astype(np.float32), verbose=0, return_dict=True)
    for name in ("loss", "auc"):  # the learning rate is 0: training saw the same weights
        assert history.history[name][0] == pytest.approx(expected[name], rel=1e-5)
        assert history.history[f"val_{name}"][0] == pytest.approx(expected[name], rel=1e-5)


def test_held_out_labels_of_another_dtype_become_what_the_training_rows_are(spark: SqlSession) -> None:
    x, y = data(40)
    model = classifier()
    held_out = (x, y.astype(np.int32))
    history = fit(spark, model, frame(spark, x, y), features="x", label="y", validation_data=held_out)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert {name: history.history[f"val_{name}"][0] for name in expected} == pytest.approx(expected, rel=1e-5)


# What may be fed


def test_every_kind_of_input_trains_the_same(spark: SqlSession) -> None:
    x, y = data(80)
    halves = [(x[:40], y[:40]), (x[40:], y[40:])]
    context = spark.sparkContext

    def dataset(part: Any) -> tf.data.Dataset:
        rows = slice(part.shard_index * 40, part.shard_index * 40 + 40)
        return tf.data.Dataset.from_tensor_slices((x[rows], y[rows]))

    vectors = spark.createDataFrame(
        context.parallelize([(Vectors.dense(a.tolist()), float(b)) for a, b in zip(x, y, strict=True)], 2), ["v", "y"]
    )
    parts = spark.createDataFrame(
        context.parallelize([(*a.tolist(), int(b)) for a, b in zip(x, y, strict=True)], 2), [*"abcdef", "y"]
    )
    raw = spark.createDataFrame(
        context.parallelize([(bytearray(a.tobytes()), int(b)) for a, b in zip(x, y, strict=True)], 2), ["r", "y"]
    )
    feeds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((frame(spark, x, y),), {"features": "x", "label": "y"}),
        ((vectors,), {"features": "v", "label": "y"}),
        ((parts,), {"features": [*"abcdef"], "label": "y"}),
        ((raw,), {"features": "r", "label": "y"}),
        ((context.parallelize(list(zip(x, y, strict=True)), 2),), {}),
        ((context.parallelize(halves, 2),), {}),
        ((x, y), {}),
        ((dataset,), {}),
    ]
    trained = []
    for arguments, options in feeds:
        model = classifier()
        history = fit(spark, model, *arguments, epochs=2, **options)
        assert history.num_samples == 160
        trained.append(bits(model))
    assert trained == [trained[0]] * len(feeds)
    assert trained[0] != bits(classifier())


def test_several_inputs_and_outputs_and_weights_are_fed_by_name(spark: SqlSession) -> None:
    x, y = data(60)
    weights = np.linspace(0.5, 2.0, 60)

    def build() -> keras.Model:
        keras.utils.set_random_seed(4)
        left, right = keras.Input((NUM_FEATURES,), name="left"), keras.Input((1,), name="right")
        joined = keras.layers.Concatenate()([left, right])
        outputs = {
            "kind": keras.layers.Dense(NUM_CLASSES, "softmax", name="kind")(joined),
            "size": keras.layers.Dense(1, name="size")(joined),
        }
        model = keras.Model({"left": left, "right": right}, outputs)
        model.compile(keras.optimizers.SGD(0.1), {"kind": "sparse_categorical_crossentropy", "size": "mse"})
        return model

    df = frame(spark, x, y, 1, r=weights.tolist(), size=(weights * 2).tolist(), w=weights.tolist())
    model, single = build(), build()
    history = fit(
        spark, model, df, features={"right": "r", "left": "x"}, label={"size": "size", "kind": "y"}, sample_weight="w",
        shuffle=False, epochs=2,
    )  # fmt: skip
    inputs = {"left": x, "right": weights.astype(np.float32)[:, None]}
    labels = {"kind": y, "size": (weights * 2).astype(np.float32)}
    expected = single.fit(
        inputs, labels, sample_weight=weights.astype(np.float32), batch_size=10, epochs=2, shuffle=False, verbose=0
    )
    assert history.history.keys() == expected.history.keys()
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-4)
    for ours, theirs in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# What a model may be


@pytest.mark.parametrize("combiner", [None, DeltaWeightCombiner, lambda: ServerAdam(0.05)])
def test_batch_statistics_are_averaged_by_any_combiner(spark: SqlSession, combiner: Callable[[], Any] | None) -> None:
    x, y = data()
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((NUM_FEATURES,)), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(3, "softmax")]
    )
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    fit(
        spark, model, frame(spark, x * 3 + 5, y), features="x", label="y", epochs=2,
        weight_combiner=combiner and combiner(),
    )  # fmt: skip
    normalization = model.layers[0]
    np.testing.assert_allclose(normalization.moving_mean.numpy(), (x * 3 + 5).mean(axis=0), atol=1.2)
    np.testing.assert_allclose(normalization.moving_variance.numpy(), (x * 3).var(axis=0), rtol=0.6)


def test_a_builder_and_optimizer_slots_that_are_averaged(spark: SqlSession) -> None:
    x, y = data()
    history = fit(
        spark, lambda: classifier(keras.optimizers.Adam(0.05)), frame(spark, x, y), features="x", label="y", epochs=3,
        average_optimizer_state=True,
    )  # fmt: skip
    assert history.history["accuracy"][-1] > 0.8


# Keras reads the rate in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_learning_rate_that_a_callback_sets_reaches_the_workers(spark: SqlSession) -> None:
    x, y = data()
    model = classifier()
    seen: list[list[bytes]] = []
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.25 if epoch == 0 else 0.0),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(bits(model))),
    ]
    history = fit(spark, model, frame(spark, x, y), features="x", label="y", epochs=3, callbacks=callbacks)
    assert seen[0] == seen[1] == seen[2] != bits(classifier())
    slower = classifier(keras.optimizers.SGD(0.25))
    fit(spark, slower, frame(spark, x, y), features="x", label="y")
    assert bits(slower) == bits(model)
    np.testing.assert_allclose(history.history["learning_rate"], [0.25, 0.0, 0.0])


def test_a_schedule_counts_the_steps_of_all_workers_and_goes_on_in_the_next_fit(spark: SqlSession) -> None:
    x, y = data()
    # 24 steps of two workers: the rate is 0 from the 24th on, so that the second fit changes nothing.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([23], [0.5, 0.0])
    model = classifier(keras.optimizers.SGD(schedule))
    seen: list[list[bytes]] = []
    with SparkSession(spark, model, **SETTINGS) as session:
        for _ in range(2):
            session.fit(frame(spark, x, y), features="x", label="y", progress=False, seed=3)
            seen.append(bits(model))
    assert seen[0] == seen[1] != bits(classifier())


def test_a_layer_that_was_adapted_travels_with_its_vocabulary(spark: SqlSession) -> None:
    words = np.array([["good day"], ["bad day"]] * 40)
    vectorizer = keras.layers.TextVectorization(output_mode="multi_hot")
    vectorizer.adapt(words)
    keras.utils.set_random_seed(3)
    text = keras.Input((1,), dtype="string")
    model = keras.Model(text, keras.layers.Dense(1, "sigmoid")(vectorizer(text)))
    model.compile(keras.optimizers.SGD(2.0), "binary_crossentropy", metrics=["accuracy"])
    rows = [(str(a[0]), float("good" in a[0])) for a in words]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), "text string, good double")
    with SparkSession(spark, model, **SETTINGS) as session:
        history = session.fit(df, features="text", label="good", epochs=3, progress=False, seed=3)
        found = session.predict(df).collect()
    assert history.history["accuracy"][-1] == 1.0
    assert [row.prediction > 0.5 for row in found] == ["good" in row.text for row in found]


def test_a_training_function_without_keras_is_fitted(spark: SqlSession) -> None:
    x, _ = data(200)
    target = x @ np.arange(1, 7, dtype=np.float32) + 2

    def build() -> Any:
        w, b = tf.Variable(tf.ones([NUM_FEATURES]), name="w"), tf.Variable(1.0, name="b")

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((tf.linalg.matvec(x, w) + b - y) ** 2)
            for variable, gradient in zip((w, b), tape.gradient(loss, (w, b)), strict=True):
                variable.assign_sub(0.1 * gradient)
            return loss

        return [w, b], step

    rows = [(a.tolist(), float(t)) for a, t in zip(x, target, strict=True)]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), "x array<float>, y double")
    for feed, options in [((df,), {"features": "x", "label": "y"}), ((x, target), {})]:
        trainer = FunctionTrainer(build)
        history = fit(spark, trainer, *feed, epochs=5, **options)
        np.testing.assert_allclose(trainer.variables[0].numpy(), np.arange(1, 7), atol=0.05)
        assert history.history["loss"][-1] < 0.01 < history.history["loss"][0]


def test_a_callback_that_asks_to_stop_ends_the_run_with_the_weights_of_that_epoch(spark: SqlSession) -> None:
    x, y = data()
    model = classifier(keras.optimizers.SGD(0.0))
    stopping = keras.callbacks.EarlyStopping("loss", patience=1)
    history = fit(spark, model, frame(spark, x, y), features="x", label="y", epochs=50, callbacks=[stopping])
    assert len(history.history["loss"]) == 2
    assert history.num_samples == 2 * NUM_ROWS
    assert not spark.sparkContext.statusTracker().getActiveJobsIds()


def test_a_stop_before_the_first_step_is_no_error(spark: SqlSession) -> None:
    class Unwilling(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.model.stop_training = True

    def late(rows: Any) -> Iterator[Any]:
        time.sleep(1.0)
        yield from rows

    x, y = data()
    model = classifier()
    rows = spark.sparkContext.parallelize([(a, int(b)) for a, b in zip(x, y, strict=True)], 2).mapPartitions(late)
    history = fit(spark, model, rows, epochs=3, callbacks=[Unwilling()])
    assert (history.num_steps, history.history, history.epoch) == (0, {}, ())
    assert bits(model) == bits(classifier())


@pytest.mark.parametrize("staleness", [0, None])
def test_a_stop_in_the_middle_of_an_epoch_reaches_the_workers_at_once(spark: SqlSession, staleness: int | None) -> None:
    """Neither is the epoch trained to its end, nor are the rows read to theirs: they would take a minute."""
    model = classifier()
    before = bits(model)

    class Impatient(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            watch = threading.Thread(target=self.wait_for_steps, daemon=True)
            watch.start()

        def wait_for_steps(self) -> None:
            deadline = time.monotonic() + 60
            while not marker.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.model.stop_training = True

    def slowly(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            time.sleep(0.01)
            if number == 100:
                marker.touch()
            yield row

    with tempfile.TemporaryDirectory() as directory:
        marker = Path(directory, "rows are read")
        x, y = data(12_000)
        rows = spark.sparkContext.parallelize([(a, int(b)) for a, b in zip(x, y, strict=True)], 2)
        began = time.monotonic()
        history = fit(
            spark, model, rows.mapPartitionsWithIndex(slowly), epochs=3, callbacks=[Impatient()], shuffle=False,
            settings={"staleness": staleness},
        )  # fmt: skip
    assert time.monotonic() - began < 30
    assert 0 < history.num_samples < 6_000
    assert history.history == {}
    assert bits(model) != before


# What is done with it


def test_what_was_fitted_is_evaluated_predicted_saved_and_exported(spark: SqlSession, tmp_path: Path) -> None:
    x, y = data()
    model = classifier()
    df = frame(spark, x, y, 3)
    with SparkSession(spark, model, **SETTINGS) as session:
        session.fit(df, features="x", label="y", progress=False, seed=3)
        scores = session.evaluate(df)
        predictions = session.predict(df, output="p")
        session.save(f"{tmp_path}/model.keras")
        session.export(f"{tmp_path}/exported")
        with pytest.raises(ConfigError, match="exists already"):
            session.export(f"{tmp_path}/exported")
    assert scores == pytest.approx(model.evaluate(x, y, verbose=0, return_dict=True), rel=1e-5)
    assert predictions.schema.simpleString() == "struct<x:array<float>,y:bigint,p:array<float>>"
    rows = predictions.collect()
    np.testing.assert_allclose(
        [row.p for row in rows], model.predict(np.array([r.x for r in rows]), verbose=0), rtol=1e-4
    )
    np.testing.assert_array_equal(
        keras.saving.load_model(tmp_path / "model.keras").get_weights()[0], model.get_weights()[0]
    )
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    served = exported.serve(tf.constant(x[:5]))
    np.testing.assert_allclose(served, model.predict(x[:5], verbose=0), rtol=1e-4)


@pytest.mark.parametrize("averages_slots", [False, True])
def test_an_interrupted_fit_is_restored_and_ends_with_the_bits_and_history_of_an_undisturbed_one(
    spark: SqlSession, tmp_path: Path, averages_slots: bool
) -> None:
    """The learning rate that a callback had set before is kept, and averaged slots find their places again."""
    x, y = data()
    df, options = frame(spark, x, y), {"features": "x", "label": "y", "epochs": 4, "validation_split": 0.2}
    options["average_optimizer_state"] = averages_slots
    make = (lambda: classifier(keras.optimizers.Adam(0.1))) if averages_slots else classifier
    undisturbed, interrupted, restored = make(), make(), make()

    class Slower(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.05

    expected = fit(spark, undisturbed, df, callbacks=[Slower()], **options)

    def fail(epoch: int, logs: Any) -> None:
        if epoch == 2:
            raise OSError("the plug was pulled")

    settings = {**SETTINGS, "hdfs_dir": str(tmp_path), "checkpoint_interval_s": 0.05}
    failing = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    waiting = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: _wait_for_a_checkpoint(session, epoch))
    raised = pytest.raises(ModelError, match=r"LambdaCallback raised OSError in on_epoch_end: the plug was pulled")
    with SparkSession(spark, interrupted, **settings) as session, raised:
        session.fit(df, callbacks=[Slower(), waiting, failing], progress=False, seed=3, **options)
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.compile("sgd", "mse")
    with pytest.raises(CheckpointError, match="of another model"):
        SparkSession.restore(spark, str(session.checkpoint_dir), other)
    unbuilt = keras.Sequential([keras.layers.Dense(NUM_CLASSES)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(
        ModelError, match=r"is not built, so that weights have no place in it: begin it with a keras\.Input"
    ):
        SparkSession.restore(spark, str(session.checkpoint_dir), unbuilt)
    with SparkSession.restore(spark, str(session.checkpoint_dir), restored) as again:
        with pytest.raises(ConfigError, match=r"validation_split must be 0\.2 as in the checkpoint .* got 0\.25"):
            again.fit(df, progress=False, seed=3, **{**options, "validation_split": 0.25})
        history = again.fit(df, progress=False, seed=3, **options)
    assert bits(restored) == bits(undisturbed)
    assert history.history == expected.history


def _wait_for_a_checkpoint(session: SparkSession, epoch: int) -> None:
    """Of that epoch, so with what callbacks had set at the end of the one before."""
    url = str(session.checkpoint_dir)
    deadline = time.monotonic() + 30
    while not list(Path(url).glob("*.msgpack")) or CheckpointDirectory(url).read_newest().epochs.epoch < epoch:
        assert time.monotonic() < deadline, f"no checkpoint of epoch {epoch}"
        time.sleep(0.02)


# Bad input


def test_a_model_that_is_not_compiled_is_refused(spark: SqlSession) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ModelError, match="compile"):
        SparkSession(spark, model)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"features": "xx"}, FeedError, r"no column 'xx': did you mean 'x'\?"),
        ({}, {"label": None}, ConfigError, "label must name a column"),
        ({}, {"label": "s"}, FeedError, "label column 's' holds strings.*StringIndexer"),
        ({}, {"features": "d"}, FeedError, "cast"),
        ({}, {"validation_split": 1.0}, ConfigError, "validation_split must be a number from 0 to below 1"),
        ({}, {"epochs": 0}, ConfigError, "epochs must be an integer of at least 1"),
        (
            {}, {"validation_data": (np.ones((4, 6)), np.ones(4))}, FeedError,
            "validation_data: .* is float32, which does not convert without loss to the training rows' int64: cast it",
        ),
        ({}, {"callbacks": [print]}, ModelError, "callbacks must be keras.callbacks.Callback"),
        ({}, {"weight_combiner": "mean"}, ConfigError, "weight_combiner must be a WeightCombiner"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_named_before_a_task_starts(
    spark: SqlSession, change: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, y = data(20)
    df = frame(spark, x, y).selectExpr("x", "y", "cast(y as string) s", "cast(y as decimal(9,2)) d")
    before = len(spark.sparkContext.statusTracker().getJobIdsForGroup())
    with pytest.raises(error, match=message):
        fit(spark, classifier(), df, **{"features": "x", "label": "y", **options})
    assert len(spark.sparkContext.statusTracker().getJobIdsForGroup()) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([([1.0] * 6, 0), (None, 1)], r"row 1: column 'x'.*got null; fill it or drop the row"),
        ([([1.0] * 6, 0), ([1.0] * 5, 1)], r"row 1: column 'x'.*array of length 5 instead of 6"),
        ([([1.0] * 6, 0), ([1.0] * 6, 3)], r"3.*classes"),
        ([([1.0] * 6, 0), ([float("nan")] * 6, 1)], r"(?i)nan"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(spark: SqlSession, rows: Any, message: str) -> None:
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 1), "x array<float>, y long")
    model = classifier()
    before = bits(model)
    with pytest.raises(WorkerFailedError, match=message):
        fit(spark, model, df, features="x", label="y")
    assert bits(model) == before


def test_feeds_without_rows_say_so(spark: SqlSession) -> None:
    x, y = data(20)
    empty = frame(spark, x[:0], y[:0])
    with pytest.raises(FeedError, match="the feed has no rows"):
        fit(spark, classifier(), empty, features="x", label="y")
    with pytest.raises(FeedError, match="validation_data has no rows"):
        fit(spark, classifier(), frame(spark, x, y), features="x", label="y", validation_data=empty)
    with pytest.raises(FeedError, match=r"validation_split=0\.01 holds out none of 20 rows"):
        fit(spark, classifier(), frame(spark, x, y), features="x", label="y", validation_split=0.01)
    with pytest.raises(FeedError, match="no rows to evaluate"), SparkSession(spark, classifier()) as session:
        session.evaluate(empty, features="x", label="y")


def test_a_metric_that_raises_is_named(spark: SqlSession) -> None:
    def broken(y_true: Any, y_pred: Any) -> Any:
        if y_pred.shape[0] is not None and not tf.executing_eagerly() and keras.backend.is_keras_tensor(y_pred):
            return y_pred
        raise ArithmeticError("no such thing as accuracy")

    x, y = data(20)
    with pytest.raises((ModelError, WorkerFailedError), match="no such thing as accuracy"):
        fit(spark, classifier(metrics=[broken]), frame(spark, x, y), features="x", label="y")
