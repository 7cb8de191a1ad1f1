"""Staging: on local directories, in memory, and on a real HDFS."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tensorspark.data import filesystem, staging
from tensorspark.data.filesystem import open_filesystem
from tensorspark.data.staging import (
    StagedFile,
    StagingDirectory,
    fetch,
    local_run_dir,
    make_local_run_dir,
    remove_local,
)
from tensorspark.errors import StagingError
from tests.hadoop.cluster import HdfsCluster

# More than one chunk, and not a whole number of them.
CONTENT = bytes(range(256)) * 10_001

ONE_ATTEMPT = """<configuration><property>
  <name>dfs.client.failover.max.attempts</name><value>1</value>
</property></configuration>"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "staging"
    directory.mkdir()
    return directory


@pytest.fixture
def executor_tmp(tmp_path: Path) -> str:
    directory = tmp_path / "executor"
    directory.mkdir()
    return str(directory)


@pytest.fixture
def memory_base() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    path = f"/staging-{uuid.uuid4().hex}"
    filesystem.makedirs(path)
    yield f"memory:/{path}"
    filesystem.rm(path, recursive=True)


@pytest.fixture
def alices(hdfs: HdfsCluster) -> str:
    """URL of a new directory that only alice may write to."""
    path = f"/alice-{uuid.uuid4().hex}"
    hdfs.make_directory(path, owner="alice")
    return f"{hdfs.url}{path}"


def _path(url: str) -> str:
    return "/" + url.split("/", 3)[3]


# --- publish and fetch ------------------------------------------------------------------------------------------------


def test_fetched_file_is_what_was_published(base: Path, executor_tmp: str) -> None:
    staged = StagingDirectory(str(base), "r1").publish("graph", CONTENT)

    path = fetch(staged, executor_tmp, "r1")

    assert path.read_bytes() == CONTENT
    assert path == Path(executor_tmp, "tensorspark-local-r1", staged.sha256)
    assert staged.num_bytes == len(CONTENT)


def test_file_url_and_bare_path_name_the_same_directory(base: Path, executor_tmp: str) -> None:
    staged = StagingDirectory(base.as_uri(), "r1").publish("graph", CONTENT)

    assert (base / "tensorspark-r1" / "graph").read_bytes() == CONTENT
    assert staged.url == (base / "tensorspark-r1" / "graph").as_uri()


def test_memory_filesystem_round_trip(memory_base: str, executor_tmp: str) -> None:
    directory = StagingDirectory(memory_base, "r1")
    staged = directory.publish("graph", CONTENT)

    assert fetch(staged, executor_tmp, "r1").read_bytes() == CONTENT
    directory.remove()
    directory.remove()


def test_empty_file_can_be_published_and_fetched(base: Path, executor_tmp: str) -> None:
    staged = StagingDirectory(str(base), "r1").publish("empty", b"")

    assert fetch(staged, executor_tmp, "r1").read_bytes() == b""


def test_staged_file_survives_pickling() -> None:
    staged = StagedFile("hdfs://host:8020/a", "00ff", 3, "alice")

    assert pickle.loads(pickle.dumps(staged)) == staged


def test_publishing_leaves_nothing_but_the_named_files(base: Path) -> None:
    directory = StagingDirectory(str(base), "r1")
    directory.publish("graph", CONTENT)
    directory.publish("weights", b"w")

    assert sorted(os.listdir(base / "tensorspark-r1")) == ["graph", "weights"]


def test_publishing_a_name_again_replaces_the_file(base: Path, executor_tmp: str) -> None:
    directory = StagingDirectory(str(base), "r1")
    directory.publish("graph", b"first")

    assert fetch(directory.publish("graph", b"second"), executor_tmp, "r1").read_bytes() == b"second"


def test_publish_that_fails_leaves_no_part_of_a_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StagingDirectory(str(base), "r1")
    filesystem, _ = open_filesystem(str(base))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(filesystem), "mv", full_disk)

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: could not publish .*No space left"):
        directory.publish("graph", CONTENT)
    assert os.listdir(base / "tensorspark-r1") == []


def test_second_fetch_on_a_host_does_not_read_the_source_again(base: Path, executor_tmp: str) -> None:
    directory = StagingDirectory(str(base), "r1")
    staged = directory.publish("graph", CONTENT)
    first = fetch(staged, executor_tmp, "r1")
    directory.remove()

    assert fetch(staged, executor_tmp, "r1") == first


def test_local_copy_that_a_crash_cut_short_is_fetched_again(base: Path, executor_tmp: str) -> None:
    staged = StagingDirectory(str(base), "r1").publish("graph", CONTENT)
    fetch(staged, executor_tmp, "r1").write_bytes(b"")

    assert fetch(staged, executor_tmp, "r1").read_bytes() == CONTENT


def _fetch_and_log_downloads(staged: StagedFile, tmp_dir: str, log: str, num_processes: int) -> str:
    """Runs in a process of its own, and holds its download until all the processes have begun."""
    copy = staging._copy

    def logged_copy(filesystem: fsspec.AbstractFileSystem, path: str, target: Path) -> tuple[int, str]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return copy(filesystem, path, target)

    staging._copy = logged_copy
    Path(tmp_dir, f"started-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(Path(tmp_dir).glob("started-*"))) < num_processes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return str(fetch(staged, tmp_dir, "r1"))


def test_processes_that_fetch_at_once_download_once(base: Path, executor_tmp: str, tmp_path: Path) -> None:
    staged = StagingDirectory(str(base), "r1").publish("graph", CONTENT)
    log = tmp_path / "downloads"

    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_fetch_and_log_downloads, staged, executor_tmp, str(log), 4) for _ in range(4)]
        paths = {future.result(timeout=120) for future in futures}

    assert len(log.read_text().splitlines()) == 1
    assert [Path(path).read_bytes() for path in paths] == [CONTENT]


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT + b"x", b"x" + CONTENT[1:], b""])
def test_file_that_changed_after_publishing_is_refused(base: Path, executor_tmp: str, damaged: bytes) -> None:
    staged = StagingDirectory(str(base), "r1").publish("graph", CONTENT)
    (base / "tensorspark-r1" / "graph").write_bytes(damaged)

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: expected 2560256 bytes .* the file changed"):
        fetch(staged, executor_tmp, "r1")
    assert not list(Path(executor_tmp, "tensorspark-local-r1").glob(staged.sha256))


def test_fetch_of_a_file_that_is_gone_names_it(base: Path, executor_tmp: str) -> None:
    directory = StagingDirectory(str(base), "r1")
    staged = directory.publish("graph", CONTENT)
    directory.remove()

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: could not copy .*spark\.tmp\.dir.*tensorspark-r1/graph"):
        fetch(staged, executor_tmp, "r1")


# --- a staging directory that cannot be used --------------------------------------------------------------------------


def test_missing_base_directory_is_refused_and_not_created(base: Path) -> None:
    missing = base / "typo"

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: expected .*typo.* but nothing is there"):
        StagingDirectory(str(missing), "r1")
    assert not missing.exists()


def test_base_that_is_a_file_is_refused(base: Path) -> None:
    (base / "file").write_bytes(b"x")

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: expected .* but it is a file"):
        StagingDirectory(str(base / "file"), "r1")


def test_base_under_a_file_is_refused(base: Path) -> None:
    (base / "file").write_bytes(b"x")

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: .*Not a directory"):
        StagingDirectory(str(base / "file" / "below"), "r1")


def test_second_run_with_the_same_id_is_refused(base: Path) -> None:
    StagingDirectory(str(base), "r1")

    with pytest.raises(StagingError, match="each run needs an id of its own"):
        StagingDirectory(str(base), "r1")


@pytest.mark.parametrize("name", ["", "..", "../other", "a/b", ".hidden", "a b", "a\n"])
def test_names_that_would_leave_the_directory_are_refused(base: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run_id must be"):
        StagingDirectory(str(base), name)
    with pytest.raises(ValueError, match="name must be"):
        StagingDirectory(str(base), "r1").publish(name, b"")


def test_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(
        StagingError, match=r"spark\.hdfs\.dir: expected a URL that fsspec can open, got 'nosuch://a/b'"
    ):
        open_filesystem("nosuch://a/b")


def test_missing_hdfs_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hdfs_native", None)
    monkeypatch.setitem(sys.modules, "hdfs_native.fsspec", None)

    with pytest.raises(StagingError, match=r"\n    pip install 'tensorspark\[hdfs\]'\n"):
        open_filesystem("hdfs://127.0.0.1:8020/base")


def test_filesystem_that_does_not_answer_gives_an_error_at_the_deadline(base: Path) -> None:
    answer = threading.Event()

    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: could not stat 'slow://a': no answer within 0\.2 s"):
        filesystem.attempt("stat", "slow://a", answer.wait, 0.2)
    answer.set()


def test_removing_twice_is_no_error(base: Path) -> None:
    directory = StagingDirectory(str(base), "r1")
    directory.publish("graph", CONTENT)

    directory.remove()
    directory.remove()

    assert os.listdir(base) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError('OperationFailed("Failed to complete file in time")'), "live DataNodes"),
        (FileNotFoundError("/a/b"), "no such file: /a/b. Check whether someone removed it"),
        (OSError("failed to lookup address information: Name or service not known"), "that this host reaches it"),
        (KeyError(), "could not stat 'x://a': KeyError. Check spark.hdfs.dir."),
    ],
)
def test_errors_of_filesystems_say_what_to_check(error: Exception, expected: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(StagingError, match=re.escape(expected)):
        filesystem.attempt("stat", "x://a", fail, 10)


# --- the local directory ----------------------------------------------------------------------------------------------


def test_local_run_directory_is_private_to_its_owner(executor_tmp: str) -> None:
    path = make_local_run_dir(executor_tmp, "r1")

    assert path == local_run_dir(executor_tmp, "r1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert make_local_run_dir(executor_tmp, "r1") == path


def test_missing_local_directory_is_refused_and_not_created(executor_tmp: str) -> None:
    missing = f"{executor_tmp}/typo"

    with pytest.raises(StagingError, match=r"spark\.tmp\.dir: expected .*typo.*No such file or directory"):
        make_local_run_dir(missing, "r1")
    assert not os.path.exists(missing)


def test_local_directory_that_is_a_file_is_refused(executor_tmp: str) -> None:
    Path(executor_tmp, "file").write_bytes(b"x")

    with pytest.raises(StagingError, match=r"spark\.tmp\.dir: .*Not a directory"):
        make_local_run_dir(f"{executor_tmp}/file", "r1")


def test_local_directory_without_write_access_is_refused(tmp_path: Path) -> None:
    read_only = "/sys/kernel" if os.geteuid() == 0 else str(tmp_path)
    tmp_path.chmod(0o500)

    with pytest.raises(StagingError, match=r"spark\.tmp\.dir: .*(Permission denied|Operation not permitted|Read-only)"):
        make_local_run_dir(read_only, "r1")


def test_local_run_directory_that_is_a_link_is_refused(executor_tmp: str, base: Path) -> None:
    local_run_dir(executor_tmp, "r1").symlink_to(base)

    with pytest.raises(StagingError, match="symbolic link"):
        make_local_run_dir(executor_tmp, "r1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_local_run_directory_of_another_user_is_refused(executor_tmp: str) -> None:
    os.chown(make_local_run_dir(executor_tmp, "r1"), 12345, -1)

    with pytest.raises(StagingError, match="belongs to uid 12345"):
        make_local_run_dir(executor_tmp, "r1")


def test_removing_the_local_directory_twice_is_no_error(base: Path, executor_tmp: str) -> None:
    fetch(StagingDirectory(str(base), "r1").publish("graph", CONTENT), executor_tmp, "r1")

    remove_local(executor_tmp, "r1")
    remove_local(executor_tmp, "r1")

    assert os.listdir(executor_tmp) == []


# --- HDFS -------------------------------------------------------------------------------------------------------------


@pytest.mark.hdfs
def test_hdfs_round_trip_belongs_to_the_named_user(hdfs: HdfsCluster, alices: str, executor_tmp: str) -> None:
    directory = StagingDirectory(alices, "r1", user="alice")
    staged = directory.publish("graph", CONTENT)

    assert fetch(staged, executor_tmp, "r1").read_bytes() == CONTENT
    assert directory.url == f"{alices}/tensorspark-r1"
    assert hdfs.status(_path(directory.url))["owner"] == "alice"
    assert hdfs.status(_path(staged.url))["owner"] == "alice"
    assert hdfs.names(_path(directory.url)) == ["graph"]
    assert staged.user == "alice"


@pytest.mark.hdfs
def test_hdfs_publishing_a_name_again_replaces_the_file(alices: str, executor_tmp: str) -> None:
    directory = StagingDirectory(alices, "r1", user="alice")
    directory.publish("graph", b"first")

    assert fetch(directory.publish("graph", b"second"), executor_tmp, "r1").read_bytes() == b"second"


@pytest.mark.hdfs
def test_hdfs_remove_is_idempotent(hdfs: HdfsCluster, alices: str) -> None:
    directory = StagingDirectory(alices, "r1", user="alice")
    directory.publish("graph", CONTENT)

    directory.remove()
    directory.remove()

    assert hdfs.names(_path(alices)) == []


@pytest.mark.hdfs
def test_hdfs_directory_of_another_user_is_refused(alices: str) -> None:
    with pytest.raises(StagingError) as caught:
        StagingDirectory(alices, "r1", user="mallory")

    message = str(caught.value)
    assert message.startswith("spark.hdfs.dir: could not create")
    assert "Permission denied: user=mallory, access=WRITE" in message
    assert "Give this user write access" in message
    assert "\n" not in message


@pytest.mark.hdfs
def test_hdfs_file_of_another_user_cannot_be_removed(hdfs: HdfsCluster, alices: str) -> None:
    directory = StagingDirectory(alices, "r1", user="alice")
    directory._user = "mallory"

    with pytest.raises(StagingError, match=r"could not remove .*Permission denied: user=mallory"):
        directory.remove()
    assert hdfs.names(_path(alices)) == ["tensorspark-r1"]


@pytest.mark.hdfs
def test_hdfs_connection_of_one_user_is_not_handed_to_another(alices: str) -> None:
    StagingDirectory(alices, "r1", user="alice")

    with pytest.raises(StagingError, match="user=mallory"):
        StagingDirectory(alices, "r2", user="mallory")
    StagingDirectory(alices, "r3", user="alice")


@pytest.mark.hdfs
@pytest.mark.parametrize("before", [None, "carol"])
def test_connecting_as_a_user_leaves_the_environment_as_it_was(
    alices: str, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HADOOP_USER_NAME", raising=False)
    if before is not None:
        monkeypatch.setenv("HADOOP_USER_NAME", before)

    open_filesystem(alices, "alice")

    assert os.environ.get("HADOOP_USER_NAME") == before


@pytest.mark.hdfs
def test_hdfs_user_defaults_to_the_environment(hdfs: HdfsCluster, alices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADOOP_USER_NAME", "alice")

    directory = StagingDirectory(alices, "r1")

    assert hdfs.status(_path(directory.url))["owner"] == "alice"


@pytest.mark.hdfs
def test_hdfs_missing_base_is_refused(hdfs: HdfsCluster, alices: str) -> None:
    with pytest.raises(StagingError, match=r"spark\.hdfs\.dir: expected .*typo.* but nothing is there"):
        StagingDirectory(f"{alices}/typo", "r1", user="alice")


@pytest.mark.hdfs
def test_hdfs_base_that_is_a_file_is_refused(alices: str) -> None:
    staged = StagingDirectory(alices, "r1", user="alice").publish("graph", b"x")

    with pytest.raises(StagingError, match="but it is a file"):
        StagingDirectory(staged.url, "r2", user="alice")


@pytest.mark.hdfs
def test_hdfs_file_that_changed_after_publishing_is_refused(alices: str, executor_tmp: str) -> None:
    directory = StagingDirectory(alices, "r1", user="alice")
    staged = directory.publish("graph", CONTENT)
    directory.publish("graph", CONTENT[::-1])

    with pytest.raises(StagingError, match="the file changed after it was published"):
        fetch(staged, executor_tmp, "r1")


@pytest.mark.hdfs
def test_processes_that_fetch_from_hdfs_at_once_download_once(alices: str, executor_tmp: str, tmp_path: Path) -> None:
    staged = StagingDirectory(alices, "r1", user="alice").publish("graph", CONTENT)
    log = tmp_path / "downloads"

    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_fetch_and_log_downloads, staged, executor_tmp, str(log), 4) for _ in range(4)]
        paths = {future.result(timeout=120) for future in futures}

    assert len(log.read_text().splitlines()) == 1
    assert [Path(path).read_bytes() for path in paths] == [CONTENT]


@pytest.mark.hdfs
def test_nameservice_without_configuration_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    monkeypatch.delenv("HADOOP_HOME", raising=False)

    with pytest.raises(StagingError, match=r"No NameNode hosts found.*HADOOP_CONF_DIR"):
        StagingDirectory("hdfs://mycluster/base", "r1")


@pytest.mark.hdfs
def test_nameservice_is_found_in_the_cluster_configuration(
    hdfs: HdfsCluster, alices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"dfs.ha.namenodes.myCluster": "nn1", "dfs.namenode.rpc-address.myCluster.nn1": hdfs.url[7:]}
    properties = "".join(f"<property><name>{k}</name><value>{v}</value></property>" for k, v in settings.items())
    (tmp_path / "hdfs-site.xml").write_text(f"<configuration>{properties}</configuration>")
    (tmp_path / "core-site.xml").write_text("<configuration></configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))

    directory = StagingDirectory(f"hdfs://myCluster{_path(alices)}", "r1", user="alice")

    assert directory.url == f"hdfs://myCluster{_path(alices)}/tensorspark-r1"
    assert hdfs.names(_path(alices)) == ["tensorspark-r1"]


def test_retries_that_the_cluster_configuration_sets_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hdfs-site.xml").write_text(ONE_ATTEMPT)
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))

    assert filesystem._hadoop_site_settings() == {"dfs.client.failover.max.attempts"}


@pytest.mark.hdfs
def test_name_node_that_is_down_gives_an_error_in_bounded_time() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        began = time.monotonic()

        with pytest.raises(StagingError, match=r"Connection refused.*Check that it runs"):
            StagingDirectory(f"hdfs://127.0.0.1:{port}/base", "r1")

    assert time.monotonic() - began < 25


@pytest.mark.hdfs
def test_name_node_that_never_answers_gives_an_error_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hdfs-site.xml").write_text(ONE_ATTEMPT)
    (tmp_path / "core-site.xml").write_text("<configuration></configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    monkeypatch.setattr(filesystem, "CONNECT_DEADLINE_S", 0.5)

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(StagingError, match=r"could not connect to 'hdfs://.*: no answer within 0\.5 s"),
    ):
        StagingDirectory(f"hdfs://127.0.0.1:{silent.getsockname()[1]}/base", "r1")

    # The server's end is what frees the abandoned thread.
    for thread in threading.enumerate():
        if thread.name == "tensorspark-staging":
            thread.join(30)
            assert not thread.is_alive()
