"""Settings of a session: a frozen dataclass, read from arguments, the Spark configuration and defaults, in that order.

Every setting is one row of `SETTINGS`: its field, its key in ``spark-defaults.conf``, how its text is read and its
default. The table in the README and ``conf/spark-defaults.conf`` list the same rows; a test holds them together.
"""

from __future__ import annotations

import enum
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tensorspark.errors import ConfigError

_TIME_UNITS_S = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS_BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}

# 30 days. Far beyond it locks and sockets refuse a timeout (OverflowError), in the middle of a run.
_MAX_TIME_S = 2_592_000


def parse_int(text: str) -> int:
    """Reads a whole number.

    >>> parse_int(" 100 ")
    100
    """
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"expected an integer such as 100, got {text!r}") from error


def parse_time_s(text: str) -> float:
    """Reads a duration as Spark writes it, such as ``500ms``, ``30s``, ``2min``; a bare number is seconds.

    >>> parse_time_s("500ms"), parse_time_s("2min"), parse_time_s("30")
    (0.5, 120.0, 30.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _TIME_UNITS_S:
        raise ValueError(f"expected a duration such as 500ms, 30s or 2min, got {text!r}")
    return float(match[1]) * _TIME_UNITS_S[match[2]]


def parse_size_bytes(text: str) -> int:
    """Reads a size as Spark writes it, such as ``64k``, ``256m``, ``2g`` (powers of 1024); a bare number is bytes.

    >>> parse_size_bytes("64k"), parse_size_bytes("2gb"), parse_size_bytes("10")
    (65536, 2147483648, 10)
    """
    match = re.fullmatch(r"\s*(\d+)\s*([kmgtp]?)b?\s*", text.lower())
    if not match:
        raise ValueError(f"expected a size such as 64k, 256m or 2g, got {text!r}")
    return int(match[1]) * _SIZE_UNITS_BYTES[match[2]]


def parse_staleness(text: str) -> int | None:
    """Reads ``async`` (None) or a number of rounds.

    >>> parse_staleness("async"), parse_staleness("0")
    (None, 0)
    """
    if text.strip().lower() == "async":
        return None
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError(f"expected async or a number of rounds (0 is bulk-synchronous), got {text!r}")
    return int(text)


def parse_auto_bool(text: str) -> bool | None:
    """Reads ``auto`` (None), ``true`` or ``false``."""
    return None if text.strip().lower() == "auto" else parse_bool(text, "auto, true or false")


def parse_bool(text: str, expected: str = "true or false") -> bool:
    """Reads ``true`` or ``false``, as Spark writes them."""
    value = {"true": True, "false": False}.get(text.strip().lower())
    if value is None:
        raise ValueError(f"expected {expected}, got {text!r}")
    return value


class NotSet(enum.Enum):
    """Stands for an argument that was not given, where None is a value."""

    NOT_SET = enum.auto()

    def __repr__(self) -> str:
        return "NOT_SET"


NOT_SET = NotSet.NOT_SET


@dataclass(frozen=True)
class Setting:
    """One row of `SETTINGS`: `parse` reads the key's text, `what` describes it for people."""

    field: str
    key: str
    parse: Callable[[str], Any]
    default: Any
    what: str


SETTINGS: tuple[Setting, ...] = (
    Setting("hdfs_dir", "spark.hdfs.dir", str, None, "Existing directory that holds a directory per session: a URL "
            "that fsspec knows (`hdfs://host:8020/tmp`, `file:///nfs/tmp`). Unset: the graph travels as a broadcast."),
    Setting("tmp_dir", "spark.tmp.dir", str, tempfile.gettempdir(), "Existing local directory on driver and executors, "
            "for the fetched graph and for cached epochs that outgrow memory."),
    Setting("server_host", "spark.tensorspark.server.host", str, None, "Address of the driver that executors connect "
            "to. Unset: `spark.driver.host`."),
    Setting("server_port", "spark.tensorspark.server.port", parse_int, 0, "Port of the parameter server and its "
            "pages; 0: a free one. Where it is taken, the next free one of sixteen."),
    Setting("sync_interval", "spark.tensorspark.sync.interval", parse_int, 100, "Local steps between two "
            "synchronizations of a worker."),
    Setting("batch_size", "spark.tensorspark.batch.size", parse_int, 100, "Rows of a training step."),
    Setting("staleness", "spark.tensorspark.staleness", parse_staleness, None, "Rounds that the fastest worker may "
            "lead the slowest: `0` is bulk-synchronous, more is stale-synchronous, `async` waits for nobody."),
    Setting("overlap", "spark.tensorspark.overlap", parse_bool, False, "Goes on with local steps while a push and a "
            "pull are under way. That is a round of staleness, so `staleness` must be 1, more or `async`."),
    Setting("compression", "spark.tensorspark.compression", str, "none", "Codec of pushes: `none`, `float16`, "
            "`bfloat16`, `int8`, `topk:0.01` (a share of the numbers) or `rows` (changed rows of embeddings)."),
    Setting("pull_compression", "spark.tensorspark.pull.compression", str, "none", "Codec of pulls: `none`, `float16`, "
            "`bfloat16`, `int8` or `rows`."),
    Setting("num_shards", "spark.tensorspark.num.shards", parse_int, 1, "Servers that the weights are split over: the "
            "driver's own, and a process beside it for each further one."),
    Setting("shards_on", "spark.tensorspark.shards.on", str, "driver", "Where the further ones of `num_shards` run: "
            "`driver`, as processes on its machine, or `executors`, as Spark tasks that take a slot each."),
    Setting("start_timeout_s", "spark.tensorspark.start.timeout", parse_time_s, 60.0, "How long the first round waits "
            "for workers after the first one came; then it goes on with those that came."),
    Setting("recovery_timeout_s", "spark.tensorspark.recovery.timeout", parse_time_s, 120.0, "How long the others "
            "wait for the successor of a worker that died; then they go on without it until it comes."),
    Setting("lease_timeout_s", "spark.tensorspark.lease.timeout", parse_time_s, 60.0, "A worker that is silent for so "
            "long loses its partition to another attempt."),
    Setting("reconnect_timeout_s", "spark.tensorspark.reconnect.timeout", parse_time_s, 60.0, "How long a worker tries "
            "to reach a server again that it has lost; then its task fails."),
    Setting("checkpoint_interval_s", "spark.tensorspark.checkpoint.interval", parse_time_s, 60.0, "Between two "
            "checkpoints of a run, under `spark.hdfs.dir`; one more is written at the end. `0`: none."),
    Setting("keep_checkpoints", "spark.tensorspark.checkpoint.keep", parse_int, 3, "Checkpoints that are kept; older "
            "ones are removed."),
    Setting("tls_enabled", "spark.tensorspark.tls.enabled", parse_bool, False, "Encrypts what workers and server say, "
            "with a key and certificate made for the run (needs `tensorspark[tls]` on the driver)."),
    Setting("max_connections", "spark.tensorspark.server.max.connections", parse_int, 4096, "Connections that the "
            "server takes at once; more are closed."),
    Setting("connect_timeout_s", "spark.tensorspark.connect.timeout", parse_time_s, 5.0, "How long a worker tries to "
            "reach the server."),
    Setting("io_timeout_s", "spark.tensorspark.io.timeout", parse_time_s, 120.0, "How long one answer of the server, "
            "or one transfer, may take."),
    Setting("receive_buffer_bytes", "spark.tensorspark.server.receive.buffer", parse_size_bytes, 256 * 2**20,
            "Memory for pushes that the server is receiving (at least one push of the model); when it is full, the "
            "server stops reading."),
    Setting("cache_memory_bytes", "spark.tensorspark.cache.memory", parse_size_bytes, 256 * 2**20, "Memory of a task "
            "for its decoded rows, and as much for held-out ones; what is more goes to a file under `spark.tmp.dir`."),
    Setting("dashboard", "spark.tensorspark.dashboard.enabled", parse_auto_bool, None, "A page that shows the run as "
            "it goes on, on the parameter server's port (needs `tensorspark[dashboard]`): `true`, `false`, or `auto`: "
            "where it is installed."),
    Setting("dashboard_token", "spark.tensorspark.dashboard.token", str, None, "What opens the dashboard, `/metrics` "
            "and `/status`, at least 16 characters. Unset: a new one for each session."),
    Setting("log_dir", "spark.tensorspark.log.dir", str, None, "Directory, as a URL, in which each run makes one of "
            "its own, with TensorBoard's event files and all that the dashboard shows. Unset: none."),
    Setting("trace_dir", "spark.tensorspark.trace.dir", str, None, "Directory, as a URL, to which each run writes a "
            "Chrome trace of driver, server and workers. Unset: none."),
)  # fmt: skip

SHARDS_ON = ("driver", "executors")
_NONE_IS_A_VALUE = frozenset({"staleness"})

# The constructor's defaults in the original Tensorspark, for `tensorspark.core.spark_session`.
ORIGINAL_DEFAULTS: Mapping[str, Any] = {
    "server_host": "localhost",
    "server_port": 10080,
    "sync_interval": 3,
    "batch_size": 10000,
}


@dataclass(frozen=True)
class Config:
    """The settings of one session, checked. `SETTINGS` says what each means."""

    hdfs_dir: str | None
    tmp_dir: str
    server_host: str | None
    server_port: int
    sync_interval: int
    batch_size: int
    staleness: int | None
    overlap: bool
    compression: str
    pull_compression: str
    num_shards: int
    shards_on: str
    start_timeout_s: float
    recovery_timeout_s: float
    lease_timeout_s: float
    reconnect_timeout_s: float
    checkpoint_interval_s: float
    keep_checkpoints: int
    tls_enabled: bool
    max_connections: int
    connect_timeout_s: float
    io_timeout_s: float
    receive_buffer_bytes: int
    cache_memory_bytes: int
    dashboard: bool | None
    dashboard_token: str | None = field(repr=False)
    log_dir: str | None
    trace_dir: str | None

    def __post_init__(self) -> None:
        for name in ("sync_interval", "batch_size", "keep_checkpoints", "max_connections", "num_shards"):
            self._check(name, minimum=1)
        self._check_staleness()
        for name in ("tls_enabled", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{_label(name)} must be True or False, got {getattr(self, name)!r}")
        if self.overlap and self.staleness == 0:
            raise ConfigError(
                f"{_label('overlap')} has each worker train on while the others' last interval is not in its weights: "
                f"that is not bulk-synchronous; set staleness to 1 (in step, one interval late), more or None"
            )
        if self.shards_on not in SHARDS_ON:
            valid = " or ".join(map(repr, SHARDS_ON))
            raise ConfigError(f"{_label('shards_on')} must be {valid}, got {self.shards_on!r}")
        if self.num_task_shards and self.tls_enabled:
            raise ConfigError(
                "shards_on='executors' cannot be had with tls_enabled: what the driver and its shards say to each "
                "other is not encrypted; leave one of them out"
            )
        self._check("server_port", minimum=0, maximum=65535)
        for name in ("receive_buffer_bytes", "cache_memory_bytes"):
            self._check(name, minimum=0)
        for name in ("connect_timeout_s", "io_timeout_s", "lease_timeout_s"):
            self._check(name, minimum=0.001, maximum=_MAX_TIME_S, is_integer=False)
        for name in ("start_timeout_s", "recovery_timeout_s", "reconnect_timeout_s", "checkpoint_interval_s"):
            self._check(name, minimum=0, maximum=_MAX_TIME_S, is_integer=False)
        if self.dashboard not in (None, True, False):
            raise ConfigError(f"{_label('dashboard')} must be True, False or None (auto), got {self.dashboard!r}")
        token = self.dashboard_token
        if token is not None and not (isinstance(token, str) and re.fullmatch(r"[\w.~-]{16,}", token, re.ASCII)):
            raise ConfigError(  # which is a secret, so that it is not quoted
                f"{_label('dashboard_token')} must be at least 16 letters, digits, or any of -._~ : it goes into a URL"
            )
        for name in ("hdfs_dir", "tmp_dir", "server_host", "compression", "pull_compression", "log_dir", "trace_dir"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ConfigError(f"{_label(name)} must be a non-empty string, got {value!r}")

    @property
    def num_task_shards(self) -> int:
        """Slots of the cluster that shards take."""
        return self.num_shards - 1 if self.shards_on == "executors" else 0

    @property
    def gate_staleness(self) -> int | None:
        """The staleness that is left for the gate: with overlap, an interval is trained before the gate is asked."""
        return self.staleness - 1 if self.overlap and self.staleness else self.staleness

    def _check_staleness(self) -> None:
        value: Any = self.staleness
        if value == "async":
            object.__setattr__(self, "staleness", None)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(
                f"{_label('staleness')} must be an integer of at least 0 (0 is bulk-synchronous), or None "
                f"('async' in the key) for asynchronous training, got {value!r}"
            )

    def _check(
        self,
        name: str,
        *,
        minimum: float,
        maximum: float = sys.maxsize,
        is_integer: bool = True,
    ) -> None:
        value: Any = getattr(self, name)
        kind = int if is_integer else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not minimum <= value <= maximum:
            expected = f"of at least {minimum}" if maximum == sys.maxsize else f"from {minimum} to {maximum}"
            noun = "an integer" if is_integer else "a number"
            raise ConfigError(f"{_label(name)} must be {noun} {expected}, got {value!r}")


def resolve(
    arguments: Mapping[str, Any],
    spark_conf: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Makes a `Config`: an argument that is not None wins, then the Spark conf's key, then `defaults`, then ours.

    Args:
        arguments: by field name; `NOT_SET`, or None where None is no value of the setting, stands for "not given".
        spark_conf: by key; keys under ``spark.tensorspark.`` that are no setting are refused.

    Raises:
        ConfigError: a value that is out of range or cannot be read, or an unknown key.
    """
    _refuse_unknown_keys(spark_conf)
    unknown = arguments.keys() - {setting.field for setting in SETTINGS}
    if unknown:
        valid = ", ".join(setting.field for setting in SETTINGS)
        raise ConfigError(f"unknown argument {sorted(unknown)[0]}; the valid ones are {valid}")
    values = {
        setting.field: _resolve_one(setting, arguments.get(setting.field, NOT_SET), spark_conf, defaults or {})
        for setting in SETTINGS
    }
    return Config(**values)


def _resolve_one(setting: Setting, argument: Any, spark_conf: Mapping[str, str], defaults: Mapping[str, Any]) -> Any:
    if argument is not NOT_SET and (argument is not None or setting.field in _NONE_IS_A_VALUE):
        return argument
    if setting.key in spark_conf:
        try:
            return setting.parse(spark_conf[setting.key])
        except ValueError as error:
            raise ConfigError(f"{setting.key} in the Spark configuration: {error}") from error
    return defaults.get(setting.field, setting.default)


def _refuse_unknown_keys(spark_conf: Mapping[str, str]) -> None:
    valid = sorted(setting.key for setting in SETTINGS)
    for key in spark_conf:
        if key.startswith("spark.tensorspark.") and key not in valid:
            raise ConfigError(f"unknown key {key} in the Spark configuration; the valid ones are {', '.join(valid)}")


def _label(field: str) -> str:
    key = next(setting.key for setting in SETTINGS if setting.field == field)
    return f"{field} (or {key})"


assert [setting.field for setting in SETTINGS] == [field.name for field in fields(Config)]
