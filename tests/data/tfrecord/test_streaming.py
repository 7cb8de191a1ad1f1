"""Streams of TFRecord files: each file is read once and each batch written once, also where the query starts again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession


def _append(session: SqlSession, path: Path, start: int, end: int) -> None:
    session.range(start, end, 1, 1).write.format("tfrecord").mode("append").save(str(path))


def _run(session: SqlSession, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    """Lets a query copy what is in ``in`` to ``out``; gives its progress."""
    stream = session.readStream.format("tfrecord").schema("id bigint").options(**options).load(str(tmp_path / "in"))
    query = (
        stream.writeStream.format("tfrecord")
        .option("checkpointLocation", str(tmp_path / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(tmp_path / "out"))
    )
    try:
        assert query.awaitTermination(120), "the query did not end in 120 s"
    finally:
        query.stop()
    return [progress for progress in query.recentProgress if progress["numInputRows"]]


def _ids(session: SqlSession, path: Path) -> list[int]:
    return sorted(row["id"] for row in session.read.format("tfrecord").schema("id bigint").load(str(path)).collect())


def test_a_stream_takes_each_file_once_and_goes_on_where_it_stopped(session: SqlSession, tmp_path: Path) -> None:
    _append(session, tmp_path / "in", 0, 5)
    _append(session, tmp_path / "in", 5, 8)

    first = _run(session, tmp_path, maxFilesPerTrigger=1)
    assert _ids(session, tmp_path / "out") == list(range(8))
    assert [progress["numInputRows"] for progress in first] == [5, 3]
    _append(session, tmp_path / "in", 8, 10)
    second = _run(session, tmp_path, maxFilesPerTrigger=1)

    assert [progress["numInputRows"] for progress in second] == [2]
    assert _ids(session, tmp_path / "out") == list(range(10))


def test_a_batch_that_spark_repeats_is_written_once(session: SqlSession, tmp_path: Path) -> None:
    """As where the driver died between the sink's commit and its own note of it; new files have come since."""
    _append(session, tmp_path / "in", 0, 5)
    _run(session, tmp_path)
    for file in (tmp_path / "checkpoint" / "commits").iterdir():
        file.unlink()
    _append(session, tmp_path / "in", 5, 8)

    _run(session, tmp_path)

    assert _ids(session, tmp_path / "out") == list(range(8))


def test_files_that_are_too_old_and_files_seen_are_left_out() -> None:
    from pyspark.sql.streaming.datasource import ReadAllAvailable, ReadMaxFiles
    from pyspark.sql.types import StructType

    from tensorspark.data.tfrecord.options import Options
    from tensorspark.data.tfrecord.source import stream
    from tensorspark.data.tfrecord.storage.paths import DataFile

    day_us = 86_400_000_000
    present = [DataFile("/in", f"/in/{name}", 1, time_us) for name, time_us in (("b", 9 * day_us), ("a", 5 * day_us))]
    reader = stream.TFRecordStreamReader(StructType(), Options(("/in",), max_file_age_s=2 * 86_400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "list_files", lambda options: list(present))
        first = reader.latestOffset(reader.initialOffset(), ReadMaxFiles(1))
        second = reader.latestOffset(first, ReadAllAvailable())
        # Late by a day: within the age. Late by three: taken for seen, as are a and b.
        present += [DataFile("/in", "/in/late", 1, 8 * day_us), DataFile("/in", "/in/lost", 1, 6 * day_us)]
        third = reader.latestOffset(second, ReadAllAvailable())
        fourth = reader.latestOffset(third, ReadAllAvailable())

    names = [[file["path"] for file in offset["batch"]] for offset in (first, second, third)]
    assert names == [["/in/a"], ["/in/b"], ["/in/late"]]
    assert fourth == third
    assert len(second["seen"]) == 1  # a is older than any file that may still come
