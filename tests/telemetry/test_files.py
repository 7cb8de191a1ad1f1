"""A run's records as files: what is written is read back, on a local disk, elsewhere and on HDFS."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import fsspec
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import ConfigError, StagingError
from tensorspark.telemetry import growing
from tensorspark.telemetry.files import RunFile, decode, directory_name, encode, read_run
from tensorspark.telemetry.growing import GrowingFile
from tensorspark.telemetry.records import (
    EpochEnded,
    LogLine,
    Record,
    RunBegan,
    RunEnded,
    Span,
    Spans,
    Tensor,
    TrainingPoint,
)

if TYPE_CHECKING:
    from tests.hadoop.cluster import HdfsCluster

texts = st.text(st.characters(codec="utf-8"), max_size=20)
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: texts,
    type(None): st.none(),
}


def of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(of, arguments))
    if origin is tuple:
        return st.lists(of(arguments[0]), max_size=3).map(tuple)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(of(arguments[0]), of(arguments[1]), max_size=3)
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: of(hints[field.name]) for field in fields(kind)})


records: st.SearchStrategy[Record] = st.one_of(*map(of, get_args(Record)))


BEGAN = RunBegan(
    *(0.0, 3, "digits", 1_700_000_000.0, "asynchronous", 2, 5, "DeltaWeightCombiner"),
    {"log_dir": "/logs"},
    (Tensor("W:0", (4, 3), "float32"), Tensor("b:0", (), "int64")),
    *(52, "2.0.0"),
)
RUN: tuple[Record, ...] = (
    BEGAN,
    TrainingPoint(1.5, 10, 100, {"loss": 0.25, "gradient": None}),
    Spans(2.0, (Span(0.5, 1, "compute", 0.25), Span(0.75, 1, "wait", 0.125, is_sum=True))),
    LogLine(2.5, 1, "node-1", 30, "fsspec", "a line\nand another, ünï \u2028\x85\r"),
    EpochEnded(3.0, 1, 12, {"loss": 0.125}),
    RunEnded(4.0, "finished", "", 12, 120),
)


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A directory of fsspec's in-memory filesystem, on which no file grows."""
    name = f"runs-{uuid.uuid4().hex}"
    yield f"memory://{name}"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(f"/{name}"):
        filesystem.rm(f"/{name}", recursive=True)


def names(url: str) -> list[str]:
    filesystem, path = fsspec.url_to_fs(url)
    return sorted(name.rpartition("/")[2] for name in filesystem.ls(path, detail=False))


def at_every_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a part be due whenever there is anything to be written."""
    monkeypatch.setattr(growing, "_FIRST_PART_S", 0.0)
    monkeypatch.setattr(growing, "_PARTS_AN_AGE", math.inf)


def write(directory: str, *written: Record) -> None:
    file = RunFile(directory)
    for record in written:
        file.record(record)
    file.close()


# A line


@given(records)
def test_a_record_comes_back_from_its_line_as_it_was(record: Record) -> None:
    line = encode(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line, "a line") == record


@given(st.lists(records, max_size=6))
def test_lines_are_told_apart_whatever_is_in_them(several: list[Record]) -> None:
    lines = b"".join(map(encode, several)).splitlines(keepends=True)
    assert [decode(line, "a line") for line in lines] == several


def test_every_kind_of_record_is_of_the_format() -> None:
    assert {type(record).__name__ for record in RUN} <= {kind.__name__ for kind in get_args(Record)}
    assert json.loads(encode(RUN[1])) == {
        "record": "TrainingPoint",
        "seconds": 1.5,
        "num_steps": 10,
        "num_samples": 100,
        "scalars": {"loss": 0.25, "gradient": None},
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_by_no_record(value: float) -> None:
    with pytest.raises(ValueError):
        encode(replace(RUN[4], logs={"loss": value}))  # type: ignore[type-var]


def test_a_record_of_a_later_versions_kind_is_passed_over() -> None:
    assert decode('{"record": "Weather", "seconds": 1.0, "sky": ["blue"]}', "a line") is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "rubbish",
        "[]",
        "7",
        "null",
        "{}",
        '{"record": ["RunEnded"]}',
        '{"record": "RunEnded"}',
        '{"record": "RunEnded", "seconds": "1", "outcome": "finished"}',
        '{"record": "RunEnded", "seconds": 1.0, "outcome": null}',
        '{"record": "RunEnded", "seconds": 1.0, "outcome": "finished", "more": 1}',
        '{"record": "RunEnded", "seconds": true, "outcome": "finished"}',
        '{"record": "RunEnded", "seconds": 1' + "0" * 5000 + ', "outcome": "finished"}',
        '{"record": "Spans", "seconds": 1.0, "spans": [7]}',
        '{"record": "Spans", "seconds": 1.0, "spans": {}}',
        '{"record": "EpochEnded", "seconds": 1.0, "epoch": 1, "num_steps": 1, "logs": []}',
        b"\xff\xfe",
    ],
    ids=lambda line: str(line)[:60],
)
def test_what_is_no_record_is_an_error_that_names_the_line(line: str | bytes) -> None:
    with pytest.raises(ConfigError, match="file x, line 7, is no record of a run"):
        decode(line, "file x, line 7,")


# A file


def test_a_run_is_read_back_from_a_local_disk_as_one_file(tmp_path: Path) -> None:
    directory = tmp_path / "logs" / "digits"  # neither is there
    write(str(directory), *RUN)
    assert os.listdir(directory) == ["run-0000.jsonl"]
    assert tuple(read_run(str(directory))) == RUN
    assert tuple(read_run(f"file://{directory}")) == RUN


def test_pandas_reads_the_file(tmp_path: Path) -> None:
    write(str(tmp_path), *RUN)
    table = pd.read_json(tmp_path / "run-0000.jsonl", lines=True)
    assert list(table["record"]) == [type(record).__name__ for record in RUN]
    assert list(table["seconds"]) == [record.seconds for record in RUN]


def test_a_local_file_has_all_that_was_flushed_while_the_run_goes_on(tmp_path: Path) -> None:
    file = RunFile(str(tmp_path))
    for number, record in enumerate(RUN, 1):
        file.record(record)
        file.flush()
        assert tuple(read_run(str(tmp_path))) == RUN[:number]
    file.close()
    assert tuple(read_run(str(tmp_path))) == RUN


def test_a_run_is_read_back_from_parts_where_files_do_not_grow(
    memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_every_flush(monkeypatch)
    file = RunFile(memory_url)
    for record in RUN:
        file.record(record)
        file.flush()
    file.flush()  # nothing is there to be written
    file.close()
    assert names(memory_url) == [f"run-{part:04d}.jsonl" for part in range(len(RUN))]
    assert tuple(read_run(memory_url)) == RUN


@given(st.lists(st.lists(records, max_size=3), max_size=5))
def test_whatever_was_flushed_together_comes_back_in_order(batches: list[list[Record]]) -> None:
    url = f"memory://runs-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        at_every_flush(monkeypatch)
        file = RunFile(url)
        for batch in batches:
            for record in batch:
                file.record(record)
            file.flush()
        file.close()
    flat = [record for batch in batches for record in batch]
    if flat:
        assert list(read_run(url)) == flat
    else:
        with pytest.raises(ConfigError, match="holds no run"):
            list(read_run(url))


def test_parts_become_rarer_the_longer_the_file_grows(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    file = GrowingFile(memory_url, lambda part: f"{part:06d}", setting="a.setting")
    began, written_at, count = now[0], [], 0
    while now[0] < began + 36_000:
        now[0] += 10.0
        file.write(b"x")
        file.flush()
        if (found := len(fsspec.filesystem("memory").ls(file._path, detail=False))) != count:
            count = found
            written_at.append(now[0] - began)
    intervals = [later - earlier for earlier, later in zip([0.0, *written_at], written_at, strict=False)]
    assert intervals[:5] == [10.0] * 5
    assert intervals == sorted(intervals)
    assert next(i for i, at in zip(intervals, written_at, strict=True) if at > 600) in (30.0, 40.0)
    assert 1500 < intervals[-1] < 2000
    assert count < 150


def test_much_that_is_pending_is_written_before_its_time(memory_url: str) -> None:
    file = GrowingFile(memory_url, lambda part: f"{part:06d}", setting="a.setting")
    file.write(bytes(2**25))
    file.flush()
    assert names(memory_url) == []
    file.write(b"x")
    file.flush()
    assert names(memory_url) == ["000000"]
    file.write(b"y")
    file.flush(at_once=True)
    assert names(memory_url) == ["000000", "000001"]


def test_what_one_thread_writes_while_another_flushes_is_in_the_file_once(tmp_path: Path) -> None:
    file = GrowingFile(str(tmp_path), lambda part: "file", setting="a.setting")
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            file.flush()

    thread = threading.Thread(target=flush)
    thread.start()
    expected = [b"%d\n" % number for number in range(30_000)]
    for line in expected:
        file.write(line)
    done.set()
    thread.join(30)
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(expected)


# What cannot be read or written


def test_a_run_that_was_cut_short_is_read_up_to_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(str(tmp_path), *RUN)
    file = tmp_path / "run-0000.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert tuple(read_run(str(tmp_path))) == RUN[:-1]
    assert "is cut off: the driver died" in caplog.text


def test_a_broken_line_is_an_error_that_says_where(tmp_path: Path) -> None:
    write(str(tmp_path), *RUN)
    file = tmp_path / "run-0000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"broken\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"run-0000\.jsonl, line 3, is no record"):
        list(read_run(str(tmp_path)))


def error_of(url: str) -> str:
    with pytest.raises(ConfigError) as raised:
        list(read_run(url))
    return str(raised.value)


def test_a_replay_of_what_holds_no_run_says_what_is_there(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "typo")).endswith("typo does not exist")
    assert error_of(str(tmp_path)).endswith("holds no run")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert error_of(str(tmp_path / "notes.txt")).endswith("notes.txt is a file: name its directory")
    assert error_of(str(tmp_path)).endswith("holds no run")
    for number in range(7):
        write(str(tmp_path / f"digits-{number}"), *RUN)
    assert error_of(f"{tmp_path}/").endswith(
        "holds 7 of them: name one, such as digits-2, digits-3, digits-4, digits-5, digits-6"
    )


def test_a_directory_below_a_file_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StagingError, match=r"spark\.tensorspark\.log\.dir: could not make"):
        RunFile(str(tmp_path / "file" / "run"))


def test_a_disk_that_is_full_is_an_error_when_it_is_written_to(tmp_path: Path) -> None:
    file = RunFile(str(tmp_path))
    os.symlink("/dev/full", tmp_path / "run-0000.jsonl")
    file.record(BEGAN)
    with pytest.raises(StagingError, match="No space left"):
        file.flush()


# A directory's name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "digits"),
        ("my run: 3/4 & ../more", "my-run-3-4-..-more"),
        ("../../etc", "etc"),
        ("..", "run"),
        ("", "run"),
        ("zażółć", "zażółć"),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_runs_directory_is_named_after_it_and_stays_where_it_belongs(name: str, expected: str) -> None:
    found = directory_name(replace(BEGAN, name=name), "0123456789abcdef")
    assert found.startswith((f"{expected}-20231114-", f"{expected}-20231115-"))  # wherever the test runs
    assert found.endswith("-012345-3")
    assert "/" not in found


# HDFS


@pytest.mark.hdfs
def test_a_run_on_hdfs_is_read_back_and_belongs_to_who_began_it(
    hdfs: HdfsCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/alice-{uuid.uuid4().hex}"
    hdfs.make_directory(path, owner="alice")
    at_every_flush(monkeypatch)
    file = RunFile(f"{hdfs.url}{path}/digits", user="alice")
    for record in RUN:
        file.record(record)
        file.flush()
        assert tuple(read_run(f"{hdfs.url}{path}/digits", user="alice")) == RUN[: RUN.index(record) + 1]
    file.close()
    assert hdfs.names(f"{path}/digits") == [f"run-{part:04d}.jsonl" for part in range(len(RUN))]
    assert hdfs.status(f"{path}/digits/run-0000.jsonl")["owner"] == "alice"


@pytest.mark.hdfs
def test_a_directory_of_another_users_on_hdfs_is_an_error_at_the_beginning(hdfs: HdfsCluster) -> None:
    path = f"/alice-{uuid.uuid4().hex}"
    hdfs.make_directory(path, owner="alice")
    with pytest.raises(StagingError, match=r"spark\.tensorspark\.log\.dir: could not make"):
        RunFile(f"{hdfs.url}{path}/digits", user="bob")


def test_a_directory_s_name_fits_any_filesystem_whatever_the_runs_is() -> None:
    from dataclasses import replace

    began = RunBegan(0.0, 1, "", 1.7e9, "", 1, 1, "", {}, (), 64, "")
    for name in ("\U0001d49c" * 80, "a/b\n" * 500, "...", "\u8a13\u7df4"):
        directory = directory_name(replace(began, name=name), "0123456789abcdef")
        assert len(directory.encode()) < 120
        assert not set(directory) & set("/\n\0")
    assert directory_name(replace(began, name="..."), "0123456789abcdef").startswith("run-")
