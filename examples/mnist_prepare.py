"""MNIST as CSV, TFRecord or Parquet files, written by Spark to any filesystem: what a cluster then trains from.

From a shell, with Spark on this machine::

    python -m examples.mnist_prepare --format tfr --output mnist_tfr

or on a cluster::

    spark-submit --master spark://host:7077 examples/mnist_prepare.py --format tfr --output hdfs://namenode:8020/mnist/tfr

`examples/mnist_tfrecord.py` trains from what ``--format tfr`` writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

if __package__ in (None, ""):  # spark-submit runs this file itself, and then looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorspark as ts
from examples import mnist_data
from examples.local import spark_session
from tensorspark.data.filesystem import attempt, open_filesystem
from tensorspark.errors import ConfigError, TensorsparkError

FORMATS = ("csv", "tfr", "parquet")
NUM_PIXELS = 784
HADOOP_USER_VARIABLE = "HADOOP_USER_NAME"


def prepare(
    spark: SparkSession, file_format: str, output: str, *, data_dir: str | None = None, partitions: int = 10
) -> tuple[str, dict[str, int]]:
    """Writes the training and the test images, with their labels, to ``train`` and ``test`` under a URL.

    Args:
        file_format: one of `FORMATS`.
        output: a bare path is a local one. ``train`` and ``test`` must not be there.
        data_dir: a local directory of the four IDX files; None looks where `examples.mnist_data.find` looks.
        partitions: files of the training images.

    Returns:
        Which data it is, and how many images are in ``train`` and in ``test``.

    Raises:
        ConfigError: there is something at the output.
    """
    url = as_url(output)
    for part in ("train", "test"):
        require_absent(f"{url}/{part}", "--output")
    files = mnist_data.find(data_dir)
    x_train, y_train, x_test, y_test = mnist_data.load(files)
    for part, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        df = as_dataframe(spark, images, labels).repartition(max(1, round(partitions * len(images) / len(x_train))))
        _write(df, file_format, f"{url}/{part}")
    return files.source, {"train": len(x_train), "test": len(x_test)}


def as_dataframe(spark: SparkSession, images: np.ndarray, labels: np.ndarray) -> DataFrame:
    """A DataFrame of ``image``, 784 floats, and ``label``, 0 to 9.

    Args:
        images: ``[n, 784] float32`` in [0, 1].
        labels: ``[n]`` class numbers.
    """
    offsets = np.arange(0, images.size + 1, NUM_PIXELS, dtype=np.int32)
    rows = pa.ListArray.from_arrays(offsets, images.ravel())
    return spark.createDataFrame(pa.table({"image": rows, "label": labels.astype(np.int64)}))


def as_url(path: str) -> str:
    """With a scheme, as Spark and fsspec do not agree on where a bare path is; without a slash at its end."""
    return (path if "://" in path else f"file://{Path(path).absolute()}").rstrip("/")


def require_absent(url: str, option: str) -> None:
    """Raises ConfigError where something is at `url`, and StagingError where that cannot be told."""
    filesystem, path = open_filesystem(url, setting=option)
    if attempt("look for", url, lambda: filesystem.exists(path), setting=option):
        raise ConfigError(f"{option}: expected nothing at {url}, but something is there; remove it, or name another")


def _write(df: DataFrame, file_format: str, url: str) -> None:
    if file_format == "tfr":
        # Executors' Python processes do not inherit the driver's environment.
        ts.data.save_tfrecords(df, url, hdfsUser=os.environ.get(HADOOP_USER_VARIABLE, ""))
    elif file_format == "parquet":
        df.write.parquet(url)
    else:
        df.select("label", *[sf.col("image")[index] for index in range(NUM_PIXELS)]).write.csv(url)


def main(arguments: list[str] | None = None) -> int:
    """Writes the files with this machine's Spark, or where spark-submit says, and prints what is where."""
    options = _parse(arguments)
    try:
        with spark_session("mnist_prepare", options.workers) as spark:
            source, num_images = prepare(
                spark, options.format, options.output, data_dir=options.data_dir, partitions=options.partitions
            )
    except (TensorsparkError, FileNotFoundError) as error:
        sys.exit(f"mnist_prepare: {error}")
    for part, num in num_images.items():
        print(f"{part:5} {num:6,} images in {as_url(options.output)}/{part}")
    print(f"The images are {source}.")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.mnist_prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Writes MNIST to train/ and test/ under a URL, as files that Spark and TensorFlow read.",
        epilog="""what the formats hold:
  csv      lines of the label, then 784 pixels from 0 to 1; no header
  tfr      TFRecords of tf.train.Example: image (784 floats from 0 to 1) and label (an integer)
  parquet  columns image (array of 784 floats from 0 to 1) and label (bigint)

Without MNIST and without a network, the 1,797 handwritten digits that come with the repository take its place.
HADOOP_USER_NAME in the environment says who to be on HDFS. Train from tfr with examples.mnist_tfrecord.""",
    )
    parser.add_argument("--format", choices=FORMATS, default="tfr", help="of the files (default: tfr)")
    parser.add_argument(
        "--output", required=True, metavar="URL", help="local path, hdfs://host:port/path or the like (default: none)"
    )
    parser.add_argument("--data-dir", help="local directory of the IDX files (default: found, or downloaded)")
    parser.add_argument("--partitions", type=count, default=10, help="files of the training images (default: 10)")
    parser.add_argument("--workers", type=count, default=2, help="slots of a local Spark (default: 2)")
    return parser.parse_args(arguments)


def count(text: str) -> int:
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
