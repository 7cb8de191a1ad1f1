"""What a user sees in Spark of damaged files and of options, schemas and paths that cannot work."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import frame

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql import SparkSession as SqlSession


def _examples(**columns: Any) -> bytes:
    """A TFRecord file of Examples."""
    batch = pa.RecordBatch.from_pydict(columns)
    return frame(Encoder(batch.schema).encode(batch))


WHOLE = _examples(x=[1, 2, 3])
RECORD_BYTES = len(WHOLE) // 3


def _flipped(place: int) -> bytes:
    damaged = bytearray(WHOLE)
    damaged[RECORD_BYTES + place] ^= 1
    return bytes(damaged)


def _load(session: SqlSession, path: Path, schema: str | None = None, **options: Any) -> DataFrame:
    reader = session.read.format("tfrecord").options(**options)
    return (reader if schema is None else reader.schema(schema)).load(str(path))


def _said(action: Callable[[], Any]) -> str:
    """The last line of the Python error in what Spark raises: what a user reads first."""
    with pytest.raises(Exception, match=r"tensorspark\.errors\.") as raised:
        action()
    (line,) = re.findall(r"^tensorspark\.errors\.(\w+: .*)$", str(raised.value), re.MULTILINE)
    return str(line)


DAMAGED = {
    "cut": (
        WHOLE[:-5],
        f"expected 30 bytes for the record at offset {2 * RECORD_BYTES}, got 25; the file is truncated",
    ),
    "length": (
        _flipped(1),
        f"expected a record at offset {RECORD_BYTES}, got a length that does not have its checksum; the file is",
    ),
    "data": (
        _flipped(14),
        f"expected record 1 at offset {RECORD_BYTES} to have the data checksum of its payload, got another",
    ),
    "cut.gz": (gzip.compress(WHOLE)[:-9], "expected the end of the gzip stream, got the file's end"),
    "none.gz": (WHOLE, "expected gzip data, got other bytes after 0 uncompressed ones"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("schema", [None, "x int"])
def test_a_damaged_file_is_an_error_with_its_name_and_the_place(
    session: SqlSession, tmp_path: Path, name: str, schema: str | None
) -> None:
    content, expected = DAMAGED[name]
    (tmp_path / name).write_bytes(content)

    said = _said(lambda: _load(session, tmp_path, schema).collect())

    assert said.startswith(f"FeedError: {tmp_path}/{name}: {expected}")


def test_the_rest_of_damaged_files_is_skipped_and_the_driver_can_count_them(
    session: SqlSession, tmp_path: Path
) -> None:
    for name, (content, _) in DAMAGED.items():
        if not name.endswith(".gz"):
            (tmp_path / name).write_bytes(content)
    (tmp_path / "whole").write_bytes(_examples(x=[7]))
    session.conf.set("spark.sql.pyspark.worker.logging.enabled", "true")
    try:
        rows = _load(session, tmp_path, "x int", ignoreCorruptFiles="true").collect()
        logged = [row["msg"] for row in session.tvf.python_worker_logs().select("msg").collect()]
    finally:
        session.conf.unset("spark.sql.pyspark.worker.logging.enabled")

    # Of three records each: two before the cut, one before each wrong checksum.
    assert sorted(row["x"] for row in rows) == [1, 1, 1, 2, 7]
    skipped = [line for line in logged if str(tmp_path) in line]
    assert sorted(line.rpartition("/")[2].partition(":")[0] for line in skipped) == ["cut", "data", "length"]
    assert all("ignoreCorruptFiles" in line and "offset" in line for line in skipped)


def test_a_damaged_file_does_not_end_a_schemas_inference_where_its_rest_is_skipped(
    session: SqlSession, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(WHOLE[:-5])
    (tmp_path / "b").write_bytes(_examples(y=["text"]))

    df = _load(session, tmp_path, ignoreCorruptFiles="true")

    assert df.dtypes == [("x", "bigint"), ("y", "string")]
    assert df.count() == 3


def test_wrong_checksums_are_read_over_where_the_user_says_so(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "sum").write_bytes(_flipped(RECORD_BYTES - 1))

    assert "data checksum" in _said(lambda: _load(session, tmp_path, "x int").collect())
    assert [row["x"] for row in _load(session, tmp_path, "x int", verifyChecksum="false").collect()] == [1, 2, 3]


def test_a_directory_without_records_needs_a_schema(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "part-00000").touch()
    (tmp_path / "part-00001.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "_SUCCESS").touch()

    said = _said(lambda: _load(session, tmp_path))

    assert said == (
        f"ConfigError: path: expected records to infer a schema from, but {tmp_path} has none (2 files); give a schema"
    )
    assert _load(session, tmp_path, "x int").collect() == []


def test_files_with_different_features_are_read_under_one_schema(session: SqlSession, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_examples(x=[1], only_a=[0.5]))
    (tmp_path / "b").write_bytes(_examples(x=[2], only_b=["text"], nobody_asks=[b"\xff"]))

    rows = _load(session, tmp_path, "x bigint, only_a float, only_b string, nowhere int").orderBy("x").collect()

    assert [tuple(row) for row in rows] == [(1, 0.5, None, None), (2, None, "text", None)]


@pytest.mark.parametrize(
    ("content", "schema", "expected"),
    [
        (WHOLE, "x string", "expected BytesList for a column of type string, got Int64List; correct the schema"),
        (_examples(x=[0.5]), "x int", "expected Int64List for a column of type int32, got FloatList"),
        (_examples(x=["text"]), "x array<float>", "expected FloatList for a column of type list<element: float>"),
        (_examples(x=[[1, 2]]), "x int", "expected one value for int32, got 2; make the column an array"),
        (_examples(x=[b"\xff"]), "x string", "expected UTF-8"),
        (_examples(x=[2**31]), "x int", "expected values of type int32, got 2147483648; make the column wider"),
    ],
)
def test_a_schema_of_another_type_names_file_record_and_feature(
    session: SqlSession, tmp_path: Path, content: bytes, schema: str, expected: str
) -> None:
    (tmp_path / "data").write_bytes(content)

    said = _said(lambda: _load(session, tmp_path, schema).collect())

    assert said.startswith(f"FeedError: {tmp_path}/data: record 0: feature 'x': {expected}")


def test_features_of_different_kinds_cannot_be_inferred_together_and_the_file_is_named(
    session: SqlSession, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(_examples(x=[1]))
    (tmp_path / "b").write_bytes(_examples(x=["text"]))

    said = _said(lambda: _load(session, tmp_path).collect())

    assert said.startswith(f"FeedError: {tmp_path}/a: record 0: feature 'x': expected BytesList")
    assert _load(session, tmp_path / "a").union(_load(session, tmp_path / "a")).count() == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recordType": "Sample"}, "ConfigError: recordType: expected one of Example, SequenceExample, ByteArray"),
        ({"codec": "snappy"}, "ConfigError: codec: expected one of none, gzip, zlib, deflate"),
        (
            {"recordTyp": "Example"},
            "ConfigError: recordtyp: expected the name of an option, which this is not; did you",
        ),
        ({"compression": "gzip"}, "ConfigError: compression: expected the name of an option, which this is not; did"),
    ],
)
def test_an_option_that_cannot_work_is_an_error_on_read_and_write(
    session: SqlSession, tmp_path: Path, options: dict[str, str], expected: str
) -> None:
    (tmp_path / "data").write_bytes(WHOLE)
    write = session.range(1).write.format("tfrecord").mode("append").options(**options)

    assert _said(lambda: _load(session, tmp_path, "x int", **options).collect()).startswith(expected)
    assert _said(lambda: write.save(str(tmp_path / "out"))).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_a_record_over_the_limit_is_refused_on_read_and_write(session: SqlSession, tmp_path: Path) -> None:
    df = session.createDataFrame([("x" * 100,), ("x" * 1000,)], "s string").coalesce(1)
    df.write.format("tfrecord").mode("append").save(str(tmp_path / "whole"))
    limited = df.write.format("tfrecord").mode("append").option("maxRecordBytes", "500")

    read = _said(lambda: _load(session, tmp_path / "whole", "s string", maxRecordBytes="500").collect())
    written = _said(lambda: limited.save(str(tmp_path / "out")))

    assert re.match(
        rf"FeedError: {tmp_path}/whole/part-\S+: expected records of at most 500 bytes, got one of 1\d{{3}} at offset",
        read,
    )
    assert re.match(r"StagingError: maxRecordBytes: expected records of at most 500 bytes, got one of 10\d\d", written)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_there_is_named(session: SqlSession, tmp_path: Path) -> None:
    for schema in (None, "x int"):
        for name in ("absent", "absent*", "{absent,gone}/part-*"):
            said = _said(lambda schema=schema, name=name: _load(session, tmp_path / name, schema).collect())
            assert said.startswith(f"ConfigError: path: expected '{tmp_path}/{name}' to ")


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("mode", ["append", "overwrite"])
@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_a_write_whose_last_task_fails_leaves_what_was_there(
    session: SqlSession, tmp_path: Path, existed: bool, mode: str, codec: str
) -> None:
    """The first task is complete by then: with one slot free after the other."""
    out = tmp_path / "out"
    if existed:
        session.range(3).write.format("tfrecord").mode("append").save(str(out))
    before = {path.relative_to(tmp_path): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    df = session.range(0, 3000, 1, 3).selectExpr("IF(id = 2999, array(id, NULL), array(id)) AS xs", "id % 2 AS p")

    write = df.write.format("tfrecord").mode(mode).options(codec=codec, partitionBy="p", maxRecordsPerFile=100)
    said = _said(lambda: write.save(str(out)))

    assert said.startswith("FeedError: column 'xs': expected arrays without nulls")
    assert {path.relative_to(tmp_path): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert out.exists() is existed
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("_temporary", "_replaced", "p="))]


def test_a_commit_that_fails_leaves_the_old_rows_and_says_why(session: SqlSession, tmp_path: Path) -> None:
    """A file stands where a partition's directory is to be: all tasks are through when that shows."""
    out = tmp_path / "out"
    session.range(3).write.format("tfrecord").mode("append").save(str(out))
    (out / "p=1").write_bytes(b"")
    before = sorted(str(path) for path in out.rglob("*"))

    write = session.range(4).selectExpr("id", "id % 2 AS p").write.format("tfrecord").mode("append")
    said = _said(lambda: write.option("partitionBy", "p").save(str(out)))

    assert said.startswith(f"StagingError: path: could not create '{out}'")
    assert sorted(str(path) for path in out.rglob("*")) == before
