"""One NameNode and one DataNode of Apache Hadoop, as processes of their own on free loopback ports."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape

from benchmarks.measuring.ports import free_port
from tests.maven import resolve

_POM = Path(__file__).with_name("pom.xml")
_NAME_NODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
_DATA_NODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"
_MIN_JAVA_VERSION = 17

_START_DEADLINE_S = 90.0
_STOP_DEADLINE_S = 15.0
_HTTP_DEADLINE_S = 10.0
_POLL_S = 0.1

SUPERUSER = "hdfs"


def unavailable_reason() -> str | None:
    """Why no HDFS can be started here; None where one can. The first call may download jars to Maven's repository."""
    return _resolution()[1]


class HdfsCluster:
    """An empty HDFS with permissions on, whose superuser is `SUPERUSER`; root is an ordinary user in it.

    Example:
        with HdfsCluster() as hdfs:
            hdfs.make_directory("/data", owner="alice")
            client = hdfs_native.Client(hdfs.url)
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="tensorspark-hdfs-"))
        self._rpc_port, self._http_port = free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"hdfs://127.0.0.1:{self._rpc_port}"

    def __enter__(self) -> Self:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"HDFS cannot run here: {reason}")
        try:
            self._write_configuration()
            self._format()
            self._start("namenode", _NAME_NODE)
            self._start("datanode", _DATA_NODE)
            self._await("one live DataNode and no safe mode", self._is_ready)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends both processes and removes their files; idempotent."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_DEADLINE_S)
        self._processes.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def make_directory(self, path: str, *, owner: str, permission: str = "755") -> None:
        self._webhdfs("PUT", path, "MKDIRS", permission=permission)
        self._webhdfs("PUT", path, "SETOWNER", owner=owner)

    def status(self, path: str) -> dict[str, Any]:
        """WebHDFS's FileStatus of `path`: `owner`, `permission`, `type`, `length` and more."""
        status: dict[str, Any] = self._webhdfs("GET", path, "GETFILESTATUS")["FileStatus"]
        return status

    def names(self, path: str) -> list[str]:
        """Names of what is in the directory at `path`, sorted."""
        statuses = self._webhdfs("GET", path, "LISTSTATUS")["FileStatuses"]["FileStatus"]
        return sorted(status["pathSuffix"] for status in statuses)

    def _webhdfs(self, method: str, path: str, operation: str, **parameters: str) -> dict[str, Any]:
        query = urllib.parse.urlencode({"op": operation, "user.name": SUPERUSER, **parameters})
        answer = self._http(method, f"/webhdfs/v1{urllib.parse.quote(path)}?{query}")
        decoded: dict[str, Any] = json.loads(answer) if answer else {}
        return decoded

    def _http(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self._http_port}{path}", method=method)
        # An opener without proxies: the address is on the loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_HTTP_DEADLINE_S) as response:
            content: bytes = response.read()
        return content

    def _is_ready(self) -> bool:
        try:
            beans = json.loads(self._http("GET", "/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"))["beans"]
        except (OSError, urllib.error.URLError, ValueError):
            return False
        return bool(beans) and beans[0]["NumLiveDataNodes"] == 1 and beans[0]["FSState"] == "Operational"

    def _await(self, expected: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_DEADLINE_S
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended:
                raise RuntimeError(f"{' and '.join(ended)} ended while starting.\n{self._log_tails()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"expected {expected} within {_START_DEADLINE_S:g} s.\n{self._log_tails()}")
            time.sleep(_POLL_S)

    def _write_configuration(self) -> None:
        any_port = "127.0.0.1:0"
        settings = {
            "fs.defaultFS": self.url,
            "hadoop.tmp.dir": str(self._directory / "tmp"),
            "dfs.permissions.enabled": "true",
            "dfs.replication": "1",
            "dfs.namenode.name.dir": (self._directory / "name").as_uri(),
            "dfs.namenode.http-address": f"127.0.0.1:{self._http_port}",
            "dfs.namenode.safemode.extension": "0",
            "dfs.datanode.data.dir": (self._directory / "data").as_uri(),
            "dfs.datanode.address": any_port,
            "dfs.datanode.http.address": any_port,
            "dfs.datanode.ipc.address": any_port,
        }
        properties = "".join(
            f"<property><name>{escape(name)}</name><value>{escape(value)}</value></property>\n"
            for name, value in settings.items()
        )
        configuration = self._directory / "conf"
        configuration.mkdir()
        for name in ("core-site.xml", "hdfs-site.xml"):
            (configuration / name).write_text(f"<configuration>\n{properties}</configuration>\n")

    def _format(self) -> None:
        log = self._directory / "format.log"
        with log.open("wb") as output:
            code = subprocess.run(
                [*self._java(_NAME_NODE), "-format", "-force", "-nonInteractive"],
                check=False,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_START_DEADLINE_S,
            ).returncode
        if code != 0:
            raise RuntimeError(f"NameNode -format exited with {code}.\n{self._log_tails()}")

    def _start(self, name: str, main_class: str) -> None:
        with (self._directory / f"{name}.log").open("wb") as output:
            self._processes[name] = subprocess.Popen(
                self._java(main_class),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _java(self, main_class: str) -> list[str]:
        classpath = os.pathsep.join((str(self._directory / "conf"), _resolution()[0]))
        return ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", classpath, main_class]

    def _environment(self) -> dict[str, str]:
        # Hadoop takes who starts the NameNode for the superuser.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HADOOP_")}
        return {**inherited, "HADOOP_USER_NAME": SUPERUSER}

    def _log_tails(self) -> str:
        logs = sorted(self._directory.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)


@functools.cache
def _resolution() -> tuple[str, str | None]:
    """The classpath, and why there is none."""
    unfit = _unfit_java()
    return ("", unfit) if unfit is not None else resolve(_POM)


def _unfit_java() -> str | None:
    if shutil.which("java") is None:
        return "java is not on the PATH"
    printed = subprocess.run(["java", "-version"], check=False, capture_output=True, text=True, timeout=60).stderr
    found = re.search(r'version "(\d+)', printed)
    if found is None or int(found[1]) < _MIN_JAVA_VERSION:
        return f"Java {_MIN_JAVA_VERSION} or newer is needed, `java -version` says: {printed.strip()}"
    return None
