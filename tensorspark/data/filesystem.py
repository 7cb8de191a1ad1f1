"""Filesystems by URL: how tensorspark opens, waits for and writes to any that fsspec knows.

``hdfs://`` goes through hdfs-native, which reads ``HADOOP_CONF_DIR`` but needs neither Java nor libhdfs. It has three
habits that this module works around:

- It takes the user's name from ``HADOOP_USER_NAME`` alone, when it connects (not when the client is made).
- It has no timeout, neither to connect nor for an answer, so every operation runs under a deadline of ours (`attempt`).
- It raises ``RuntimeError`` with a Java stack in its text for everything but a missing or an existing file.

Errors name `setting`, what the user would change: ``spark.hdfs.dir`` unless the caller says otherwise.
"""

from __future__ import annotations

import io
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

import fsspec

from tensorspark.errors import StagingError, TensorsparkError

T = TypeVar("T")

CONNECT_DEADLINE_S = 20.0
TRANSFER_DEADLINE_S = 600.0
_CHUNK_BYTES = 1 << 22

_HDFS_FILESYSTEMS = {"hdfs": "HdfsFileSystem", "viewfs": "ViewfsFileSystem"}
# Where a connection is refused, hdfs-native's default (Hadoop's: 15 attempts, growing pauses) reports it after minutes.
_HDFS_SETTINGS = {"dfs.client.failover.max.attempts": "5", "dfs.client.failover.sleep.max.millis": "2000"}
# What an error says (hdfs-native's say most in their text alone), and what the user can do; the first that fits.
_ADVICE = {
    "AccessControlException|PermissionError": "Give this user write access to it, or connect as one that "
    "has it: the session's `user`, or HADOOP_USER_NAME.",
    "No NameNode hosts found|No fs.defaultFS": "Name the NameNode in {setting} (hdfs://host:8020/path), or set "
    "HADOOP_CONF_DIR to the directory of core-site.xml and hdfs-site.xml on the driver and on every executor.",
    "Connection|lookup address|timed out|unreachable|No route|disconnected": "Check that it runs, that {setting} "
    "names its address (fs.defaultFS), and that this host reaches it.",
    "Failed to complete file|could only be written to": "Check that HDFS has live DataNodes (hdfs dfsadmin -report), "
    "and that this host reaches them.",
    "FileNotFoundError": "Check whether someone removed it while the run went on.",
}

_hadoop_user_lock = threading.Lock()


def open_filesystem(url: str, user: str = "", setting: str = "spark.hdfs.dir") -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url`, and the path of `url` in it. A bare path is a local one.

    Args:
        user: who to connect to HDFS as; empty: `HADOOP_USER_NAME` or the process's own user. Only HDFS without Kerberos
            heeds it. hdfs-native knows no other way than the environment, so `HADOOP_USER_NAME` is set for the time it
            takes to connect and then restored. A connection that is lost and made again is the process's own user.
        setting: what the user would change, for errors.

    Raises:
        StagingError: no client for this kind of URL is installed, or the NameNode did not answer within 20 s.
    """
    if urlsplit(url).scheme in _HDFS_FILESYSTEMS:
        return _open_hdfs(url, user, setting)
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StagingError(
            f"{setting}: expected a URL that fsspec can open, got {url!r}: {error}. "
            "Install the client it names, or use hdfs://, file:// or another filesystem that is installed."
        ) from error
    return filesystem, path


def attempt(
    doing: str,
    url: str,
    operation: Callable[[], T],
    deadline_s: float = CONNECT_DEADLINE_S,
    setting: str = "spark.hdfs.dir",
) -> T:
    """Runs `operation` on a thread of its own; past the deadline that thread is left to itself.

    Args:
        doing: what `operation` does to `url`, as in "could not publish".
        setting: what the user would change.

    Raises:
        StagingError: what `operation` raised, or that it did not end in time. Our own errors go through.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(operation())
        except BaseException as error:  # handed to the caller, whatever it is
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="tensorspark-staging", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        raise StagingError(
            f"{setting}: could not {doing} {url!r}: no answer within {deadline_s:g} s. "
            f"Check that the filesystem works and can be reached from this host, or change {setting}."
        )
    try:
        return outcome.result()
    except Exception as error:  # each fsspec filesystem has its own kinds
        if isinstance(error, TensorsparkError):
            raise
        raise StagingError(
            f"{setting}: could not {doing} {url!r}: {reason(error)}. {_advice(error, setting)}"
        ) from error


def require_directory(
    filesystem: fsspec.AbstractFileSystem, url: str, path: str, setting: str = "spark.hdfs.dir"
) -> None:
    """Raises StagingError where `path`, which `url` names, is absent or no directory. The caller has a deadline."""
    expected = f"{setting}: expected {url!r} to be an existing directory"
    try:
        kind = filesystem.info(path)["type"]
    except FileNotFoundError as error:
        raise StagingError(
            f"{expected}, but nothing is there. Create it, or set {setting} to a directory that exists."
        ) from error
    if kind != "directory":
        raise StagingError(f"{expected}, but it is a {kind}. Set {setting} to a directory.")


def write_then_rename(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    parts: Iterable[bytes | memoryview],
    *,
    is_durable: bool = False,
    is_nameless: bool = False,
    give_up_at: float = math.inf,
) -> None:
    """Writes a file that appears whole or not at all; one of that name is replaced.

    Until then its name is ``.<name>.<32 hex digits>``, or ``.<32 hex digits>``. Asks under the caller's deadline.

    Args:
        parts: the content, in pieces; not copied as a whole.
        is_durable: whether a local file must be on the disk, not only in the kernel's memory, before it gets its name.
        is_nameless: whether the name until then must not hold the file's, by which somebody else would take it for one.
        give_up_at: on `time.monotonic`: an operation that was left to itself stops here once it can go on.
    """
    parent, _, name = path.rpartition("/")
    temporary = f"{parent}/.{'' if is_nameless else f'{name}.'}{uuid.uuid4().hex}"
    # Other filesystems' renames replace the target anyway, and not all of them take the argument.
    options = {"overwrite": True} if str(filesystem.protocol) in _HDFS_FILESYSTEMS else {}
    try:
        with filesystem.open(temporary, "wb") as file:
            for chunk in _chunks(parts):
                file.write(chunk)
                _check_time(give_up_at)
            if is_durable:
                _sync(file)
        _check_time(give_up_at)
        filesystem.mv(temporary, path, **options)
    except Exception:
        with suppress(Exception):
            filesystem.rm(temporary)
        raise


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _check_time(give_up_at: float) -> None:
    if time.monotonic() > give_up_at:
        raise TimeoutError("the deadline has passed")


def _sync(file: IO[Any]) -> None:
    try:
        descriptor = file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return  # no local file
    file.flush()
    os.fsync(descriptor)


def _open_hdfs(url: str, user: str, setting: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        import hdfs_native.fsspec
    except ImportError as error:
        raise StagingError(
            f"{setting}: {url!r} needs hdfs-native, which is not installed on {socket.gethostname()}. Run\n"
            "    pip install 'tensorspark[hdfs]'\n"
            "on the driver and on every executor."
        ) from error
    parts = urlsplit(url)
    # Not parts.hostname: it is in lower case, and the name of an HDFS nameservice is not.
    host, _, port = parts.netloc.partition(":")
    filesystem_class = getattr(hdfs_native.fsspec, _HDFS_FILESYSTEMS[parts.scheme])

    def connect() -> fsspec.AbstractFileSystem:
        settings = {name: value for name, value in _HDFS_SETTINGS.items() if name not in _hadoop_site_settings()}
        # fsspec's instance cache does not know the user, and would hand out another user's connection.
        filesystem = filesystem_class(host or None, int(port) if port else None, skip_instance_cache=True, **settings)
        filesystem.exists(parts.path or "/")  # the first call connects
        return filesystem

    with _hadoop_user(user):
        return attempt("connect to", url, connect, CONNECT_DEADLINE_S, setting), parts.path or "/"


@contextmanager
def _hadoop_user(user: str) -> Iterator[None]:
    """Sets `HADOOP_USER_NAME` where `user` is not empty. Locked, as a thread without `user` must not see another's."""
    with _hadoop_user_lock:
        before = os.environ.get("HADOOP_USER_NAME")
        if user:
            os.environ["HADOOP_USER_NAME"] = user
        try:
            yield
        finally:
            os.environ.pop("HADOOP_USER_NAME", None)
            if before is not None:
                os.environ["HADOOP_USER_NAME"] = before


def _hadoop_site_settings() -> set[str]:
    """Names of what the cluster's own configuration files set, found where hdfs-native finds them."""
    directory = os.environ.get("HADOOP_CONF_DIR")
    if directory is None and "HADOOP_HOME" in os.environ:
        directory = f"{os.environ['HADOOP_HOME']}/etc/hadoop"
    files = [Path(directory, name) for name in ("core-site.xml", "hdfs-site.xml")] if directory else []
    return {name.text or "" for file in files if file.is_file() for name in ElementTree.parse(file).iter("name")}


def reason(error: Exception) -> str:
    """The first line of an error's message, without the Java names and the stack that hdfs-native wraps it in."""
    text = str(error)
    if remote := re.match(r'(?:Fatal)?RPCError\("[^"]*", "((?:[^"\\]|\\.)*)', text):
        text = remote[1].replace("\\n", "\n").replace('\\"', '"')
    elif isinstance(error, FileNotFoundError) and error.errno is None:
        text = f"no such file: {text}"  # hdfs-native and fsspec give the path alone
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _advice(error: Exception, setting: str) -> str:
    text = f"{type(error).__name__}: {error}"
    advice = next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, text)), "Check {setting}.")
    return advice.replace("{setting}", setting)
