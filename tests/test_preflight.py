"""The preflight on a real local Spark: executors that lack something lack it in real worker processes of their own."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tensorspark
from tensorspark.driver.jobs import SparkJob
from tensorspark.driver.preflight import CheckResult, Status, examine, require_ready
from tensorspark.errors import (
    AuthenticationError,
    ConfigError,
    ServerUnreachableError,
    StagingError,
    TransportError,
    WorkerFailedError,
)
from tensorspark.ps.client import ServerAddress
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import MeanWeightCombiner
from tensorspark.weights.layout import TensorSpec, WeightLayout

if TYPE_CHECKING:
    from pyspark import SparkContext

    from tests.hadoop.cluster import HdfsCluster

HOST = re.escape(socket.gethostname())

# Python reads this file when it starts. Modules in $WITHOUT are then as good as not installed, and $HOSTNAMES gives
# every process a host of its own.
SITECUSTOMIZE = """
import os, socket, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in os.environ.get("WITHOUT", "").split(",")
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
if "HOSTNAMES" in os.environ:
    socket.gethostname = lambda: f"host-{os.getpid()}"
"""


@pytest.fixture
def server() -> Iterator[ParameterServer]:
    layout = WeightLayout([TensorSpec("w", (2,), "float32")])
    with ParameterServer(layout, "127.0.0.1") as server:
        server.begin_run(layout.allocate(), MeanWeightCombiner(1), 1)
        yield server


@pytest.fixture
def address(server: ParameterServer) -> ServerAddress:
    return ServerAddress("127.0.0.1", server.port, server.token, connect_timeout_s=1.0)


@pytest.fixture
def check(sc: SparkContext, address: ServerAddress, tmp_path: Path) -> Callable[..., list[CheckResult]]:
    """Examines with what works, but for what the test says."""

    def run(**options: Any) -> list[CheckResult]:
        arguments = {"address": address, "hdfs_dir": None, "tmp_dir": str(tmp_path), "run_id": "test", **options}
        return examine(sc, **arguments)

    return run


@pytest.fixture
def executors(sc: SparkContext, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives executors other environment variables, and returns a directory in which their Python looks first.

    Under Spark's own daemon: ours has imported what they are to lack.
    """
    settings = sc._jsc.sc().conf()
    daemon = settings.get("spark.python.daemon.module")
    settings.set("spark.python.daemon.module", "pyspark.daemon")

    def change(**environment: str) -> Path:
        directory = tmp_path_factory.mktemp("site")
        (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        for name, value in {"PYTHONPATH": str(directory), **environment}.items():
            monkeypatch.setitem(sc.environment, name, value)
        return directory

    yield change
    settings.set("spark.python.daemon.module", daemon)


def named(results: list[CheckResult], name: str) -> CheckResult:
    (result,) = [result for result in results if result.name == name]
    return result


def failure(results: list[CheckResult], name: str, kind: type[Exception]) -> str:
    """The text of the one failure of this name, which is of this kind and one line."""
    result = named(results, name)
    assert result.status is Status.FAILED
    assert type(result.error) is kind
    assert str(result.error) == result.detail
    assert str(result).startswith(f"FAIL {name}: ")
    assert "\n" not in str(result)
    return result.detail


def distribution(directory: Path, name: str, version: str) -> None:
    information = directory / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


# What is well


def test_a_cluster_that_can_train_fails_no_check(check: Callable[..., list[CheckResult]]) -> None:
    lines = [str(result) for result in check()]
    python, tensorflow = platform.python_version(), importlib.metadata.version("tensorflow")
    assert lines[:5] == [
        "ok   slots: 2 slots on 1 host",
        f"ok   Python: {python} on the driver, {python} on the executors",
        "ok   packages: executors have numpy, msgpack, fsspec",
        f"ok   tensorspark: {tensorspark.__version__} everywhere",
        f"ok   TensorFlow: {tensorflow} everywhere",
    ]
    assert [line[:4] for line in lines[5:]] == ["ok  ", "skip", "ok  ", "ok  ", "skip"]


def test_the_staging_directory_is_written_and_read_on_both_sides_and_nothing_stays(
    check: Callable[..., list[CheckResult]], tmp_path: Path
) -> None:
    staging, temporary = tmp_path / "staging", tmp_path / "temporary"
    staging.mkdir()
    temporary.mkdir()
    results = check(hdfs_dir=str(staging), tmp_dir=str(temporary))
    assert {result.status for result in results} == {Status.OK}
    assert {"staging directory on driver", "staging directory on executors"} <= {result.name for result in results}
    assert list(staging.iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_warm_session_is_checked_in_under_two_seconds(
    check: Callable[..., list[CheckResult]], tmp_path: Path
) -> None:
    check()
    began = time.monotonic()
    check(hdfs_dir=str(tmp_path))
    assert time.monotonic() - began < 2


def test_a_server_behind_tls_is_reached(check: Callable[..., list[CheckResult]]) -> None:
    layout = WeightLayout([TensorSpec("w", (2,), "float32")])
    with ParameterServer(layout, "127.0.0.1", tls=True) as server:
        server.begin_run(layout.allocate(), MeanWeightCombiner(1), 1)
        secure = ServerAddress("127.0.0.1", server.port, server.token, certificate=server.certificate)
        assert named(check(address=secure), "driver reachable").status is Status.OK


# Directories


@pytest.mark.parametrize("side", ["driver", "executors"])
def test_an_absent_temporary_directory_is_named_with_its_setting(
    check: Callable[..., list[CheckResult]], tmp_path: Path, side: str
) -> None:
    text = failure(check(tmp_dir=str(tmp_path / "typo")), f"temporary directory on {side}", StagingError)
    assert re.search(rf"typo.* on {HOST}, but .*No such file.*set spark\.tmp\.dir", text)


def test_an_absent_staging_directory_is_named_with_its_setting(
    check: Callable[..., list[CheckResult]], tmp_path: Path
) -> None:
    results = check(hdfs_dir=str(tmp_path / "typo"))
    text = failure(results, "staging directory on driver", StagingError)
    assert re.search(r"typo.* nothing is there.*set spark\.hdfs\.dir", text)
    assert named(results, "staging directory on executors").status is Status.SKIPPED


def test_a_staging_directory_that_executors_do_not_share_is_named_with_the_host(
    check: Callable[..., list[CheckResult]],
) -> None:
    results = check(hdfs_dir="memory:///")  # every process has a memory of its own
    assert named(results, "staging directory on driver").status is Status.OK
    text = failure(results, "staging directory on executors", StagingError)
    assert re.search(rf"host {HOST}: .*[Ss]et spark\.hdfs\.dir to a directory that the driver and all executors", text)


@pytest.mark.hdfs
def test_hdfs_is_written_and_read_as_the_sessions_user(
    check: Callable[..., list[CheckResult]], hdfs: HdfsCluster
) -> None:
    hdfs.make_directory("/preflight", owner="alice")
    url = f"{hdfs.url}/preflight"
    results = check(hdfs_dir=url, user="alice")
    assert {result.status for result in results} == {Status.OK}
    text = failure(check(hdfs_dir=url, user="mallory"), "staging directory on driver", StagingError)
    assert re.search(r"Permission denied: user=mallory", text)


# The server


def test_a_closed_port_is_named_with_the_settings(check: Callable[..., list[CheckResult]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    text = failure(check(address=ServerAddress("127.0.0.1", port, "t")), "driver reachable", ServerUnreachableError)
    assert re.search(rf"host {HOST} cannot reach .*127\.0\.0\.1:{port}.*spark\.tensorspark\.server\.host", text)


def test_another_runs_server_is_not_ours(check: Callable[..., list[CheckResult]], address: ServerAddress) -> None:
    stranger = ServerAddress(address.host, address.port, "another run's token")
    text = failure(check(address=stranger), "driver reachable", AuthenticationError)
    assert re.search(rf"host {HOST} reached something else.*set spark\.tensorspark\.server\.host", text)


def test_who_accepts_and_says_nothing_is_no_server(check: Callable[..., list[CheckResult]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = ServerAddress("127.0.0.1", silent.getsockname()[1], "t", connect_timeout_s=0.2)
        result = named(check(address=address), "driver reachable")
    assert isinstance(result.error, TransportError)
    assert "spark.tensorspark.server.host" in result.detail


def test_without_a_server_all_else_is_checked(check: Callable[..., list[CheckResult]]) -> None:
    results = check(address=None)
    assert str(named(results, "driver reachable")) == "skip driver reachable: there is no server to reach"
    assert named(results, "temporary directory on executors").status is Status.OK


# Shards


def test_shards_that_executors_reach_are_named(check: Callable[..., list[CheckResult]], address: ServerAddress) -> None:
    layout = WeightLayout([TensorSpec("w", (2,), "float32")])
    with ParameterServer(layout, "127.0.0.1") as other:
        other.begin_run(layout.allocate(), MeanWeightCombiner(1), 1)
        shard = ServerAddress("127.0.0.1", other.port, other.token)
        result = named(check(shards=[shard, shard]), "shards reachable")
    assert (result.status, result.detail) == (Status.OK, f"executors reach {shard}, {shard}")


@pytest.mark.parametrize("num_reachable", [0, 1])
def test_a_shard_that_executors_cannot_reach_is_named_with_its_place_and_what_to_change(
    check: Callable[..., list[CheckResult]], address: ServerAddress, num_reachable: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = ServerAddress("127.0.0.1", listener.getsockname()[1], "t")
    results = check(shards=[address] * num_reachable + [closed, address])
    assert named(results, "driver reachable").status is Status.OK
    text = failure(results, "shards reachable", ServerUnreachableError)
    expected = rf"host {HOST} cannot reach shard {num_reachable + 1} at {closed} \(.*refused.*open the ports of 127\.0"
    assert re.search(expected, text)
    assert "spark.tensorspark.server.host" in text


def test_a_shard_that_cannot_be_reached_stops_a_run_before_it_starts(
    sc: SparkContext, address: ServerAddress, tmp_path: Path
) -> None:
    stranger = ServerAddress(address.host, address.port, "another run's token")
    with pytest.raises(AuthenticationError, match="cannot reach shard 1 at"):
        require_ready(sc, address, hdfs_dir=None, tmp_dir=str(tmp_path), run_id="test", shards=[stranger])


# What executors have


def test_packages_that_executors_lack_are_named_at_once(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path]
) -> None:
    executors(WITHOUT="numpy,msgpack")
    results = check()
    text = failure(results, "packages", ConfigError)
    assert re.search(rf"on {HOST} \(\S+python\S*\) has no numpy, msgpack; .*spark\.pyspark\.python", text)
    assert named(results, "tensorspark").status is Status.SKIPPED
    assert named(results, "driver reachable").status is Status.SKIPPED


def test_executors_need_no_package_of_the_server(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path]
) -> None:
    executors(WITHOUT="tornado,safetensors,cryptography")
    assert Status.FAILED not in {result.status for result in check()}


@pytest.mark.parametrize(
    ("package", "name", "change"),
    [
        ("tensorflow", "TensorFlow", r"spark\.pyspark\.python"),
        ("tensorspark", "tensorspark", r"spark\.submit\.pyFiles"),
    ],
)
def test_a_package_that_executors_lack_is_said_without_a_java_stack(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path], package: str, name: str, change: str
) -> None:
    executors(WITHOUT=package)
    text = failure(check(), name, ConfigError)
    assert re.search(rf"on {HOST} .*{name}.*{change}", text)
    assert "org.apache" not in text


def test_each_host_that_lacks_something_has_a_line(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path]
) -> None:
    executors(WITHOUT="tensorflow", HOSTNAMES="1")
    lines = [str(result) for result in check() if result.name == "TensorFlow"]
    assert len(lines) == 2
    assert len(set(re.findall(r"the executor on (host-\d+) ", "\n".join(lines)))) == 2


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("__version__ = '1.0.6'", rf"has tensorspark 1\.0\.6, the driver {re.escape(tensorspark.__version__)}; "),
        ("", "has tensorspark of unknown version, "),
        ("print 'Python 2'", r"cannot import tensorspark \(SyntaxError: "),
        (f"__version__ = {tensorspark.__version__!r}", "has a tensorspark that is not the driver's"),
    ],
)
def test_another_tensorspark_on_the_executors_is_refused(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path], source: str, expected: str
) -> None:
    # Safe: the daemon's working directory, this repository, must not come first.
    package = executors(PYTHONSAFEPATH="1") / "tensorspark"
    (package / "driver").mkdir(parents=True)
    (package / "driver" / "__init__.py").touch()
    (package / "driver" / "probe.py").touch()
    (package / "__init__.py").write_text(source)
    text = failure(check(), "tensorspark", ConfigError)
    assert re.search(rf"on {HOST} .*{expected}.*--py-files \(spark\.submit\.pyFiles\)", text)


def test_another_minor_version_of_tensorflow_is_refused(
    check: Callable[..., list[CheckResult]], executors: Callable[..., Path]
) -> None:
    distribution(executors(), "tensorflow", "2.1.0")
    ours = importlib.metadata.version("tensorflow")
    assert f"has TensorFlow 2.1.0, the driver {ours}; " in failure(check(), "TensorFlow", ConfigError)


def test_another_patch_of_tensorflow_is_a_warning_in_the_log(
    sc: SparkContext,
    address: ServerAddress,
    executors: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    major, minor = importlib.metadata.version("tensorflow").split(".")[:2]
    distribution(executors(), "tensorflow", f"{major}.{minor}.99")
    require_ready(sc, address, hdfs_dir=None, tmp_dir=str(tmp_path), run_id="test")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"has TensorFlow {major}.{minor}.99, " in record.getMessage()


def test_another_minor_version_of_python_is_said_without_a_java_stack(
    sc: SparkContext, check: Callable[..., list[CheckResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sc, "pythonVer", "3.8")  # what the driver says it runs; Spark's worker compares and raises
    text = failure(check(), "Python", ConfigError)
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.search(rf"^the executors.* run Python {ours}, the driver 3\.8; set spark\.pyspark\.python", text)


def test_a_python_that_is_not_there_is_named(
    sc: SparkContext, check: Callable[..., list[CheckResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sc, "pythonExec", "/nonexistent/python")
    text = failure(check(), "Python", ConfigError)
    assert re.search(
        r"on \S+, for one\) cannot start Python as '/nonexistent/python'; set spark\.pyspark\.python", text
    )


# Slots


def test_slots_that_stay_busy_end_the_check_at_its_deadline(
    sc: SparkContext, check: Callable[..., list[CheckResult]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(30)
        here = door.getsockname()

        def wait(_: Any) -> None:
            with socket.create_connection(here, timeout=60) as line:
                line.recv(1)

        action = sc.parallelize(range(2), 2).foreach
        with SparkJob(sc, lambda: action(wait), group="busy", description="holds all slots") as job:
            lines = [door.accept()[0] for _ in range(2)]
            try:
                began = time.monotonic()
                results = check(timeout_s=0.5)
                assert time.monotonic() - began < 10
            finally:
                for line in lines:
                    line.close()
            assert job.wait(30)
    text = failure(results, "slots", WorkerFailedError)
    assert "other jobs hold the slots" in text
    assert "spark.tensorspark.io.timeout" in text


def test_an_application_that_spark_has_ended_is_said_to_be(tmp_path: Path) -> None:
    # What becomes of an application that its master does not let in, after a minute; here at once.
    program = (
        "from pyspark import SparkConf, SparkContext\n"
        "from tensorspark.driver.preflight import examine\n"
        "conf = SparkConf().setMaster('local[1]').set('spark.ui.enabled', 'false').set('spark.log.level', 'OFF')\n"
        "sc = SparkContext(conf=conf)\n"
        "sc._jsc.sc().stop()\n"
        f"print(examine(sc, None, hdfs_dir=None, tmp_dir={str(tmp_path)!r}, run_id='r')[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert re.fullmatch(r"FAIL slots: Spark ended .*local\[1\].*set spark\.master\n", done.stdout), done.stderr


# In a run


def test_the_first_failure_is_raised_with_the_text_of_its_line(
    sc: SparkContext, address: ServerAddress, executors: Callable[..., Path], tmp_path: Path
) -> None:
    executors(WITHOUT="tensorflow")
    options: dict[str, Any] = {"hdfs_dir": None, "tmp_dir": str(tmp_path / "typo"), "run_id": "test"}
    first, *others = [result for result in examine(sc, address, **options) if result.status is Status.FAILED]
    assert others
    with pytest.raises(ConfigError) as caught:
        require_ready(sc, address, **options)
    assert str(first) == f"FAIL TensorFlow: {caught.value}"
