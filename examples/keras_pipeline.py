"""A Keras model as a stage of a Spark ML pipeline, chosen by cross-validation.

From a shell, with two Spark workers on this machine::

    python -m examples.keras_pipeline

Three kinds of flowers are told apart by length, width and weight of their petals. The kinds lie around each other like
the skins of an onion, so that a linear model cannot part them. Cross-validation finds that out: it is given a network
without and one with a hidden layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.feature import StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.local import spark_session
from tensorspark.ml import KerasEstimator, KerasModel
from tensorspark.trainers.startup import importing

with importing():
    import keras

MEASURES = ("length", "width", "weight")
KINDS = ("bud", "open", "withered")


@dataclass(frozen=True)
class Result:
    """What cross-validation and the training after it came to.

    Attributes:
        accuracies: mean over the folds, by network.
        test_accuracy: of the chosen network, trained on all folds, on rows of none.
        reloaded_accuracy: the same, of the pipeline that was saved and loaded again.
        history: of the chosen network's training.
    """

    accuracies: dict[str, float]
    chosen: str
    test_accuracy: float
    reloaded_accuracy: float
    history: dict[str, list[float]]
    seconds: float
    saved: Path


def linear() -> keras.Model:
    """Softmax regression."""
    return _compiled([])


def hidden() -> keras.Model:
    """A network with a hidden layer."""
    return _compiled([keras.layers.Dense(32, activation="relu")])


def _compiled(layers: list[keras.Layer]) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((len(MEASURES),)), *layers, keras.layers.Dense(len(KINDS), activation="softmax")]
    )
    model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def run(
    spark: SparkSession,
    *,
    rows: int = 3000,
    folds: int = 2,
    epochs: int = 8,
    workers: int = 2,
    seed: int = 0,
    output: str | None = None,
) -> Result:
    """Chooses, trains, tests, saves and loads.

    Args:
        rows: in all; a fifth of them is for the test.
        workers: partitions of the rows.
        seed: of rows, folds, weights and shuffles.
        output: a directory, not there yet, for the trained pipeline; None makes a temporary one.
    """
    began = time.monotonic()
    train_df, test_df = (
        df.repartition(workers).cache() for df in flowers(spark, rows, seed).randomSplit([0.8, 0.2], seed)
    )
    print(f"{train_df.count():,} flowers to train on, {test_df.count():,} to test on", flush=True)

    network = KerasEstimator(
        featuresCol="scaled", labelCol="label", batchSize=32, epochs=epochs, syncInterval=4, seed=seed, progress=True
    )
    pipeline = Pipeline(
        stages=[
            StringIndexer(inputCol="kind", outputCol="label", stringOrderType="alphabetAsc"),
            VectorAssembler(inputCols=list(MEASURES), outputCol="features"),
            StandardScaler(inputCol="features", outputCol="scaled", withMean=True),
            network,
        ]
    )
    networks = [linear, hidden]
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    chooser = CrossValidator(
        estimator=pipeline,
        estimatorParamMaps=ParamGridBuilder().addGrid(network.model, networks).build(),
        evaluator=evaluator,
        numFolds=folds,
        seed=seed,
    )
    print(f"training {len(networks)} networks on {folds} folds each, and the better one on all rows", flush=True)
    chosen = chooser.fit(train_df)
    accuracies = {build.__name__: float(mean) for build, mean in zip(networks, chosen.avgMetrics, strict=True)}
    best = chosen.bestModel
    assert isinstance(best, PipelineModel)
    trained = best.stages[-1]
    assert isinstance(trained, KerasModel)
    test_accuracy = evaluator.evaluate(best.transform(test_df))

    saved = Path(output or Path(tempfile.mkdtemp(prefix="keras_pipeline-")) / "pipeline").absolute()
    best.write().overwrite().save(saved.as_uri())
    reloaded = PipelineModel.load(saved.as_uri())
    reloaded.transform(test_df).select("kind", "prediction", "probability").show(3, truncate=60)
    return Result(
        accuracies=accuracies,
        chosen=max(accuracies, key=lambda name: accuracies[name]),
        test_accuracy=float(test_accuracy),
        reloaded_accuracy=float(evaluator.evaluate(reloaded.transform(test_df))),
        history=trained.history,
        seconds=time.monotonic() - began,
        saved=saved,
    )


def flowers(spark: SparkSession, num_rows: int, seed: int) -> DataFrame:
    """Rows of three measures, in units of their own, and a kind, which is how far out of their middle they lie."""
    random = np.random.default_rng(seed)
    points = random.normal(size=(num_rows, len(MEASURES)))
    distance = np.linalg.norm(points, axis=1) + 0.05 * random.normal(size=num_rows)
    kinds = np.array(KINDS)[np.digitize(distance, [1.1, 1.9])]
    measures = points * [4.0, 0.5, 100.0] + [20.0, 3.0, 700.0]
    return spark.createDataFrame(pa.table({**dict(zip(MEASURES, measures.T, strict=True)), "kind": kinds}))


def main(arguments: list[str] | None = None) -> int:
    """Runs on this machine, or where spark-submit says, and prints what came of it."""
    options = _parse(arguments)
    with spark_session("keras_pipeline", options.workers) as spark:
        result = run(spark, **vars(options))
    losses = result.history["loss"]
    folds = "\n".join(f"{name:<14} {accuracy:.4f} over the folds" for name, accuracy in result.accuracies.items())
    print(
        f"{folds}\n"
        f"chosen         {result.chosen}\n"
        f"test accuracy  {result.test_accuracy:.4f}; {result.reloaded_accuracy:.4f} when saved and loaded\n"
        f"loss           {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last\n"
        f"seconds        {result.seconds:.1f}\n"
        f"pipeline       {result.saved}"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.keras_pipeline",
        description="Cross-validates a Spark ML pipeline that ends in a Keras model, on flowers that are made up.",
        epilog="Each fit of the pipeline trains a fresh copy of the network, on all workers; fits take turns.",
    )
    parser.add_argument("--rows", type=int, default=3000, help="flowers; a fifth is for the test (default: 3000)")
    parser.add_argument("--folds", type=int, default=2, help="of the cross-validation (default: 2)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the rows of each training (default: 8)")
    parser.add_argument("--workers", type=int, default=2, help="Spark workers and partitions (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, folds, weights and shuffles (default: 0)")
    parser.add_argument("--output", help="new directory for the trained pipeline (default: a temporary one)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
