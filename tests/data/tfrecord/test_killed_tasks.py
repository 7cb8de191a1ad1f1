"""Writes on two executors whose tasks are run twice at once, or killed in the middle: every row is there once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.clusters.standalone import StandaloneCluster, spark_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_ROWS = 20  # of each of two partitions; of 200 kB, so that more than buffers hold is written before the last
NAMES = ("hung", "both", "killed", "killed locally")

# What the task of the second partition does at its row 16, in its first attempt: "hung" waits for its own end, "both"
# waits until the speculative attempt runs too, "killed" kills the process that has the attempt's file open.
_DRIVER = """
import json, os, sys, time
from pathlib import Path

import psutil
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import SparkSession

from tensorspark.data.tfrecord.source.data_source import register_tfrecord

master, root, num_rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
settings = {
    "spark.ui.enabled": "false",
    "spark.cores.max": "2",
    "spark.executor.cores": "1",
    "spark.executor.memory": "512m",
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.multiplier": "1.1",
    "spark.speculation.minTaskRuntime": "500ms",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "2",
}
builder = SparkSession.builder.master(master).appName("killed tasks").config(map=settings)
spark = builder.getOrCreate()
register_tfrecord(spark)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited for 60 s")
        time.sleep(0.02)


def copies(name, partition):
    return list(root.glob(f"{name} {partition} *"))


def kill_writer(out):
    def writers():
        begun = {str(path) for path in out.glob("_temporary/*/*/part-00001*") if path.stat().st_size}
        for process in psutil.process_iter() if begun else ():
            try:
                if begun & {file.path for file in process.open_files()}:
                    yield process
            except psutil.Error:
                continue

    found = []
    wait_until(lambda: found.extend(writers()) or found)
    for process in found:
        process.kill()


def rows(name):
    def generate(batches):
        context = TaskContext.get()
        partition, attempt = context.partitionId(), context.attemptNumber()
        executor = psutil.Process().parent().ppid()
        (root / f"{name} {partition} {attempt}").write_text(str(executor))
        for batch in batches:
            for row in batch.column(0).to_pylist():
                if partition == 1 and attempt == 0 and row == num_rows + 16:
                    if name == "hung":
                        wait_until(lambda: False)
                    elif name == "both":
                        wait_until(lambda: len(copies(name, 1)) > 1)
                    else:
                        kill_writer(root / "out" / name)
                yield pa.RecordBatch.from_pydict({"id": [row], "payload": [bytes([row]) * 200_000]})

    return generate


def write(name, **options):
    out = root / "out" / name
    df = spark.range(0, 2 * num_rows, 1, 2).mapInArrow(rows(name), "id bigint, payload binary")
    df.write.format("tfrecord").mode("append").options(**options).save(str(out))
    back = spark.read.format("tfrecord").schema("id bigint, payload binary").load(str(out)).collect()
    return {
        "rows": sorted((row["id"], bytes(row["payload"]) == bytes([row["id"]]) * 200_000) for row in back),
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "executors": [path.read_text() for path in sorted(copies(name, 1))],
    }


outcome = {
    "hung": write("hung"),
    "both": write("both"),
    "killed": write("killed"),
    "killed locally": write("killed locally", writeLocality="local"),
}
(root / "outcome").write_text(json.dumps(outcome))
spark.stop()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each write: the rows read back, the files left, and the executor of each attempt of the second partition."""
    root = tmp_path_factory.mktemp("writes")
    with StandaloneCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        ended = subprocess.run(
            [sys.executable, "-c", _DRIVER, cluster.url, root, str(NUM_ROWS)],
            check=False,
            env=spark_environment(),
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads((root / "outcome").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_there_once_and_nothing_else(outcome: dict[str, Any], name: str) -> None:
    written = outcome[name]

    assert written["rows"] == [[row, True] for row in range(2 * NUM_ROWS)]
    data = [file for file in written["files"] if file.startswith("part-")]
    assert [file[:10] for file in data] == ["part-00000", "part-00001"]
    # Executors that commit for themselves write no mark of the whole.
    assert set(written["files"]) - set(data) == (set() if name == "killed locally" else {"_SUCCESS"})


@pytest.mark.parametrize("name", NAMES)
def test_the_task_ran_more_than_once(outcome: dict[str, Any], name: str) -> None:
    executors = outcome[name]["executors"]

    assert len(executors) > 1
    if name in ("hung", "both"):  # Spark's speculation is what ran it again, elsewhere
        assert len(set(executors)) == 2
