"""The options of the TFRecord data source: their names, values and defaults.

Names are the Scala connectors' where those have one, and do not depend on case. A name that resembles one of these is
refused; others are ignored, as Spark's own sources do. The class `Options` documents each.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tensorspark.data.tfrecord.format.framing import MAX_RECORD_BYTES, Codec
from tensorspark.data.tfrecord.format.types import RECORD_TYPES, RecordType
from tensorspark.errors import ConfigError

T = TypeVar("T")

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]
SaveMode = Literal["append", "overwrite", "error", "ignore"]
Locality = Literal["distributed", "local"]

MIB = 2**20
LARGEST_RECORD_BYTES = 2**31 - 1
_HADOOP = "org.apache.hadoop.io.compress."
# What `codec` takes, in lower case. Hadoop's DefaultCodec is zlib, and its files end in .deflate.
CODECS: Mapping[str, Codec | None] = {
    "none": None,
    "uncompressed": None,
    "gzip": "gzip",
    f"{_HADOOP}GzipCodec".lower(): "gzip",
    "zlib": "zlib",
    "deflate": "zlib",
    f"{_HADOOP}DefaultCodec".lower(): "zlib",
    f"{_HADOOP}DeflateCodec".lower(): "zlib",
}
_CODEC_NAMES = ("none", "gzip", "zlib", "deflate", f"{_HADOOP}GzipCodec", f"{_HADOOP}DefaultCodec")
_SAVE_MODES: Mapping[str, SaveMode] = {
    "append": "append",
    "overwrite": "overwrite",
    "error": "error",
    "errorifexists": "error",
    "ignore": "ignore",
}
# What Spark passes itself, and what other sources call an option of ours.
_SPARKS_NAMES = ("path", "paths", "checkpointlocation")
_OTHERS_NAMES = {"compression": "codec", "mode": "saveMode", "samplingratio": "inferSchemaSampleRatio"}
_BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "m": MIB, "mb": MIB, "g": 2**30, "gb": 2**30}
_SECOND_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Options:
    """What a read or write was told, checked.

    Attributes:
        urls: `path`, or the list that `load` was given: files, directories or globs.
        record_type: `recordType`: ``Example`` (default), ``SequenceExample`` or ``ByteArray``.
        codec: `codec`: ``none`` (default), ``gzip``, ``zlib`` (or ``deflate``), or the class name of Hadoop's codec. A
            file that is read is of the codec that its name ends in (.gz, .deflate, .zlib), and of this one where its
            name does not say.
        partition_by: `partitionBy`: names of columns, between commas. Spark refuses `DataFrameWriter.partitionBy` for
            sources in Python.
        locality: `writeLocality`: ``distributed`` (default), or ``local``: each executor writes to its own disk. A task
            that Spark repeats on another host may leave its file on both, where nobody can take it back: leave
            spark.speculation off.
        save_mode: `saveMode`: ``append``, ``overwrite``, ``error`` or ``ignore``; default: the mode of the
            `DataFrameWriter`. Spark hands only append and overwrite to sources in Python, and refuses the default of
            `DataFrameWriter`, which is error: to have error or ignore, write with ``mode("append")`` and this option.
        overwrites_dynamically: `partitionOverwriteMode`: ``static`` (default): overwrite replaces all that is there;
            ``dynamic``: only those partitions that get rows.
        sample_ratio: `inferSchemaSampleRatio`: share of the records from which a schema is inferred, above 0 to 1
            (default).
        infer_max_bytes: `inferSchemaMaxBytes`: how much is read to infer a schema, of what is on disk and spread over
            the files; 0 for all. Default: 256m for ``format("tfrecord")``, which infers in one process on the driver;
            0 for `load_tfrecords`, which does so on the executors.
        binary_features: `binaryFeatures`: names between commas, of features that are inferred as binary where others
            are strings.
        verifies: `verifyChecksum`: whether lengths and payloads are compared with their checksums: ``true`` (default)
            or ``false``.
        max_records_per_file: `maxRecordsPerFile`: after so many a task begins another file; 0 for no limit. Default:
            Spark's spark.sql.files.maxRecordsPerFile.
        max_record_bytes: `maxRecordBytes`: a record that says to be longer is taken for damaged (default 1g).
        is_recursive: `recursiveFileLookup`: ``true`` reads files at any depth, and takes no columns from names of
            directories (default ``false``).
        base_path: `basePath`: directories from here down to a path that is read give columns too.
        name_glob: `pathGlobFilter`: read only files whose names match, also of those that a path or glob names.
        skips_corrupt: `ignoreCorruptFiles`: ``true`` skips the rest of a damaged file, and counts it in the log,
            instead of an error. The log is the executor's; with spark.sql.pyspark.worker.logging.enabled (Spark 4.1)
            the driver has it in `spark.tvf.python_worker_logs()`. Default: Spark's spark.sql.files.ignoreCorruptFiles.
        max_partition_bytes: `maxPartitionBytes`: files are packed to Spark partitions up to this; larger ones go alone.
            Default: what spark.sql.files.maxPartitionBytes was when the source was registered, as for all of Spark's.
        open_cost_bytes: `openCostInBytes`: what opening a file counts as. Default: Spark's
            spark.sql.files.openCostInBytes.
        min_partitions: `minPartitionNum`: how many Spark partitions to aim at. Default: Spark's
            spark.sql.files.minPartitionNum, or the cluster's parallelism.
        max_files_per_trigger: `maxFilesPerTrigger`: of a streaming read; 0 for no limit (default 1000).
        max_file_age_s: `maxFileAge`: a streaming read ignores files whose modification time is this much before the
            latest seen, and remembers names for as long (default 1d).
        user: `hdfsUser`: who to be on HDFS without Kerberos; empty for the process's own.
    """

    urls: tuple[str, ...]
    record_type: RecordType = "Example"
    codec: Codec | None = None
    partition_by: tuple[str, ...] = ()
    locality: Locality = "distributed"
    save_mode: SaveMode | None = None
    overwrites_dynamically: bool = False
    sample_ratio: float = 1.0
    infer_max_bytes: int = 256 * MIB
    binary_features: frozenset[str] = frozenset()
    verifies: bool = True
    max_records_per_file: int = 0
    max_record_bytes: int = MAX_RECORD_BYTES
    is_recursive: bool = False
    base_path: str | None = None
    name_glob: str | None = None
    skips_corrupt: bool = False
    max_partition_bytes: int = 128 * MIB
    open_cost_bytes: int = 4 * MIB
    min_partitions: int = 1
    max_files_per_trigger: int = 1000
    max_file_age_s: float = 86400.0
    user: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Options:
        """From what Spark hands a data source.

        Raises:
            ConfigError: no path, a value that cannot work, or a name that looks like a misspelled one; says what would
                do.
        """
        lower = {name.lower(): str(value) for name, value in given.items()}
        _check_names(given)
        values: dict[str, Any] = {"urls": _urls(lower)}
        for name, (field, parse) in _PARSERS.items():
            if (text := lower.get(name.lower())) is not None:
                values[field] = parse(name, text.strip())
        return cls(**values)


def paths_of(given: Paths) -> tuple[str, ...]:
    """Paths or URLs that an argument gives: one or several.

    Raises:
        ConfigError: none, or something else.
    """
    several = [given] if isinstance(given, str | os.PathLike) else given
    paths = tuple(several) if isinstance(several, Iterable) and not isinstance(several, bytes) else ()
    texts = tuple(os.fspath(path) for path in paths if isinstance(path, str | os.PathLike))
    if not texts or len(texts) < len(paths) or not all(text.strip() for text in texts):
        raise ConfigError(f"path: expected a path or URL, or a list of them, got {given!r}")
    return texts


def names_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Names that an argument gives; a string is one name."""
    return (given,) if isinstance(given, str) else tuple(given)


def _check_names(given: Iterable[str]) -> None:
    known = {name.lower(): name for name in _PARSERS}
    for name in given:
        if name.lower() in known or name.lower() in _SPARKS_NAMES:
            continue
        near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.8)
        meant = _OTHERS_NAMES.get(name.lower()) or (known[near[0]] if near else None)
        if meant is not None:
            raise ConfigError(f"{name}: expected the name of an option, which this is not; did you mean {meant}?")


def _urls(lower: Mapping[str, str]) -> tuple[str, ...]:
    """Spark passes one path as `path`, several as a JSON list in `paths`."""
    try:
        urls = tuple(map(str, json.loads(lower.get("paths", "[]"))))
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"paths: expected a list in JSON, got {lower['paths']!r}; give load() a list") from error
    if "path" in lower:
        urls = (lower["path"], *urls)
    if not urls or not all(urls):
        raise ConfigError("expected a path to read from or write to, got none; give it to load() or save()")
    return urls


def _choice(choices: Mapping[str, T], names: Iterable[str]) -> Callable[[str, str], T]:
    listed = ", ".join(names)

    def parse(name: str, text: str) -> T:
        if text.lower() not in choices:
            raise ConfigError(f"{name}: expected one of {listed}, got {text!r}")
        return choices[text.lower()]

    return parse


def _codec(name: str, text: str) -> Codec | None:
    return _choice(CODECS, _CODEC_NAMES)(name, text or "none")


def _names(name: str, text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"{name}: expected names of columns, each once, between commas, got {text!r}")
    return names


def _amount(units: Mapping[str, int], example: str) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.lower())
        if match is None or match[2] not in units:
            raise ConfigError(
                f"{name}: expected a whole number, with or without a unit ({', '.join(filter(None, units))}), "
                f"as in {example}, got {text!r}"
            )
        return int(match[1]) * units[match[2]]

    return parse


def _record_bytes(name: str, text: str) -> int:
    value = _positive(_bytes)(name, text)
    if value > LARGEST_RECORD_BYTES:
        raise ConfigError(f"{name}: expected at most 2g - 1, as messages cannot be longer, got {text!r}")
    return value


def _positive(parse: Callable[[str, str], int]) -> Callable[[str, str], int]:
    def checked(name: str, text: str) -> int:
        value = parse(name, text)
        if value <= 0:
            raise ConfigError(f"{name}: expected more than 0, got {text!r}")
        return value

    return checked


def _count(name: str, text: str) -> int:
    # Spark's own maxRecordsPerFile takes a negative number, too, for no limit.
    if re.fullmatch(r"-?\d+", text) is None:
        raise ConfigError(f"{name}: expected a whole number (0: no limit), got {text!r}")
    return max(0, int(text))


def _ratio(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: expected a number above 0 and at most 1, got {text!r}")
    return value


def _optional(name: str, text: str) -> str | None:
    return text or None


def _user(name: str, text: str) -> str:
    return text


_bool = _choice({"true": True, "false": False}, ("true", "false"))
_locality: Callable[[str, str], Locality] = _choice(
    {"distributed": "distributed", "local": "local"}, ("distributed", "local")
)
_record_type = _choice({name.lower(): name for name in RECORD_TYPES}, RECORD_TYPES)
_save_mode = _choice(_SAVE_MODES, _SAVE_MODES)
_dynamic = _choice({"static": False, "dynamic": True}, ("static", "dynamic"))
_bytes = _amount(_BYTE_UNITS, "128m")

_PARSERS: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "recordType": ("record_type", _record_type),
    "codec": ("codec", _codec),
    "partitionBy": ("partition_by", lambda name, text: _names(name, text) if text else ()),
    "writeLocality": ("locality", _locality),
    "saveMode": ("save_mode", _save_mode),
    "partitionOverwriteMode": ("overwrites_dynamically", _dynamic),
    "inferSchemaSampleRatio": ("sample_ratio", _ratio),
    "inferSchemaMaxBytes": ("infer_max_bytes", _bytes),
    "binaryFeatures": ("binary_features", lambda name, text: frozenset(_names(name, text)) if text else frozenset()),
    "verifyChecksum": ("verifies", _bool),
    "maxRecordsPerFile": ("max_records_per_file", _count),
    "maxRecordBytes": ("max_record_bytes", _record_bytes),
    "recursiveFileLookup": ("is_recursive", _bool),
    "basePath": ("base_path", _optional),
    "pathGlobFilter": ("name_glob", _optional),
    "ignoreCorruptFiles": ("skips_corrupt", _bool),
    "maxPartitionBytes": ("max_partition_bytes", _positive(_bytes)),
    "openCostInBytes": ("open_cost_bytes", _bytes),
    "minPartitionNum": ("min_partitions", _positive(_count)),
    "maxFilesPerTrigger": ("max_files_per_trigger", _count),
    "maxFileAge": ("max_file_age_s", _amount(_SECOND_UNITS, "7d")),
    "hdfsUser": ("user", _user),
}
