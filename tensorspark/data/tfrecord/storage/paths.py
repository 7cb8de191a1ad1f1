"""Which files a read takes: listing, globs, hidden files, columns from names of directories, packing into partitions.

A directory is read as Spark reads one: names that begin with ``_`` or ``.`` are hidden (``_SUCCESS``, ``_temporary``),
and directories called ``column=value`` give a column each. Other directories are entered only by `recursiveFileLookup`.
"""

from __future__ import annotations

import datetime
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from tensorspark.data.filesystem import TRANSFER_DEADLINE_S, attempt, open_filesystem
from tensorspark.data.tfrecord.format.framing import Codec
from tensorspark.data.tfrecord.options import Options
from tensorspark.errors import ConfigError

SETTING = "path"
NULL_DIRECTORY = "__HIVE_DEFAULT_PARTITION__"
# Hadoop's codecs by the end of a file's name; those it knows and we do not would be read as garbage.
_CODEC_ENDS: dict[str, Codec] = {".gz": "gzip", ".gzip": "gzip", ".deflate": "zlib", ".zlib": "zlib"}
_UNKNOWN_ENDS = (".bz2", ".snappy", ".lz4", ".zst", ".zstd", ".lzo")
# Hadoop's escapes, which Spark takes over: control characters and these.
_ESCAPED = re.compile(r"[\x00-\x1f\"#%'*/:=?\\\x7f{\[\]^]")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(NaN|Infinity|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", re.ASCII)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)

Value = tuple[str, str | None]
"""A column's name, and the text of its value in a directory's name; None for null."""


@dataclass(frozen=True)
class DataFile:
    """A file to read.

    Attributes:
        root: URL that it was found under; `open_filesystem` of it gives the filesystem of `path`.
        path: in that filesystem.
        num_bytes: on disk.
        modified_us: modification time, in microseconds since 1970; 0 where the filesystem does not tell.
        values: from the names of the directories between `root` and it, outermost first.
    """

    root: str
    path: str
    num_bytes: int
    modified_us: int = 0
    values: tuple[Value, ...] = ()


def list_files(options: Options) -> list[DataFile]:
    """All files that the options name, each once, in the order of their paths under each URL.

    Raises:
        ConfigError: a path that does not exist, a glob that matches nothing, or directories that disagree on columns.
        StagingError: a filesystem that cannot be listed.
    """
    found: list[tuple[str, DataFile]] = []
    for url in options.urls:
        filesystem, path = open_filesystem(url, options.user, SETTING)
        identity = _identity(filesystem)
        found += [(identity, file) for file in _list_url(filesystem, path, url, options)]
    _check_columns([file for _, file in found])
    first: dict[tuple[str, str], DataFile] = {}
    for identity, file in found:
        first.setdefault((identity, file.path), file)
    return list(first.values())


def partition_schema(files: Iterable[DataFile]) -> pa.Schema:
    """The columns that the directories' names give, typed as Spark infers them: int, long, double, date or string."""
    texts: dict[str, set[str]] = {}
    for file in files:
        for name, text in file.values:
            texts.setdefault(name, set()).update(() if text is None else (text,))
    return pa.schema([pa.field(name, _type_of(values)) for name, values in texts.items()])


def partition_value(file: DataFile, field: pa.Field) -> pa.Scalar:
    """What a file's directory says for a column, as the column's type.

    Raises:
        ConfigError: a text that is no value of that type.
    """
    text = dict(file.values)[field.name]
    if text is None:
        return pa.scalar(None, field.type)
    try:
        return pa.scalar(text.removeprefix("+") if pa.types.is_integer(field.type) else text).cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"column {field.name!r}: expected {field.type} from the name of the directory, got {text!r} ({file.path}); "
            "give it the type string in the schema"
        ) from error


def pack(files: Sequence[DataFile], max_bytes: int, open_cost_bytes: int, min_partitions: int) -> list[list[DataFile]]:
    """Files into Spark partitions, as Spark packs them: large ones alone, small ones together, none split.

    Args:
        max_bytes: of a partition of more than one file.
        open_cost_bytes: what each file counts as beyond its size.
        min_partitions: aimed at; fewer where there are fewer files, or the files are small.
    """
    total_bytes = sum(file.num_bytes + open_cost_bytes for file in files)
    limit_bytes = min(max_bytes, max(open_cost_bytes, total_bytes // max(1, min_partitions)))
    partitions: list[list[DataFile]] = []
    packed_bytes = 0
    for file in sorted(files, key=lambda file: (-file.num_bytes, file.path)):
        if not partitions or packed_bytes + file.num_bytes > limit_bytes:
            partitions.append([])
            packed_bytes = 0
        partitions[-1].append(file)
        packed_bytes += file.num_bytes + open_cost_bytes
    return partitions


def codec_of(path: str, otherwise: Codec | None) -> Codec | None:
    """The codec that a file's name says, or `otherwise`.

    Raises:
        ConfigError: the name of a codec that is not supported.
    """
    if path.lower().endswith(_UNKNOWN_ENDS):
        raise ConfigError(f"{path}: expected a file without compression, or .gz, .deflate or .zlib; recompress it")
    return next((codec for end, codec in _CODEC_ENDS.items() if path.lower().endswith(end)), otherwise)


def is_hidden(name: str) -> bool:
    """Whether a read passes over a file or directory of that name, as Hadoop's and Spark's do."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def directory_name(column: str, text: str | None) -> str:
    """The name of the directory for a column's value, escaped as Spark does."""
    return f"{_escape(column)}={NULL_DIRECTORY if text is None or not text else _escape(text)}"


def describe(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """fsspec's information on a path; None where nothing is there. The caller has a deadline."""
    filesystem.invalidate_cache()  # some of fsspec's filesystems remember listings, and answer from them
    try:
        return dict(filesystem.info(path))
    except FileNotFoundError:
        return None


def base_name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether it is this host's own."""
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    return "file" in protocols


def children(filesystem: fsspec.AbstractFileSystem, directory: str, url: str) -> list[dict[str, Any]]:
    """fsspec's information on what lies in a directory, hidden names included, by name; under a deadline."""

    def listing() -> list[dict[str, Any]]:
        # Some of fsspec's filesystems remember listings, and some list a directory as its own child.
        filesystem.invalidate_cache()
        entries = filesystem.ls(directory, detail=True)
        # Of a local link it says no more than that; None where the link leads nowhere.
        followed = (describe(filesystem, entry["name"]) if entry.get("islink") else dict(entry) for entry in entries)
        return [entry for entry in followed if entry and entry["name"].rstrip("/") != directory.rstrip("/")]

    entries = attempt("list", url, listing, TRANSFER_DEADLINE_S, SETTING)
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _list_url(filesystem: fsspec.AbstractFileSystem, path: str, url: str, options: Options) -> Iterator[DataFile]:
    base = None if options.base_path is None else open_filesystem(options.base_path, options.user, SETTING)[1]
    for entry in attempt("list", url, lambda: _roots(filesystem, path, url), TRANSFER_DEADLINE_S, SETTING):
        values = () if base is None or options.is_recursive else _values_below(base, entry)
        if entry["type"] == "directory":
            yield from _walk(filesystem, entry["name"], values, url, options)
        elif _matches(base_name(entry["name"]), options.name_glob):
            yield _file(url, entry, values)


def _identity(filesystem: fsspec.AbstractFileSystem) -> str:
    """The same for filesystems that were opened alike; fsspec's equality asks for the same thread, too."""
    return repr((type(filesystem), filesystem.storage_args, filesystem.storage_options))


def _values_below(base: str, entry: dict[str, Any]) -> tuple[Value, ...]:
    """What the directories say between `base` and what is read."""
    name, base = entry["name"].rstrip("/"), base.rstrip("/")
    if name != base and not name.startswith(f"{base}/"):
        raise ConfigError(f"basePath: expected a directory above {name}, got {base}; correct it or leave it out")
    parts = [part for part in name[len(base) :].split("/") if part]
    return tuple(_value(part) for part in (parts if entry["type"] == "directory" else parts[:-1]) if "=" in part)


def _roots(filesystem: fsspec.AbstractFileSystem, path: str, url: str) -> list[dict[str, Any]]:
    """What a path or glob names. A path that exists as it is written is no glob."""
    entry = describe(filesystem, path)  # which forgets remembered listings, for the glob as well
    if entry is not None:
        return [entry]
    if not re.search(r"[*?\[{]", path):
        raise ConfigError(f"path: expected {url!r} to exist, but nothing is there; correct the path, or write it first")
    found: dict[str, dict[str, Any]] = {}
    for pattern in _without_braces(path):
        found |= {name: dict(entry) for name, entry in filesystem.glob(pattern, detail=True).items()}
    visible = [found[name] for name in sorted(found) if not is_hidden(base_name(name))]
    if not visible:
        raise ConfigError(f"path: expected {url!r} to match files or directories, but it matches none; correct it")
    return visible


def _walk(
    filesystem: fsspec.AbstractFileSystem, directory: str, values: tuple[Value, ...], url: str, options: Options
) -> Iterator[DataFile]:
    for entry in children(filesystem, directory, url):
        name = base_name(entry["name"])
        if is_hidden(name):
            continue
        if entry["type"] == "file":
            if _matches(name, options.name_glob):
                yield _file(url, entry, values)
        elif entry["type"] != "directory":
            continue  # a pipe or socket has no end
        elif options.is_recursive:
            if not entry.get("islink"):  # which may lead round in a circle
                yield from _walk(filesystem, entry["name"], (), url, options)
        elif "=" in name:
            yield from _walk(filesystem, entry["name"], (*values, _value(name)), url, options)


def _file(url: str, entry: dict[str, Any], values: tuple[Value, ...]) -> DataFile:
    return DataFile(url, entry["name"], int(entry["size"] or 0), _modified_us(entry), values)


def _modified_us(entry: dict[str, Any]) -> int:
    if "modification_time" in entry:  # hdfs-native: milliseconds
        return int(entry["modification_time"]) * 1000
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = entry.get(key)
        if isinstance(value, datetime.datetime):
            return int(value.timestamp() * 1e6)
        if isinstance(value, int | float):
            return int(value * 1e6)
    return 0


def _value(directory: str) -> Value:
    column, _, text = directory.partition("=")
    return unquote(column), None if text == NULL_DIRECTORY else unquote(text)


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", text)


def _check_columns(files: Sequence[DataFile]) -> None:
    examples: dict[tuple[str, ...], str] = {}
    for file in files:
        examples.setdefault(tuple(name for name, _ in file.values), file.path)
    if len(examples) > 1:
        listed = "; ".join(f"{', '.join(names) or 'none'}: {path}" for names, path in list(examples.items())[:3])
        raise ConfigError(
            f"path: expected all files to lie in directories that give the same columns, got {listed}. Read them "
            "apart, or set recursiveFileLookup to true to take no columns from directories"
        )


def _type_of(texts: set[str]) -> pa.DataType:
    if texts and all(_INT.fullmatch(text) for text in texts):
        bits = max((int(text) if int(text) >= 0 else ~int(text)).bit_length() for text in texts)
        return pa.int32() if bits < 32 else pa.int64() if bits < 64 else pa.string()
    if texts and all(_FLOAT.fullmatch(text) for text in texts):
        return pa.float64()
    return pa.date32() if texts and all(_is_date(text) for text in texts) else pa.string()


def _is_date(text: str) -> bool:
    if not _DATE.fullmatch(text):
        return False
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _matches(name: str, glob: str | None) -> bool:
    return glob is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in _without_braces(glob))


def _without_braces(pattern: str) -> list[str]:
    """Hadoop's ``{a,b}`` spelled out, as fsspec and fnmatch know no braces."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for part in match[1].split(",") for whole in _without_braces(before + part + after)]
