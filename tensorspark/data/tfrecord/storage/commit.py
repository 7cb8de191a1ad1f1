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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import fsspec

from tensorspark.data.filesystem import write_then_rename
from tensorspark.data.tfrecord.storage.job import (
    CLAIM,
    REPLACED,
    STREAM_LOG,
    SUCCESS,
    TEMPORARY,
    TaskFiles,
    WriteJob,
    ask,
    holds_others,
    moved,
    moves_in,
    remove,
    remove_empty,
)
from tensorspark.data.tfrecord.storage.paths import base_name, children, describe, is_hidden
from tensorspark.errors import ConfigError


def commit_job(job: WriteJob, tasks: Sequence[TaskFiles]) -> None:
    """Makes the tasks' files visible, on the driver; where that fails, none of them is.

    Raises:
        ConfigError: of mode error, where another write has come to its end here since this one began.
        StagingError: what the filesystem refused; where it did not let files be put back either, it says which.
    """
    if job.locality == "local":
        return
    filesystem, path = job.open()
    ask(job, "create", filesystem.makedirs, path, exist_ok=True)
    try:
        with _alone(job, filesystem, path) as is_alone:
            if is_alone:
                with _placed(job, filesystem, path, tasks):
                    ask(job, "write to", _touch, filesystem, f"{path}/{SUCCESS}")
            elif job.mode == "error":
                raise ConfigError(
                    f"path: expected {job.url!r} to be absent, but another write has come to its end there meanwhile; "
                    "choose another path, or set the mode to append, overwrite or ignore"
                )
    finally:
        _remove_temporary(job, filesystem, path)


def abort_job(job: WriteJob, tasks: Sequence[TaskFiles]) -> None:
    """Removes what the job wrote, and the directory where the job made it."""
    filesystem, path = job.open()
    if job.locality == "local":
        here = [f"{path}/{file}" for task in tasks if task.host == socket.gethostname() for file in task.files]
        remove(job, filesystem, here)
        for directory in {file.rpartition("/")[0] for file in here}:
            remove_empty(job, filesystem, directory, path)
    _remove_temporary(job, filesystem, path)
    if not job.existed:
        with suppress(Exception):  # somebody else's files are in it, or nobody made it
            ask(job, "remove", filesystem.rmdir, path)


def commit_batch(job: WriteJob, tasks: Sequence[TaskFiles], query: str, batch: int) -> None:
    """As `commit_job`, for a micro-batch of a stream; a second time it leaves what the first time left.

    Raises:
        StagingError: what the filesystem refused.
    """
    filesystem, path = job.open()
    log = f"{path}/{STREAM_LOG}/{query}"
    ask(job, "create", filesystem.makedirs, log, exist_ok=True)
    last = _read_json(job, filesystem, f"{log}/committed")
    if last is None or batch > last["batch"]:
        begun = _read_json(job, filesystem, f"{log}/begun")
        if begun is not None and begun["batch"] == batch:
            remove(job, filesystem, [f"{path}/{file}" for file in begun["files"]])
        targets = [file for task in tasks for file in task.files]
        _write_json(job, filesystem, f"{log}/begun", {"batch": batch, "files": targets})
        with _placed(job, filesystem, path, tasks):
            _write_json(job, filesystem, f"{log}/committed", {"batch": batch})
    _remove_temporary(job, filesystem, path)


@contextmanager
def _alone(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[bool]:
    """Whether the job may commit: of two in the modes error or ignore that began at once, the first to come here."""
    if job.mode not in ("error", "ignore"):
        yield True
        return
    claim = f"{path}/{TEMPORARY}/{CLAIM}"

    def take() -> bool:
        try:
            filesystem.makedirs(claim, exist_ok=False)
        except FileExistsError:
            return False
        return True

    is_first = ask(job, "create a directory in", take)
    try:
        yield is_first and not holds_others(job, filesystem, path)
    finally:
        if is_first:
            remove_empty(job, filesystem, claim, path)


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
    was_complete = ask(job, "look at", describe, filesystem, f"{path}/{SUCCESS}") is not None
    remove(job, filesystem, [f"{path}/{SUCCESS}"])
    try:
        # Apart: the directories that the second makes must be gone before those of the first come back.
        with moved(job, filesystem, path, moves_out), moved(job, filesystem, path, moves_in(job, path, tasks)):
            yield
    except Exception:
        if was_complete:
            with suppress(Exception):
                ask(job, "write to", _touch, filesystem, f"{path}/{SUCCESS}")
        raise
    with suppress(Exception):  # no reader sees them
        ask(job, "remove", filesystem.rm, f"{path}/{REPLACED}/{job.job_id}", recursive=True)
    remove_empty(job, filesystem, f"{path}/{REPLACED}", path)


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
        if ask(job, "look at", describe, filesystem, whole) is not None:
            entries = children(filesystem, whole, job.url)
            names = [base_name(entry["name"]) for entry in entries if entry["type"] != "directory"]
            old += [f"{directory}/{name}" if directory else name for name in names if not is_hidden(name)]
    return old


def _remove_temporary(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Removes the job's temporary directory, and the one around it where no other job uses it; as far as it can be."""
    with suppress(Exception):
        ask(job, "remove", filesystem.rm, f"{path}/{TEMPORARY}/{job.job_id}", recursive=True)
    remove_empty(job, filesystem, f"{path}/{TEMPORARY}", path)


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

    return ask(job, "read the log of", read)


def _write_json(job: WriteJob, filesystem: fsspec.AbstractFileSystem, path: str, content: Any) -> None:
    ask(job, "write the log of", write_then_rename, filesystem, path, [json.dumps(content).encode()])
