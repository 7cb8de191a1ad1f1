"""DataFrames saved and loaded in one call, and the names that TensorFlowOnSpark had for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tensorspark.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession


def test_a_schema_is_inferred_from_all_files_by_a_job(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.data.tfrecord.frames import is_loaded, load_tfrecords, save_tfrecords

    # Only the last row shows that `xs` is an array and that there is a `rare`: each file alone says another thing.
    df = spark.range(0, 8, 1, 4).selectExpr(
        "id", "IF(id = 7, array(1, 2), array(3)) AS xs", "IF(id = 7, 'x', NULL) AS rare", "cast('b' as binary) AS raw"
    )
    save_tfrecords(df, str(tmp_path / "out"))

    back = load_tfrecords(spark, str(tmp_path / "out"), ["raw"], maxPartitionBytes=1)

    assert dict(back.dtypes) == {"id": "bigint", "xs": "array<bigint>", "rare": "string", "raw": "binary"}
    assert sorted(map(tuple, back.select("id", "xs", "rare", "raw").collect())) == [
        *((i, [3], None, b"b") for i in range(7)),
        (7, [1, 2], "x", b"b"),
    ]
    assert is_loaded(back)
    assert not is_loaded(back.select("id"))
    assert not is_loaded(df)


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


def test_a_type_that_no_example_holds_is_named() -> None:
    from tensorspark.compat.tensorflowonspark import dfutil

    with pytest.raises(ConfigError, match=r"column 'm': expected one of boolean, .*, got map<string,int>; cast it"):
        dfutil.toTFExample([("a", "int"), ("m", "map<string,int>")])
