"""Files that the driver publishes once and every executor fetches once per host.

The driver puts a run's files in ``<spark.hdfs.dir>/tensorspark-<run id>``, on any filesystem that fsspec knows;
executors copy them to ``<spark.tmp.dir>/tensorspark-local-<run id>``, named by the hash of their content.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec

from tensorspark.data.filesystem import (
    CONNECT_DEADLINE_S,
    TRANSFER_DEADLINE_S,
    attempt,
    open_filesystem,
    reason,
    require_directory,
    write_then_rename,
)
from tensorspark.errors import StagingError

_LOCK_POLL_S = 0.05
_CHUNK_BYTES = 1 << 20


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
        attempt("create", self._url, lambda: _create_run_directory(filesystem, base_url, base_path, self._path))

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
        attempt("publish", url, lambda: write_then_rename(filesystem, path, [content]), TRANSFER_DEADLINE_S)
        return StagedFile(url, hashlib.sha256(content).hexdigest(), len(content), self._user)

    def remove(self) -> None:
        """Removes the directory and all in it; nothing happens where it is already gone.

        Raises:
            StagingError: the filesystem refused it or did not answer.
        """
        filesystem, _ = open_filesystem(self._url, self._user)
        attempt("remove", self._url, lambda: _remove_tree(filesystem, self._path), CONNECT_DEADLINE_S)


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
        raise StagingError(f"{expected}, but {reason(error)}. {change}.") from error
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
    require_directory(filesystem, base_url, base_path)
    # HDFS's mkdir is content with a directory that exists.
    if filesystem.exists(path):
        raise StagingError(
            f"spark.hdfs.dir: expected no {path!r} yet, but it exists: each run needs an id of its own. "
            "Remove the directory if no run uses it any more, or choose another id."
        )
    filesystem.mkdir(path, create_parents=False)


def _remove_tree(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def _download(staged: StagedFile, target: Path) -> None:
    temporary = target.with_suffix(f".{uuid.uuid4().hex}")
    filesystem, path = open_filesystem(staged.url, staged.user)
    try:
        doing = f"copy to '{temporary}' (spark.tmp.dir)"
        copied = attempt(doing, staged.url, lambda: _copy(filesystem, path, temporary), TRANSFER_DEADLINE_S)
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
    deadline = time.monotonic() + TRANSFER_DEADLINE_S + CONNECT_DEADLINE_S
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
