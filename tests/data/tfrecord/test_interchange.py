"""Files of TensorFlow and of Hadoop's TFRecord formats, read and written through Spark's DataFrames."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.tfrecord.messages import Row, comparable, example, feature, sequence_example, tables
from tests.hadoop.cluster import HdfsCluster
from tests.maven import classpath

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql import SparkSession as SqlSession

_TF_CODECS = {"none": ("", ""), "gzip": ("GZIP", ".gz"), "zlib": ("ZLIB", ".deflate")}
few = settings(max_examples=6, suppress_health_check=list(HealthCheck))


@st.composite
def frames(draw: st.DrawFn, deepest: int) -> tuple[pa.Schema, list[Row]]:
    """Tables that Spark takes: with columns, whose names differ in more than their case, and without 64-bit offsets."""

    def narrow(data_type: pa.DataType) -> pa.DataType:
        if pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
            return pa.list_(narrow(data_type.value_type))
        return pa.string() if pa.types.is_large_string(data_type) else data_type

    schema, rows = draw(
        tables(deepest).filter(lambda table: 0 < len(table[0]) == len({name.casefold() for name in table[0].names}))
    )
    return pa.schema([field.with_type(narrow(field.type)) for field in schema]), rows


def _frame(session: SqlSession, schema: pa.Schema, rows: list[Row]) -> DataFrame:
    return session.createDataFrame(pa.Table.from_pylist(rows, schema))


def _messages(schema: pa.Schema, rows: list[Row], record_type: str) -> list[Any]:
    convert = example if record_type == "Example" else sequence_example
    return [convert(row, schema) for row in rows]


def _sorted(rows: Sequence[Row]) -> list[str]:
    return sorted(repr(sorted(comparable(row).items())) for row in rows)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("part-*"))


# --- TensorFlow -------------------------------------------------------------------------------------------------------


@few
@given(st.data())
def test_tensorflow_reads_what_a_dataframe_wrote_byte_for_byte(
    session: SqlSession, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    record_type = data.draw(st.sampled_from(["Example", "SequenceExample"]))
    codec = data.draw(st.sampled_from(list(_TF_CODECS)))
    schema, rows = data.draw(frames(deepest=1 if record_type == "Example" else 2))
    directory, (compression, _) = tmp_path_factory.mktemp("written"), _TF_CODECS[codec]

    # Three partitions of rows, of which some may be empty.
    written = _frame(session, schema, rows).repartition(3).write.format("tfrecord").mode("append")
    written.options(recordType=record_type, codec=codec).save(str(directory / "out"))

    payloads: list[bytes] = []
    for file in _files(directory / "out"):
        records = list(tf.data.TFRecordDataset(str(file), compression).as_numpy_iterator())
        with tf.io.TFRecordWriter(str(directory / "again")) as again:
            for record in records:
                again.write(record)
        content = file.read_bytes()
        plain = content if codec == "none" else b"" if not content else _inflated(content)
        assert plain == (directory / "again").read_bytes()
        payloads += records
    message = tf.train.Example if record_type == "Example" else tf.train.SequenceExample
    assert sorted(message.FromString(each).SerializeToString(deterministic=True) for each in payloads) == sorted(
        message.FromString(each.SerializeToString()).SerializeToString(deterministic=True)
        for each in _with_parts(_messages(schema, rows, record_type))
    )


def _with_parts(messages: list[Any]) -> list[Any]:
    for message in messages:
        if isinstance(message, tf.train.Example):
            message.features.SetInParent()  # which ours writes also where it is empty
    return messages


def _inflated(content: bytes) -> bytes:
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else zlib.decompress(content)


@few
@given(st.data())
def test_a_dataframe_reads_what_tensorflow_wrote(
    session: SqlSession, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    from pyspark.sql.pandas.types import from_arrow_schema

    record_type = data.draw(st.sampled_from(["Example", "SequenceExample"]))
    compression, end = _TF_CODECS[data.draw(st.sampled_from(list(_TF_CODECS)))]
    schema, rows = data.draw(frames(deepest=1 if record_type == "Example" else 2))
    directory = tmp_path_factory.mktemp("tensorflow")
    messages = _messages(schema, rows, record_type)
    for index in range(3):  # the last of them empty, as may be the others
        with tf.io.TFRecordWriter(str(directory / f"part-{index}{end}"), compression) as writer:
            for message in messages[index::2] if index < 2 else ():
                writer.write(message.SerializeToString())

    reader = session.read.format("tfrecord").schema(from_arrow_schema(schema)).option("recordType", record_type)
    back = reader.load(str(directory)).toArrow()

    assert back.schema.names == schema.names
    assert _sorted(back.to_pylist()) == _sorted(rows)


def test_values_at_the_limits_come_back_through_tensorflow(session: SqlSession, tmp_path: Path) -> None:
    """What the random tables above may miss, all at once."""
    schema = pa.schema(
        [
            *(("long", pa.int64()), ("float", pa.float32()), ("text", pa.string()), ("raw", pa.binary())),
            *(("longs", pa.list_(pa.int64())), ("floats", pa.list_(pa.float32())), ("texts", pa.list_(pa.string()))),
        ]
    )
    limits, numbers = [2**63 - 1, -(2**63), 0, -1], [math.nan, math.inf, -math.inf, -0.0, 2.0**-149]
    texts = ["", "ünï 漢字 😀", "\x00", "e\u0301"]
    rows: list[Row] = [
        {"long": long, "float": number, "text": text, "raw": raw, "longs": limits, "floats": numbers, "texts": texts}
        for long, number, text, raw in zip(limits, numbers, texts, [b"", b"\xff", b"\x00", bytes(300)], strict=False)
    ]
    rows += [{name: [] if pa.types.is_list(schema.field(name).type) else None for name in schema.names}]

    _frame(session, schema, rows).coalesce(1).write.format("tfrecord").mode("append").save(str(tmp_path / "out"))
    (file,) = _files(tmp_path / "out")
    parsed = [tf.train.Example.FromString(each) for each in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    with tf.io.TFRecordWriter(str(tmp_path / "tensorflow")) as writer:
        for message in parsed:
            writer.write(message.SerializeToString())
    back = session.read.format("tfrecord").load([str(file), str(tmp_path / "tensorflow")])

    assert [message.SerializeToString(deterministic=True) for message in parsed] == [
        example(row, schema).SerializeToString(deterministic=True) for row in rows
    ]
    # `raw` holds what is no text, so it is inferred as binary.
    assert {name: kind for name, kind in back.dtypes if name == "raw"} == {"raw": "binary"}
    assert _sorted(back.select(schema.names).toArrow().to_pylist()) == _sorted(rows * 2)


def test_a_value_of_ten_megabytes_goes_both_ways(session: SqlSession, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    raw, numbers = generator.bytes(10_000_000), generator.normal(size=2_500_000).astype(np.float32)
    table = pa.table({"id": [1, 2], "raw": [b"small", raw], "floats": [[1.0], numbers]})
    table = table.cast(pa.schema([("id", pa.int64()), ("raw", pa.binary()), ("floats", pa.list_(pa.float32()))]))
    out, theirs = tmp_path / "out", tmp_path / "tensorflow"

    session.createDataFrame(table).coalesce(1).write.format("tfrecord").mode("append").save(str(out))
    ours = list(tf.data.TFRecordDataset([str(file) for file in _files(out)]).as_numpy_iterator())
    large = max(
        (tf.train.Example.FromString(each).features.feature for each in ours),
        key=lambda found: found["id"].int64_list.value[0],
    )
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        message = {"id": feature(3, pa.int64()), "raw": feature(raw, pa.binary()), "floats": large["floats"]}
        writer.write(tf.train.Example(features=tf.train.Features(feature=message)).SerializeToString())
    back = (
        session.read.format("tfrecord")
        .schema("id bigint, raw binary, floats array<float>")
        .load([str(out), str(theirs)])
    )
    read = back.toArrow().sort_by("id")

    assert large["raw"].bytes_list.value == [raw]
    np.testing.assert_array_equal(large["floats"].float_list.value, numbers)
    assert read["id"].to_pylist() == [1, 2, 3]
    assert read["raw"].to_pylist() == [b"small", raw, raw]
    for index in (1, 2):
        np.testing.assert_array_equal(read["floats"][index].values.to_numpy(), numbers)


# --- Hadoop -----------------------------------------------------------------------------------------------------------

# With the class of the jar, in a Spark of its own: a jar must be there when the JVM starts.
_WITH_HADOOPS_FORMAT = """
import sys
from pyspark import SparkConf, SparkContext

jar, filesystem, written, ours = sys.argv[1:]
conf = SparkConf().setMaster("local[2]").set("spark.ui.enabled", "false").set("spark.log.level", "ERROR")
conf.set("spark.jars", jar).set("spark.driver.host", "127.0.0.1").set("spark.driver.bindAddress", "127.0.0.1")
conf.set("spark.hadoop.fs.defaultFS", filesystem)
sc = SparkContext(conf=conf)
package = "org.tensorflow.hadoop.io.TFRecordFile"
types = {"keyClass": "org.apache.hadoop.io.BytesWritable", "valueClass": "org.apache.hadoop.io.NullWritable"}
numbers = sc.parallelize(range(6), 2).map(lambda number: (bytearray(b"record %d" % number), None))
numbers.saveAsNewAPIHadoopFile(written, package + "OutputFormat", **types)
found = sc.newAPIHadoopFile(ours, package + "InputFormat", *types.values()).keys().map(bytes).collect()
print("FOUND", sorted(found))
sc.stop()
"""


@pytest.mark.hdfs
@pytest.mark.slow
def test_hadoops_own_format_writes_what_is_read_and_reads_what_is_written(
    session: SqlSession, hdfs: HdfsCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tensorflow-hadoop's TFRecordFileOutputFormat and TFRecordFileInputFormat, on HDFS."""
    jar = classpath("org.tensorflow:tensorflow-hadoop:1.15.0")
    name = uuid.uuid4().hex
    hdfs.make_directory(f"/{name}", owner="alice")
    theirs, ours = f"{hdfs.url}/{name}/theirs", f"{hdfs.url}/{name}/ours"
    df = session.range(5).coalesce(1).selectExpr("cast(concat('row ', id) AS binary) AS byteArray")
    df.write.format("tfrecord").mode("append").options(recordType="ByteArray", hdfsUser="alice").save(ours)

    monkeypatch.setenv("HADOOP_USER_NAME", "alice")
    ended = subprocess.run(
        [sys.executable, "-c", _WITH_HADOOPS_FORMAT, jar, hdfs.url, theirs, ours],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    monkeypatch.undo()

    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"FOUND {[b'row %d' % index for index in range(5)]}" in ended.stdout
    assert hdfs.names(f"/{name}/theirs") == ["_SUCCESS", "part-r-00000", "part-r-00001"]
    for path in (theirs, f"{theirs}/part-r-*", f"{hdfs.url}/{name}/the*"):
        back = session.read.format("tfrecord").options(recordType="ByteArray", hdfsUser="alice").load(path)
        assert sorted(bytes(row[0]) for row in back.collect()) == [b"record %d" % index for index in range(6)]


@pytest.mark.parametrize("place", ["", "/part-r-*", "/{part-r-00000,part-r-00001.gz,part-r-00002.deflate}"])
def test_a_hadoop_jobs_directory_is_read_but_for_what_is_hidden(
    session: SqlSession, tmp_path: Path, place: str
) -> None:
    with tf.io.TFRecordWriter(str(tmp_path / "part-r-00000")) as writer:
        for number in range(6):
            writer.write(
                tf.train.Example(
                    features=tf.train.Features(feature={"x": feature(number, pa.int64())})
                ).SerializeToString()
            )
    content = (tmp_path / "part-r-00000").read_bytes()
    record = len(content) // 6
    (tmp_path / "part-r-00000").write_bytes(content[: 2 * record])
    (tmp_path / "part-r-00001.gz").write_bytes(gzip.compress(content[2 * record : 4 * record]))
    (tmp_path / "part-r-00002.deflate").write_bytes(zlib.compress(content[4 * record :]))
    (tmp_path / "part-r-00003").touch()  # of a reducer without rows
    for hidden in ("_SUCCESS", "_logs/history", "_x", ".x", ".part-r-00000.crc", "_temporary/0/part-r-00000"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / hidden).write_bytes(b"no record")

    back = session.read.format("tfrecord").load(f"{tmp_path}{place}")

    assert back.dtypes == [("x", "bigint")]
    assert sorted(row["x"] for row in back.collect()) == list(range(6))
