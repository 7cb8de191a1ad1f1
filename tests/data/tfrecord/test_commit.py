"""Written files become visible whole, once and together: on local disks, in memory, and on a real HDFS."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tensorspark.data.tfrecord.storage import job as job_module
from tensorspark.data.tfrecord.storage.commit import abort_job, commit_batch, commit_job
from tensorspark.data.tfrecord.storage.job import TaskFiles, WriteJob
from tensorspark.data.tfrecord.storage.task_output import TaskOutput
from tensorspark.errors import ConfigError, StagingError
from tests.hadoop.cluster import HdfsCluster


@pytest.fixture(params=["local", "memory", pytest.param("hdfs", marks=pytest.mark.hdfs)])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a directory that does not exist yet, on each kind of filesystem."""
    name = uuid.uuid4().hex
    if request.param == "local":
        yield str(tmp_path / name)
    elif request.param == "memory":
        yield f"memory://{name}/out"
        filesystem = fsspec.filesystem("memory")
        if filesystem.exists(f"/{name}"):
            filesystem.rm(f"/{name}", recursive=True)
    else:
        cluster: HdfsCluster = request.getfixturevalue("hdfs")
        cluster.make_directory(f"/{name}", owner="alice")
        yield f"{cluster.url}/{name}/out"


def _job(url: str, job_id: str = "job", **options: object) -> WriteJob:
    # Of a local directory or one in memory there is no user.
    return WriteJob(url, job_id, user="alice" if url.startswith("hdfs") else "", **options)  # type: ignore[arg-type]


def _write(job: WriteJob, partition: int, attempt: str, *contents: str, directory: str = "") -> TaskFiles:
    output = TaskOutput(job, partition, attempt)
    for content in contents:
        file = output.open(directory, ".tfrecord")
        file.write(content.encode())
        file.close()
    return output.finish()


def _tree(job: WriteJob) -> dict[str, str]:
    """Every file under the target, with what it holds."""
    filesystem, path = job.open()
    if not filesystem.exists(path):
        return {}
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        for entry in filesystem.ls(waiting.pop(), detail=True):
            if entry["type"] == "directory":
                waiting.append(entry["name"])
            else:
                with filesystem.open(entry["name"], "rb") as file:
                    found[entry["name"][len(path) + 1 :]] = bytes(file.read()).decode()
    return found


@pytest.mark.parametrize("mode", ["error", "ignore"])
def test_of_two_writes_that_began_at_once_and_want_no_other_the_first_wins(target: str, mode: str) -> None:
    first = _job(target, "first", mode=mode, existed=False)
    second = _job(target, "second", mode=mode, existed=False)
    tasks = [[_write(job, 0, "1-a", job.job_id)] for job in (first, second)]

    commit_job(first, tasks[0])
    if mode == "error":
        with pytest.raises(ConfigError, match="to be absent, but another write has come to its end there meanwhile"):
            commit_job(second, tasks[1])
    else:
        commit_job(second, tasks[1])

    assert _tree(first) == {"part-00000-first-c000.tfrecord": "first", "_SUCCESS": ""}


def test_nothing_is_visible_before_the_commit_and_all_after_it(target: str) -> None:
    job = _job(target)
    tasks = [_write(job, 0, "7-a", "zero", "more"), _write(job, 1, "8-b", "one")]
    assert all(name.startswith("_temporary/") for name in _tree(job))

    commit_job(job, tasks)

    assert _tree(job) == {
        "part-00000-job-c000.tfrecord": "zero",
        "part-00000-job-c001.tfrecord": "more",
        "part-00001-job-c000.tfrecord": "one",
        "_SUCCESS": "",
    }
    filesystem, path = job.open()
    assert not filesystem.exists(f"{path}/_temporary")


def test_only_the_attempt_that_counts_is_kept(target: str) -> None:
    """As under speculation, or where a task is killed in the middle: its files are whole, or not even that."""
    job = _job(target)
    _write(job, 0, "7-killed", "half of ze")
    counted = _write(job, 0, "9-again", "zero")
    _write(job, 0, "11-speculative", "zero")

    commit_job(job, [counted])

    assert _tree(job) == {"part-00000-job-c000.tfrecord": "zero", "_SUCCESS": ""}


def test_appending_keeps_what_is_there(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second")
    commit_job(first, [_write(first, 0, "1-a", "old")])
    commit_job(second, [_write(second, 0, "1-a", "new")])

    assert _tree(second) == {
        "part-00000-first-c000.tfrecord": "old",
        "part-00000-second-c000.tfrecord": "new",
        "_SUCCESS": "",
    }


def test_overwriting_replaces_all_that_is_there(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite")
    commit_job(
        first, [_write(first, 0, "1-a", "old"), _write(first, 1, "2-a", "old too", directory="p=1"), TaskFiles("3-a")]
    )
    task = _write(second, 0, "1-a", "new", directory="p=2")
    assert _tree(second)["part-00000-first-c000.tfrecord"] == "old"  # until the new files are complete

    commit_job(second, [task])

    assert _tree(second) == {"p=2/part-00000-second-c000.tfrecord": "new", "_SUCCESS": ""}
    filesystem, path = second.open()
    assert not filesystem.exists(f"{path}/p=1")


def test_overwriting_dynamically_replaces_the_partitions_that_get_rows(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite", is_dynamic=True)
    commit_job(
        first, [_write(first, 0, "1-a", "old 1", directory="p=1"), _write(first, 1, "2-a", "old 2", directory="p=2")]
    )

    commit_job(second, [_write(second, 0, "1-a", "new 2", directory="p=2")])

    assert _tree(second) == {
        "p=1/part-00000-first-c000.tfrecord": "old 1",
        "p=2/part-00000-second-c000.tfrecord": "new 2",
        "_SUCCESS": "",
    }


def test_overwriting_dynamically_without_partitions_replaces_the_files_that_lie_there(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite", is_dynamic=True)
    commit_job(first, [_write(first, 0, "1-a", "old"), _write(first, 1, "2-a", "other", directory="p=1")])

    commit_job(second, [_write(second, 0, "1-a", "new")])

    assert _tree(second) == {
        "part-00000-second-c000.tfrecord": "new",
        "p=1/part-00001-first-c000.tfrecord": "other",
        "_SUCCESS": "",
    }


def test_aborting_leaves_nothing(target: str) -> None:
    job = _job(target, existed=False)
    task = _write(job, 0, "1-a", "zero", directory="p=1")

    abort_job(job, [task])

    filesystem, path = job.open()
    assert not filesystem.exists(path)


def test_aborting_leaves_what_was_there_before(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite")
    commit_job(first, [_write(first, 0, "1-a", "old")])
    _write(second, 0, "1-a", "half")

    abort_job(second, [])

    assert _tree(second) == {"part-00000-first-c000.tfrecord": "old", "_SUCCESS": ""}


def test_a_job_leaves_another_jobs_temporary_files_alone(target: str) -> None:
    mine, other = _job(target, "mine"), _job(target, "other")
    others_task = _write(other, 0, "1-a", "other")

    commit_job(mine, [_write(mine, 0, "1-a", "mine")])
    commit_job(other, [others_task])

    assert sorted(_tree(mine)) == ["_SUCCESS", "part-00000-mine-c000.tfrecord", "part-00000-other-c000.tfrecord"]


def test_a_commit_that_fails_halfway_takes_back_what_it_moved(target: str) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite")
    commit_job(first, [_write(first, 0, "1-a", "old")])
    written = _write(second, 0, "1-a", "new")
    lost = TaskFiles("2-a", ("p=1/part-00001-second-c000.tfrecord",))

    with pytest.raises(StagingError, match="path: could not move files in"):
        commit_job(second, [written, lost])

    assert _tree(second) == {"part-00000-first-c000.tfrecord": "old", "_SUCCESS": ""}
    filesystem, path = second.open()
    assert sorted(entry.rpartition("/")[2] for entry in filesystem.ls(path, detail=False)) == [
        "_SUCCESS",
        "part-00000-first-c000.tfrecord",
    ]


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_overwriting_shows_old_files_or_new_ones_and_never_both(
    target: str, is_dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _job(target, "first"), _job(target, "second", mode="overwrite", is_dynamic=is_dynamic)
    olds = [_write(first, index, f"{index}-a", "old", directory=f"p={index}") for index in range(2)]
    commit_job(first, olds)
    news = [_write(second, index, f"{index}-a", "new", directory=f"p={index}") for index in range(2)]
    seen: list[tuple[bool, set[str]]] = []

    def looking(doing: str, url: str, operation: Callable[[], Any], *rest: Any) -> Any:
        tree = {name: text for name, text in _tree(second).items() if not name.startswith(("_temp", "_repl"))}
        seen.append((tree.pop("_SUCCESS", None) is not None, set(tree.values())))
        return operation()

    monkeypatch.setattr(job_module, "attempt", looking)
    commit_job(second, news)

    assert {"old", "new"} not in [texts for _, texts in seen]
    whole = [texts for is_complete, texts in seen if is_complete]
    assert all(texts in ({"old"}, {"new"}) for texts in whole)
    assert 0 < len(whole) < len(seen)
    assert set(_tree(second).values()) == {"new", ""}


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_overwriting_that_fails_at_any_step_leaves_what_was_there(
    tmp_path: Path, is_dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _job(str(tmp_path / "out"), "first")
    commit_job(first, [_write(first, index, f"{index}-a", "old", directory=f"p={index}") for index in range(2)])
    before = _tree(first)
    steps = 0
    while True:
        second = _job(str(tmp_path / "out"), f"second-{steps}", mode="overwrite", is_dynamic=is_dynamic)
        news = [_write(second, index, f"{index}-a", "new", directory=f"p={index + 1}") for index in range(2)]
        num_done = 0

        def failing(doing: str, url: str, operation: Callable[[], Any], *rest: Any, step: int = steps) -> Any:
            nonlocal num_done
            num_done += 1
            if num_done == step + 1:
                raise StagingError(f"could not {doing}: the disk is full")
            return operation()

        with monkeypatch.context() as patch:
            patch.setattr(job_module, "attempt", failing)
            try:
                commit_job(second, news)
            except StagingError:
                steps += 1
            else:
                break
        abort_job(second, news)  # as Spark does then
        assert _tree(first) == before
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_SUCCESS", "p=0", "p=1"]

    assert steps >= 8  # looking, moving two out and two in, and writing _SUCCESS
    kept = {"p=0/part-00000-first-c000.tfrecord": "old"} if is_dynamic else {}
    # That which failed last was to remove the old files, of which no reader knows.
    assert {name: text for name, text in _tree(first).items() if not name.startswith("_replaced/")} == {
        **kept,
        f"p=1/part-00000-second-{steps}-c000.tfrecord": "new",
        f"p=2/part-00001-second-{steps}-c000.tfrecord": "new",
        "_SUCCESS": "",
    }


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_committed_twice_is_there_once(target: str) -> None:
    job = _job(target, "query-b0")
    commit_batch(job, [_write(job, 0, "1-a", "zero")], "query", 0)
    again = _write(job, 0, "5-b", "zero")

    commit_batch(job, [again], "query", 0)

    assert {name: text for name, text in _tree(job).items() if not name.startswith("_")} == {
        "part-00000-query-b0-c000.tfrecord": "zero"
    }


def test_a_batch_whose_commit_was_cut_off_is_there_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver dies after one of two moves; the batch is then cut into one task instead of two."""
    job = _job(target, "query-b3")
    first, second = _write(job, 0, "1-a", "zero"), _write(job, 1, "2-a", "one")

    class DriverDied(BaseException):
        pass

    num_moved = 0

    def die(doing: str, url: str, operation: Callable[[], Any], *rest: Any) -> Any:
        nonlocal num_moved
        num_moved += doing == "move files in"
        if num_moved > 1:
            raise DriverDied
        return operation()

    monkeypatch.setattr(job_module, "attempt", die)
    with pytest.raises(DriverDied):
        commit_batch(job, [second, first], "query", 3)
    monkeypatch.undo()
    assert "part-00001-query-b3-c000.tfrecord" in _tree(job)
    commit_batch(job, [_write(job, 0, "9-b", "zero and one")], "query", 3)

    assert {name: text for name, text in _tree(job).items() if not name.startswith("_")} == {
        "part-00000-query-b3-c000.tfrecord": "zero and one"
    }


def test_batches_follow_each_other_and_the_log_does_not_grow(target: str) -> None:
    for batch in range(3):
        job = _job(target, f"query-b{batch}")
        commit_batch(job, [_write(job, 0, "1-a", f"batch {batch}")], "query", batch)

    tree = _tree(_job(target))
    assert sorted(text for name, text in tree.items() if name.startswith("part-")) == ["batch 0", "batch 1", "batch 2"]
    assert sorted(name for name in tree if name.startswith("_")) == [
        "_tensorspark/query/begun",
        "_tensorspark/query/committed",
    ]
    assert json.loads(tree["_tensorspark/query/committed"]) == {"batch": 2}


# --- each executor on its own disk ------------------------------------------------------------------------------------


def test_a_local_write_is_visible_when_its_task_ends(tmp_path: Path) -> None:
    job = _job(str(tmp_path / "out"), locality="local", mode="error")

    _write(job, 0, "1-a", "zero")

    assert _tree(job) == {"part-00000-job-c000.tfrecord": "zero"}
    assert not (tmp_path / "out" / "_temporary").exists()


def test_a_local_write_that_is_repeated_replaces_its_files(tmp_path: Path) -> None:
    job = _job(str(tmp_path / "out"), locality="local")
    _write(job, 0, "1-a", "first")

    _write(job, 0, "2-b", "again")

    assert _tree(job) == {"part-00000-job-c000.tfrecord": "again"}


def test_a_local_write_takes_away_what_a_killed_attempt_of_its_task_left(tmp_path: Path) -> None:
    job = _job(str(tmp_path / "out"), locality="local")
    killed, others = TaskOutput(job, 0, "1-killed"), TaskOutput(job, 1, "2-running")
    for output in (killed, others):
        output.open("", ".tfrecord").write(b"half")

    _write(job, 0, "3-again", "zero")

    assert {name.replace("2-running", "x"): text for name, text in _tree(job).items()} == {
        "part-00000-job-c000.tfrecord": "zero",
        "_temporary/job/00001-x/part-00001-job-c000.tfrecord": "half",
    }


@pytest.mark.parametrize("place", ["part-other", "p=1/part-other", "p=1/q=2/part-other", "other/part-other"])
def test_a_local_write_looks_for_files_of_others_where_it_runs(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"")
    url = str(tmp_path)

    assert TaskOutput(_job(url, locality="local", mode="append"), 0, "1-a").is_wanted()
    assert not TaskOutput(_job(url, locality="local", mode="ignore"), 0, "1-a").is_wanted()
    with pytest.raises(ConfigError, match=r"expected '.*' to be absent on .*, but files are there"):
        TaskOutput(_job(url, locality="local", mode="error"), 0, "1-a").is_wanted()


@pytest.mark.parametrize("mode", ["error", "ignore"])
def test_a_local_write_takes_the_directories_of_its_own_job_for_no_others(tmp_path: Path, mode: str) -> None:
    job = _job(str(tmp_path / "out"), locality="local", mode=mode, existed=False)
    _write(job, 0, "1-a", "zero", directory="p=1/q=2")
    (tmp_path / "out" / "p=3").mkdir()  # of a task that is about to move its file there
    second = TaskOutput(job, 1, "2-a")

    assert second.is_wanted()
    second.open("p=1/q=2", ".tfrecord").close()
    second.finish()

    assert _tree(job) == {
        "p=1/q=2/part-00000-job-c000.tfrecord": "zero",
        "p=1/q=2/part-00001-job-c000.tfrecord": "",
    }


@pytest.mark.parametrize("directory", ["", "p=1", "p=1/q=2"])
def test_a_local_write_that_is_aborted_takes_this_hosts_files_back(tmp_path: Path, directory: str) -> None:
    job = _job(str(tmp_path / "out"), locality="local", existed=False)
    tasks = [_write(job, index, "1-a", "zero", directory=directory) for index in range(2)]

    abort_job(job, tasks)

    assert not (tmp_path / "out").exists()


def test_a_local_write_that_is_aborted_leaves_what_was_there_before(tmp_path: Path) -> None:
    first, second = (_job(str(tmp_path / "out"), name, locality="local") for name in ("first", "second"))
    _write(first, 0, "1-a", "old", directory="p=1")

    abort_job(second, [_write(second, 0, "1-a", "new", directory=place) for place in ("p=1", "p=2")])

    assert _tree(second) == {"p=1/part-00000-first-c000.tfrecord": "old"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p=1"]


def test_a_local_write_whose_task_fails_leaves_nothing_on_its_host(tmp_path: Path) -> None:
    output = TaskOutput(_job(str(tmp_path / "out"), locality="local"), 0, "1-a")
    output.open("p=1", ".tfrecord").close()

    output.discard()

    assert list((tmp_path / "out").iterdir()) == []
