"""Encoding, framing and decoding in one process, one thread, against TensorFlow's parser and zlib itself.

Rounds measure all sides one after the other; figures are medians over the rounds, ratios the medians of the rounds'
ratios.
"""

from __future__ import annotations

import io
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.tfrecord.rows import NUM_PIXELS, images
from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import Records, framed, open_writer, read_records

_BATCH_ROWS = 1000
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 9, 2


@dataclass
class Workload:
    """Rows of one schema, and what TensorFlow is told of it.

    Attributes:
        batches: of 1000 rows each: as many as `tf.io.parse_example` is given at once.
        spec: TensorFlow's description of the features.
        times: by what was measured, seconds a round.
    """

    name: str
    batches: list[pa.RecordBatch]
    spec: dict[str, Any]
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


def measure(report: Report, is_quick: bool) -> None:
    """Measures all workloads, and adds their figures."""
    num_rounds = _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS
    for workload in (_images(), _images_of_many_labels(), _mixed(), _strings()):
        sides = _sides(workload)
        for index in range(num_rounds):
            say(f"{workload.name}: round {index + 1} of {num_rounds}")
            for name, run in sides.items():
                workload.times[name].append(_seconds(run))
        _add_rows(report, workload)


def _sides(workload: Workload) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    import tensorflow as tf

    schema = workload.batches[0].schema
    encoder, decoder = Encoder(schema), Decoder(schema)
    encoded = [encoder.encode(batch) for batch in workload.batches]
    content = b"".join(framed(records).tobytes() for records in encoded)
    batches = list(read_records(io.BytesIO(content), name="benchmark"))
    payloads = [bytes(payload) for batch in batches for payload in batch.payloads()]
    tensors = [tf.constant(payloads[start : start + _BATCH_ROWS]) for start in range(0, len(payloads), _BATCH_ROWS)]
    return {
        "encode": lambda: _for_each(encoder.encode, workload.batches),
        "frame": lambda: _for_each(framed, encoded),
        "read": lambda: _drain(content, verifies=True),
        "read without checksums": lambda: _drain(content, verifies=False),
        "decode": lambda: _for_each(decoder.decode, batches),
        "tf.io.parse_example": lambda: _for_each(lambda tensor: tf.io.parse_example(tensor, workload.spec), tensors),
        "plain write": lambda: _write(encoder, workload.batches, None),
        "gzip write": lambda: _write(encoder, workload.batches, "gzip"),
        "zlib level 1": lambda: zlib.compress(content, 1),
    }


def _add_rows(report: Report, workload: Workload) -> None:
    times, num_rows = workload.times, workload.num_rows
    for name, seconds in times.items():
        report.add(f"{workload.name}: {name}", num_rows / statistics.median(seconds), "rows/s")
    ratio = median_ratio(times["tf.io.parse_example"], times["decode"])
    report.add(f"{workload.name}: decode / tf.io.parse_example", ratio, "x", at_least=0.8)
    both = [one + other for one, other in zip(times["plain write"], times["zlib level 1"], strict=True)]
    ratio = median_ratio(times["gzip write"], both)
    report.add(f"{workload.name}: time of gzip / (zlib level 1 + plain write)", ratio, "x", below=1.2)
    sums = [whole - part for whole, part in zip(times["read"], times["read without checksums"], strict=True)]
    report.add(f"{workload.name}: checksums", statistics.median(sums) / num_rows * 1e9, "ns/row")


def _for_each(run: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Keeps no result, as a reader keeps none: new memory for all would take longer than the work."""
    for item in items:
        run(item)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _drain(content: bytes, verifies: bool) -> None:
    for _ in read_records(io.BytesIO(content), name="benchmark", verifies=verifies):
        pass


def _write(encoder: Encoder, batches: list[pa.RecordBatch], codec: Any) -> None:
    writer = open_writer(io.BytesIO(), codec)
    for batch in batches:
        records: Records = encoder.encode(batch)
        writer.write(framed(records).data)
    writer.close()


def _images() -> Workload:
    return _workload("784 floats, label", pa.Table.from_batches([images(np.random.default_rng(0), 16_000)]))


def _images_of_many_labels() -> Workload:
    """Labels of one and of two bytes: records of two lengths."""
    rows = images(np.random.default_rng(0), 16_000, num_labels=1000)
    return _workload("784 floats, label below 1000", pa.Table.from_batches([rows]))


def _mixed() -> Workload:
    rng = np.random.default_rng(1)
    num_rows = 100_000
    columns = {
        "id": pa.array(rng.integers(0, 2**40, num_rows)),
        "score": pa.array(rng.random(num_rows, dtype=np.float32)),
        "name": _words(rng, num_rows),
        "age": pa.array(rng.integers(0, 100, num_rows)),
    }
    return _workload("two integers, float, string", pa.table(columns))


def _strings() -> Workload:
    rng = np.random.default_rng(2)
    num_rows = 100_000
    columns = {"first": _words(rng, num_rows), "second": _words(rng, num_rows)}
    return _workload("two strings", pa.table(columns))


def _words(rng: np.random.Generator, num_rows: int) -> pa.Array:
    lengths = rng.integers(5, 60, num_rows)
    letters = rng.integers(97, 123, int(lengths.sum()), dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths).tolist()
    return pa.array([letters[start:end] for start, end in zip([0, *ends], ends, strict=False)])


def _workload(name: str, table: pa.Table) -> Workload:
    import tensorflow as tf

    spec: dict[str, Any] = {}
    for column in table.schema:
        if pa.types.is_list(column.type):
            spec[column.name] = tf.io.FixedLenFeature([NUM_PIXELS], tf.float32)
        elif pa.types.is_string(column.type):
            spec[column.name] = tf.io.FixedLenFeature([], tf.string)
        else:
            is_integer = pa.types.is_integer(column.type)
            spec[column.name] = tf.io.FixedLenFeature([], tf.int64 if is_integer else tf.float32)
    return Workload(name, table.to_batches(max_chunksize=_BATCH_ROWS), spec)
