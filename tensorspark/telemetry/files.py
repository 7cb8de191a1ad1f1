"""A run's records as a file: one JSON object a line, in a directory of the run's own.

The file is ``run-0000.jsonl``; on filesystems where no file grows while somebody reads it (HDFS, say) it comes in
parts, of which ``run-0001.jsonl`` is the next. Each line is ``{"record": "Sample", "seconds": 1.5, ...}``: the name of
a class of `telemetry.records`, and its fields; ``pandas.read_json("run-0000.jsonl", lines=True)`` reads them too.
Numbers that are not finite are null.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any, get_args

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem
from tensorspark.errors import ConfigError
from tensorspark.plain import WrongValueError, as_plain, build
from tensorspark.telemetry.growing import GrowingFile
from tensorspark.telemetry.records import Record, RunBegan
from tensorspark.telemetry.thinning import Thinning

logger = logging.getLogger(__name__)

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Record)}
_PIECE_BYTES = 2**24
_MAX_NAME_BYTES = 60
_PART = re.compile(r"run-\d+\.jsonl")


def encode(record: Record) -> bytes:
    """A record's line.

    Raises:
        ValueError: it has a number that is not finite.
    """
    fields = {"record": type(record).__name__, **as_plain(record)}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | str, where: str) -> Record | None:
    """The record of a line; None for one of a kind that this version does not know.

    Args:
        where: names the line, for the error.

    Raises:
        ConfigError: it is no record.
    """
    try:
        fields = json.loads(line)
        kind = _KINDS.get(fields.pop("record"))
        record: Record | None = kind and build(kind, fields, where)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, WrongValueError) as error:
        raise ConfigError(f"{where} is no record of a run: {error}") from error
    return record


class RunFile:
    """Writes a run's records to its directory; of a long run, fewer samples and spans: see `telemetry.thinning`.

    Args:
        directory: URL; made where there is none.
        user: who to connect to HDFS as.

    Raises:
        StagingError: (any method) the filesystem did not take it.
    """

    def __init__(self, directory: str, *, user: str = "", setting: str = "spark.tensorspark.log.dir") -> None:
        self._file = GrowingFile(directory, lambda part: f"run-{part:04d}.jsonl", user=user, setting=setting)
        self._thinning = Thinning()
        self._num_bytes = 0

    def record(self, record: Record) -> None:
        for passed in self._thinning.passed(record, self._num_bytes):
            line = encode(passed)
            self._num_bytes += len(line)
            self._file.write(line)

    def flush(self, *, at_once: bool = False) -> None:
        self._file.flush(at_once=at_once)

    def close(self) -> None:
        self._file.close()


def read_run(directory: str, *, user: str = "") -> Iterator[Record]:
    """The records of a run that has written them to `directory`; of one that was cut short, as many as there are.

    Raises:
        ConfigError: it holds no run: says what it does hold; or a line is no record.
        StagingError: it cannot be read.
    """
    filesystem, path = open_filesystem(directory, user, "RUN_DIR")
    names = attempt("read", directory, lambda: _parts(filesystem, path, directory), setting="RUN_DIR")
    for name in names:
        for number, line in enumerate(_lines(filesystem, name), 1):
            if not line.endswith(b"\n"):
                logger.warning(
                    "the last line of %s is cut off: the driver died while it wrote, or the disk was full", name
                )
                return
            record = decode(line, f"{name}, line {number},")
            if record is not None:
                yield record


def _lines(filesystem: Any, name: str) -> Iterator[bytes]:
    """A file's lines; of long files a piece is in memory at a time."""
    rest, start = b"", 0
    while True:
        read = functools.partial(filesystem.cat_file, name, start, start + _PIECE_BYTES)
        piece = attempt("read", name, read, TRANSFER_DEADLINE_S, "RUN_DIR")
        start += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(piece) < _PIECE_BYTES:
            break
    if rest:
        yield rest


def _parts(filesystem: Any, path: str, url: str) -> list[str]:
    expected = f"expected a run's directory, with run-0000.jsonl, which training with log_dir writes; {url}"
    if not filesystem.exists(path):
        raise ConfigError(f"{expected} does not exist")
    if not filesystem.isdir(path):
        raise ConfigError(f"{expected} is a file: name its directory")
    names = sorted(filesystem.ls(path, detail=False))
    if parts := [name for name in names if _PART.fullmatch(_base(name))]:
        return parts
    runs = [name for name in names if filesystem.isdir(name) and _holds_run(filesystem, name)]
    if runs:
        some = ", ".join(_base(name) for name in runs[-5:])
        raise ConfigError(f"{expected} holds {len(runs)} of them: name one, such as {some}")
    raise ConfigError(f"{expected} holds no run")


def _holds_run(filesystem: Any, path: str) -> bool:
    return any(_PART.fullmatch(_base(name)) for name in filesystem.ls(path, detail=False))


def _base(path: str) -> str:
    return str(path).rstrip("/").rpartition("/")[2]


def directory_name(began: RunBegan, run_id: str) -> str:
    """A name for a run's directory: that of the run, when it began, and a part of an id that no other run has.

    Args:
        run_id: of the session, hexadecimal.
    """

    name = re.sub(r"[^\w.-]+", "-", began.name).strip("-.") or "run"
    began_at = time.strftime("%Y%m%d-%H%M%S", time.localtime(began.started_at))
    name = name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return f"{name}-{began_at}-{run_id[:6]}-{began.run}"
