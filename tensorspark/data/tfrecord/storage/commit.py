"""How written files become visible: whole, once, and all together or not at all.

A task writes to ``_temporary/<job>/<attempt>/`` under the target, which every reader passes over. Spark tells the
driver which one attempt of each task counts; the driver moves that attempt's files to their places, writes
``_SUCCESS`` and removes the rest. So a task that is killed, repeated or run twice leaves nothing that a reader sees,
and a job that fails leaves nothing at all.

Overwriting moves what is there to ``_replaced/<job>/``, the new files to their places, writes ``_SUCCESS`` and then
removes the old: a write that fails puts everything back, and a reader never sees old rows beside new ones. While the
renames take place it may see only some of the rows; ``_SUCCESS`` is absent for that time. Where the driver dies in the
middle of them, the old files are in ``_replaced``.

A micro-batch of a stream may be committed twice, where the driver died in between. What it is about to move stands in
``_tensorspark/<query>/``, so that the second commit removes what the first had moved, or does nothing where it was
complete.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

import fsspec

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem, write_then_rename
from tensorspark.data.tfrecord.options import Locality
from tensorspark.data.tfrecord.storage.paths import SETTING, base_name, children, describe, is_hidden, is_local
from tensorspark.errors import ConfigError, StagingError

T = TypeVar("T")

TEMPORARY = "_temporary"
SUCCESS = "_SUCCESS"
STREAM_LOG = "_tensorspark"
REPLACED = "_replaced"


@dataclass(frozen=True)
class WriteJob:
    """One write, as the driver and its tasks know it.

    Attributes:
        url: of the directory that is written to.
        job_id: unlike that of any other; part of each file's name.
        replaces: whether what is in the directory goes when the new files are in place.
        is_dynamic: then only what lies in those directories that get new files.
        locality: ``"local"``: each task moves its own files, on its executor's disk, and there is no commit.
        tolerates_existing: for ``"local"``, where each executor looks for itself: True to append, False to refuse, None
            to write nothing where files of another job are.
        existed: whether the directory was there when the write was planned.
        user: who to be on HDFS; empty for the process's own.
    """

    url: str
    job_id: str
    replaces: bool = False
    is_dynamic: bool = False
    locality: Locality = "distributed"
    tolerates_existing: bool | None = True
    existed: bool = True
    user: str = ""

    def open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The directory's filesystem, and its path there."""
        filesystem, path = open_filesystem(self.url, self.user, SETTING)
        return filesystem, path.rstrip("/")


@dataclass(frozen=True)
class TaskFiles:
    """What an attempt wrote.

    Attributes:
        attempt: name of its temporary directory.
        files: paths, relative to that directory and to the target alike.
        num_records: in all files.
        host: that it ran on.
    """

    attempt: str
    files: tuple[str, ...] = ()
    num_records: int = 0
    host: str = field(default_factory=socket.gethostname)


class TaskOutput:
    """The files that one attempt of a task writes; used by one thread.

    Args:
        job: of the task.
        partition: the task's number, part of its files' names.
        attempt_id: unlike that of any other attempt of the job.
    """

    def __init__(self, job: WriteJob, partition: int, attempt_id: str) -> None:
        self._job = job
        self._partition = partition
        self._attempt = f"{partition:05d}-{attempt_id}"
        self._filesystem, self._path = job.open()
        self._directory = f"{self._path}/{TEMPORARY}/{job.job_id}/{self._attempt}"
        self._files: list[str] = []

    def is_wanted(self) -> bool:
        """Whether to write at all: not where a local write is to leave existing files alone.

        Raises:
            ConfigError: files of another job are there, and must not.
        """
        if self._job.locality == "distributed" or self._job.tolerates_existing:
            return True
        present = _ask(self._job, "list", describe, self._filesystem, self._path)
        entries = children(self._filesystem, self._path, self._job.url) if present is not None else []
        names = [base_name(entry["name"]) for entry in entries]
        if not any(self._job.job_id not in name and not is_hidden(name) for name in names):
            return True
        if self._job.tolerates_existing is None:
            return False
        raise ConfigError(
            f"path: expected {self._job.url!r} to be absent on {socket.gethostname()}, but files are there; remove it, "
            "choose another path, or set saveMode to append or ignore"
        )

    def open(self, directory: str, extension: str) -> OutputFile:
        """A new file, in `directory` below the target (empty: in the target itself)."""
        name = f"part-{self._partition:05d}-{self._job.job_id}-c{len(self._files):03d}{extension}"
        relative = f"{directory}/{name}" if directory else name
        path = f"{self._directory}/{relative}"

        def create() -> Any:
            for _ in range(3):
                # Another job that ends may remove what is above, empty, before the file is in it.
                with suppress(FileNotFoundError):
                    self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                    return self._filesystem.open(path, "wb")
            raise FileNotFoundError(path)

        file = _ask(self._job, "create a file in", create)
        self._files.append(relative)
        return OutputFile(file, self._job.url, is_local=is_local(self._filesystem))

    def finish(self, num_records: int) -> TaskFiles:
        """Says what was written, once all files are closed. A local write's files get their names here."""
        files = TaskFiles(self._attempt, tuple(self._files), num_records)
        if self._job.locality == "local":
            try:
                with _moved(self._job, self._filesystem, self._path, _moves_in(self._job, self._path, [files])):
                    pass
            finally:
                self.discard()
            self._discard_killed()
            _remove_temporary(self._job, self._filesystem, self._path, only_empty=True)
        return files

    def discard(self) -> None:
        """Removes the attempt's files, as far as that can be done."""
        with suppress(Exception):
            _ask(self._job, "remove", self._filesystem.rm, self._directory, recursive=True)

    def _discard_killed(self) -> None:
        """Removes what other attempts of the task left on this host: of a local write nobody else does."""
        with suppress(Exception):
            for entry in children(self._filesystem, self._directory.rpartition("/")[0], self._job.url):
                if base_name(entry["name"]).startswith(f"{self._partition:05d}-"):
                    _ask(self._job, "remove", self._filesystem.rm, entry["name"], recursive=True)


class OutputFile:
    """A file that is being written; on other filesystems than the local one each operation has a deadline."""

    def __init__(self, file: IO[bytes], url: str, *, is_local: bool) -> None:
        self._file = file
        self._url = url
        self._is_local = is_local

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of it; raises StagingError where that fails."""
        if self._is_local:
            try:
                self._file.write(data)
            except OSError as error:
                raise StagingError(f"path: could not write to {self._url!r}: {error}; free space or move it") from error
        else:
            attempt("write to", self._url, partial(self._file.write, data), TRANSFER_DEADLINE_S, SETTING)
        return len(data)

    def close(self) -> None:
        """The file is complete once this returns."""
        attempt("write to", self._url, self._file.close, TRANSFER_DEADLINE_S, SETTING)


def commit_job(job: WriteJob, tasks: Sequence[TaskFiles]) -> None:
    """Makes the tasks' files visible, on the driver; where that fails, none of them is.

    Raises:
        StagingError: what the filesystem refused; where it did not let files be put back either, it says which.
    """
    if job.locality == "local":
        return
    filesystem, path = job.open()
    _ask(job, "create", filesystem.makedirs, path, exist_ok=True)
    try:
        with _placed(job, filesystem, path, tasks):
            _ask(job, "write to", _touch, filesystem, f"{path}/{SUCCESS}")
    finally:
        _remove_temporary(job, filesystem, path)


def abort_job(job: WriteJob, tasks: Sequence[TaskFiles]) -> None:
    """Removes what the job wrote, and the directory where the job made it."""
    filesystem, path = job.open()
    if job.locality == "local":
        here = [file for task in tasks if task.host == socket.gethostname() for file in task.files]
        _remove(job, filesystem, [f"{path}/{file}" for file in here])
    _remove_temporary(job, filesystem, path)
    if not job.existed:
        with suppress(Exception):  # somebody else's files are in it, or nobody made it
            _ask(job, "remove", filesystem.rmdir, path)


def commit_batch(job: WriteJob, tasks: Sequence[TaskFiles], query: str, batch: int) -> None:
    """As `commit_job`, for a micro-batch of a stream; a second time it leaves what the first time left.

    Raises:
        StagingError: what the filesystem refused.
    """
    filesystem, path = job.open()
    log = f"{path}/{STREAM_LOG}/{query}"
    _ask(job, "create", filesystem.makedirs, log, exist_ok=True)
    last = _read_json(job, filesystem, f"{log}/committed")
    if last is None or batch > last["batch"]:
        begun = _read_json(job, filesystem, f"{log}/begun")
        if begun is not None and begun["batch"] == batch:
            _remove(job, filesystem, [f"{path}/{file}" for file in begun["files"]])
        targets = [file for task in tasks for file in task.files]
        _write_json(job, filesystem, f"{log}/begun", {"batch": batch, "files": targets})
        with _placed(job, filesystem, path, tasks):
            _write_json(job, filesystem, f"{log}/committed", {"batch": batch})
    _remove_temporary(job, filesystem, path)


@contextmanager
def _placed(
    job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, tasks: Sequence[TaskFiles]
) -> Iterator[None]:
    """Moves the old files out where the job replaces them, then the new ones in, and removes the old after the block.

    Where a move or the block fails, all is as before.
    """
    # Under a name of its own: a micro-batch whose commit was cut off may have left a directory of the job.
    away = f"{path}/{REPLACED}/{job.job_id}/{uuid.uuid4().hex}"
    moves_out = [(f"{path}/{name}", f"{away}/{name}") for name in _old(job, filesystem, path, tasks)]
    was_complete = _ask(job, "look at", describe, filesystem, f"{path}/{SUCCESS}") is not None
    _remove(job, filesystem, [f"{path}/{SUCCESS}"])
    try:
        # Apart: the directories that the second makes must be gone before those of the first come back.
        with _moved(job, filesystem, path, moves_out), _moved(job, filesystem, path, _moves_in(job, path, tasks)):
            yield
    except Exception:
        if was_complete:
            with suppress(Exception):
                _ask(job, "write to", _touch, filesystem, f"{path}/{SUCCESS}")
        raise
    with suppress(Exception):  # no reader sees them
        _ask(job, "remove", filesystem.rm, f"{path}/{REPLACED}/{job.job_id}", recursive=True)
    _remove_empty(job, filesystem, f"{path}/{REPLACED}", path)


def _old(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, tasks: Sequence[TaskFiles]) -> list[str]:
    """What goes when the new files come, relative to the target: files and whole directories."""
    if not job.replaces:
        return []
    if not job.is_dynamic:
        present = [base_name(entry["name"]) for entry in children(filesystem, path, job.url)]
        return [name for name in present if name not in (TEMPORARY, STREAM_LOG, REPLACED, SUCCESS)]
    old: list[str] = []
    for directory in sorted({file.rpartition("/")[0] for task in tasks for file in task.files}):
        whole = f"{path}/{directory}".rstrip("/")
        if _ask(job, "look at", describe, filesystem, whole) is not None:
            entries = children(filesystem, whole, job.url)
            names = [base_name(entry["name"]) for entry in entries if entry["type"] != "directory"]
            old += [f"{directory}/{name}" if directory else name for name in names if not is_hidden(name)]
    return old


def _moves_in(job: WriteJob, path: str, tasks: Iterable[TaskFiles]) -> list[tuple[str, str]]:
    """From where to where the tasks' files go."""
    return [
        (f"{path}/{TEMPORARY}/{job.job_id}/{task.attempt}/{file}", f"{path}/{file}")
        for task in tasks
        for file in task.files
    ]


@contextmanager
def _moved(
    job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, moves: Iterable[tuple[str, str]]
) -> Iterator[None]:
    """Moves files and directories, in this order; where one fails, or the block does, they go back."""
    made: set[str] = set()
    done: list[tuple[str, str]] = []
    try:
        for source, target in moves:
            parent = target.rpartition("/")[0]
            if parent not in made:
                _ask(job, "create", filesystem.makedirs, parent, exist_ok=True)
                made.add(parent)
            # shutil and hdfs-native rename; a local file that a failed attempt left is replaced.
            _ask(job, "move files in", filesystem.mv, source, target, recursive=True)
            done.append((source, target))
        yield
    except Exception as error:
        left = _move_back(job, filesystem, done)
        for parent in made:
            _remove_empty(job, filesystem, parent, path)
        if left:
            raise StagingError(f"{error} These could not be moved back, do it yourself: {'; '.join(left)}") from error
        raise


def _move_back(job: WriteJob, filesystem: fsspec.AbstractFileSystem, moves: Sequence[tuple[str, str]]) -> list[str]:
    """Undoes the moves, the last first; says which it could not."""
    left: list[str] = []
    for source, target in reversed(moves):
        try:
            _ask(job, "create", filesystem.makedirs, source.rpartition("/")[0], exist_ok=True)
            _ask(job, "move files back", filesystem.mv, target, source, recursive=True)
        except StagingError:
            left.append(f"{target} (to {source})")
    return left


def _remove_empty(job: WriteJob, filesystem: fsspec.AbstractFileSystem, directory: str, above: str) -> None:
    """Removes a directory below `above` and those between, as far as they are empty."""
    with suppress(Exception):
        while directory.startswith(f"{above}/"):
            _ask(job, "remove", filesystem.rmdir, directory)
            directory = directory.rpartition("/")[0]


def _remove(job: WriteJob, filesystem: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    def remove(path: str) -> None:
        # hdfs-native's delete of nothing is no error.
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)

    for path in paths:
        _ask(job, "remove a file of", remove, path)


def _remove_temporary(
    job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, *, only_empty: bool = False
) -> None:
    """Removes the job's temporary directory, and the one around it where no other job uses it; as far as it can be."""
    directory = f"{path}/{TEMPORARY}/{job.job_id}"
    if only_empty:
        _remove_empty(job, filesystem, directory, path)
        return
    with suppress(Exception):
        _ask(job, "remove", filesystem.rm, directory, recursive=True)
    _remove_empty(job, filesystem, f"{path}/{TEMPORARY}", path)


def _touch(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    with filesystem.open(path, "wb"):
        pass


def _read_json(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str) -> Any:
    def read() -> Any:
        try:
            with filesystem.open(path, "rb") as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None

    return _ask(job, "read the log of", read)


def _write_json(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, content: Any) -> None:
    parts = [json.dumps(content).encode()]
    _ask(job, "write the log of", write_then_rename, filesystem, path, parts)


def _ask(job: WriteJob, doing: str, operation: Callable[..., T], *args: Any, **options: Any) -> T:
    return attempt(doing, job.url, partial(operation, *args, **options), TRANSFER_DEADLINE_S, SETTING)
