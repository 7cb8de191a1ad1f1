"""The data source in a real Spark: what is written is read, nothing half or twice, and errors say what to change."""

from __future__ import annotations

import gzip
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import frame
from tests.hadoop.cluster import HdfsCluster

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql import SparkSession as SqlSession

TYPES = "id bigint, flag boolean, small int, ratio float, wide double, name string, raw binary, many array<float>"


def _write(df: DataFrame, path: str | Path, mode: str = "append", **options: Any) -> None:
    df.write.format("tfrecord").mode(mode).options(**options).save(str(path))


def _read(session: SqlSession, path: str | Path, schema: str | None = None, **options: Any) -> DataFrame:
    reader = session.read.format("tfrecord").options(**options)
    return (reader if schema is None else reader.schema(schema)).load(str(path))


def _rows(df: DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row) for row in df.select(*(columns or df.columns)).collect())


def _visible(path: Path) -> list[str]:
    """Names of files that are no markers, at any depth."""
    return sorted(file.name for file in path.rglob("*") if file.is_file() and not file.name.startswith(("_", ".")))


def _examples(**columns: Any) -> bytes:
    """A TFRecord file of Examples."""
    batch = pa.RecordBatch.from_pydict(columns)
    return frame(Encoder(batch.schema).encode(batch))


# --- round trips ------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_under_both_names(session: SqlSession, tmp_path: Path) -> None:
    rows = [
        (2**62, True, -7, 0.1, 1 / 3, "ünï", b"\x00\xff", [1.5, float("inf")]),
        (-(2**63), False, 2**31 - 1, -0.0, 1e300, "", b"", []),
        (3, None, None, None, None, None, None, None),
    ]
    df = session.createDataFrame(rows, TYPES).repartition(2)

    df.write.format("tfrecords").mode("append").save(str(tmp_path / "out"))
    back = {row["id"]: row for row in _read(session, tmp_path / "out", TYPES).collect()}

    assert (tmp_path / "out" / "_SUCCESS").exists()
    first, second, third = (back[row[0]] for row in rows)
    # Features hold floats of 32 bits.
    as_float32 = [struct.unpack("f", struct.pack("f", value))[0] for value in (0.1, 1 / 3)]
    assert first[1:] == (True, -7, *as_float32, "ünï", b"\x00\xff", [1.5, float("inf")])
    assert second[1:] == (False, 2**31 - 1, -0.0, float("inf"), "", b"", [])
    assert third[1:] == (None,) * 7


def test_a_schema_is_inferred_over_files_of_different_features(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_examples(x=[1, 2], y=[0.5, 1.5]))
    (tmp_path / "b").write_bytes(_examples(x=[3], z=[["p", "q"]]))

    df = _read(session, tmp_path)

    assert dict(df.dtypes) == {"x": "bigint", "y": "float", "z": "array<string>"}
    assert sorted(map(tuple, df.select("x", "y", "z").collect())) == [
        (1, 0.5, None),
        (2, 1.5, None),
        (3, None, ["p", "q"]),
    ]


def test_columns_from_directories_are_typed_and_come_last(session: SqlSession, tmp_path: Path) -> None:
    df = session.createDataFrame(
        [(1, "a/b", 0.5), (2, None, 1.5), (3, "a/b", 2.5)], "day int, place string, value float"
    ).coalesce(1)

    _write(df, tmp_path / "out", partitionBy="day,place")
    back = _read(session, tmp_path / "out")

    assert back.dtypes == [("value", "float"), ("day", "int"), ("place", "string")]
    assert sorted(map(tuple, back.collect())) == [(0.5, 1, "a/b"), (1.5, 2, None), (2.5, 3, "a/b")]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["_SUCCESS", "day=1", "day=2", "day=3"]
    only = _read(session, tmp_path / "out" / "day=3", "day string, value double", basePath=str(tmp_path / "out"))
    assert _rows(only) == [("3", 2.5)]


def test_one_query_on_a_dataframe_does_not_change_the_next(session: SqlSession, tmp_path: Path) -> None:
    """Spark keeps what a reader planned for the first: it must not depend on that query's filter."""
    _write(session.range(9).selectExpr("id", "id % 3 AS p"), tmp_path / "out", partitionBy="p")
    session.conf.set("spark.sql.python.filterPushdown.enabled", "true")
    try:
        df = _read(session, tmp_path / "out")
        counts = [df.where("p = 1").count(), df.where("p = 2").count(), df.count()]
    finally:
        session.conf.unset("spark.sql.python.filterPushdown.enabled")

    assert counts == [3, 3, 9]


def test_empty_partitions_and_no_rows_at_all_write_no_files(session: SqlSession, tmp_path: Path) -> None:
    _write(session.range(1).repartition(2), tmp_path / "one")
    _write(session.range(1).where("id > 5"), tmp_path / "none")

    assert len(_visible(tmp_path / "one")) == 1
    assert _visible(tmp_path / "none") == []
    assert (tmp_path / "none" / "_SUCCESS").exists()
    assert _rows(_read(session, tmp_path / "none", "id bigint")) == []


def test_byte_arrays_and_files_of_many_records(session: SqlSession, tmp_path: Path) -> None:
    df = session.createDataFrame([(bytes([i]) * i,) for i in range(7)], "payload binary").coalesce(1)

    _write(df, tmp_path / "out", recordType="ByteArray", codec="gzip", maxRecordsPerFile=3)
    back = _read(session, tmp_path / "out", recordType="ByteArray")

    assert [name.rpartition("-c")[2] for name in _visible(tmp_path / "out")] == [
        "000.tfrecord.gz",
        "001.tfrecord.gz",
        "002.tfrecord.gz",
    ]
    assert back.dtypes == [("byteArray", "binary")]
    assert _rows(back) == [(bytes([i]) * i,) for i in range(7)]


def test_arrays_of_arrays_travel_in_sequence_examples(session: SqlSession, tmp_path: Path) -> None:
    df = session.createDataFrame([(1, [[1.0, 2.0], [], [3.0]])], "id bigint, frames array<array<float>>")

    _write(df, tmp_path / "out", recordType="SequenceExample", codec="org.apache.hadoop.io.compress.DefaultCodec")

    assert _visible(tmp_path / "out")[0].endswith(".tfrecord.deflate")
    back = _read(session, tmp_path / "out", recordType="SequenceExample")
    assert dict(back.dtypes) == {"id": "bigint", "frames": "array<array<float>>"}
    assert _rows(back, "id", "frames") == [(1, [[1.0, 2.0], [], [3.0]])]


def test_hadoops_layout_is_read(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "part-r-00000").write_bytes(_examples(x=[1, 2]))
    (tmp_path / "part-r-00001.gz").write_bytes(gzip.compress(_examples(x=[3])))
    for marker in ("_SUCCESS", ".part-r-00000.crc"):
        (tmp_path / marker).write_bytes(b"no record")

    assert _rows(_read(session, tmp_path)) == [(1,), (2,), (3,)]


def test_lists_of_paths_and_globs_are_read(session: SqlSession, tmp_path: Path) -> None:
    for name, value in (("a1", 1), ("a2", 2), ("b, 1", 3)):
        (tmp_path / name).write_bytes(_examples(x=[value]))

    df = session.read.format("tfrecord").schema("x int").load([str(tmp_path / "a*"), str(tmp_path / "b, 1")])

    assert _rows(df) == [(1,), (2,), (3,)]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_modes_do_as_sparks(session: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import save_tfrecords

    out = tmp_path / "out"
    save_tfrecords(session.range(2).coalesce(1), str(out))
    with pytest.raises(Exception, match=f"expected '{out}' to be absent, but it is there") as caught:
        save_tfrecords(session.range(1), str(out))
    assert "PYTHON_DATA_SOURCE_ERROR" in str(caught.value)
    save_tfrecords(session.range(5), str(out), mode="ignore")
    assert _rows(_read(session, out, "id bigint")) == [(0,), (1,)]
    _write(session.range(2, 3).coalesce(1), out, "append")
    assert _rows(_read(session, out, "id bigint")) == [(0,), (1,), (2,)]
    _write(session.range(7, 9).coalesce(1), out, "overwrite")
    assert _rows(_read(session, out, "id bigint")) == [(7,), (8,)]
    assert len(_visible(out)) == 1


def test_a_dataframe_can_overwrite_what_it_is_read_from(session: SqlSession, tmp_path: Path) -> None:
    _write(session.range(4).coalesce(1), tmp_path / "out")

    _write(_read(session, tmp_path / "out").where("id > 1"), tmp_path / "out", "overwrite")

    assert _rows(_read(session, tmp_path / "out")) == [(2,), (3,)]


def test_a_local_write_leaves_each_tasks_file_where_it_ran(session: SqlSession, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(session.range(4).repartition(2), out, writeLocality="local", saveMode="error")

    assert len(_visible(out)) == 2
    assert not (out / "_temporary").exists()
    assert _rows(_read(session, out, "id bigint")) == [(0,), (1,), (2,), (3,)]
    with pytest.raises(Exception, match=r"writeLocality local: expected the mode append, error or ignore"):
        _write(session.range(1), out, "overwrite", writeLocality="local")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_leaves_nothing_half_and_nothing_twice(session: SqlSession, tmp_path: Path) -> None:
    out, go_on = tmp_path / "out", tmp_path / "go-on"
    killed: list[int] = []

    def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.column(0).to_pylist():
                if row % 20 == 16:
                    deadline = time.monotonic() + 60
                    while not go_on.exists() and time.monotonic() < deadline:
                        time.sleep(0.02)
                yield pa.RecordBatch.from_pydict({"id": [row], "payload": [bytes([row]) * 200_000]})

    def kill() -> None:
        """Kills the process that has a temporary file open, once it has written to it."""
        deadline = time.monotonic() + 50
        while not killed and time.monotonic() < deadline:
            begun = {str(path) for path in out.glob("_temporary/*/*/part-*") if path.stat().st_size}
            for process in psutil.process_iter(["pid"]) if begun else ():
                try:
                    if begun & {file.path for file in process.open_files()}:
                        process.kill()
                        killed.append(process.pid)
                        break
                except psutil.Error:
                    continue
            time.sleep(0.05)
        go_on.touch()

    session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "2")
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        # Two partitions of twenty rows of 200 kB: more than what lies in buffers between the processes.
        _write(session.range(0, 40, 1, 2).mapInArrow(rows, "id bigint, payload binary"), out)
    finally:
        killer.join(60)
        session.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")

    assert len(killed) == 1
    back = _read(session, out, "id bigint, payload binary").collect()
    assert sorted((row["id"], bytes(row["payload"]) == bytes([row["id"]]) * 200_000) for row in back) == [
        (i, True) for i in range(40)
    ]
    assert len(_visible(out)) == 2
    assert not (out / "_temporary").exists()


def test_a_write_that_fails_leaves_nothing(session: SqlSession, tmp_path: Path) -> None:
    df = session.range(0, 20, 1, 2).selectExpr("id", "IF(id = 19, array(id, NULL), array(id)) AS xs")

    with pytest.raises(Exception, match=r"xs"):
        _write(df, tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_rows(session: SqlSession, tmp_path: Path) -> None:
    _write(session.range(3), tmp_path / "out")
    df = session.range(5).selectExpr("IF(id = 4, array(id, NULL), array(id)) AS xs")

    with pytest.raises(Exception, match=r"xs"):
        _write(df, tmp_path / "out", "overwrite")

    assert _rows(_read(session, tmp_path / "out", "id bigint")) == [(0,), (1,), (2,)]


def test_a_damaged_file_is_named_or_its_rest_is_skipped(session: SqlSession, tmp_path: Path) -> None:
    whole = _examples(x=[1, 2, 3])
    record_bytes = len(whole) // 3
    (tmp_path / "cut").write_bytes(whole[:-5])
    wrong = bytearray(whole)
    wrong[record_bytes + 14] ^= 1  # in the second payload
    (tmp_path / "wrong").write_bytes(wrong)

    with pytest.raises(Exception, match=f"{tmp_path}/(cut|wrong)"):
        _read(session, tmp_path, "x int").collect()
    assert _rows(_read(session, tmp_path, "x int", ignoreCorruptFiles="true")) == [(1,), (1,), (2,)]


@pytest.mark.parametrize(
    ("schema", "options", "said"),
    [
        ("x string", {}, r"FeedError: .*/data: record 0: feature 'x': expected BytesList .*, got Int64List"),
        ("x int", {"maxRecordBytes": "4"}, r"FeedError: .*/data: expected records of at most 4 bytes, got one of 14"),
        ("x struct<a: int>", {}, r"ConfigError: column 'x': expected .*, got struct<a: int32>"),
    ],
)
def test_a_read_that_cannot_work_says_why(
    session: SqlSession, tmp_path: Path, schema: str, options: dict[str, str], said: str
) -> None:
    (tmp_path / "data").write_bytes(_examples(x=[1, 2, 3]))

    with pytest.raises(Exception, match=said):
        _read(session, tmp_path, schema, **options).collect()


def test_what_cannot_be_inferred_or_found_is_named(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "no-records").touch()

    with pytest.raises(Exception, match=rf"expected records to infer a schema from, but {tmp_path}/empty has none \(1"):
        _read(session, tmp_path / "empty")
    with pytest.raises(Exception, match=f"expected '{tmp_path}/absent' to exist, but nothing is there"):
        _read(session, tmp_path / "absent")
    with pytest.raises(Exception, match=r"codec: expected one of none, gzip, zlib, deflate, .*, got 'lz4'"):
        _write(session.range(1), tmp_path / "out", codec="lz4")
    with pytest.raises(Exception, match=r"partitionBy: expected columns of the DataFrame \(id\), got \['day'\]"):
        _write(session.range(1), tmp_path / "out", partitionBy="day")


@pytest.mark.hdfs
def test_executors_write_and_read_hdfs(session: SqlSession, hdfs: HdfsCluster) -> None:
    name = uuid.uuid4().hex
    hdfs.make_directory(f"/{name}", owner="alice")
    out = f"{hdfs.url}/{name}/out"
    df = session.range(0, 30, 1, 2).selectExpr("id", "id % 2 AS p")

    _write(df, out, partitionBy="p", codec="gzip", hdfsUser="alice")
    _write(df.where("id < 4"), out, "overwrite", partitionBy="p", hdfsUser="alice")

    assert sorted(hdfs.names(f"/{name}/out")) == ["_SUCCESS", "p=0", "p=1"]
    assert hdfs.status(f"/{name}/out/_SUCCESS")["owner"] == "alice"
    assert _rows(_read(session, out), "id", "p") == [(0, 0), (1, 1), (2, 0), (3, 1)]
