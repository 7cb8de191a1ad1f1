"""Where a run's checkpoints are kept, and the thread that writes them while the run goes on.

They lie in ``<spark.hdfs.dir>/tensorspark-checkpoints-<run id>``, which the first one creates and nothing of ours
removes: they are for later. One is ``checkpoint-<number>-<random>`` and the endings of `ps.checkpoint`; the random part
keeps two writers (a driver that was taken for dead, say) from ever writing to one name, so each one's files stay its
own. A file appears whole, by its rename, and the mark comes last: a writer that dies leaves the checkpoints before as
they were, and files without a mark, which the next writer removes.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self

import fsspec

from tensorspark.data.filesystem import (
    CONNECT_DEADLINE_S,
    TRANSFER_DEADLINE_S,
    attempt,
    open_filesystem,
    require_directory,
    write_then_rename,
)
from tensorspark.errors import CheckpointError, ConfigError, StagingError, TensorsparkError
from tensorspark.ps.checkpoint import MARK, EncodedFile, RunCheckpoint, decode, encode

logger = logging.getLogger(__name__)

_DIRECTORY = "tensorspark-checkpoints-"
_FILE = re.compile(
    r"\.?(?P<stem>checkpoint-(?P<number>\d{8,})-[0-9a-f]{8})"
    r"(?P<ending>\.safetensors|\.combiner\.safetensors|\.msgpack)(?P<unfinished>\.[0-9a-f]{32})?"
)
_NUM_LISTINGS = 3  # where a writer removes what is being read, it has written newer ones
_CLOSE_DEADLINE_S = 30.0
_MAX_NAMED = 10


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A checkpoint that is whole and in its place.

    Attributes:
        url: of its directory.
        written_at: seconds since 1970.
        num_bytes: of all its files.
    """

    number: int
    url: str
    written_at: float
    num_bytes: int


class CheckpointDirectory:
    """A directory of checkpoints, on any filesystem that fsspec knows; it need not exist yet. Thread-safe.

    Args:
        url: of the directory; a bare path is a local one.
        user: who to connect as; see `data.filesystem.open_filesystem`.
        keep: the newest so many stay when another is written; the filesystem needs room for one more.
        deadline_s: of one checkpoint's writing or reading.
    """

    def __init__(self, url: str, *, user: str = "", keep: int = 3, deadline_s: float = TRANSFER_DEADLINE_S) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if not isinstance(url, str) or not url.strip():
            raise ConfigError(f"url must be the directory of the checkpoints as a string (checkpoint_dir), got {url!r}")
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self._user = user
        self._keep = keep

    @staticmethod
    def url_of_run(hdfs_dir: str, run_id: str) -> str:
        """Where the checkpoints of a run go whose session has `hdfs_dir` (`spark.hdfs.dir`)."""
        return f"{hdfs_dir.rstrip('/')}/{_DIRECTORY}{run_id}"

    def write(self, checkpoint: RunCheckpoint) -> WrittenCheckpoint:
        """Writes a checkpoint under the next free number, and removes those that are too many.

        What cannot be removed is a warning in the log: the checkpoint is written all the same.

        Raises:
            StagingError: the filesystem refused it or did not answer; the checkpoints before are as they were.
            CheckpointError: see `ps.checkpoint.encode`.
        """
        files = encode(checkpoint)
        filesystem, path = open_filesystem(self.url, self._user)
        give_up_at = time.monotonic() + self.deadline_s
        write = functools.partial(_write, filesystem, self.url, path, files, give_up_at)
        number = attempt("write a checkpoint to", self.url, write, self.deadline_s)
        try:
            attempt("remove old checkpoints in", self.url, lambda: _prune(filesystem, path, number, self._keep))
        except StagingError as error:
            logger.warning("checkpoint %d is written, but older ones could not be removed: %s", number, error)
        return WrittenCheckpoint(number, self.url, time.time(), sum(file.num_bytes for file in files.values()))

    def read_newest(self, log: logging.Logger = logger) -> RunCheckpoint:
        """The newest checkpoint that is whole; `log` is warned of every newer one that is not.

        Raises:
            CheckpointError: none is whole, or there is no such directory; says what is there.
            StagingError: the filesystem refused it or did not answer: the newest may well be whole.
        """
        filesystem, path = open_filesystem(self.url, self._user, "url")
        skipped: dict[str, CheckpointError] = {}
        for _ in range(_NUM_LISTINGS):
            stems = attempt("list", self.url, lambda: _whole_stems(filesystem, path), CONNECT_DEADLINE_S, "url")
            unread = [stem for stem in reversed(stems) if stem not in skipped]
            if not unread:
                break
            for stem in unread:
                try:
                    checkpoint = self._read(filesystem, path, stem)
                except CheckpointError as error:
                    log.warning("skipped %s in %s: %s", stem, self.url, error)
                    skipped[stem] = error
                else:
                    log.info("read %s in %s: version %d of the weights", stem, self.url, checkpoint.version)
                    return checkpoint
        raise attempt("look into", self.url, lambda: _none_whole(filesystem, self.url, path, skipped), setting="url")

    def _read(self, filesystem: fsspec.AbstractFileSystem, path: str, stem: str) -> RunCheckpoint:
        def read() -> RunCheckpoint:
            with ExitStack() as stack:
                return decode(stem, lambda name: stack.enter_context(filesystem.open(f"{path}/{name}", "rb")))

        try:
            return attempt("read", f"{self.url}/{stem}{MARK}", read, self.deadline_s, "url")
        except StagingError as error:
            raise StagingError(f"{error} To go on from the checkpoint before it, move {stem}.* away.") from error


class Checkpointer:
    """Writes a run's checkpoints from a thread of its own, one at a time, until its ``with`` block ends.

    A checkpoint that cannot be written does not harm the run: it is a warning in the log, once for each cause, and the
    next one is tried in its time. What equals the one written last is not written again.

    Args:
        capture: makes a checkpoint whose buffers do not change any more, or None where there is nothing to keep. Called
            on this class's thread, or by `write_last`. It must have a deadline of its own.
        interval_s: from the beginning of one to the beginning of the next.
        on_written: told of each: version of the weights, URL of the directory, bytes, seconds that it took.
        close_deadline_s: how long leaving the block waits for a write that is under way.

    Attributes:
        last: the checkpoint written last.
        error: why the newest could not be written; None where it was.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        capture: Callable[[], RunCheckpoint | None],
        interval_s: float,
        on_written: Callable[[int, str, int, float], None] = lambda version, url, num_bytes, duration_s: None,
        *,
        close_deadline_s: float = _CLOSE_DEADLINE_S,
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s must be more than 0, got {interval_s}")
        self.last: WrittenCheckpoint | None = None
        self.error: Exception | None = None
        self._directory = directory
        self._capture = capture
        self._interval_s = interval_s
        self._on_written = on_written
        self._close_deadline_s = close_deadline_s
        self._written: object = None
        self._told: set[str] = set()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        # A daemon: a filesystem that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="tensorspark-checkpoint", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(self._close_deadline_s)
        if self._thread.is_alive():
            logger.warning(
                "a checkpoint is still being written to %s after %g s: it is left to itself",
                self._directory.url,
                self._close_deadline_s,
            )

    def write_last(self) -> WrittenCheckpoint | None:
        """Writes the run's end, here and now, after what is being written; no other is written later.

        It raises nothing, as the run's result is good without it: see `error`, and the warning in the log.

        Returns:
            The checkpoint written last, which is of the run's end where `error` is None.
        """
        self._stop.set()
        if not self._writing.acquire(timeout=self._directory.deadline_s):
            self._note(StagingError(f"the write before did not end within {self._directory.deadline_s:g} s"))
            return self.last
        try:
            self._write()
        finally:
            self._writing.release()
        return self.last

    def _run(self) -> None:
        next_at = time.monotonic() + self._interval_s
        while not self._stop.wait(max(0.0, next_at - time.monotonic())):
            next_at = time.monotonic() + self._interval_s
            with self._writing:
                if not self._stop.is_set():
                    self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            checkpoint = self._capture()
            if checkpoint is None:
                return
            state = (checkpoint.version, checkpoint.partitions, checkpoint.is_complete)
            if state != self._written:
                self.last = self._directory.write(checkpoint)
                self._written = state
                logger.info("checkpoint %d written to %s", self.last.number, self.last.url)
                self._on_written(checkpoint.version, self.last.url, self.last.num_bytes, time.monotonic() - began)
        except Exception as error:  # whatever it is, the training goes on
            self._note(error)
            return
        self.error = None
        self._told.clear()

    def _note(self, error: Exception) -> None:
        self.error = error
        cause = re.sub(
            r"[0-9a-f]*\d[0-9a-f]*", "#", f"{type(error).__name__}: {error}"
        )  # numbers and random names differ
        if cause in self._told:
            logger.debug("again no checkpoint: %s", error)
            return
        self._told.add(cause)
        unexpected = None if isinstance(error, TensorsparkError) else error
        logger.warning("no checkpoint was written, training goes on without: %s", error, exc_info=unexpected)


# On the filesystem, under the caller's deadline


def _write(
    filesystem: fsspec.AbstractFileSystem, url: str, path: str, files: Mapping[str, EncodedFile], give_up_at: float
) -> int:
    _create(filesystem, url, path)
    number = 1 + max((int(match["number"]) for match in _files(filesystem, path)), default=0)
    stem = f"checkpoint-{number:08d}-{secrets.token_hex(4)}"
    try:
        for ending, file in files.items():
            name = f"{path}/{stem}{ending}"
            write_then_rename(filesystem, name, file.parts, is_durable=True, give_up_at=give_up_at)
    except Exception:
        for ending in reversed(list(files)):
            with suppress(Exception):
                filesystem.rm(f"{path}/{stem}{ending}")
        raise
    return number


def _create(filesystem: fsspec.AbstractFileSystem, url: str, path: str) -> None:
    if filesystem.exists(path):
        require_directory(filesystem, url, path)
        return
    require_directory(filesystem, posixpath.dirname(url), posixpath.dirname(path) or "/")
    with suppress(FileExistsError):
        filesystem.mkdir(path, create_parents=False)


def _prune(filesystem: fsspec.AbstractFileSystem, path: str, number: int, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`, and what writers left that had begun before number `number`.

    A writer that still lives loses its files, too, if another that began later was faster. It does not matter which of
    them ends first: the highest number that has a mark is whole.
    """
    files = _files(filesystem, path)
    stems = _stems(files)
    old = set(stems[:-keep])
    unneeded = [
        match
        for match in files
        if match["stem"] in old or (match["stem"] not in stems and int(match["number"]) < number)
    ]
    for match in sorted(unneeded, key=lambda match: not _is_mark(match)):
        with suppress(FileNotFoundError):
            filesystem.rm(f"{path}/{match[0]}")


def _whole_stems(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    return [] if filesystem.isfile(path) else _stems(_files(filesystem, path))


def _stems(files: Iterable[re.Match[str]]) -> list[str]:
    """Stems of the checkpoints that have a mark, the oldest first."""
    marks = sorted((int(match["number"]), match["stem"]) for match in files if _is_mark(match))
    return [stem for _, stem in marks]


def _is_mark(match: re.Match[str]) -> bool:
    return match[0] == f"{match['stem']}{MARK}"


def _files(filesystem: fsspec.AbstractFileSystem, path: str) -> list[re.Match[str]]:
    """Checkpoints' files in the directory, unfinished ones too; nothing where there is no directory."""
    return [match for name in _names(filesystem, path) if (match := _FILE.fullmatch(name))]


def _names(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    filesystem.invalidate_cache(path)
    try:
        return sorted(posixpath.basename(name.rstrip("/")) for name in filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []


def _none_whole(
    filesystem: fsspec.AbstractFileSystem, url: str, path: str, skipped: Mapping[str, CheckpointError]
) -> CheckpointError:
    """Says what there is instead of a whole checkpoint, and what to do."""
    if skipped:
        found = "none in it is whole: " + "; ".join(str(error) for error in skipped.values())
        return CheckpointError(f"url: expected a whole checkpoint in {url!r}, but {found}. Start the run anew.")
    expected = f"url: expected a directory of checkpoints, got {url!r}"
    parent_url, parent = posixpath.dirname(url), posixpath.dirname(path)
    if not filesystem.exists(path):
        found, near_url, near = "where nothing is", parent_url, parent
    elif filesystem.isfile(path):
        found, near_url, near = "which is a file", parent_url, parent
    else:
        found, near_url, near = "which holds no checkpoint", url, path
    names = [name for name in _names(filesystem, near) if name.startswith(_DIRECTORY)]
    if names:
        listed = ", ".join(f"{near_url}/{name}" for name in names[:_MAX_NAMED])
        return CheckpointError(f"{expected}, {found}. Pass one of {listed}.")
    return CheckpointError(
        f"{expected}, {found}. Pass <spark.hdfs.dir>/{_DIRECTORY}<run id>, as the log of the run names it."
    )
