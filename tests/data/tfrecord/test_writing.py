"""Rows go to the files and directories that they belong in, under the names that Spark gives those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.format.decoding import Decoder
from tensorspark.data.tfrecord.format.framing import read_records
from tensorspark.data.tfrecord.frames import load_tfrecords, save_tfrecords
from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.commit import commit_job
from tensorspark.data.tfrecord.storage.job import WriteJob
from tensorspark.data.tfrecord.storage.task_output import TaskOutput
from tensorspark.data.tfrecord.storage.writing import RowWriter

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession


def _write(directory: Path, batch: pa.RecordBatch, **options: str) -> None:
    """Writes a batch as a job of one task does."""
    job = WriteJob(str(directory), "job")
    output = TaskOutput(job, 0, "1-a")
    writer = RowWriter(output, batch.schema, Options.parse({"path": str(directory), **options}))
    writer.write(batch)
    writer.close()
    commit_job(job, [output.finish()])


def _ids(file: Path) -> list[int]:
    """The values of the column `id` in a file, in their order."""
    decoder = Decoder(pa.schema([pa.field("id", pa.int64())]))
    with file.open("rb") as opened:
        return [
            row["id"] for records in read_records(opened, name=file.name) for row in decoder.decode(records).to_pylist()
        ]


def _directories(root: Path) -> list[str]:
    """Of the data files, relative to `root`."""
    files = (file for file in root.rglob("*") if file.is_file() and not file.name.startswith(("_", ".")))
    return sorted({str(file.parent.relative_to(root)) for file in files})


def test_rows_lie_in_their_directories_in_the_order_that_they_came_in(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict(
        {"p": ["b", "a", None, "b", "a", "", "b"], "id": list(range(10, 17)), "q": [1, 1, 2, 1, 2, 2, 3]}
    )

    _write(tmp_path / "out", batch, partitionBy="p,q")

    # Spark gives null and the empty string one directory.
    nothing = "p=__HIVE_DEFAULT_PARTITION__/q=2"
    expected = {"p=a/q=1": [11], "p=a/q=2": [14], "p=b/q=1": [10, 13], "p=b/q=3": [16], nothing: [12, 15]}
    assert _directories(tmp_path / "out") == sorted(expected)
    for directory, ids in expected.items():
        (file,) = (tmp_path / "out" / directory).iterdir()
        assert _ids(file) == ids


def test_columns_whose_combinations_64_bits_cannot_count_give_each_row_its_own_directory(tmp_path: Path) -> None:
    num_rows, names = 100, [f"p{index}" for index in range(10)]
    assert num_rows ** len(names) > 2**64
    random = np.random.default_rng(7)
    values = {name: random.permutation(num_rows) for name in names}

    batch = pa.RecordBatch.from_pydict({"id": np.arange(num_rows), **values})
    _write(tmp_path / "out", batch, partitionBy=",".join(names))

    for row in range(num_rows):
        directory = tmp_path / "out" / "/".join(f"{name}={values[name][row]}" for name in names)
        (file,) = directory.iterdir()
        assert _ids(file) == [row]


def test_a_batch_without_rows_makes_no_directories(tmp_path: Path) -> None:
    _write(tmp_path / "out", pa.RecordBatch.from_pydict({"id": pa.array([], pa.int64()), "p": []}), partitionBy="p")

    assert _directories(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("data_type", "values"),
    [
        ("float", "0.1 -1.5 100 1e-5 0.001 0.00099 9999999 1e7 16777216 3.4028235e38 -0.0 NaN Infinity"),
        ("double", "0.1 123456.789 1e-5 0.001 0.00099 9999999 1e7 -1.5e-7 1e20 1.7976931348623157e308 0 NaN -Infinity"),
        ("decimal(12,8)", "0 0.00000001 -12.5 100"),
        ("decimal(20,0)", "0 100000000000000000"),
        ("boolean", "true false"),
        ("date", "0999-01-31 2024-02-29"),
        ("tinyint", "-7 0"),
        ("string", "a/b NaN 0.10"),
    ],
    ids=lambda text: text.partition(" ")[0],
)
def test_directories_are_named_as_spark_names_them(
    session: SqlSession, tmp_path: Path, data_type: str, values: str
) -> None:
    texts = session.createDataFrame([(text,) for text in [*values.split(), None]], "text string").coalesce(1)
    df = texts.selectExpr("1L AS id", f"CAST(text AS {data_type}) AS p")
    df.write.partitionBy("p").parquet(str(tmp_path / "sparks"))

    save_tfrecords(df, str(tmp_path / "ours"), partition_by=["p"])

    assert _directories(tmp_path / "ours") == _directories(tmp_path / "sparks")


def test_numbers_that_are_no_finite_ones_come_back_as_numbers(session: SqlSession, tmp_path: Path) -> None:
    names = ["NaN", "Infinity", "-Infinity", "0.25", "1e30"]
    df = session.createDataFrame([(index, float(name)) for index, name in enumerate(names)], "id bigint, p double")
    save_tfrecords(df.coalesce(1), str(tmp_path / "ours"), partition_by=["p"])
    df.where("p <> 1e30").coalesce(1).write.partitionBy("p").parquet(str(tmp_path / "sparks"))

    back = load_tfrecords(session, str(tmp_path / "ours"))

    # Spark itself takes 1.0E30 for a decimal, and then all of them for strings.
    assert back.dtypes == session.read.parquet(str(tmp_path / "sparks")).dtypes == [("id", "bigint"), ("p", "double")]
    assert [str(row["p"]) for row in back.orderBy("id").collect()] == ["nan", "inf", "-inf", "0.25", "1e+30"]


@pytest.mark.parametrize("mode", ["error", "ignore"])
def test_a_local_write_into_directories_keeps_every_tasks_rows(session: SqlSession, tmp_path: Path, mode: str) -> None:
    """More tasks than run at once: the later ones find the directories of the earlier ones."""
    df = session.range(0, 24, 1, 6).selectExpr("id", "id % 2 AS label")

    save_tfrecords(df, str(tmp_path / "out"), partition_by=["label"], mode=mode, writeLocality="local")

    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["label=0", "label=1"]
    back = load_tfrecords(session, str(tmp_path / "out"))
    assert sorted(map(tuple, back.collect())) == [(index, index % 2) for index in range(24)]
