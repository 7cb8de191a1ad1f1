"""`tf.data` over TFRecord files: each worker reads its own part of them; needs neither Spark nor a JVM there."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.options import Options, Paths, paths_of
from tensorspark.data.tfrecord.storage.paths import DataFile, codec_of, list_files
from tensorspark.data.tfrecord.storage.reading import FileReader
from tensorspark.errors import ConfigError, FeedError
from tensorspark.trainers.startup import importing

with importing():
    import tensorflow as tf

_log = logging.getLogger(__name__)

_BATCH_RECORDS = 1024
_NUM_PREFETCHED = 2
# Of the data source's options, those that concern which bytes are read.
_OPTIONS = ("hdfsUser", "ignoreCorruptFiles", "maxRecordBytes", "pathGlobFilter", "recursiveFileLookup")
# What TensorFlow puts around what it says of a record.
_UNPARSABLE = (tf.errors.InvalidArgumentError, UnicodeDecodeError)  # the latter where it would quote a record
_AROUND = re.compile(r"^\{\{.*?\}\} |Name: <unknown>, | \[Op:\w+\].*", re.DOTALL)


def tfrecord_dataset(
    context: Any,
    path: Paths,
    features: Mapping[str, Any] | None = None,
    *,
    codec: str | None = None,
    verify_checksum: bool = True,
    num_parallel_files: int = 4,
    **options: Any,
) -> tf.data.Dataset:
    """The rows of a worker's part of some TFRecord files, single and in the same order each time.

    Whole files are dealt to the workers, so that all read about as many bytes. Where there are fewer files than
    workers, all read every file, and records are dealt instead: which is slower, as the log says.

    Args:
        context: what `dataset_fn` was given. ``DatasetContext(0, 1)`` reads everything.
        path: file, directory, glob or a list of them, on any filesystem that fsspec knows; a bare path is a local one.
            All workers must find the same files. Columns that directories' names would give are not read.
        features: as `tf.io.parse_example` takes them, such as ``{"x": tf.io.FixedLenFeature([784], tf.float32)}``; a
            row is a dict of tensors by these names. Up to 1024 records are parsed at once, and features of variable
            length are padded to the longest among them. None: a row is the record's bytes, a scalar string, to be
            parsed in a ``map``: for SequenceExamples by `tf.io.parse_single_sequence_example`.
        codec: ``none``, ``gzip`` or ``zlib``, of files whose names end in neither .gz, .deflate nor .zlib.
        verify_checksum: whether damaged bytes are noticed.
        num_parallel_files: how many files are read at once. Each holds some 16 MB of memory, or a record, if larger.
        options: of the data source, by their names: hdfsUser, ignoreCorruptFiles, maxRecordBytes, pathGlobFilter,
            recursiveFileLookup.

    Raises:
        ConfigError: an argument that cannot work, a path that does not exist, or files without a byte.
        StagingError: a filesystem that cannot be listed.
        tf.errors.OpError: while it is read: a file that is damaged or cannot be read, or records that lack the
            features. Says which, as the data source does.

    Example:
        def read(context):
            features = {
                "image": tf.io.FixedLenFeature([784], tf.float32),
                "label": tf.io.FixedLenFeature([], tf.int64),
            }
            rows = ts.tfrecord_dataset(context, "hdfs://namenode:8020/mnist/train", features)
            return rows.map(lambda row: (row["image"], row["label"]))

        session.fit(read, epochs=3)
    """
    if num_parallel_files < 1:
        raise ConfigError(f"num_parallel_files: expected 1 or more, got {num_parallel_files}")
    known = {name.lower() for name in _OPTIONS}
    for name in options:
        if name.lower() not in known:
            raise ConfigError(f"{name}: expected one of the options {', '.join(_OPTIONS)}, the only ones of a dataset")
    if not 0 <= context.shard_index < context.num_shards:
        raise ConfigError(f"expected a shard_index from 0 to num_shards - 1, got {context}")
    paths = json.dumps(paths_of(path))
    given = {"codec": codec or "none", "verifyChecksum": str(verify_checksum), **options, "paths": paths}
    read = Options.parse(given)
    spec = _spec(features)
    files, (first, stride) = _dealt(_files(read), context.shard_index, context.num_shards)
    reader = FileReader(read)

    def batches(index: int) -> Iterator[Any]:
        """The records of one file that are this worker's, or what is in them."""
        for records in reader.read(files[index]):
            # By the number of the file, too, so that many files of one record do not all go to the first worker.
            start = (first - int(index) - records.first_index) % stride
            for chosen in _chunks(np.arange(start, len(records), stride)):
                serialized = _payloads(records, chosen)
                yield serialized if features is None else _parsed(serialized, features, records, chosen)

    def of_file(index: Any) -> tf.data.Dataset:
        return tf.data.Dataset.from_generator(batches, output_signature=spec, args=(index,))

    num_parallel = min(num_parallel_files, len(files))
    dataset = tf.data.Dataset.range(len(files)).interleave(of_file, num_parallel, num_parallel_calls=num_parallel)
    return dataset.prefetch(_NUM_PREFETCHED).unbatch()


def _spec(features: Mapping[str, Any] | None) -> Any:
    """Shapes and dtypes of a batch of rows."""
    if features is None:
        return tf.TensorSpec([None], tf.string)
    try:
        unread = tf.data.Dataset.from_tensors("").batch(1)
        return unread.map(lambda serialized: tf.io.parse_example(serialized, features)).element_spec
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "features: expected names with tf.io.FixedLenFeature, tf.io.VarLenFeature and the like of float32, int64 "
            f"or string, as tf.io.parse_example takes them, got {features!r}: {_last_line(error)}"
        ) from error


def _files(options: Options) -> list[DataFile]:
    """The files that have something in them."""
    files = [file for file in list_files(options) if file.num_bytes]
    if not files:
        raise ConfigError(f"path: expected TFRecord files, but {', '.join(options.urls)} has none that is not empty")
    for file in files:
        codec_of(file.path, options.codec)
    return files


def _dealt(files: list[DataFile], shard_index: int, num_shards: int) -> tuple[list[DataFile], tuple[int, int]]:
    """The files that a worker reads, and of their records the first and the stride.

    The largest file goes to the worker that has the fewest bytes so far, and so on: the same on all workers.
    """
    if len(files) < num_shards:
        if shard_index == 0:
            _log.warning(
                "%d TFRecord files for %d workers: each worker reads all of them and takes one record in %d; write as "
                "many files as there are workers, or more, and each reads only its own",
                len(files),
                num_shards,
                num_shards,
            )
        return files, (shard_index, num_shards)
    num_bytes = [0] * num_shards
    mine: list[DataFile] = []
    for file in sorted(files, key=lambda file: (-file.num_bytes, file.root, file.path)):
        fewest = num_bytes.index(min(num_bytes))
        num_bytes[fewest] += file.num_bytes
        if fewest == shard_index:
            mine.append(file)
    return mine, (0, 1)


def _chunks(chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(chosen), _BATCH_RECORDS):
        yield chosen[start : start + _BATCH_RECORDS]


def _payloads(records: Records, chosen: NDArray[np.int64]) -> NDArray[np.object_]:
    """`[len(chosen)]` bytes."""
    part = replace(records, offsets=records.offsets[chosen], lengths=records.lengths[chosen])
    return np.array([bytes(payload) for payload in part.payloads()], np.object_)


def _parsed(
    serialized: NDArray[np.object_], features: Mapping[str, Any], records: Records, chosen: NDArray[np.int64]
) -> Any:
    try:
        return tf.io.parse_example(serialized, features)
    except _UNPARSABLE as error:
        of_batch = error
    # TensorFlow does not always say which record it was.
    for payload, number in zip(serialized, (records.first_index + chosen).tolist(), strict=True):
        try:
            tf.io.parse_example([payload], features)
        except _UNPARSABLE as error:
            said = _AROUND.sub("", str(error)) if isinstance(error, tf.errors.OpError) else "it cannot be parsed"
            raise FeedError(
                f"{records.name}: record {number}: expected a tf.train.Example with {', '.join(features)} as features "
                f"says, got another: {said}"
            ) from None  # else its traceback is in what tf.data says of this
    raise of_batch


def _last_line(error: Exception) -> str:
    """Of what TensorFlow says of an error while it traces a function."""
    return str(error).strip().splitlines()[-1].strip()
