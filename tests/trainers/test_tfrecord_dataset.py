"""`tfrecord_dataset` on files that TensorFlow wrote: each record once over the workers, and errors that say which."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tensorspark import DatasetContext, SparkSession, tfrecord_dataset
from tensorspark.data.filesystem import open_filesystem
from tensorspark.errors import ConfigError, WorkerFailedError
from tensorspark.trainers.startup import importing
from tests.hadoop.cluster import HdfsCluster

with importing():
    import keras
    import tensorflow as tf

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession

ALL = DatasetContext(0, 1)
FEATURES = {"id": tf.io.FixedLenFeature([], tf.int64), "x": tf.io.FixedLenFeature([2], tf.float32)}
# Of these files, the first has as many records as the others together.
SIZES = (50, 20, 13, 10, 7)
NUM_RECORDS = sum(SIZES)


def example(number: int) -> bytes:
    features = {
        "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
        "x": tf.train.Feature(float_list=tf.train.FloatList(value=x_of(number))),
        "words": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"w\0"] * (number % 3))),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def x_of(number: int) -> list[float]:
    return [number + 0.25, -number / 8]


def write(directory: Path, sizes: Sequence[int] = SIZES, compression: str = "", end: str = ".tfrecord") -> list[str]:
    """Files of so many records, numbered from 100 on through all of them."""
    directory.mkdir(exist_ok=True)
    numbers = iter(range(100, 100 + sum(sizes)))
    paths = [str(directory / f"part-{index:02}{end}") for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with tf.io.TFRecordWriter(path, compression) as writer:
            for _ in range(size):
                writer.write(example(next(numbers)))
    return paths


def ids(dataset: tf.data.Dataset) -> list[int]:
    return [int(row["id"]) for row in dataset.as_numpy_iterator()]


def shards(path: Any, num_shards: int, **options: Any) -> list[list[int]]:
    contexts = [DatasetContext(index, num_shards) for index in range(num_shards)]
    return [ids(tfrecord_dataset(context, path, FEATURES, **options)) for context in contexts]


# What is read


@pytest.mark.parametrize("num_shards", [1, 3, 7])
@pytest.mark.parametrize(
    ("compression", "end", "codec"),
    [("", ".tfrecord", None), ("GZIP", ".gz", None), ("GZIP", "", "gzip"), ("ZLIB", ".zlib", "none")],
)
def test_each_record_is_one_workers(
    tmp_path: Path, compression: str, end: str, codec: str | None, num_shards: int
) -> None:
    write(tmp_path, compression=compression, end=end)
    read = shards(str(tmp_path), num_shards, codec=codec, num_parallel_files=num_shards)
    assert sorted(chain(*read)) == list(range(100, 100 + NUM_RECORDS))
    assert all(read)


def test_rows_hold_what_tensorflows_own_reader_and_parser_make_of_the_records(tmp_path: Path) -> None:
    paths = write(tmp_path, [3, 2000])
    features = {**FEATURES, "words": tf.io.RaggedFeature(tf.string), "absent": tf.io.FixedLenFeature([1], tf.int64, 7)}
    dataset = tfrecord_dataset(ALL, str(tmp_path), features)
    assert dataset.element_spec["x"] == tf.TensorSpec([2], tf.float32)
    rows = sorted(dataset, key=lambda row: int(row["id"]))
    assert len(rows) == 2003
    for row, record in zip(rows, tf.data.TFRecordDataset(paths), strict=True):
        expected = tf.io.parse_single_example(record, features)
        assert {name: value.numpy().tolist() for name, value in row.items()} == {
            name: value.numpy().tolist() for name, value in expected.items()
        }
    assert rows[3]["x"].numpy().tolist() == x_of(103)
    assert rows[4]["words"].numpy().tolist() == [b"w\0"] * 2


def test_features_of_variable_length_may_be_sparse(tmp_path: Path) -> None:
    write(tmp_path, [5])
    rows = tfrecord_dataset(ALL, str(tmp_path), {"words": tf.io.VarLenFeature(tf.string)})
    assert [row["words"].values.numpy().tolist() for row in rows] == [[b"w\0"] * (n % 3) for n in range(100, 105)]


def test_without_features_a_row_is_the_records_bytes(tmp_path: Path) -> None:
    records = [b"", b"a\0", bytes(range(256)), b"\0"]
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
        for record in records:
            writer.write(record)
    dataset = tfrecord_dataset(ALL, str(tmp_path / "a"))
    assert dataset.element_spec == tf.TensorSpec([], tf.string)
    assert list(dataset.as_numpy_iterator()) == records


def test_a_row_is_in_its_place_each_time(tmp_path: Path) -> None:
    write(tmp_path, [2000, 1500, 1800])
    dataset = tfrecord_dataset(ALL, str(tmp_path), FEATURES)
    first = ids(dataset)
    assert ids(dataset) == first
    assert ids(tfrecord_dataset(ALL, str(tmp_path), FEATURES)) == first


def test_lists_and_globs_name_files(tmp_path: Path) -> None:
    paths = write(tmp_path)
    assert sorted(ids(tfrecord_dataset(ALL, [paths[4], paths[3]], FEATURES))) == list(range(183, 200))
    assert sorted(ids(tfrecord_dataset(ALL, f"{tmp_path}/part-0[34]*", FEATURES))) == list(range(183, 200))


@pytest.mark.hdfs
def test_files_on_hdfs_are_read_without_a_jvm(tmp_path: Path, hdfs: HdfsCluster) -> None:
    name = uuid.uuid4().hex
    hdfs.make_directory(f"/{name}", owner="alice", permission="700")
    filesystem, directory = open_filesystem(f"{hdfs.url}/{name}", "alice")
    for path in write(tmp_path, compression="GZIP", end=".gz"):
        filesystem.put_file(path, f"{directory}/{Path(path).name}")
    read = shards(f"{hdfs.url}/{name}", 3, hdfsUser="alice")
    assert sorted(chain(*read)) == list(range(100, 100 + NUM_RECORDS))


# Who reads what


def test_whole_files_are_dealt_so_that_workers_have_about_as_many_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    first, second = shards(str(tmp_path), 2)
    assert sorted(first) == list(range(100, 150))  # the largest file
    assert sorted(second) == list(range(150, 200))
    assert [len(shard) for shard in shards(str(tmp_path), 3)] == [50, 27, 23]  # 20 + 7, 13 + 10
    assert not caplog.records


def test_files_without_a_byte_are_nobodys(tmp_path: Path) -> None:
    write(tmp_path, [4, 6])
    for index in range(5):
        (tmp_path / f"empty-{index}").touch()
    assert [len(shard) for shard in shards(str(tmp_path), 2)] == [6, 4]


def test_records_are_dealt_where_there_are_fewer_files_than_workers_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [2500, 31])
    with caplog.at_level(logging.WARNING):
        read = shards(str(tmp_path), 3)
    assert [record.getMessage() for record in caplog.records] == [
        "2 TFRecord files for 3 workers: each worker reads all of them and takes one record in 3; write as many files "
        "as there are workers, or more, and each reads only its own"
    ]
    assert sorted(chain(*read)) == list(range(100, 2631))
    assert max(map(len, read)) - min(map(len, read)) <= 2


def test_many_files_of_one_record_do_not_all_go_to_the_first_worker(tmp_path: Path) -> None:
    write(tmp_path, [1] * 6)
    assert [len(shard) for shard in shards(str(tmp_path), 7)] == [1] * 6 + [0]


# In a run


def reader(path: str) -> Any:
    """What `fit` takes; nested, so that it reaches workers that do not have this module."""

    def read(context: DatasetContext) -> tf.data.Dataset:
        features = {"id": tf.io.FixedLenFeature([], tf.int64), "x": tf.io.FixedLenFeature([2], tf.float32)}
        rows = tfrecord_dataset(context, path, features)
        return rows.map(scaled)

    @tf.autograph.experimental.do_not_convert
    def scaled(row: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        return row["x"] / 100.0, tf.cast(row["id"], tf.float32) / 100.0

    return read


def trained(spark: SqlSession, rows: Any) -> tuple[list[np.ndarray], int]:
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    with SparkSession(spark, model, staleness=0, sync_interval=2, batch_size=6) as session:
        history = session.fit(rows, epochs=2, seed=3, progress=False)
    return model.get_weights(), history.num_samples


@pytest.mark.parametrize(("sizes", "parts"), [([30, 18], ("0:30", "30:48")), ([48], ("0:48:2", "1:48:2"))])
def test_workers_train_on_their_own_records(
    spark: SqlSession, tmp_path: Path, sizes: list[int], parts: tuple[str, str]
) -> None:
    write(tmp_path, sizes)
    bounds = [slice(*map(int, part.split(":"))) for part in parts]

    def in_memory(context: DatasetContext) -> tf.data.Dataset:
        numbers = np.arange(100, 148)[bounds[context.shard_index]].astype(np.float32)
        x = np.stack([numbers + np.float32(0.25), -numbers / np.float32(8)], axis=1)
        return tf.data.Dataset.from_tensor_slices((x / np.float32(100), numbers / np.float32(100)))

    weights, num_samples = trained(spark, reader(str(tmp_path)))
    expected, _ = trained(spark, in_memory)
    assert num_samples == 2 * 48
    for ours, theirs in zip(weights, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert np.abs(expected[1]).max() > 0.01  # has learned something


def test_a_damaged_file_ends_the_run_with_its_name_and_the_offset(spark: SqlSession, tmp_path: Path) -> None:
    _, path = write(tmp_path, [20, 10])
    offset = sum(len(example(number)) + 16 for number in (120, 121, 122))
    content = bytearray(Path(path).read_bytes())
    content[offset + 20] ^= 1
    Path(path).write_bytes(content)
    message = rf"FeedError: partition \d: {re.escape(path)}: expected record 3 at offset {offset} to have the data"
    with pytest.raises(WorkerFailedError, match=message):
        trained(spark, reader(str(tmp_path)))


# What cannot work


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent", {}, "expected '.*/absent' to exist, but nothing is there"),
        ("nothing", {}, "path: expected TFRecord files, but .*/nothing has none that is not empty"),
        ("snappy", {}, r"part-00.snappy: expected a file without compression, or .gz, .deflate or .zlib"),
        ("good", {"codec": "lz4"}, "codec: expected one of none, gzip, .*, got 'lz4'"),
        ("good", {"context": DatasetContext(2, 2)}, "shard_index from 0 to num_shards - 1, got .*shard_index=2"),
        ("good", {"path": 5}, "path: expected a path or URL, or a list of them, got 5"),
        ("good", {"path": []}, r"path: expected a path or URL, or a list of them, got \[\]"),
        ("good", {"recordType": "SequenceExample"}, "recordType: expected one of the options hdfsUser, ignoreCorrupt"),
        ("good", {"num_parallel_files": 0}, "num_parallel_files: expected 1 or more, got 0"),
        ("good", {"features": {}}, "features: expected names with .*, got {}: "),
        ("good", {"features": {"id": tf.int64}}, "features: expected .*, got {'id': .*}: ValueError: Unsupported "),
        (
            "good",
            {"features": {"id": tf.io.FixedLenFeature([], tf.int32)}},
            "features: expected .* of float32, int64 or string, .*: TypeError: .* has DataType int32 not in",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "good")
    write(tmp_path / "snappy", end=".snappy")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "part-00").touch()
    with pytest.raises(ConfigError, match=message):
        tfrecord_dataset(**{"context": ALL, "path": tmp_path / name, "features": FEATURES, **options})


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"id": tf.io.FixedLenFeature([2], tf.int64)}, "record 0: expected .* Number of int64 values != expected"),
        (
            {"other": tf.io.FixedLenFeature([], tf.int64)},
            "record 0: expected .* with other as .*: Feature: other",
        ),
        ({"words": tf.io.FixedLenFeature([1], tf.string)}, "record 1: expected .* Key: words, Index: 0"),
        ({"words": tf.io.VarLenFeature(tf.float32)}, "record 0: expected .* Data types don't match"),
    ],
)
def test_a_record_of_other_features_is_named(tmp_path: Path, feature: dict[str, Any], said: str) -> None:
    (path,) = write(tmp_path, [12])
    with pytest.raises(tf.errors.OpError, match=f"FeedError: {re.escape(path)}: {said}"):
        list(tfrecord_dataset(ALL, path, feature))


def test_a_record_that_is_no_example_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "part")
    with tf.io.TFRecordWriter(path) as writer:
        for number in range(1400):
            writer.write(b"\xff" if number == 1301 else example(number))
    message = f"{re.escape(path)}: record 1301: expected a tf.train.Example with id, x as features says, got another"
    with pytest.raises(tf.errors.OpError, match=message):
        list(tfrecord_dataset(ALL, path, FEATURES))
    with pytest.raises(tf.errors.OpError, match=message):
        list(tfrecord_dataset(DatasetContext(2, 3), path, FEATURES))  # 1301 = 2 modulo 3
    assert ids(tfrecord_dataset(DatasetContext(0, 3), path, FEATURES)) == list(range(0, 1400, 3))


def test_a_truncated_file_is_an_error_or_its_rest_is_skipped(tmp_path: Path) -> None:
    paths = write(tmp_path, [8, 5])
    content = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(content[:-3])
    offset = len(content) - len(example(107)) - 16
    with pytest.raises(tf.errors.OpError, match=rf"{re.escape(paths[0])}: .*at offset {offset}, got .* truncated"):
        list(tfrecord_dataset(ALL, str(tmp_path), FEATURES))
    skipping = tfrecord_dataset(ALL, str(tmp_path), FEATURES, ignoreCorruptFiles=True)
    assert sorted(ids(skipping)) == [*range(100, 107), *range(108, 113)]


def test_damage_is_seen_by_the_checksum_unless_that_is_not_verified(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [3])
    content = bytearray(Path(path).read_bytes())
    place = content.find(np.float32(101.25).tobytes())
    content[place : place + 4] = np.float32(55.5).tobytes()
    Path(path).write_bytes(content)
    with pytest.raises(
        tf.errors.OpError, match=rf"{re.escape(path)}: expected record 1 at offset \d+ to have the data"
    ):
        list(tfrecord_dataset(ALL, path, FEATURES))
    rows = list(tfrecord_dataset(ALL, path, FEATURES, verify_checksum=False).as_numpy_iterator())
    assert [float(row["x"][0]) for row in rows] == [100.25, 55.5, 102.25]
