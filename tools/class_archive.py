"""Writes an archive of the classes that Spark loads, so that the JVMs of the tests start with half the processor time.

    python tools/class_archive.py FILE

It is Java's class data sharing: a JVM that is started with ``-XX:SharedArchiveFile=FILE`` maps the classes instead of
parsing and verifying them. One that cannot use the file (another Java, other jars) starts as if there were none.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

# Writing takes some ten seconds, after the context has ended.
_DEADLINE_S = 120


def main(path: Path) -> None:
    path.unlink(missing_ok=True)
    # The collector is part of what an archive is for: the one of tests/conftest.py.
    os.environ["SPARK_SUBMIT_OPTS"] = f"-XX:+UseSerialGC -XX:ArchiveClassesAtExit={path} -Xlog:cds*=off"
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    # What most tests have Spark do: Python tasks, a shuffle, and batches of Arrow from Python and to it.
    frame = spark.range(8, numPartitions=2).selectExpr("id", "array(cast(id AS double)) AS features")
    frame.mapInArrow(lambda batches: batches, frame.schema).repartition(2).rdd.mapPartitions(list).count()
    spark.createDataFrame(frame.toPandas()).groupBy("id").count().collect()
    spark.stop()
    gateway: Any = spark.sparkContext._gateway
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(_DEADLINE_S)
    # spark-submit, whose end was waited for, is the JVM itself: the file is whole, or there is none.
    if not path.exists():
        sys.exit(f"{sys.argv[0]}: this Java wrote no archive of classes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    start = time.monotonic()
    main(Path(sys.argv[1]).resolve())
    print(f"archive of Spark's classes: {sys.argv[1]}, {time.monotonic() - start:.0f} s")
