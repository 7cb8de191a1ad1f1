"""Texts, categories and numbers into one Keras model: string columns and several inputs, named by a dict.

From a shell, with two Spark workers on this machine::

    python -m examples.keras_text

Reviews of a shop, made up here, have a text, the kind of thing that was bought, and its price. Whether the buyer is
content is in all three: "cheap" is praise for a cable and blame for a watch, and a high price makes buyers strict.

Executors get the vocabulary with the model, so that the DataFrame's strings go in as they are. Spark counts the words;
a layer that was given a vocabulary travels with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorspark as ts
from examples.local import spark_session
from tensorspark.trainers.startup import importing

with importing():
    import keras

KINDS = ("cable", "watch", "lamp", "tent")
PRAISE = ("lovely", "sturdy", "bright", "perfect", "quick")
BLAME = ("broken", "slow", "dull", "flimsy", "late")
FILLER = ("the", "it", "was", "and", "delivery", "colour", "bought", "this", "for", "my", "friend", "very")
FEATURES = {"text": "review", "kind": "kind", "price": "price"}
"""The model's inputs, and the DataFrame's columns that go into them."""


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        base_rate: accuracy of always saying what is more frequent.
        scores: of the test rows, by metric.
        right: part of the test rows that are predicted rightly, counted by Spark in the predictions.
    """

    base_rate: float
    num_words: int
    scores: dict[str, float]
    right: float
    history: ts.History


def train(
    spark: SparkSession, *, rows: int = 8000, epochs: int = 6, workers: int = 2, sync_interval: int = 8, seed: int = 0
) -> Result:
    """Trains, evaluates and shows predictions.

    Args:
        rows: reviews, of which a fifth is for the test.
        workers: partitions of the reviews.
        seed: of reviews, weights and shuffles.
    """
    train_df, test_df = (
        df.repartition(workers).cache() for df in reviews(spark, rows, seed).randomSplit([0.8, 0.2], seed)
    )
    words = frequent_words(train_df, 1000)
    print(f"{train_df.count():,} reviews to train on, {len(words)} words", flush=True)

    keras.utils.set_random_seed(seed)
    model = build(words)
    with ts.SparkSession(
        spark, model, name="keras_text", sync_interval=sync_interval, staleness=0, batch_size=32
    ) as session:
        history = session.fit(
            train_df,
            features=FEATURES,
            label="content",
            sample_weight="trust",
            epochs=epochs,
            validation_split=0.1,
            seed=seed,
        )
        scores = session.evaluate(test_df)
        predictions = session.predict(test_df, output="p_content")
        predictions.select("review", "kind", sf.round("price", 2).alias("price"), "content", "p_content").show(
            5, truncate=50
        )
        right = sf.avg(sf.expr("int((p_content > 0.5) = (content = 1))"))
        means = predictions.agg(sf.avg("content"), right).head()
    assert means is not None
    return Result(max(means[0], 1 - means[0]), len(words), scores, means[1], history)


def build(words: Sequence[str]) -> keras.Model:
    """A classifier of a text, a kind and a price, compiled.

    Args:
        words: that are told apart; all others count as one.
    """
    text = keras.Input((), dtype="string", name="text")
    kind = keras.Input((), dtype="string", name="kind")
    price = keras.Input((1,), name="price")
    counts = keras.layers.TextVectorization(output_mode="multi_hot", vocabulary=list(words))(text)
    is_kind = keras.layers.StringLookup(output_mode="one_hot", vocabulary=list(KINDS))(kind)
    merged = keras.layers.Concatenate()([counts, is_kind, keras.layers.Rescaling(1 / 100)(price)])
    inner = keras.layers.Dense(32, activation="relu")(merged)
    content = keras.layers.Dense(1, activation="sigmoid", name="content")(inner)
    model = keras.Model({"text": text, "kind": kind, "price": price}, content)
    model.compile(
        keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy", keras.metrics.AUC(name="auc")]
    )
    return model


def frequent_words(df: DataFrame, num_words: int) -> list[str]:
    """The reviews' words, the most frequent first, counted by Spark."""
    words = df.select(sf.explode(sf.split("review", " ")).alias("word")).groupBy("word").count()
    return [row["word"] for row in words.orderBy(sf.desc("count"), "word").limit(num_words).collect()]


def reviews(spark: SparkSession, num_rows: int, seed: int) -> DataFrame:
    """Rows of ``review`` and ``kind`` (strings), ``price``, ``content`` (0 or 1) and ``trust``, the row's weight."""
    random = np.random.default_rng(seed)
    kinds = random.choice(KINDS, num_rows)
    prices = random.gamma(2.0, 50.0, num_rows)
    texts, scores = [], []
    for kind, price in zip(kinds, prices, strict=True):
        praise, blame = random.choice(PRAISE, random.integers(3)), random.choice(BLAME, random.integers(3))
        is_cheap = random.random() < 0.4
        words = [*praise, *blame, *random.choice(FILLER, 6), *(["cheap"] if is_cheap else [])]
        texts.append(" ".join(random.permutation(words)))
        cheapness = {"cable": 2.0, "watch": -2.0}.get(str(kind), 0.0) if is_cheap else 0.0
        scores.append(len(praise) - len(blame) + cheapness - (price - 100) / 150)
    content = (np.array(scores) + 0.3 * random.normal(size=num_rows) > 0).astype(np.int64)
    trust = random.choice(np.array([0.5, 1.0]), num_rows)
    return spark.createDataFrame(
        pa.table({"review": texts, "kind": kinds.tolist(), "price": prices, "content": content, "trust": trust})
    )


def main(arguments: list[str] | None = None) -> int:
    """Trains on this machine, or where spark-submit says, and prints what it came to."""
    options = _parse(arguments)
    with spark_session("keras_text", options.workers) as spark:
        result = train(spark, **vars(options))
    epochs = result.history.history
    print("epoch  loss    accuracy  held out: loss  accuracy")
    for epoch, values in enumerate(
        zip(epochs["loss"], epochs["accuracy"], epochs["val_loss"], epochs["val_accuracy"], strict=True)
    ):
        print("{:5}  {:.4f}  {:.4f}              {:.4f}  {:.4f}".format(epoch + 1, *values))
    print(
        f"\ntest accuracy  {result.scores['accuracy']:.4f}; always the same answer: {result.base_rate:.4f}\n"
        f"predictions    {result.right:.4f} of them right\n"
        f"test AUC       {result.scores['auc']:.4f}\n"
        f"words          {result.num_words}\n"
        f"seconds        {result.history.seconds:.1f}"
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.keras_text",
        description="Trains a Keras model of a text, a category and a number with Spark workers, on made-up reviews.",
        epilog="The rows' weights, in the column trust, come from the DataFrame too.",
    )
    parser.add_argument("--rows", type=int, default=8000, help="reviews; a fifth is for the test (default: 8000)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the reviews (default: 6)")
    parser.add_argument("--workers", type=int, default=2, help="Spark workers and partitions (default: 2)")
    parser.add_argument("--sync-interval", type=int, default=8, help="steps between synchronizations (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of reviews, weights and shuffles (default: 0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
