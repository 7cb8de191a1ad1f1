"""The command line as processes, with Spark where it needs one."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensorspark
from tensorspark import cli
from tensorspark.cli import doctor as doctor_command

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MAIN = [sys.executable, "-m", "tensorspark"]
DEADLINE_S = 120
# On a machine whose own name cannot be reached, too.
HERE = ["--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.driver.bindAddress=127.0.0.1"]


def environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "SPARK_HOME"}, **more}


def execute(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(**more),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE_S,
        check=False,
    )


def doctor(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return execute([*MAIN, "doctor", *arguments], **more)


def failures(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The text of each failed check by its name; asserts that stdout has nothing but results."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not re.match(r"(ok  |warn|skip|FAIL) [\w ]+: \S", line)] == []
    return dict(re.findall(r"^FAIL ([\w ]+): (.*)$", done.stdout, re.MULTILINE))


# Usage


def test_the_version_is_said() -> None:
    done = execute([*MAIN, "--version"])
    assert (done.returncode, done.stdout) == (0, f"tensorspark {tensorspark.__version__}\n")


def test_the_help_teaches_with_an_example() -> None:
    done = doctor("--help")
    assert done.returncode == 0
    assert "python -m tensorspark doctor --properties-file conf/spark-defaults.conf" in done.stdout
    assert "spark-submit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: tensorspark"),
        (["nurse"], "invalid choice: 'nurse'"),
        (["doctor", "--conf", "spark.tmp.dir"], "expected KEY=VALUE, such as spark.tmp.dir=/tmp, got 'spark.tmp.dir'"),
        (["doctor", "--properties-file", "/typo"], "expected a file, but there is none at /typo"),
    ],
)
def test_a_command_that_is_wrong_ends_with_2_and_says_why(arguments: list[str], expected: str) -> None:
    done = execute([*MAIN, *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_options_that_come_too_late_under_spark_submit_are_refused() -> None:
    done = doctor("--master", "local[2]", PYSPARK_GATEWAY_PORT="1", PYSPARK_GATEWAY_SECRET="s")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Spark has started already: give --master to spark-submit instead" in done.stderr


# Before Spark


def test_a_missing_pyspark_is_one_line(tmp_path: Path) -> None:
    absent = "import sys\nfrom importlib.machinery import PathFinder\nfind = PathFinder.find_spec\n"
    hide = "lambda name, *more: None if name == 'pyspark' else find(name, *more)"
    (tmp_path / "sitecustomize.py").write_text(f"{absent}PathFinder.find_spec = staticmethod({hide})\n")
    done = doctor(PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    assert list(failures(done)) == ["pyspark"]
    assert len(done.stdout.splitlines()) == 1
    assert "pip install 'tensorspark[spark]'" in done.stdout


def test_a_missing_java_is_one_line(tmp_path: Path) -> None:
    done = doctor(JAVA_HOME=str(tmp_path))
    assert re.search(rf"it did not start: .*{tmp_path}/bin/java.*; .*JAVA_HOME", failures(done)["Spark"])
    assert len(done.stdout.splitlines()) == 1


def test_a_spark_home_without_spark_is_one_line(tmp_path: Path) -> None:
    done = doctor(SPARK_HOME=str(tmp_path))
    assert "SPARK_HOME" in failures(done)["Spark"]
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("setting", ["spark.tensorspark.sync.intervall=3", "spark.tensorspark.sync.interval=never"])
def test_a_setting_that_cannot_work_is_one_line(setting: str) -> None:
    done = doctor("--master", "local[1]", "--conf", setting)
    assert setting.partition("=")[0] in failures(done)["settings"]
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("master", ["nonsense", "local[many]"])
def test_a_master_that_is_none_is_one_line(master: str) -> None:
    assert re.fullmatch(
        r"it did not start: .*[Mm]aster .*; check spark\.master, .*", failures(doctor("--master", master))["Spark"]
    )


# With Spark


def test_a_cluster_that_is_well_is_read_from_a_properties_file(tmp_path: Path) -> None:
    staging, temporary = tmp_path / "staging", tmp_path / "temporary"
    staging.mkdir()
    temporary.mkdir()
    properties = tmp_path / "spark.conf"
    properties.write_text(
        "# Java's properties: three separators, two comments, a line that goes on\n! and so on\n\n"
        f"spark.master  local[2]\nspark.driver.host=127.0.0.1\nspark.driver.bindAddress : 127.0.0.1\n"
        f"spark.hdfs.dir \\\n    {staging}\nspark.tmp.dir /nonexistent\nspark.tensorspark.tls.enabled true\n"
    )
    done = doctor("--properties-file", str(properties), "--conf", f"spark.tmp.dir={temporary}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    shown = re.sub(r"(\d+\.)+\d+|:\d+", "#", done.stdout)
    assert shown.splitlines() == [
        "ok   settings: those of tensorspark are valid",
        "ok   Spark: # runs on local[2]",
        "ok   parameter server: listens with TLS, and advertises ##",
        "ok   slots: 2 slots on 1 host",
        "ok   Python: # on the driver, # on the executors",
        "ok   packages: executors have numpy, msgpack, fsspec",
        "ok   tensorspark: # everywhere",
        "ok   TensorFlow: # everywhere",
        f"ok   temporary directory on driver: {temporary} is writable",
        f"ok   staging directory on driver: {staging} is writable",
        "ok   driver reachable: executors reach ## and its token is known",
        f"ok   temporary directory on executors: {temporary} is writable",
        "ok   staging directory on executors: readable and writable",
    ]
    assert [*staging.iterdir(), *temporary.iterdir()] == []


def test_every_failure_is_a_line_that_names_its_setting(tmp_path: Path) -> None:
    options = {
        "spark.tensorspark.server.host": "203.0.113.7",
        "spark.tensorspark.connect.timeout": "1s",
        "spark.hdfs.dir": tmp_path / "typo",
        "spark.tmp.dir": tmp_path / "typo",
    }
    settings = [argument for key, value in options.items() for argument in ("--conf", f"{key}={value}")]
    failed = failures(doctor("--master", "local[2]", *HERE, *settings))
    setting_of = {
        "temporary directory on driver": "set spark.tmp.dir",
        "staging directory on driver": "set spark.hdfs.dir",
        "driver reachable": "spark.tensorspark.server.host",
        "temporary directory on executors": "set spark.tmp.dir",
    }
    assert list(failed) == list(setting_of)
    assert [name for name, setting in setting_of.items() if setting not in failed[name]] == []


def test_a_taken_port_is_a_warning_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = doctor("--master", "local[1]", *HERE, "--conf", f"spark.tensorspark.server.port={port}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        rf"^warn parameter server: .*port {port} \(spark\.tensorspark\.server\.port\) is taken", done.stdout, re.M
    )
    assert "ok   slots: 1 slot on 1 host" in done.stdout


def test_executors_start_the_python_of_the_settings() -> None:
    failed = failures(doctor("--master", "local[1]", *HERE, "--conf", "spark.pyspark.python=/nonexistent/python"))
    assert "'/nonexistent/python'; set spark.pyspark.python" in failed["Python"]


@pytest.mark.slow
def test_the_doctor_runs_under_spark_submit() -> None:
    main = str(REPOSITORY / "tensorspark" / "__main__.py")
    done = execute([str(BIN / "spark-submit"), "--master", "local[1]", *HERE, main, "doctor"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   driver reachable: " in done.stdout


# A cluster without executors


@pytest.fixture(scope="module")
def empty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A standalone master that has no workers; yields its URL."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ports.append(listener.getsockname()[1])
    command = [str(BIN / "spark-class"), "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1"]
    command += ["--port", str(ports[0]), "--webui-port", str(ports[1])]
    with (tmp_path_factory.mktemp("master") / "log").open("wb") as log:
        master = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not _answers(f"http://127.0.0.1:{ports[1]}/json/"):
            assert master.poll() is None, "the master ended"
            assert time.monotonic() < deadline, "the master did not start"
            time.sleep(0.2)
        yield f"spark://127.0.0.1:{ports[0]}"
    finally:
        master.terminate()
        master.wait(20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_without_slots_is_given_up_at_the_deadline(empty_cluster: str) -> None:
    done = doctor("--master", empty_cluster, *HERE, "--conf", "spark.tensorspark.io.timeout=2s")
    failed = failures(done)
    assert list(failed) == ["slots"]
    assert re.search(r"got none within 2 s; set spark\.executor\.instances .*spark\.executor\.cores", failed["slots"])
    assert empty_cluster in failed["slots"]


@pytest.mark.parametrize("is_interrupt", [True, False])
def test_an_interrupt_in_the_middle_of_a_call_to_spark_is_one_and_other_errors_are_not(
    is_interrupt: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(submit_options: list[str]) -> Iterator[Any]:
        try:  # as py4j's GatewayClient.send_command does
            raise KeyboardInterrupt if is_interrupt else ValueError
        except (KeyboardInterrupt, ValueError):
            raise RuntimeError("Gateway must be connected to send cancel cmd.")  # noqa: B904
        yield

    monkeypatch.setattr(doctor_command, "_examine", examine)
    for name, attribute in (("py4j", "propagate"), ("py4j", "handlers"), ("", "filters")):  # which the doctor changes
        logger = logging.getLogger(name)
        kept = getattr(logger, attribute)
        monkeypatch.setattr(logger, attribute, kept[:] if isinstance(kept, list) else kept)
    if is_interrupt:
        assert cli.main(["doctor"]) == 130
        assert capsys.readouterr().err == "tensorspark doctor: interrupted\n"
    else:
        with pytest.raises(RuntimeError, match="Gateway"):
            cli.main(["doctor"])


@pytest.mark.slow
@pytest.mark.cluster
def test_an_interrupt_ends_the_doctor_while_it_waits_for_slots(empty_cluster: str) -> None:
    process = subprocess.Popen(
        [*MAIN, "doctor", "--master", empty_cluster, *HERE],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "parameter server" in line:
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "tensorspark doctor: interrupted\n")


# dashboard


@pytest.mark.parametrize("content", [b"", b'{"record": "Ru'])
def test_a_replay_of_a_file_without_a_run_says_so(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-0000.jsonl").write_bytes(content)
    assert cli.main(["dashboard", "--replay", str(tmp_path)]) == 1
    assert "no run in it" in capsys.readouterr().err


def test_a_replay_of_a_run_that_was_cut_short_does_not_call_it_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorspark.dashboard import replay
    from tensorspark.telemetry.files import RunFile
    from tensorspark.telemetry.records import RunBegan, TrainingPoint

    file = RunFile(str(tmp_path))
    file.record(RunBegan(0.0, 1, "cut", 1.7e9, "asynchronous", 1, 1, "C", {}, (), 64, "2.0.0"))
    file.record(TrainingPoint(1.5, 3, 30, {"loss": 0.5}))
    file.close()
    served: list[Any] = []
    monkeypatch.setattr(replay, "serve", lambda view, port, on_ready, token: served.append(view))
    assert cli.main(["dashboard", "--replay", str(tmp_path)]) == 0
    (view,) = served
    assert view.ended.outcome == "unfinished"
    assert [point.num_steps for point in view.points] == [3]
