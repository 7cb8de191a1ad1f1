"""What a write is, and what its tasks and its driver do alike: ask the filesystem, move files, and clean up."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import fsspec

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem
from tensorspark.data.tfrecord.options import Locality, SaveMode
from tensorspark.data.tfrecord.storage.paths import SETTING, base_name, children, describe, is_hidden
from tensorspark.errors import StagingError

T = TypeVar("T")

TEMPORARY = "_temporary"
CLAIM = "_committing"
SUCCESS = "_SUCCESS"
STREAM_LOG = "_tensorspark"
REPLACED = "_replaced"


@dataclass(frozen=True)
class WriteJob:
    """One write, as the driver and its tasks know it.

    Attributes:
        url: of the directory that is written to.
        job_id: unlike that of any other; part of each file's name.
        mode: what becomes of what is in the directory. The driver has looked there; of a local write each task does.
        is_dynamic: then overwriting takes only what lies in those directories that get new files.
        locality: ``"local"``: each task moves its own files, on its executor's disk, and there is no commit.
        existed: whether the directory was there when the write was planned.
        user: who to be on HDFS; empty for the process's own.
    """

    url: str
    job_id: str
    mode: SaveMode = "append"
    is_dynamic: bool = False
    locality: Locality = "distributed"
    existed: bool = True
    user: str = ""

    @property
    def replaces(self) -> bool:
        """Whether what is in the directory goes when the new files are in place."""
        return self.mode == "overwrite"

    @property
    def is_skipped(self) -> bool:
        """Whether there is nothing to write, by what the driver saw."""
        return self.mode == "ignore" and self.existed

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
        host: that it ran on.
    """

    attempt: str
    files: tuple[str, ...] = ()
    host: str = field(default_factory=socket.gethostname)


def ask(job: WriteJob, doing: str, operation: Callable[..., T], *args: Any, **options: Any) -> T:
    return attempt(doing, job.url, partial(operation, *args, **options), TRANSFER_DEADLINE_S, SETTING)


def holds_others(job: WriteJob, filesystem: fsspec.AbstractFileSystem, directory: str) -> bool:
    """Whether anything in a directory, or in those of `partitionBy` below it, is visible and not of the job."""
    is_there = ask(job, "look at", describe, filesystem, directory) is not None
    for entry in children(filesystem, directory, job.url) if is_there else []:
        path, name = entry["name"], base_name(entry["name"])
        # Whose a directory of `partitionBy` is, only the files in it tell.
        is_partition = entry["type"] == "directory" and "=" in name
        if not is_hidden(name) and (holds_others(job, filesystem, path) if is_partition else job.job_id not in name):
            return True
    return False


def moves_in(job: WriteJob, path: str, tasks: Iterable[TaskFiles]) -> list[tuple[str, str]]:
    """From where to where the tasks' files go."""
    return [
        (f"{path}/{TEMPORARY}/{job.job_id}/{task.attempt}/{file}", f"{path}/{file}")
        for task in tasks
        for file in task.files
    ]


@contextmanager
def moved(
    job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, moves: Iterable[tuple[str, str]]
) -> Iterator[None]:
    """Moves files and directories, in this order; where one fails, or the block does, they go back."""
    made: set[str] = set()
    done: list[tuple[str, str]] = []
    try:
        for source, target in moves:
            parent = target.rpartition("/")[0]
            if parent not in made:
                ask(job, "create", filesystem.makedirs, parent, exist_ok=True)
                made.add(parent)
            # shutil and hdfs-native rename; a local file that a failed attempt left is replaced.
            ask(job, "move files in", filesystem.mv, source, target, recursive=True)
            done.append((source, target))
        yield
    except Exception as error:
        left = _move_back(job, filesystem, done)
        for parent in made:
            remove_empty(job, filesystem, parent, path)
        if left:
            raise StagingError(f"{error} These could not be moved back, do it yourself: {'; '.join(left)}") from error
        raise


def _move_back(job: WriteJob, filesystem: fsspec.AbstractFileSystem, moves: Sequence[tuple[str, str]]) -> list[str]:
    """Undoes the moves, the last first; says which it could not."""
    left: list[str] = []
    for source, target in reversed(moves):
        try:
            ask(job, "create", filesystem.makedirs, source.rpartition("/")[0], exist_ok=True)
            ask(job, "move files back", filesystem.mv, target, source, recursive=True)
        except StagingError:
            left.append(f"{target} (to {source})")
    return left


def remove_empty(job: WriteJob, filesystem: fsspec.AbstractFileSystem, directory: str, above: str) -> None:
    """Removes a directory below `above` and those between, as far as they are empty."""
    with suppress(Exception):
        while directory.startswith(f"{above}/"):
            ask(job, "remove", filesystem.rmdir, directory)
            directory = directory.rpartition("/")[0]


def remove(job: WriteJob, filesystem: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    def remove(path: str) -> None:
        # hdfs-native's delete of nothing is no error.
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)

    for path in paths:
        ask(job, "remove a file of", remove, path)
