"""`examples.mnist_prepare` and `examples.mnist_tfrecord` as users run them, on local files and on HDFS."""

from __future__ import annotations

import getpass
import re
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import REPOSITORY
from benchmarks.clusters.standalone import BIN
from examples import mnist_data, mnist_prepare, mnist_tfrecord
from tensorspark.data.filesystem import open_filesystem
from tensorspark.errors import ConfigError
from tensorspark.trainers.startup import importing
from tests.hadoop.cluster import HdfsCluster
from tests.programs import execute

with importing():
    import tensorflow as tf

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession

DIGITS = str(REPOSITORY / "MNIST_data")
NUM_TRAIN, NUM_TEST = 1500, 297
# Adam at 1e-3 ends at 0.97 to 0.98 in both modes; chance is 0.1.
LEARNED = 0.9
OPTIONS = {
    "mnist_prepare": {"--format", "--output", "--data-dir", "--partitions", "--workers"},
    "mnist_tfrecord": {"--data", "--output", "--input-mode", "--workers", "--epochs", "--batch-size", "--seed"},
}


def read_back(spark: SqlSession, file_format: str, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, by other readers than ours."""
    if file_format == "tfr":
        features = {"image": tf.io.FixedLenFeature([784], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}
        records = tf.data.TFRecordDataset([str(path) for path in directory.glob("part-*")])
        rows = list(records.map(lambda record: tf.io.parse_single_example(record, features)).as_numpy_iterator())
    elif file_format == "parquet":
        rows = spark.read.parquet(directory.as_uri()).collect()
    else:
        lines = [line for path in directory.glob("part-*") for line in path.read_text().splitlines()]
        numbers = [np.array(line.split(","), np.float32) for line in lines]
        rows = [{"label": row[0], "image": row[1:]} for row in numbers]
    return np.array([row["image"] for row in rows]), np.array([row["label"] for row in rows])


def rows_of(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Each image with its label, in an order of their own."""
    return sorted(
        np.append(image, label).astype(np.float32).tobytes() for image, label in zip(images, labels, strict=True)
    )


# Preparing


@pytest.mark.slow
@pytest.mark.parametrize("file_format", mnist_prepare.FORMATS)
def test_what_is_prepared_are_the_images_and_labels(spark: SqlSession, tmp_path: Path, file_format: str) -> None:
    source, num_images = mnist_prepare.prepare(spark, file_format, str(tmp_path), data_dir=DIGITS, partitions=5)
    assert source.startswith("scikit-learn digits")
    assert num_images == {"train": NUM_TRAIN, "test": NUM_TEST}
    x_train, y_train, x_test, y_test = mnist_data.load(mnist_data.find(DIGITS))
    for part, images, labels, num_files in (("train", x_train, y_train, 5), ("test", x_test, y_test, 1)):
        assert (tmp_path / part / "_SUCCESS").is_file()
        assert len(list((tmp_path / part).glob("part-*"))) == num_files
        assert rows_of(*read_back(spark, file_format, tmp_path / part)) == rows_of(images, labels)


def test_nothing_is_written_where_something_is(spark: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    with pytest.raises(ConfigError, match=f"--output: expected nothing at file://{tmp_path}/test, but something is"):
        mnist_prepare.prepare(spark, "tfr", str(tmp_path), data_dir=DIGITS)
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


# Training


def write_out(url: str, user: str = "") -> list[str]:
    """The lines of the text files in a directory."""
    filesystem, directory = open_filesystem(url, user)
    paths = [path for path in filesystem.ls(directory, detail=False) if path.rpartition("/")[2].startswith("part-")]
    return [line for path in sorted(paths) for line in filesystem.cat_file(path).decode().splitlines()]


def check_run(printed: str, url: str, user: str = "") -> None:
    """What is printed is what the predictions say, which are right, and of the test images."""
    found = re.search(r"^test accuracy  (\d\.\d+)$", printed, re.MULTILINE)
    assert found, printed
    assert f"predictions    {url}" in printed
    pairs = [tuple(map(int, line.split(" "))) for line in write_out(url, user)]
    labels = mnist_data.load(mnist_data.find(DIGITS))[3]
    assert sorted(label for label, _ in pairs) == sorted(labels.tolist())
    accuracy = sum(label == prediction for label, prediction in pairs) / len(pairs)
    assert accuracy == pytest.approx(float(found[1]), abs=0.5e-4)
    assert accuracy > LEARNED


@pytest.fixture(scope="module")
def prepared(spark: SqlSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as TFRecords."""
    directory = tmp_path_factory.mktemp("prepared")
    mnist_prepare.prepare(spark, "tfr", str(directory), data_dir=DIGITS, partitions=4)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("mode", mnist_tfrecord.INPUT_MODES)
def test_a_model_learns_whoever_reads_the_files(prepared: Path, tmp_path: Path, mode: str) -> None:
    output = tmp_path / "predictions"
    arguments = ["--data", str(prepared), "--output", str(output), "--input-mode", mode]
    printed = execute([sys.executable, "-m", "examples.mnist_tfrecord", *arguments])
    check_run(printed, output.as_uri())
    assert "AutoGraph" not in printed


@pytest.mark.slow
@pytest.mark.hdfs
@pytest.mark.cluster
def test_executors_without_the_examples_train_on_hdfs_as_the_user(hdfs: HdfsCluster) -> None:
    name = uuid.uuid4().hex
    hdfs.make_directory(f"/{name}", owner="alice", permission="700")
    url = f"{hdfs.url}/{name}"
    submit = [str(BIN / "spark-submit"), "--master", "local-cluster[2,1,1024]"]
    prepare = ["examples/mnist_prepare.py", "--format", "tfr", "--output", f"{url}/tfr"]
    printed = execute([*submit, *prepare], HADOOP_USER_NAME="alice")
    assert re.search(rf"^train  1,500 images in {url}/tfr/train$", printed, re.MULTILINE), printed
    for part in ("train", "test"):
        assert hdfs.status(f"/{name}/tfr/{part}/_SUCCESS")["owner"] == "alice"

    arguments = ["--data", f"{url}/tfr", "--output", f"{url}/predictions", "--input-mode", "files"]
    printed = execute([*submit, "examples/mnist_tfrecord.py", *arguments], HADOOP_USER_NAME="alice")
    check_run(printed, f"{url}/predictions", "alice")
    assert "AutoGraph" not in printed
    assert hdfs.status(f"/{name}/predictions")["owner"] == "alice"


@pytest.mark.slow
@pytest.mark.hdfs
@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_sparks_own_formats_are_written_to_hdfs(spark: SqlSession, hdfs: HdfsCluster, file_format: str) -> None:
    name = uuid.uuid4().hex
    hdfs.make_directory(f"/{name}", owner=getpass.getuser())
    mnist_prepare.prepare(spark, file_format, f"{hdfs.url}/{name}", data_dir=DIGITS, partitions=2)
    for part, num_files in (("train", 2), ("test", 1)):
        names = hdfs.names(f"/{name}/{part}")
        assert "_SUCCESS" in names
        assert sum(each.startswith("part-") for each in names) == num_files


# Bad input


def test_data_without_tfrecords_is_told_before_anything_is_trained(spark: SqlSession, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"path: expected 'file://{tmp_path}/absent/train' to exist, but nothing is"):
        mnist_tfrecord.train(spark, str(tmp_path / "absent"), str(tmp_path / "out"))
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"expected TFRecord files, but file://{tmp_path}/data/train has none"):
        mnist_tfrecord.train(spark, str(tmp_path / "data"), str(tmp_path / "out"), input_mode="files")
    with pytest.raises(ConfigError, match=f"--output: expected nothing at file://{tmp_path}/data, but something is"):
        mnist_tfrecord.train(spark, str(tmp_path / "data"), f"{tmp_path}/data/")
    assert not (tmp_path / "out").exists()


def test_a_command_that_cannot_work_ends_with_a_line_that_says_why(tmp_path: Path) -> None:
    output = execute(
        [sys.executable, "-m", "examples.mnist_prepare", "--format", "avro", "--output", str(tmp_path)], check=False
    )
    assert "argument --format: invalid choice: 'avro' (choose from 'csv', 'tfr', 'parquet')" in output
    output = execute(
        [sys.executable, "-m", "examples.mnist_tfrecord", "--data", str(tmp_path), "--output", str(tmp_path / "out")],
        check=False,
    )
    assert (
        output.strip().splitlines()[-1].startswith(f"mnist_tfrecord: path: expected 'file://{tmp_path}/train' to exist")
    )
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_help_names_every_option_with_its_default(name: str) -> None:
    output = execute([sys.executable, "-m", f"examples.{name}", "--help"])
    entries = re.split(r"^  --", output, flags=re.MULTILINE)[1:]
    assert {f"--{re.match(r'[a-z-]+', entry)[0]}" for entry in entries} == OPTIONS[name]
    assert [entry for entry in entries if not re.search(r"\(default:\s", entry)] == []
