"""The files that one attempt of a task writes, out of every reader's sight; `commit` says why."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from typing import IO, Any

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt
from tensorspark.data.tfrecord.storage.job import (
    TEMPORARY,
    TaskFiles,
    WriteJob,
    ask,
    holds_others,
    moved,
    moves_in,
    remove_empty,
)
from tensorspark.data.tfrecord.storage.paths import SETTING, base_name, children, is_local
from tensorspark.errors import ConfigError, StagingError


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
        looks = self._job.locality == "local" and self._job.mode in ("error", "ignore")
        if not looks or not holds_others(self._job, self._filesystem, self._path):
            return True
        if self._job.mode == "ignore":
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

        file = ask(self._job, "create a file in", create)
        self._files.append(relative)
        return OutputFile(file, self._job.url, is_local=is_local(self._filesystem))

    def finish(self) -> TaskFiles:
        """Says what was written, once all files are closed. A local write's files get their names here."""
        files = TaskFiles(self._attempt, tuple(self._files))
        if self._job.locality == "local":
            try:
                with moved(self._job, self._filesystem, self._path, moves_in(self._job, self._path, [files])):
                    self._discard_killed()
            finally:
                self.discard()
        return files

    def discard(self) -> None:
        """Removes the attempt's files, as far as that can be done."""
        with suppress(Exception):
            ask(self._job, "remove", self._filesystem.rm, self._directory, recursive=True)
        if self._job.locality == "local":  # nobody else comes by on this host
            remove_empty(self._job, self._filesystem, self._directory.rpartition("/")[0], self._path)

    def _discard_killed(self) -> None:
        """Removes what other attempts of the task left on this host: of a local write nobody else does."""
        with suppress(Exception):
            for entry in children(self._filesystem, self._directory.rpartition("/")[0], self._job.url):
                if base_name(entry["name"]).startswith(f"{self._partition:05d}-"):
                    ask(self._job, "remove", self._filesystem.rm, entry["name"], recursive=True)


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
