"""The public names for TFRecords, and RDDs of serialized records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tensorspark as ts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession


def test_records_of_an_rdd_are_in_files_that_tensorflow_reads_and_come_back(spark: SqlSession, tmp_path: Path) -> None:
    import tensorflow as tf

    records = [b"", b"\x00\xff", "é".encode(), b"x" * 100_000]
    path = tmp_path / "records"

    ts.data.save_tfrecords_rdd(spark.sparkContext.parallelize(records, 3), str(path), codec="gzip")

    files = sorted(map(str, path.glob("part-*.gz")))
    assert sorted(tf.data.TFRecordDataset(files, "GZIP").as_numpy_iterator()) == sorted(records)
    assert sorted(ts.data.load_tfrecords_rdd(spark, str(path)).collect()) == sorted(records)


def test_pairs_that_begin_with_a_record_are_saved_without_the_rest(spark: SqlSession, tmp_path: Path) -> None:
    from tensorspark.compat.tensorflowonspark import dfutil

    frame = spark.createDataFrame([(1, [0.5, 1.5])], "id long, xs array<float>")
    examples = frame.rdd.mapPartitions(dfutil.toTFExample(frame.dtypes))

    ts.data.save_tfrecords_rdd(examples, str(tmp_path / "out"))

    [row] = ts.data.load_tfrecords(spark, str(tmp_path / "out")).collect()
    assert row.asDict() == {"id": 1, "xs": [0.5, 1.5]}


def test_an_rdd_of_something_else_is_refused_and_leaves_nothing(spark: SqlSession, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"expected an RDD of bytes, .*, got int; serialize the records"):
        ts.data.save_tfrecords_rdd(spark.sparkContext.parallelize([b"x", 3], 2), str(tmp_path / "out"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_names_are_there_without_spark_or_tensorflow_being_imported() -> None:
    program = (
        "import sys, tensorspark as ts\n"
        "assert ts.data and 'register_tfrecord' in ts.__all__\n"
        "print(sorted({'tensorflow', 'pyspark', 'pyarrow', 'crc32c'} & set(sys.modules)))\n"
        "print(ts.register_tfrecord.__name__, ts.data.save_tfrecords.__name__, ts.tfrecord_dataset.__name__)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.splitlines() == ["[]", "register_tfrecord save_tfrecords tfrecord_dataset"]


def test_a_missing_dependency_is_named_with_what_installs_it() -> None:
    program = "import sys; sys.modules['crc32c'] = None\nimport tensorspark as ts; ts.data.load_tfrecords\n"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    expected = r"ImportError: TFRecord files need crc32c, .* not installed: pip install 'tensorspark\[tfrecord\]'"
    assert re.search(expected, output.stderr), output.stderr
