"""Files that the driver publishes once and every executor fetches once per host.

The driver puts a run's files in ``<spark.hdfs.dir>/tensorspark-<run id>``, on any filesystem that fsspec knows;
executors copy them to ``<spark.tmp.dir>/tensorspark-local-<run id>``, named by the hash of their content. ``hdfs://``
goes through hdfs-native, which reads ``HADOOP_CONF_DIR`` but needs neither Java nor libhdfs.

hdfs-native has three habits that this module works around:

- It takes the user's name from ``HADOOP_USER_NAME`` alone, when it connects (not when the client is made).
- It has no timeout, neither to connect nor for an answer, so every operation runs under a deadline of ours.
- It raises ``RuntimeError`` with a Java stack in its text for everything but a missing or an existing file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

import fsspec

from tensorspark.errors import StagingError

T = TypeVar("T")

_CONNECT_DEADLINE_S = 20.0
_TRANSFER_DEADLINE_S = 600.0
_LOCK_POLL_S = 0.05
_CHUNK_BYTES = 1 << 20

_HDFS_FILESYSTEMS = {"hdfs": "HdfsFileSystem", "viewfs": "ViewfsFileSystem"}
# Where a connection is refused, hdfs-native's default (Hadoop's: 15 attempts, growing pauses) reports it after minutes.
_HDFS_SETTINGS = {"dfs.client.failover.max.attempts": "5", "dfs.client.failover.sleep.max.millis": "2000"}
# What an error says (hdfs-native's say most in their text alone), and what the user can do; the first that fits.
_ADVICE = {
    "AccessControlException|PermissionError": "Give this user write access to spark.hdfs.dir, or connect as one that "
    "has it: the session's `user`, or HADOOP_USER_NAME.",
    "No NameNode hosts found|No fs.defaultFS": "Name the NameNode in spark.hdfs.dir (hdfs://host:8020/path), or set "
    "HADOOP_CONF_DIR to the directory of core-site.xml and hdfs-site.xml on the driver and on every executor.",
    "Connection|lookup address|timed out|unreachable|No route|disconnected": "Check that it runs, that spark.hdfs.dir "
    "names its address (fs.defaultFS), and that this host reaches it.",
    "Failed to complete file|could only be written to": "Check that HDFS has live DataNodes (hdfs dfsadmin -report), "
    "and that this host reaches them.",
    "FileNotFoundError": "Check whether someone removed it while the run went on.",
}

_hadoop_user_lock = threading.Lock()


@dataclass(frozen=True)
class StagedFile:
    """A published file; executors hand it to `fetch`.

    Attributes:
        sha256: hash of the content, in hexadecimal.
        user: who the executors connect as; see `open_filesystem`.
    """

    url: str
    sha256: str
    num_bytes: int
    user: str = ""


class StagingDirectory:
    """A run's own directory under `spark.hdfs.dir`, on the driver's side. Not thread-safe.

    Example:
        >>> fsspec.filesystem("memory").makedirs("/staging", exist_ok=True)
        >>> directory = StagingDirectory("memory://staging", "run-1")
        >>> directory.publish("graph", b"content").url
        'memory:///staging/tensorspark-run-1/graph'
        >>> directory.remove()
    """

    def __init__(self, base_url: str, run_id: str, *, user: str = "") -> None:
        """Creates the directory, which is also the check that `base_url` can be used.

        Args:
            base_url: an existing directory. It is not created: a typing error would go unseen.
            user: see `open_filesystem`.

        Raises:
            StagingError: `base_url` is absent, a file, not writable or does not answer, or another run has this id.
        """
        _check_plain_name("run_id", run_id)
        filesystem, base_path = open_filesystem(base_url, user)
        self._user = user
        self._path = f"{base_path.rstrip('/')}/tensorspark-{run_id}"
        self._url: str = filesystem.unstrip_protocol(self._path)
        _attempt("create", self._url, lambda: _create_run_directory(filesystem, base_url, base_path, self._path))

    @property
    def url(self) -> str:
        return self._url

    def publish(self, name: str, content: bytes) -> StagedFile:
        """Writes a file that appears whole or not at all; one already published under that name is replaced.

        Raises:
            StagingError: the filesystem refused it or did not answer.
        """
        _check_plain_name("name", name)
        filesystem, _ = open_filesystem(self._url, self._user)
        path = f"{self._path}/{name}"
        url: str = filesystem.unstrip_protocol(path)
        _attempt("publish", url, lambda: _write_then_rename(filesystem, path, content), _TRANSFER_DEADLINE_S)
        return StagedFile(url, hashlib.sha256(content).hexdigest(), len(content), self._user)

    def remove(self) -> None:
        """Removes the directory and all in it; nothing happens where it is already gone.

        Raises:
            StagingError: the filesystem refused it or did not answer.
        """
        filesystem, _ = open_filesystem(self._url, self._user)
        _attempt("remove", self._url, lambda: _remove_tree(filesystem, self._path), _CONNECT_DEADLINE_S)


def open_filesystem(url: str, user: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url`, and the path of `url` in it. A bare path is a local one.

    Args:
        user: who to connect to HDFS as; empty: `HADOOP_USER_NAME` or the process's own user. Only HDFS without Kerberos
            heeds it. hdfs-native knows no other way than the environment, so `HADOOP_USER_NAME` is set for the time it
            takes to connect and then restored. A connection that is lost and made again is the process's own user.

    Raises:
        StagingError: no client for this kind of URL is installed, or the NameNode did not answer within 20 s.
    """
    if urlsplit(url).scheme in _HDFS_FILESYSTEMS:
        return _open_hdfs(url, user)
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StagingError(
            f"spark.hdfs.dir: expected a URL that fsspec can open, got {url!r}: {error}. "
            "Install the client it names, or use hdfs://, file:// or another filesystem that is installed."
        ) from error
    return filesystem, path


def fetch(staged: StagedFile, tmp_dir: str, run_id: str) -> Path:
    """The local copy of a published file, downloaded by the first process of this host that asks for it.

    Raises:
        StagingError: `spark.tmp.dir` cannot be used, the file is gone or unreachable, or its bytes are not those that
            were published.
    """
    target = make_local_run_dir(tmp_dir, run_id) / staged.sha256
    with _exclusive(target.with_suffix(".lock")):
        # Only verified files get this name, so its length is check enough: a crash of the host can leave an empty one.
        if not target.is_file() or target.stat().st_size != staged.num_bytes:
            _download(staged, target)
    return target


def local_run_dir(tmp_dir: str, run_id: str) -> Path:
    """Where a run keeps its files on this host; it need not exist."""
    _check_plain_name("run_id", run_id)
    return Path(tmp_dir) / f"tensorspark-local-{run_id}"  # not the staged directory's name: both may be in /tmp


def make_local_run_dir(tmp_dir: str, run_id: str) -> Path:
    """Creates `local_run_dir` where it does not exist, readable by its owner alone.

    Raises:
        StagingError: `tmp_dir` is absent (it is not created), a file or not writable, or the run's directory belongs to
            another user, who could exchange the files in it.
    """
    directory = local_run_dir(tmp_dir, run_id)
    expected = f"spark.tmp.dir: expected {tmp_dir!r} to be an existing, writable directory on {socket.gethostname()}"
    change = "Create it on every host, or set spark.tmp.dir to a local directory that all hosts have"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise StagingError(f"{expected}, but {_reason(error)}. {change}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StagingError(
            f"{expected} in which this run's user (uid {os.geteuid()}) owns '{directory.name}', but that is a symbolic "
            f"link or belongs to uid {found.st_uid}. {change} and where only trusted users write."
        )
    return directory


def remove_local(tmp_dir: str, run_id: str) -> None:
    """Removes `local_run_dir` and all in it; nothing happens where it is already gone.

    Raises:
        StagingError: something in it cannot be removed.
    """
    directory = local_run_dir(tmp_dir, run_id)
    # Several processes of a host may do this at once, so a file that vanishes meanwhile is no error.
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise StagingError(
            f"spark.tmp.dir: could not remove '{directory}' on {socket.gethostname()}. Check who owns it and its files."
        )


def _check_plain_name(argument: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError(f"{argument} must be letters, digits, '.', '_' and '-', and not start with '.', got {name!r}")


def _create_run_directory(filesystem: fsspec.AbstractFileSystem, base_url: str, base_path: str, path: str) -> None:
    expected = f"spark.hdfs.dir: expected {base_url!r} to be an existing directory"
    try:
        kind = filesystem.info(base_path)["type"]
    except FileNotFoundError as error:
        raise StagingError(
            f"{expected}, but nothing is there. Create it, or set spark.hdfs.dir to a directory that exists."
        ) from error
    if kind != "directory":
        raise StagingError(f"{expected}, but it is a {kind}. Set spark.hdfs.dir to a directory.")
    # HDFS's mkdir is content with a directory that exists.
    if filesystem.exists(path):
        raise StagingError(
            f"spark.hdfs.dir: expected no {path!r} yet, but it exists: each run needs an id of its own. "
            "Remove the directory if no run uses it any more, or choose another id."
        )
    filesystem.mkdir(path, create_parents=False)


def _write_then_rename(filesystem: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    parent, _, name = path.rpartition("/")
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex}"
    # Other filesystems' renames replace the target anyway, and not all of them take the argument.
    options = {"overwrite": True} if str(filesystem.protocol) in _HDFS_FILESYSTEMS else {}
    try:
        with filesystem.open(temporary, "wb") as file:
            file.write(content)
        filesystem.mv(temporary, path, **options)
    except Exception:
        with suppress(Exception):
            filesystem.rm(temporary)
        raise


def _remove_tree(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def _download(staged: StagedFile, target: Path) -> None:
    temporary = target.with_suffix(f".{uuid.uuid4().hex}")
    filesystem, path = open_filesystem(staged.url, staged.user)
    try:
        doing = f"copy to '{temporary}' (spark.tmp.dir)"
        copied = _attempt(doing, staged.url, lambda: _copy(filesystem, path, temporary), _TRANSFER_DEADLINE_S)
        if copied != (staged.num_bytes, staged.sha256):
            raise StagingError(
                f"spark.hdfs.dir: expected {staged.num_bytes} bytes with SHA-256 {staged.sha256} in {staged.url!r}, "
                f"got {copied[0]} bytes with SHA-256 {copied[1]}: the file changed after it was published. "
                "Set spark.hdfs.dir to a directory that no other program writes to, and start the run again."
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(filesystem: fsspec.AbstractFileSystem, path: str, target: Path) -> tuple[int, str]:
    """Returns the number of bytes copied and their SHA-256."""
    digest = hashlib.sha256()
    num_bytes = 0
    with filesystem.open(path, "rb") as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file at `path`. The kernel lets go of it when its holder dies, so it is never stale."""
    deadline = time.monotonic() + _TRANSFER_DEADLINE_S + _CONNECT_DEADLINE_S
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StagingError(
                        f"spark.tmp.dir: expected '{path}' to be free by now, but another process on "
                        f"{socket.gethostname()} still holds it. End that process, or use another spark.tmp.dir."
                    ) from error
            time.sleep(_LOCK_POLL_S)  # flock has no timeout of its own
        yield


def _open_hdfs(url: str, user: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        import hdfs_native.fsspec
    except ImportError as error:
        raise StagingError(
            f"spark.hdfs.dir: {url!r} needs hdfs-native, which is not installed on {socket.gethostname()}. Run\n"
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
        return _attempt("connect to", url, connect, _CONNECT_DEADLINE_S), parts.path or "/"


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


def _attempt(doing: str, url: str, operation: Callable[[], T], deadline_s: float = _CONNECT_DEADLINE_S) -> T:
    """Runs `operation` and raises what goes wrong as StagingError; past the deadline its thread is left to itself."""
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
            f"spark.hdfs.dir: could not {doing} {url!r}: no answer within {deadline_s:g} s. "
            "Check that the filesystem works and can be reached from this host, or change spark.hdfs.dir."
        )
    try:
        return outcome.result()
    except Exception as error:  # each fsspec filesystem has its own kinds
        if isinstance(error, StagingError):
            raise
        raise StagingError(f"spark.hdfs.dir: could not {doing} {url!r}: {_reason(error)}. {_advice(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, without the Java names and the stack that hdfs-native wraps it in."""
    text = str(error)
    if remote := re.match(r'(?:Fatal)?RPCError\("[^"]*", "((?:[^"\\]|\\.)*)', text):
        text = remote[1].replace("\\n", "\n").replace('\\"', '"')
    elif isinstance(error, FileNotFoundError) and error.errno is None:
        text = f"no such file: {text}"  # hdfs-native and fsspec give the path alone
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _advice(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, text)), "Check spark.hdfs.dir.")
