"""A standalone Spark cluster on this machine: a master and two workers, on addresses of their own, and their processes.

Nothing is simulated: executors are JVMs that a Worker started, their Python workers are processes too, and all of them
may be killed. They are found under ``/proc`` by their parents, so that nobody else's are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from benchmarks import REPOSITORY
from benchmarks.measuring import procfs
from benchmarks.measuring.ports import free_port

BIN = Path(sys.executable).parent
_HOSTS = ("127.0.0.1", "127.0.0.2")
_START_DEADLINE_S = 90.0
_END_DEADLINE_S = 20.0
_POLL_S = 0.2


class ClusterError(Exception):
    """The cluster did not start, or one of its own processes ended."""


class StandaloneCluster:
    """A master with two workers, until the ``with`` block ends. Needs Java (``JAVA_HOME`` or on the path).

    Args:
        directory: for logs and the executors' files.
        environment: of the master and the workers, and so of the executors; None takes `spark_environment`.
        num_cores: of each worker.
        memory: of each worker, as Spark writes it.

    Attributes:
        url: of the master.
    """

    def __init__(
        self,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        *,
        num_cores: int = 1,
        memory: str = "1g",
    ) -> None:
        self._directory = directory
        self._environment = dict(environment or spark_environment())
        self._worker_arguments = f"--cores {num_cores} --memory {memory} --webui-port 0"
        self._port, self._ui_port = free_port(), free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"spark://{_HOSTS[0]}:{self._port}"

    def __enter__(self) -> Self:
        try:
            self._start("master.Master", f"--host {_HOSTS[0]} --port {self._port} --webui-port {self._ui_port}")
            self._wait_until(lambda: self._num_workers() == 0)
            for host in _HOSTS:
                work = f"--work-dir {self._directory / host}"
                self._start("worker.Worker", f"--host {host} {self._worker_arguments} {work} {self.url}")
            self._wait_until(lambda: self._num_workers() == len(_HOSTS))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_END_DEADLINE_S)

    def executors(self, application: str) -> list[int]:
        """Process ids of the application's executors that live, by the worker that started them."""
        children = procfs.children()
        workers = (process.pid for process in self._processes[1:])
        started = (pid for worker in workers for pid in children.get(worker, ()))
        return [pid for pid in started if _runs(pid, "ExecutorBackend") and _runs(pid, application)]

    def python_workers(self, executor: int) -> list[int]:
        """Process ids of an executor's Python workers: the children of its daemon, which is not among them."""
        children = procfs.children()
        daemons = [pid for pid in children.get(executor, ()) if procfs.is_python_daemon(pid)]
        return [pid for daemon in daemons for pid in children.get(daemon, ())]

    def _start(self, name: str, arguments: str) -> None:
        command = [str(BIN / "spark-class"), f"org.apache.spark.deploy.{name}", *arguments.split()]
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self._directory
            )
        self._processes.append(process)

    def _num_workers(self) -> int | None:
        """How many workers the master knows; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://{_HOSTS[0]}:{self._ui_port}/json/", timeout=5) as page:
                return int(json.load(page)["aliveworkers"])
        except (OSError, ValueError):  # its page is there before what it is to show
            return None

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_DEADLINE_S
        while not condition():
            if any(process.poll() is not None for process in self._processes):
                raise ClusterError(f"a process of the cluster ended: see the logs in {self._directory}")
            if time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not start within {_START_DEADLINE_S:g} s")
            time.sleep(_POLL_S)


def spark_environment() -> dict[str, str]:
    """This process's environment without another Spark's settings, for Spark on the loopback addresses."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SPARK_HOME", "PYTHONPATH")}
    fixed = {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        # Executors find this repository's package also where it is not installed.
        "PYTHONPATH": str(REPOSITORY),
        "SPARK_LOCAL_IP": _HOSTS[0],
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return {**kept, **fixed}


def _runs(pid: int, what: str) -> bool:
    """Whether the process's command line names `what`."""
    return any(what in argument for argument in procfs.arguments(pid))
