"""Directories of checkpoints on local disks, in memory and on a real HDFS; writers that die; the thread that writes."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from tensorspark.data.filesystem import open_filesystem
from tensorspark.driver.checkpoints import CheckpointDirectory, Checkpointer
from tensorspark.errors import CheckpointError, StagingError
from tensorspark.history import PointSums, RecorderState, WorkerReport
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.messages import Cursor, PartitionProgress
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import TensorSpec, WeightLayout

REPOSITORY = Path(__file__).resolve().parents[2]
ENDINGS = (".safetensors", ".combiner.safetensors", ".msgpack")
DEADLINE_S = 60.0

LAYOUT = WeightLayout([TensorSpec("W", (300, 100), "float32"), TensorSpec("b", (3,), "float64")])


def checkpoint(version: int) -> RunCheckpoint:
    """Whose numbers all say which version it is."""
    weights, momentum = (
        LAYOUT.pack({"W": np.full((300, 100), version + by, np.float32), "b": np.full(3, version + by, np.float64)})
        for by in (0.25, 0.75)
    )
    return RunCheckpoint(
        layout=LAYOUT,
        weights=weights,
        version=version,
        seconds=version * 0.5,
        partitions=(PartitionProgress(version, Cursor(1, version), version, 0.5, WorkerReport(0, "h")),),
        points=RecorderState(1, 1, (PointSums(0.5, version, 10, 10, {"loss": 0.1}),)),
        plan={"seed": 7},
        combiner="Momentum",
        combiner_settings={"rate": 0.5},
        combiner_state=CombinerState({"momentum": momentum}, {"count": version}),
        is_complete=False,
    )


def assert_is_version(found: RunCheckpoint, version: int) -> None:
    expected = checkpoint(version)
    assert found.version == version
    assert found.weights.tobytes() == expected.weights.tobytes()
    assert found.combiner_state.slots["momentum"].tobytes() == expected.combiner_state.slots["momentum"].tobytes()
    assert found.partitions == expected.partitions


@dataclass
class Place:
    """An existing directory on some filesystem."""

    url: str
    user: str = ""

    def directory(self, keep: int = 3, **settings: Any) -> CheckpointDirectory:
        return CheckpointDirectory(f"{self.url}/tensorspark-checkpoints-r1", user=self.user, keep=keep, **settings)

    def filesystem(self) -> tuple[Any, str]:
        filesystem, path = open_filesystem(self.url, self.user)
        return filesystem, f"{path}/tensorspark-checkpoints-r1"

    def names(self) -> list[str]:
        filesystem, path = self.filesystem()
        return sorted(name.rpartition("/")[2] for name in filesystem.ls(path, detail=False))

    def marks(self) -> list[str]:
        return [name for name in self.names() if name.endswith(".msgpack") and not name.startswith(".")]

    def change(self, name: str, change: Callable[[bytes], bytes]) -> None:
        filesystem, path = self.filesystem()
        with filesystem.open(f"{path}/{name}", "rb") as file:
            content = bytes(file.read())
        with filesystem.open(f"{path}/{name}", "wb") as file:
            file.write(change(content))


def make_local(request: pytest.FixtureRequest) -> Place:
    path: Path = request.getfixturevalue("tmp_path")
    return Place(path.as_uri())


def make_memory(request: pytest.FixtureRequest) -> Place:
    filesystem = fsspec.filesystem("memory")
    path = f"/checkpoints-{uuid.uuid4().hex}"
    filesystem.makedirs(path)
    request.addfinalizer(lambda: filesystem.rm(path, recursive=True))
    return Place(f"memory:/{path}")


def make_hdfs(request: pytest.FixtureRequest) -> Place:
    hdfs = request.getfixturevalue("hdfs")
    path = f"/checkpoints-{uuid.uuid4().hex}"
    hdfs.make_directory(path, owner="alice")
    return Place(f"{hdfs.url}{path}", "alice")


HDFS = pytest.param(make_hdfs, id="hdfs", marks=pytest.mark.hdfs)


@pytest.fixture(params=[pytest.param(make_local, id="file"), pytest.param(make_memory, id="memory"), HDFS])
def place(request: pytest.FixtureRequest) -> Place:
    made: Place = request.param(request)
    return made


@pytest.fixture(params=[pytest.param(make_local, id="file"), HDFS])
def shared_place(request: pytest.FixtureRequest) -> Place:
    """One that several processes and threads can use at once."""
    made: Place = request.param(request)
    return made


@pytest.fixture(params=[pytest.param(make_local, id="file"), pytest.param(make_memory, id="memory")])
def quick_place(request: pytest.FixtureRequest) -> Place:
    """For what depends on the content alone, in many cases."""
    made: Place = request.param(request)
    return made


@pytest.fixture
def local(request: pytest.FixtureRequest) -> Place:
    return make_local(request)


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_read(place: Place) -> None:
    directory = place.directory()
    for version in (5, 6):
        directory.write(checkpoint(version))
    assert_is_version(directory.read_newest(), 6)


def test_a_checkpoint_is_three_files_of_one_stem_and_nothing_else_is_left(place: Place) -> None:
    written = place.directory().write(checkpoint(5))
    names = place.names()
    stems = {name.split(".")[0] for name in names}
    assert (written.number, written.url) == (1, f"{place.url}/tensorspark-checkpoints-r1")
    assert len(stems) == 1
    assert re.fullmatch(r"checkpoint-00000001-[0-9a-f]{8}", min(stems))
    assert sorted(name.removeprefix(min(stems)) for name in names) == sorted(ENDINGS)


def test_only_the_newest_are_kept(place: Place) -> None:
    directory = place.directory(keep=2)
    for version in range(1, 5):
        directory.write(checkpoint(version))
    assert [name[:19] for name in place.marks()] == ["checkpoint-00000003", "checkpoint-00000004"]
    assert len(place.names()) == 2 * len(ENDINGS)


def test_numbers_go_on_where_another_writer_ended(place: Place) -> None:
    place.directory().write(checkpoint(5))
    place.directory().write(checkpoint(6))
    assert place.directory().write(checkpoint(7)).number == 3
    assert_is_version(place.directory().read_newest(), 7)


def test_what_a_writer_left_is_removed_and_what_is_not_ours_stays(place: Place) -> None:
    place.directory().write(checkpoint(5))
    filesystem, path = place.filesystem()
    left = [
        "checkpoint-00000002-0123abcd.safetensors",
        f".checkpoint-00000002-0123abcd.combiner.safetensors.{'0' * 32}",
        f".checkpoint-00000001-0123abcd.msgpack.{'0' * 32}",
    ]
    foreign = ["checkpoint-2.safetensors", "notes.txt", "model.safetensors"]
    for name in left + foreign:
        with filesystem.open(f"{path}/{name}", "wb") as file:
            file.write(b"x")
    assert place.directory().write(checkpoint(6)).number == 3
    assert not set(left) & set(place.names())
    assert set(foreign) <= set(place.names())
    assert len(place.names()) == 2 * len(ENDINGS) + len(foreign)


def test_the_directory_comes_with_the_first_checkpoint_and_its_parent_must_exist(place: Place) -> None:
    filesystem, path = place.filesystem()
    directory = place.directory()
    assert not filesystem.exists(path)
    directory.write(checkpoint(1))
    assert filesystem.exists(path)
    orphan = CheckpointDirectory(f"{place.url}/typo/tensorspark-checkpoints-r1", user=place.user)
    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: expected .*typo' .*but nothing is there"):
        orphan.write(checkpoint(1))
    assert not filesystem.exists(path.replace("tensorspark-checkpoints-r1", "typo"))


def test_a_bare_path_is_a_local_directory(tmp_path: Path) -> None:
    CheckpointDirectory(f"{tmp_path}/c/").write(checkpoint(5))
    assert_is_version(CheckpointDirectory(f"{tmp_path}/c").read_newest(), 5)


def test_the_directory_of_a_run_lies_in_the_staging_directory() -> None:
    assert CheckpointDirectory.url_of_run("hdfs://h:1/tmp/", "r1") == "hdfs://h:1/tmp/tensorspark-checkpoints-r1"


def test_a_keep_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointDirectory("/tmp", keep=0)


def test_a_write_that_fails_leaves_the_directory_as_it_was(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = local.directory(keep=1)
    directory.write(checkpoint(5))
    before = local.names()
    filesystem, _ = local.filesystem()
    move = type(filesystem).mv

    def full_at_the_mark(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith(".msgpack"):
            raise OSError(28, "No space left on device")
        move(self, source, target, **options)

    monkeypatch.setattr(type(filesystem), "mv", full_at_the_mark)
    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: could not write a checkpoint to .*No space left"):
        directory.write(checkpoint(6))
    assert local.names() == before
    assert_is_version(directory.read_newest(), 5)


def test_old_checkpoints_that_cannot_be_removed_are_a_warning(
    local: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = local.directory(keep=1)
    directory.write(checkpoint(5))
    filesystem, _ = local.filesystem()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(filesystem), "rm", refuse)
    assert directory.write(checkpoint(6)).number == 2
    assert "checkpoint 2 is written, but older ones could not be removed: spark.hdfs.dir: " in caplog.text
    assert_is_version(directory.read_newest(), 6)


# --- a checkpoint that is not whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_the_log_says_why(
    quick_place: Place, ending: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = quick_place.directory()
    for version in (5, 6):
        directory.write(checkpoint(version))
    stem = quick_place.marks()[-1].removesuffix(".msgpack")
    if damage == "gone":
        filesystem, path = quick_place.filesystem()
        filesystem.rm(f"{path}/{stem}{ending}")
    else:
        damaged: dict[str, Callable[[bytes], bytes]] = {
            "cut": lambda content: content[: len(content) // 2],
            "flipped": lambda content: content[:99] + bytes([content[99] ^ 16]) + content[100:],
            "empty": lambda content: b"",
        }
        quick_place.change(f"{stem}{ending}", damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert_is_version(directory.read_newest(), 5)
    warnings = [record.getMessage() for record in caplog.records]
    if (ending, damage) == (".msgpack", "gone"):
        assert warnings == []  # without its mark it is no checkpoint
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(f"skipped {stem} in {directory.url}: {stem}{ending}: ")


@pytest.mark.hdfs
def test_a_damaged_checkpoint_on_hdfs_is_skipped(request: pytest.FixtureRequest) -> None:
    place = make_hdfs(request)
    for version in (5, 6):
        place.directory().write(checkpoint(version))
    place.change(place.marks()[-1].replace(".msgpack", ".safetensors"), lambda content: content[:-1])
    assert_is_version(place.directory().read_newest(), 5)


def test_warnings_go_to_the_log_that_was_given(local: Place, caplog: pytest.LogCaptureFixture) -> None:
    directory = local.directory()
    for version in (5, 6):
        directory.write(checkpoint(version))
    local.change(local.marks()[-1], lambda content: content[:-1])
    directory.read_newest(logging.getLogger("notebook"))
    assert [(record.name, record.levelname) for record in caplog.records] == [("notebook", "WARNING")]


def test_where_none_is_whole_the_error_lists_them_all(place: Place) -> None:
    directory = place.directory()
    for version in (5, 6):
        directory.write(checkpoint(version))
    marks = place.marks()
    for mark in marks:
        place.change(mark, lambda content: content[:-1])
    with pytest.raises(CheckpointError, match="expected a whole checkpoint in") as caught:
        directory.read_newest()
    for mark in marks:
        assert f"{mark}: torn" in str(caught.value)


def test_an_absent_directory_is_named(place: Place) -> None:
    with pytest.raises(CheckpointError, match=r"got '.*/tensorspark-checkpoints-r1', where nothing is\. Pass <spark"):
        place.directory().read_newest()


def test_a_parent_of_checkpoint_directories_names_them(place: Place) -> None:
    for run in ("a", "b"):
        CheckpointDirectory(CheckpointDirectory.url_of_run(place.url, run), user=place.user).write(checkpoint(1))
    expected = ", ".join(f"{place.url}/tensorspark-checkpoints-{run}" for run in ("a", "b"))
    with pytest.raises(CheckpointError, match=rf"which holds no checkpoint\. Pass one of {re.escape(expected)}\."):
        CheckpointDirectory(place.url, user=place.user).read_newest()
    with pytest.raises(CheckpointError, match=rf"where nothing is\. Pass one of {re.escape(expected)}\."):
        CheckpointDirectory(f"{place.url}/typo", user=place.user).read_newest()


def test_a_url_of_one_of_the_files_is_refused(place: Place) -> None:
    directory = place.directory()
    directory.write(checkpoint(1))
    url = f"{directory.url}/{place.marks()[0]}"
    with pytest.raises(CheckpointError, match="which is a file"):
        CheckpointDirectory(url, user=place.user).read_newest()


def test_a_checkpoint_that_cannot_be_reached_is_not_skipped(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = local.directory()
    for version in (5, 6):
        directory.write(checkpoint(version))
    filesystem, _ = local.filesystem()

    def lost(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(filesystem), "open", lost)
    with pytest.raises(
        StagingError, match=r"url: could not read .*Input/output error.* To go on from the checkpoint bef"
    ):
        directory.read_newest()


# --- writers that die, and several at once ----------------------------------------------------------------------------

WRITER = """
import sys
sys.path[:0] = [{repository!r}, {here!r}]
from test_checkpoints import checkpoint, Place
directory = Place({url!r}, {user!r}).directory(keep=1)
first = int(sys.argv[1])
for version in range(first, first + 100_000):
    directory.write(checkpoint(version))
    print(version, flush=True)
"""


def write_until_killed(place: Place, first: int, kill: Callable[[subprocess.Popen[str]], None]) -> int:
    """Runs a process that writes versions from `first` on; returns the last that it said was written."""
    here = str(Path(__file__).parent)
    code = WRITER.format(repository=str(REPOSITORY), here=here, url=place.url, user=place.user)
    with subprocess.Popen([sys.executable, "-c", code, str(first)], stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(DEADLINE_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            last = int(process.stdout.readline())
            kill(process)
            for line in process.stdout:
                last = int(line)
        finally:
            timer.cancel()
            process.kill()
    assert process.returncode == -signal.SIGKILL
    return last


def test_after_kill_9_at_any_moment_the_newest_acknowledged_checkpoint_is_read(shared_place: Place) -> None:
    rng = random.Random(1)
    version = 1
    for _ in range(5):

        def kill_soon(process: subprocess.Popen[str]) -> None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.05))
            process.kill()

        last = write_until_killed(shared_place, version, kill_soon)
        found = shared_place.directory().read_newest()
        assert found.version in (last, last + 1)
        assert_is_version(found, found.version)
        version = found.version + 1
    shared_place.directory(keep=1).write(checkpoint(version))
    assert len(shared_place.names()) == len(ENDINGS)


@pytest.mark.parametrize(
    "seen",
    [
        r"\.checkpoint-\d+-\w+\.safetensors\.\w+",
        r"\.checkpoint-\d+-\w+\.combiner\.safetensors\.\w+",
        r"checkpoint-\d+-\w+\.combiner\.safetensors",
        r"\.checkpoint-\d+-\w+\.msgpack\.\w+",
    ],
)
def test_after_kill_9_between_any_two_steps_the_newest_acknowledged_checkpoint_is_read(local: Place, seen: str) -> None:
    path = local.filesystem()[1]

    def kill_when_seen(process: subprocess.Popen[str]) -> None:
        # Of the next checkpoint only: what the first one has in its place has this form, too.
        begun = max(name.lstrip(".")[:19] for name in os.listdir(path))
        deadline = time.monotonic() + DEADLINE_S
        while not any(re.fullmatch(seen, name) and name.lstrip(".") > begun + "~" for name in os.listdir(path)):
            assert time.monotonic() < deadline
        process.kill()

    last = write_until_killed(local, 1, kill_when_seen)
    found = local.directory().read_newest()
    assert found.version in (last, last + 1)
    assert_is_version(found, found.version)
    local.directory(keep=1).write(checkpoint(1000))
    assert len(local.names()) == len(ENDINGS)


def test_two_writers_at_once_leave_whole_checkpoints_and_a_reader_always_finds_one(shared_place: Place) -> None:
    shared_place.directory().write(checkpoint(1))
    done, num_versions = threading.Event(), 4 if shared_place.user else 15

    def write(first: int) -> None:
        directory = shared_place.directory(keep=2)
        for version in range(first, first + num_versions):
            with suppress(StagingError):  # one that began later was faster, and removed what it took for remains
                directory.write(checkpoint(version))

    def read() -> int:
        directory, num_read = shared_place.directory(), 0
        while not done.is_set() or not num_read:
            found = directory.read_newest()
            assert_is_version(found, found.version)
            num_read += 1
        return num_read

    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, first) for first in (100, 200)]
        try:
            for writer in writers:
                writer.result(DEADLINE_S)
        finally:
            done.set()
        assert reader.result(DEADLINE_S) > 0
    found = shared_place.directory().read_newest()
    assert found.version - num_versions + 1 in (100, 200)
    shared_place.directory(keep=1).write(checkpoint(300))
    shared_place.directory(keep=1).write(checkpoint(301))
    assert len(shared_place.names()) == len(ENDINGS)


def test_two_writers_that_take_the_same_number_do_not_mix(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_listed = threading.Barrier(2)
    from tensorspark.driver import checkpoints

    token_hex = checkpoints.secrets.token_hex

    def wait_for_the_other(num_bytes: int) -> str:
        both_have_listed.wait(DEADLINE_S)
        return token_hex(num_bytes)

    monkeypatch.setattr(checkpoints.secrets, "token_hex", wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        writes = [pool.submit(local.directory().write, checkpoint(version)) for version in (5, 6)]
        assert [write.result(DEADLINE_S).number for write in writes] == [1, 1]
    assert len(local.marks()) == 2
    found = [local.directory().read_newest()]
    filesystem, path = local.filesystem()
    filesystem.rm(f"{path}/{local.marks()[-1]}")
    found.append(local.directory().read_newest())
    assert {one.version for one in found} == {5, 6}
    for one in found:
        assert_is_version(one, one.version)


# --- the thread -------------------------------------------------------------------------------------------------------


class Source:
    """Gives a new version at each call, and says how often it was called."""

    def __init__(self) -> None:
        self.version = 0
        self.same = False
        self.error: Exception | None = None
        self._called = threading.Condition()
        self.num_calls = 0

    def __call__(self) -> RunCheckpoint:
        with self._called:
            self.num_calls += 1
            self._called.notify_all()
        if self.error is not None:
            raise self.error
        if not self.same:
            self.version += 1
        return checkpoint(self.version)

    def wait_for_more(self, num_calls: int) -> None:
        """Returns when so many more calls were made: all but the last have been dealt with, at least."""
        with self._called:
            target = self.num_calls + num_calls
            assert self._called.wait_for(lambda: self.num_calls >= target, DEADLINE_S)


def test_checkpoints_are_written_every_interval_until_the_block_ends(place: Place) -> None:
    source = Source()
    with Checkpointer(place.directory(), source, 0.01) as checkpointer:
        source.wait_for_more(4)
    assert checkpointer.last is not None
    assert checkpointer.last.number == source.version
    assert checkpointer.last.written_at == pytest.approx(time.time(), abs=DEADLINE_S)
    assert_is_version(place.directory().read_newest(), source.version)


def test_nothing_is_written_before_the_first_interval_or_for_none(local: Place) -> None:
    with Checkpointer(local.directory(), Source(), 3600) as checkpointer:
        pass
    assert (checkpointer.last, checkpointer.error) == (None, None)
    with Checkpointer(local.directory(), lambda: None, 3600) as checkpointer:
        assert checkpointer.write_last() is None
    assert not local.filesystem()[0].exists(local.filesystem()[1])


def test_what_has_not_changed_is_not_written_again(local: Place) -> None:
    source = Source()
    source.same, source.version = True, 9
    with Checkpointer(local.directory(), source, 0.01) as checkpointer:
        source.wait_for_more(4)
        last = checkpointer.write_last()
    assert last is not None
    assert last.number == 1
    assert checkpointer.error is None


def test_the_last_checkpoint_is_written_at_once_and_none_after_it(local: Place) -> None:
    source = Source()
    with Checkpointer(local.directory(), source, 0.01) as checkpointer:
        source.wait_for_more(2)
        last = checkpointer.write_last()
        num_calls = source.num_calls
    assert source.num_calls == num_calls
    assert last == checkpointer.last
    assert_is_version(local.directory().read_newest(), source.version)


def test_writes_that_fail_are_told_once_a_cause_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source()
    staging = tmp_path / "staging"
    place = Place(staging.as_uri())
    with Checkpointer(place.directory(), source, 0.01) as checkpointer:
        source.wait_for_more(4)
        assert isinstance(checkpointer.error, StagingError)
        assert checkpointer.last is None
        staging.mkdir()
        source.wait_for_more(3)
        assert checkpointer.error is None
        assert checkpointer.last is not None
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert re.match(
        r"no checkpoint was written, training goes on without: spark\.hdfs\.dir: .*nothing is there", warnings[0]
    )


def test_a_capture_that_raises_does_not_end_the_thread(local: Place, caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    source.error = RuntimeError("first cause")
    with Checkpointer(local.directory(), source, 0.01) as checkpointer:
        source.wait_for_more(3)
        source.error = RuntimeError("second cause")
        source.wait_for_more(3)
        source.error = None
        source.wait_for_more(3)
        assert checkpointer.last is not None
    told = [(record.getMessage().rpartition(": ")[2], record.exc_info is not None) for record in caplog.records]
    assert told == [("first cause", True), ("second cause", True)]


def test_a_last_checkpoint_that_fails_is_a_warning_and_a_kept_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place((tmp_path / "absent").as_uri())
    with Checkpointer(place.directory(), Source(), 3600) as checkpointer:
        assert checkpointer.write_last() is None
    assert isinstance(checkpointer.error, StagingError)
    assert "no checkpoint was written" in caplog.text


def test_an_interval_of_nothing_is_refused(local: Place) -> None:
    with pytest.raises(ValueError, match="interval_s must be more than 0, got 0"):
        Checkpointer(local.directory(), Source(), 0)


@dataclass
class Hanging:
    """A local place whose files open only when `answer` is set; `asked` is set when one is to be opened."""

    place: Place
    asked: threading.Event
    answer: threading.Event


def await_abandoned_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("tensorspark-"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


@pytest.fixture
def hanging(local: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging(local, threading.Event(), threading.Event())
    open_file = LocalFileSystem._open

    def wait_and_open(*args: Any, **kwargs: Any) -> Any:
        made.asked.set()
        assert made.answer.wait(DEADLINE_S)
        return open_file(*args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "_open", wait_and_open)
    yield made
    made.answer.set()
    await_abandoned_threads()


def test_a_filesystem_that_hangs_holds_the_end_of_the_block_for_its_deadline_only(
    hanging: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with Checkpointer(hanging.place.directory(), Source(), 0.01, close_deadline_s=0.2):
        assert hanging.asked.wait(DEADLINE_S)
    assert time.monotonic() - began < 10
    assert f"a checkpoint is still being written to {hanging.place.directory().url} after 0.2 s" in caplog.text


def test_a_last_checkpoint_on_a_filesystem_that_hangs_ends_at_the_deadline(hanging: Hanging) -> None:
    with Checkpointer(hanging.place.directory(deadline_s=0.2), Source(), 0.01) as checkpointer:
        assert hanging.asked.wait(DEADLINE_S)
        began = time.monotonic()
        assert checkpointer.write_last() is None
        assert time.monotonic() - began < 10
    assert re.search(r"no answer within 0\.2 s|did not end within 0\.2 s", str(checkpointer.error))


def test_a_write_that_was_left_to_itself_puts_nothing_in_its_place_later(hanging: Hanging) -> None:
    with pytest.raises(StagingError, match=r"no answer within 0\.2 s"):
        hanging.place.directory(deadline_s=0.2).write(checkpoint(5))
    hanging.answer.set()
    await_abandoned_threads()
    assert hanging.place.names() == []


def test_one_checkpoint_is_written_at_a_time(hanging: Hanging) -> None:
    source = Source()
    with Checkpointer(hanging.place.directory(), source, 0.01) as checkpointer, ThreadPoolExecutor(1) as pool:
        assert hanging.asked.wait(DEADLINE_S)
        last = pool.submit(checkpointer.write_last)
        assert (source.num_calls, last.done()) == (1, False)
        hanging.answer.set()
        assert last.result(DEADLINE_S) == checkpointer.last
    assert source.num_calls == 2
    assert_is_version(hanging.place.directory().read_newest(), 2)
