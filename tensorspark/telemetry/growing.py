"""A file that grows while others read it, on any filesystem."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem, write_then_rename

_FIRST_PART_S = 10.0
_PARTS_AN_AGE = 20
_MAX_PENDING_BYTES = 2**25


class GrowingFile:
    """Appends to one local file, which readers may follow; elsewhere writes parts, each of which appears whole.

    Filesystems such as HDFS show a file's end to nobody before it is closed. So a part is written every ten seconds at
    first, and more rarely the longer the file grows: after ten minutes every 30 s, after ten hours every half hour. Any
    thread may `write`; the rest is for one.

    Args:
        directory: URL of a directory, which is made where there is none.
        name: of a part, by its number from 0; a local file is part 0. The names' order is the parts'.
        user: who to connect to HDFS as.
        setting: what the user would change, for errors.

    Raises:
        StagingError: (any method) the filesystem did not take it.
    """

    def __init__(self, directory: str, name: Callable[[int], str], *, user: str = "", setting: str) -> None:
        self._url = directory
        self._name = name
        self._setting = setting
        self._filesystem, self._path = open_filesystem(directory, user, setting)
        self._is_local = "file" in self._protocols()
        self._lock = threading.Lock()  # of what is pending
        self._pending = bytearray()
        self._num_parts = 0
        self._began_at = self._written_at = time.monotonic()
        self._attempt("make", lambda: self._filesystem.makedirs(self._path, exist_ok=True))

    def write(self, data: bytes) -> None:
        """Adds to what `flush` writes."""
        with self._lock:
            self._pending += data

    def flush(self, *, at_once: bool = False) -> None:
        """Writes what is there, if it is time to; `at_once` in any case."""
        now = time.monotonic()
        interval_s = 0.0 if self._is_local else max(_FIRST_PART_S, (now - self._began_at) / _PARTS_AN_AGE)
        is_due = now - self._written_at >= interval_s or len(self._pending) > _MAX_PENDING_BYTES
        if not self._pending or not (at_once or is_due):
            return
        with self._lock:
            data, self._pending = bytes(self._pending), bytearray()
        self._attempt("write to", lambda: self._write(data))
        self._written_at = now

    def close(self) -> None:
        self.flush(at_once=True)

    def _write(self, data: bytes) -> None:
        if self._is_local:
            with open(f"{self._path}/{self._name(0)}", "ab") as file:
                file.write(data)
            return
        # TensorBoard takes every file for one of its own whose name holds a certain word.
        write_then_rename(self._filesystem, f"{self._path}/{self._name(self._num_parts)}", [data], is_nameless=True)
        self._num_parts += 1

    def _attempt(self, doing: str, operation: Callable[[], object]) -> None:
        attempt(doing, self._url, operation, TRANSFER_DEADLINE_S, self._setting)

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._filesystem.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)
