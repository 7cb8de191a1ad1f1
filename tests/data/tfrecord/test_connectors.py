"""Files of the Scala connectors, written and read by their own jars in Sparks that they support."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from benchmarks.clusters.standalone import spark_environment
from tests.maven import classpath

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession

pytestmark = [pytest.mark.slow]

# The jar, the Spark that it is run in, and the name of its format.
CONNECTORS = {
    "spark-tfrecord": (
        "com.linkedin.sparktfrecord:spark-tfrecord_2.12:0.7.0",
        "org.apache.spark:spark-mllib_2.12:3.5.6",
        "tfrecord",
    ),
    "spark-tensorflow-connector": (
        "org.tensorflow:spark-tensorflow-connector_2.11:1.15.0",
        "org.apache.spark:spark-mllib_2.11:2.4.8",
        "tfrecords",
    ),
}
# Spark's own scripts open these to a Spark on Java 17; Spark 2.4 needs them too.
_OPENED = (
    *("java.io", "java.lang", "java.lang.invoke", "java.lang.reflect", "java.net", "java.nio", "java.util"),
    *("java.util.concurrent", "java.util.concurrent.atomic", "sun.nio.ch", "sun.nio.cs", "sun.security.action"),
    "sun.util.calendar",
)

EXAMPLES = """
    SELECT id, CAST(id - 1 AS INT) AS small, CAST(id / 4 AS FLOAT) AS ratio, CAST(id / 10 AS DOUBLE) AS wide,
        concat('ünï ', id) AS name, CAST(concat('raw', id) AS BINARY) AS raw,
        array(-9223372036854775808, id) AS longs, array(CAST(0.5 AS FLOAT), CAST(id AS FLOAT)) AS ratios,
        array(CAST(0.1 AS DOUBLE), CAST(id AS DOUBLE)) AS wides, array('', concat('ß', id)) AS names,
        array(CAST('a' AS BINARY), CAST('b' AS BINARY)) AS raws, IF(id = 1, 'only one', NULL) AS rare
    FROM range(1, 4)
"""
COLUMNS = (
    "id bigint, small int, ratio float, wide double, name string, raw binary, longs array<bigint>,"
    " ratios array<float>, wides array<double>, names array<string>, raws array<binary>, rare string"
)
SEQUENCES = """
    SELECT id, array(array(id, 2L), array(3L)) AS longs, array(array(CAST(0.5 AS FLOAT)), array(CAST(id AS FLOAT)))
        AS ratios, array(array('a', 'b'), array(concat('c', id))) AS names
    FROM range(1, 4)
"""
NESTED = "id bigint, longs array<array<bigint>>, ratios array<array<float>>, names array<array<string>>"


class Crossed(NamedTuple):
    """What the connector wrote, and what it read of what we wrote: rows, and types by column, of each record type."""

    written: dict[str, Path]
    rows: dict[str, list[dict[str, Any]]]
    types: dict[str, dict[str, Any]]


@pytest.fixture(
    scope="module", params=["spark-tfrecord", pytest.param("spark-tensorflow-connector", marks=pytest.mark.jar)]
)
def crossed(request: pytest.FixtureRequest, session: SqlSession, tmp_path_factory: pytest.TempPathFactory) -> Crossed:
    jar, its_spark, its_format = CONNECTORS[request.param]
    if shutil.which("javac") is None:
        pytest.skip("javac is not on the PATH: a JDK is needed")
    classpath(jar)  # before a Spark is downloaded for it in vain
    jars = classpath(jar, whole=[its_spark])
    from pyspark.sql.functions import expr

    root = tmp_path_factory.mktemp(request.param)
    steps: list[str] = []
    for record_type, query in (("Example", EXAMPLES), ("SequenceExample", SEQUENCES)):
        ours = root / f"ours {record_type}"
        # The elder connector says that it takes decimals, and fails.
        rows = session.sql(query).withColumn("price", expr("CAST(id / 8 AS DECIMAL(10, 3))")).coalesce(1)
        rows.write.format("tfrecord").mode("append").option("recordType", record_type).save(str(ours))
        steps += ["write", record_type, query, str(root / record_type)]
        steps += ["read", record_type, str(ours), str(root / f"read {record_type}")]
    ended = subprocess.run(
        [
            *("java", "-Xmx1g", "-XX:TieredStopAtLevel=1"),
            *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED),
            *("-cp", jars, Path(__file__).with_name("Connector.java"), its_format, *steps),
        ],
        check=False,
        env=spark_environment(),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=root,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    schemas = [json.loads(line) for line in re.findall(r"^SCHEMA (.*)$", ended.stdout, re.MULTILINE)]
    kinds = ("Example", "SequenceExample")
    return Crossed(
        {kind: root / kind for kind in kinds},
        {kind: _json_rows(root / f"read {kind}") for kind in kinds},
        {
            kind: {field["name"]: field["type"] for field in schema["fields"]}
            for kind, schema in zip(kinds, schemas, strict=True)
        },
    )


def _json_rows(directory: Path) -> list[dict[str, Any]]:
    lines = [line for file in directory.glob("part-*") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: int(row["id"]))


def _expected(row: int) -> dict[str, Any]:
    """A row of EXAMPLES as features hold it: all floats are of 32 bits."""
    return {
        "id": row,
        "small": row - 1,
        "ratio": row / 4,
        "wide": float(np.float32(row / 10)),
        "name": f"ünï {row}",
        "raw": b"raw%d" % row,
        "longs": [-(2**63), row],
        "ratios": [0.5, float(row)],
        "wides": [float(np.float32(0.1)), float(row)],
        "names": ["", f"ß{row}"],
        "raws": [b"a", b"b"],
        "rare": "only one" if row == 1 else None,
    }


def _expected_sequence(row: int) -> dict[str, Any]:
    return {
        "id": row,
        "longs": [[row, 2], [3]],
        "ratios": [[0.5], [float(row)]],
        "names": [["a", "b"], [f"c{row}"]],
    }


def test_examples_of_the_connector_are_read(session: SqlSession, crossed: Crossed) -> None:
    df = session.read.format("tfrecord").schema(COLUMNS).load(str(crossed.written["Example"]))

    assert df.orderBy("id").toArrow().to_pylist() == [_expected(row) for row in (1, 2, 3)]


def test_sequence_examples_of_the_connector_are_read(session: SqlSession, crossed: Crossed) -> None:
    reader = session.read.format("tfrecord").schema(NESTED).option("recordType", "SequenceExample")
    df = reader.load(str(crossed.written["SequenceExample"]))

    assert df.orderBy("id").toArrow().to_pylist() == [_expected_sequence(row) for row in (1, 2, 3)]


def test_the_connector_reads_our_examples(crossed: Crossed) -> None:
    def as_json(value: Any) -> Any:
        if isinstance(value, list):
            return [as_json(each) for each in value]
        if isinstance(value, bytes):
            return value.decode()
        return pytest.approx(value, rel=1e-7) if isinstance(value, float) else value

    expected = [
        {name: as_json(value) for name, value in {**_expected(row), "price": row / 8}.items()} for row in (1, 2, 3)
    ]
    for row in expected:  # JSON lines leave nulls out
        assert row["rare"] is not None or row.pop("rare") is None
    assert crossed.rows["Example"] == expected


def test_the_connector_reads_our_sequence_examples(crossed: Crossed) -> None:
    assert crossed.rows["SequenceExample"] == [{**_expected_sequence(row), "price": row / 8} for row in (1, 2, 3)]


@pytest.mark.parametrize("record_type", ["Example", "SequenceExample"])
def test_both_infer_the_same_types(session: SqlSession, crossed: Crossed, record_type: str) -> None:
    reader = session.read.format("tfrecord").option("recordType", record_type)
    inferred = json.loads(reader.load(str(crossed.written[record_type])).schema.json())

    types = {field["name"]: field["type"] for field in inferred["fields"]}
    assert {**types, "price": "float"} == crossed.types[record_type]
