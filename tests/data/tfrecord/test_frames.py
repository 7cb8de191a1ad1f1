"""DataFrames saved and loaded in one call, and the names that TensorFlowOnSpark had for it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import frame
from tensorspark.errors import ConfigError, FeedError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql import SparkSession as SqlSession


def _write(path: Path, **columns: Any) -> int:
    """Writes a file of Examples, and gives its size in bytes."""
    batch = pa.RecordBatch.from_pydict(columns)
    return path.write_bytes(frame(Encoder(batch.schema).encode(batch)))


def _num_tasks_of_jobs(spark: SqlSession, action: Callable[[], object]) -> list[int]:
    """The number of tasks of each job that `action` runs."""
    context, group = spark.sparkContext, uuid.uuid4().hex
    context.setJobGroup(group, "counted")
    try:
        action()
    finally:
        context.setLocalProperty("spark.jobGroup.id", None)
    tracker = context.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    stages = [[tracker.getStageInfo(stage) for stage in job.stageIds] for job in jobs if job is not None]
    return [sum(stage.numTasks for stage in each if stage is not None) for each in stages]


def test_a_schema_is_inferred_from_all_files_by_a_job(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import is_loaded, load_tfrecords, save_tfrecords

    # Only the last row shows that `xs` is an array and that there is a `rare`: each file alone says another thing.
    df = spark.range(0, 8, 1, 4).selectExpr(
        "id", "IF(id = 7, array(1, 2), array(3)) AS xs", "IF(id = 7, 'x', NULL) AS rare", "cast('b' as binary) AS raw"
    )
    save_tfrecords(df, str(tmp_path / "out"))
    loaded: list[DataFrame] = []

    def load() -> None:
        loaded.append(load_tfrecords(spark, str(tmp_path / "out"), ["raw"], maxPartitionBytes=1))

    num_tasks = _num_tasks_of_jobs(spark, load)

    assert num_tasks == [4]
    [back] = loaded
    assert dict(back.dtypes) == {"id": "bigint", "xs": "array<bigint>", "rare": "string", "raw": "binary"}
    assert sorted(map(tuple, back.select("id", "xs", "rare", "raw").collect())) == [
        *((i, [3], None, b"b") for i in range(7)),
        (7, [1, 2], "x", b"b"),
    ]
    assert is_loaded(back)
    assert not is_loaded(back.select("id"))
    assert not is_loaded(df)


@pytest.mark.parametrize("max_partition_bytes", [2**30, 1], ids=["one part", "a part per file"])
def test_a_schema_is_inferred_from_as_much_as_is_asked_for(
    spark: SqlSession, tmp_path: Path, max_partition_bytes: int
) -> None:
    """All of it, unless the option says less: then of each part its share, here one of two batches."""
    from tensorspark.data.tfrecord.frames import load_tfrecords

    # A batch of records is at most 4 MiB: the array of two is in the second batch of each file.
    for name in ("a", "b"):
        _write(tmp_path / name, pad=[bytes(2**20)] * 6, xs=[[1]] * 5 + [[1, 2]])

    def types(**options: Any) -> dict[str, str]:
        given = {"maxPartitionBytes": max_partition_bytes, "openCostInBytes": 0, "minPartitionNum": 1, **options}
        return dict(load_tfrecords(spark, str(tmp_path), ["pad"], **given).dtypes)

    assert types() == {"pad": "binary", "xs": "array<bigint>"}
    assert types(inferSchemaMaxBytes="12b") == {"pad": "binary", "xs": "bigint"}


def test_all_of_one_large_file_is_read_to_infer(spark: SqlSession, tmp_path: Path) -> None:
    """More than format("tfrecord") would read, on the driver, where the file is one part."""
    from tensorspark.data.tfrecord.frames import load_tfrecords

    record = tmp_path / "record"
    record_bytes = _write(record, pad=[bytes(2**25)])
    head, tail = record.read_bytes()[:64], record.read_bytes()[-64:]
    record.unlink()
    last = tmp_path / "last"
    _write(last, rare=[1])
    # Eight records of 32 MiB of zeros, which are holes in the file, and another.
    with (tmp_path / "data").open("wb") as file:
        for index in range(8):
            file.seek(index * record_bytes)
            file.write(head)
            file.seek((index + 1) * record_bytes - len(tail))
            file.write(tail)
        file.write(last.read_bytes())
    last.unlink()

    back = load_tfrecords(spark, str(tmp_path), ["pad"], maxPartitionBytes="1g", minPartitionNum=1)

    assert dict(back.dtypes) == {"pad": "binary", "rare": "bigint"}


def test_inference_heeds_sparks_settings_for_files(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords

    num_bytes = _write(tmp_path / "cut", x=[1, 2, 3, 4])
    with (tmp_path / "cut").open("r+b") as file:
        file.truncate(num_bytes - 5)

    spark.conf.set("spark.sql.files.ignoreCorruptFiles", "true")
    try:
        back = load_tfrecords(spark, str(tmp_path))
        assert sorted(map(tuple, back.collect())) == [(1,), (2,), (3,)]
    finally:
        spark.conf.unset("spark.sql.files.ignoreCorruptFiles")


def test_a_damaged_file_is_named_by_an_inference_in_one_part_and_in_several(spark: SqlSession, tmp_path: Path) -> None:
    from pyspark.errors import PythonException

    from tensorspark.data.tfrecord.frames import load_tfrecords

    _write(tmp_path / "whole", x=[1, 2])
    num_bytes = _write(tmp_path / "cut", x=[3, 4])
    with (tmp_path / "cut").open("r+b") as file:
        file.truncate(num_bytes - 5)

    with pytest.raises(FeedError, match=f"{tmp_path}/cut"):
        load_tfrecords(spark, str(tmp_path), minPartitionNum=1)
    with pytest.raises(PythonException, match=rf"FeedError: {tmp_path}/cut"):
        load_tfrecords(spark, str(tmp_path), maxPartitionBytes=1)


def test_an_inferred_schema_has_the_directories_columns(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    df = spark.range(6).selectExpr("id", "id % 2 AS p")
    save_tfrecords(df, str(tmp_path / "out"), partition_by=["p"], codec="zlib")

    back = load_tfrecords(spark, str(tmp_path / "out"), maxPartitionBytes=1)

    assert back.dtypes == [("id", "bigint"), ("p", "int")]
    assert sorted(map(tuple, back.collect())) == [(i, i % 2) for i in range(6)]


def test_a_wrong_argument_is_refused_before_spark_is_asked(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    with pytest.raises(ConfigError, match="saveMode: expected one of append, overwrite, error"):
        save_tfrecords(spark.range(1), str(tmp_path / "out"), mode="replace")
    with pytest.raises(ConfigError, match=f"expected '{tmp_path}/absent' to exist"):
        load_tfrecords(spark, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"codec: expected one of none, gzip, .*, got 'lz4'"):
        load_tfrecords(spark, str(tmp_path / "absent"), schema="id long", codec="lz4")
    with pytest.raises(ConfigError, match=r"expected a path or URL, or a list of them, got \[\]"):
        load_tfrecords(spark, [])


def test_a_string_is_one_name(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.compat.tensorflowonspark import dfutil
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    df = spark.createDataFrame([(b"one", 1), (b"two", 2)], "image binary, label int")
    save_tfrecords(df, str(tmp_path / "out"), partition_by="label")

    expected = [("image", "binary"), ("label", "int")]
    assert load_tfrecords(spark, str(tmp_path / "out"), "image").dtypes == expected
    assert dfutil.loadTFRecords(spark.sparkContext, str(tmp_path / "out"), "image").dtypes == expected
    records = dfutil.toTFExample([("image", "binary")])([(b"one",)])
    assert [row.image for row in dfutil.fromTFExample(records, "image")] == [bytearray(b"one")]


def test_tensorflowonsparks_names_do_what_they_did(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.compat.tensorflowonspark import dfutil

    df = spark.createDataFrame(
        [(1, [2, 3], -1.5, "text", b"\x00\xff"), (2, [5], 2.5, "ünï", b"")],
        "a bigint, b array<bigint>, c double, d string, e binary",
    )

    dfutil.saveAsTFRecords(df, str(tmp_path / "out"))
    back = dfutil.loadTFRecords(spark.sparkContext, str(tmp_path / "out"), binary_features=["e"])

    assert dfutil.isLoadedDF(back)
    assert dict(back.dtypes) == dict(df.dtypes)
    assert sorted(map(tuple, back.select(df.columns).collect())) == sorted(map(tuple, df.collect()))


def test_rows_become_tensorflows_examples_and_back(spark: SqlSession) -> None:
    from tensorflow.train import Example

    from tensorspark.compat.tensorflowonspark import dfutil

    dtypes = [("a", "int"), ("b", "array<float>"), ("c", "boolean"), ("d", "string"), ("e", "binary")]
    rows = [(1, [0.5, 1.5], True, "text", b"\xff"), (2, [2.5], False, None, b"")]

    records = list(dfutil.toTFExample(dtypes)(rows))
    example = Example.FromString(bytes(records[0][0]))
    back = list(dfutil.fromTFExample(records, binary_features=["e"]))

    assert all(value is None for _, value in records)
    assert list(example.features.feature["b"].float_list.value) == [0.5, 1.5]
    assert list(example.features.feature["c"].int64_list.value) == [1]
    assert list(example.features.feature["d"].bytes_list.value) == [b"text"]
    assert "d" not in Example.FromString(bytes(records[1][0])).features.feature
    # Rows have their fields by name; a list of one is its value.
    assert [tuple(row) for row in back] == [(1, [0.5, 1.5], 1, "text", b"\xff"), (2, 2.5, 0, None, b"")]
    assert [(field.name, field.dataType.simpleString()) for field in dfutil.infer_schema(example, ["e"])] == [
        ("a", "bigint"),
        ("b", "array<double>"),
        ("c", "bigint"),
        ("d", "string"),
        ("e", "binary"),
    ]


def test_rows_are_taken_by_name_and_tuples_by_position(spark: SqlSession) -> None:
    from pyspark.sql import Row

    from tensorspark.compat.tensorflowonspark import dfutil

    to_examples = dfutil.toTFExample([("id", "bigint"), ("label", "bigint")])
    rows = [Row(label=7, id=1), Row(id=2, label=8), Row(x=0.5, id=3, label=9), {"label": 10, "id": 4}, (5, 11)]

    back = list(dfutil.fromTFExample(to_examples(rows)))

    assert [(row.id, row.label) for row in back] == [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]
    df = spark.createDataFrame([(12, 6)], "label int, id int")
    [(record, _)] = df.rdd.mapPartitions(dfutil.toTFExample([("id", "int")])).collect()
    assert [row.asDict() for row in dfutil.fromTFExample([(record, None)])] == [{"id": 6}]


def test_rows_without_what_the_types_name_are_refused() -> None:
    from pyspark.sql import Row

    from tensorspark.compat.tensorflowonspark import dfutil

    to_examples = dfutil.toTFExample([("id", "bigint"), ("label", "bigint")])

    with pytest.raises(FeedError, match=r"expected rows of 2 values \(id, label\), got one of 3"):
        list(to_examples([(1, 2, 3)]))
    with pytest.raises(FeedError, match=r"with the columns id, label, got one with id, x, which lacks label"):
        list(to_examples([Row(id=1, x=2)]))


def test_tensorflowonsparks_parameters_have_its_names(spark: SqlSession, tmp_path: Path) -> None:
    from tensorflow.train import BytesList, Example, Feature, Features

    from tensorspark.compat.tensorflowonspark import dfutil

    df = spark.createDataFrame([(1, b"\xff")], "id bigint, raw binary")
    dfutil.saveAsTFRecords(df=df, output_dir=str(tmp_path / "out"))
    back = dfutil.loadTFRecords(sc=spark.sparkContext, input_dir=str(tmp_path / "out"), binary_features=["raw"])
    assert [tuple(row) for row in back.select("id", "raw").collect()] == [(1, b"\xff")]
    assert dfutil.isLoadedDF(df=back)

    records = dfutil.toTFExample(dtypes=df.dtypes)(df.collect())
    [row] = dfutil.fromTFExample(iter=records, binary_features=["raw"])
    assert (row.id, row.raw, type(row.raw)) == (1, b"\xff", bytearray)

    several = Feature(bytes_list=BytesList(value=[b"a", b"b"]))
    example = Example(features=Features(feature={"kind": Feature(), "none": Feature(), "several": several}))
    schema = dfutil.infer_schema(example=example, binary_features=["none"])
    # As there, what has no value is a string, unless it is named.
    assert [field.dataType.simpleString() for field in schema] == ["string", "binary", "array<string>"]
    [(record, _)] = dfutil.toTFExample([("a", "void"), ("b", "int")])([(None, 3)])
    assert list(Example.FromString(bytes(record)).features.feature) == ["b"]


def test_a_type_that_no_example_holds_is_named() -> None:
    from tensorspark.compat.tensorflowonspark import dfutil

    with pytest.raises(ConfigError, match=r"column 'm': expected one of boolean, .*, got map<string,int>; cast it"):
        dfutil.toTFExample([("a", "int"), ("m", "map<string,int>")])


def test_a_thread_and_a_new_session_write_too(spark: SqlSession, tmp_path: Path) -> None:
    import threading

    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    other = spark.newSession()
    thread = threading.Thread(target=lambda: save_tfrecords(spark.range(3), str(tmp_path / "thread")))
    thread.start()
    thread.join(60)
    save_tfrecords(other.range(4), tmp_path / "other")

    assert load_tfrecords(spark, tmp_path / "thread").count() == 3
    assert load_tfrecords(other, [tmp_path / "other", tmp_path / "thread"]).count() == 7


def test_dynamic_overwriting_without_partitions_replaces_everything(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    save_tfrecords(spark.range(6), tmp_path / "out")
    save_tfrecords(spark.range(2), tmp_path / "out", mode="overwrite", partitionOverwriteMode="dynamic")
    assert load_tfrecords(spark, tmp_path / "out").count() == 2


def test_a_partition_column_may_have_any_name_but_a_hidden_one(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    save_tfrecords(spark.range(2).selectExpr("id", "id AS `a.b`"), tmp_path / "dot", partition_by="a.b")
    assert sorted(map(tuple, load_tfrecords(spark, tmp_path / "dot").collect())) == [(0, 0), (1, 1)]
    with pytest.raises(Exception, match=r"expected a name that does not begin with a dot, .* got '.h'"):
        save_tfrecords(spark.range(2).selectExpr("id", "id AS `.h`"), tmp_path / "hidden", partition_by=".h")
    assert not (tmp_path / "hidden").exists()


def test_arguments_that_cannot_work_are_named(spark: SqlSession, tmp_path: Path) -> None:
    import tensorspark as ts
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    df = spark.range(2)
    for path in (None, 5, "", " ", [], b"/x", [None]):
        with pytest.raises(ConfigError, match="path: expected a path or URL, or a list of them, got "):
            load_tfrecords(spark, path)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="path: expected a path or URL, or a list of them, got "):
            save_tfrecords(df, path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="df: expected a Spark DataFrame, got dict"):
        save_tfrecords({}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected pyspark's SparkSession, got NoneType"):
        ts.register_tfrecord(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mode instead of saveMode; got .*'overwrite'"):
        save_tfrecords(df, tmp_path, saveMode="overwrite")
    with pytest.raises(ConfigError, match=r"without commas in names, .* got .*'a,b'"):
        save_tfrecords(df, tmp_path, partition_by=["a,b"])
    with pytest.raises(Exception, match=r"expected a DataFrame with columns, got one without"):
        save_tfrecords(df.select(), tmp_path / "none")
    with pytest.raises(Exception, match="expected columns of different names, got id twice"):
        load_tfrecords(spark, tmp_path, schema="id long, id int").collect()
    assert list(tmp_path.iterdir()) == []


def test_a_directorys_column_in_another_case_is_refused(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords

    save_tfrecords(spark.range(2).selectExpr("id", "id AS Label"), tmp_path, mode="append", partition_by="Label")
    with pytest.raises(Exception, match="column 'label': expected 'Label', as the directories' names have it"):
        load_tfrecords(spark, tmp_path, schema="id long, label int").collect()
