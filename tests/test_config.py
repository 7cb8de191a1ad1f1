"""Settings: who wins, how Spark's units are read, and what a bad value's message names."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.config import NOT_SET, ORIGINAL_DEFAULTS, SETTINGS, Config, parse_size_bytes, parse_time_s, resolve
from tensorspark.errors import ConfigError

ROOT = Path(__file__).parents[1]
KEYS = {setting.field: setting.key for setting in SETTINGS}

# Field: (argument, text in the Spark configuration, what that text means).
EXAMPLES: dict[str, tuple[Any, str, Any]] = {
    "hdfs_dir": ("file:///nfs/tmp", "hdfs://host:8020/tmp", "hdfs://host:8020/tmp"),
    "tmp_dir": ("/scratch", "/var/tmp", "/var/tmp"),
    "server_host": ("10.0.0.1", "driver.example", "driver.example"),
    "server_port": (7001, "7002", 7002),
    "sync_interval": (16, "32", 32),
    "batch_size": (64, "128", 128),
    "staleness": (0, "4", 4),
    "overlap": (False, "true", True),
    "compression": ("int8", "topk:0.1", "topk:0.1"),
    "pull_compression": ("float16", "rows", "rows"),
    "num_shards": (2, "3", 3),
    "shards_on": ("driver", "executors", "executors"),
    "start_timeout_s": (3, "90s", 90.0),
    "recovery_timeout_s": (0, "5min", 300.0),
    "lease_timeout_s": (1.5, "10s", 10.0),
    "reconnect_timeout_s": (0, "2s", 2.0),
    "checkpoint_interval_s": (0, "10min", 600.0),
    "keep_checkpoints": (1, "5", 5),
    "tls_enabled": (False, "true", True),
    "max_connections": (10, "64", 64),
    "connect_timeout_s": (2.5, "500ms", 0.5),
    "io_timeout_s": (60, "3min", 180.0),
    "receive_buffer_bytes": (1000, "64k", 65536),
    "cache_memory_bytes": (0, "2g", 2147483648),
    "dashboard": (True, "false", False),
    "dashboard_token": ("0123456789abcdef", "a-token.of_the~conf", "a-token.of_the~conf"),
    "log_dir": ("/var/log/runs", "hdfs://host:8020/logs", "hdfs://host:8020/logs"),
    "trace_dir": ("/tmp/traces", "file:///tmp/t", "file:///tmp/t"),
}

BAD_ARGUMENTS = [
    ("dashboard", "yes"),
    ("log_dir", ""),
    ("trace_dir", 7),
    ("sync_interval", 0),
    ("sync_interval", -1),
    ("sync_interval", 1.5),
    ("sync_interval", True),
    ("batch_size", 0),
    ("overlap", 1),
    ("compression", ""),
    ("pull_compression", 8),
    ("num_shards", 0),
    ("shards_on", "moon"),
    ("batch_size", "100"),
    ("staleness", -1),
    ("staleness", 1.5),
    ("staleness", True),
    ("staleness", "bulk"),
    ("keep_checkpoints", 0),
    ("max_connections", 0),
    ("tls_enabled", "true"),
    ("tls_enabled", 1),
    ("lease_timeout_s", 0),
    ("start_timeout_s", -1),
    ("recovery_timeout_s", math.nan),
    ("reconnect_timeout_s", math.inf),
    ("checkpoint_interval_s", "60s"),
    ("server_port", -1),
    ("server_port", 65536),
    ("checkpoint_interval_s", 1e10),
    ("io_timeout_s", 2_592_001),
    ("connect_timeout_s", float("inf")),
    ("server_port", "10080"),
    ("receive_buffer_bytes", -1),
    ("receive_buffer_bytes", "64m"),
    ("cache_memory_bytes", -1),
    ("cache_memory_bytes", 1e6),
    ("connect_timeout_s", 0),
    ("connect_timeout_s", -5.0),
    ("connect_timeout_s", math.nan),
    ("connect_timeout_s", math.inf),
    ("connect_timeout_s", "5s"),
    ("io_timeout_s", 0),
    ("io_timeout_s", math.nan),
    ("io_timeout_s", math.inf),
    ("io_timeout_s", False),
    ("hdfs_dir", ""),
    ("hdfs_dir", 5),
    ("tmp_dir", "  "),
    ("tmp_dir", Path("/tmp")),
    ("server_host", ""),
    ("server_host", 127),
]

BAD_TEXTS = [
    ("server_port", "http"),
    ("server_port", ""),
    ("server_port", "70000"),
    ("sync_interval", "1.5"),
    ("sync_interval", "0"),
    ("batch_size", "many"),
    ("batch_size", "-3"),
    ("connect_timeout_s", "5 parsecs"),
    ("connect_timeout_s", "-5s"),
    ("connect_timeout_s", ""),
    ("io_timeout_s", "0s"),
    ("io_timeout_s", "nan"),
    ("io_timeout_s", "inf"),
    ("receive_buffer_bytes", "2.5g"),
    ("receive_buffer_bytes", "10x"),
    ("cache_memory_bytes", "-1"),
    ("cache_memory_bytes", "lots"),
    ("hdfs_dir", ""),
    ("tmp_dir", " "),
    ("server_host", ""),
    ("staleness", "-1"),
    ("staleness", "none"),
    ("staleness", "1.5"),
    ("tls_enabled", "yes"),
    ("keep_checkpoints", "0"),
]


def test_every_setting_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(KEYS) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field", sorted(KEYS.keys() - {"tls_enabled", "overlap", "shards_on"}))
def test_an_argument_wins_over_the_conf_over_given_defaults_over_ours(field: str) -> None:
    argument, text, meaning = EXAMPLES[field]
    ours = next(setting.default for setting in SETTINGS if setting.field == field)
    given_default = {field: meaning if meaning != argument else ours}
    conf = {KEYS[field]: text}
    assert getattr(resolve({field: argument}, conf, given_default), field) == argument
    for not_given in ({field: None} if field != "staleness" else {}, {field: NOT_SET}, {}):
        assert getattr(resolve(not_given, conf, {field: argument}), field) == meaning
        assert getattr(resolve(not_given, {}, {field: argument}), field) == argument
        assert getattr(resolve(not_given, {}), field) == ours
    assert len({repr(argument), repr(meaning), repr(ours)}) == 3, "an example that could not tell them apart"


@pytest.mark.parametrize("nobody", [None, "async"])
def test_a_staleness_of_none_is_a_value_and_wins_over_the_conf(nobody: str | None) -> None:
    assert resolve({"staleness": nobody}, {KEYS["staleness"]: "4"}).staleness is None
    assert resolve({}, {KEYS["staleness"]: "Async"}, {"staleness": 3}).staleness is None


def test_overlap_leaves_the_gate_one_round_less_and_cannot_be_bulk_synchronous() -> None:
    assert resolve({"overlap": True}, {}).gate_staleness is None
    assert resolve({"overlap": True, "staleness": 3}, {}).gate_staleness == 2
    assert resolve({"staleness": 3}, {}).gate_staleness == 3
    with pytest.raises(ConfigError, match=r"overlap .*that is not bulk-synchronous; set staleness to 1"):
        resolve({"overlap": True, "staleness": 0}, {})


def test_shards_take_slots_only_on_executors() -> None:
    assert resolve({"num_shards": 3}, {}).num_task_shards == 0
    assert resolve({"num_shards": 3}, {KEYS["shards_on"]: "executors"}).num_task_shards == 2
    assert resolve({"num_shards": 3, "shards_on": "driver"}, {KEYS["shards_on"]: "executors"}).num_task_shards == 0
    with pytest.raises(ConfigError, match=r"shards_on \(or spark.tensorspark.shards.on\) must be 'driver' or"):
        resolve({"shards_on": "moon"}, {})
    with pytest.raises(ConfigError, match="cannot be had with tls_enabled"):
        resolve({"num_shards": 2, "shards_on": "executors", "tls_enabled": True}, {})


def test_tls_is_off_unless_the_conf_or_an_argument_asks_for_it() -> None:
    assert not resolve({}, {}).tls_enabled
    assert resolve({}, {KEYS["tls_enabled"]: "true"}).tls_enabled
    assert not resolve({"tls_enabled": False}, {KEYS["tls_enabled"]: "true"}).tls_enabled


def test_the_originals_defaults_apply_where_neither_argument_nor_conf_speaks() -> None:
    config = resolve({"sync_interval": None, "batch_size": 7}, {KEYS["server_port"]: "9"}, ORIGINAL_DEFAULTS)
    assert (config.server_host, config.sync_interval) == ("localhost", 3)
    assert (config.server_port, config.batch_size) == (9, 7)
    original = resolve({}, {}, ORIGINAL_DEFAULTS)
    assert (original.server_port, original.batch_size) == (10080, 10000)
    assert original.connect_timeout_s == resolve({}, {}).connect_timeout_s


def test_an_argument_of_zero_is_given() -> None:
    conf = {KEYS["server_port"]: "10080", KEYS["cache_memory_bytes"]: "1g"}
    config = resolve({"server_port": 0, "cache_memory_bytes": 0}, conf)
    assert (config.server_port, config.cache_memory_bytes) == (0, 0)


def test_without_anything_the_defaults_are_a_free_port_and_the_systems_temporary_directory() -> None:
    config = resolve({}, {})
    assert (config.server_port, config.server_host, config.hdfs_dir) == (0, None, None)
    assert config.tmp_dir == tempfile.gettempdir()


@pytest.mark.parametrize(("field", "value"), BAD_ARGUMENTS, ids=str)
def test_a_bad_argument_is_named_with_its_key(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({field: value}, {})
    assert field in str(caught.value)
    assert KEYS[field] in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("field", "text"), BAD_TEXTS, ids=str)
def test_a_bad_text_in_the_conf_is_named_with_its_key(field: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {KEYS[field]: text})
    assert KEYS[field] in str(caught.value)
    assert "got" in str(caught.value) or text in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("server_port", 65535), ("batch_size", 1), ("io_timeout_s", 0.001)])
def test_the_ends_of_a_range_are_good(field: str, value: Any) -> None:
    assert getattr(resolve({field: value}, {}), field) == value


def test_an_unknown_key_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {"spark.tensorspark.batchsize": "64"})
    assert "spark.tensorspark.batchsize" in str(caught.value)
    for key in KEYS.values():
        assert key in str(caught.value)


def test_keys_of_others_are_left_alone() -> None:
    others = {"spark.tensorsparkle": "1", "spark.hdfs.other": "x", "spark.tmp.dirs": "y", "spark.master": "local"}
    assert resolve({}, others) == resolve({}, {})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}, {}).batch_size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250us", 0.00025),
        ("500ms", 0.5),
        ("30s", 30),
        ("30", 30),
        ("1.5s", 1.5),
        ("2m", 120),
        ("2min", 120),
        ("3h", 10800),
        ("1d", 86400),
        (" 30S ", 30),
        ("5 s", 5),
    ],
)
def test_durations_are_read_as_spark_writes_them(text: str, seconds: float) -> None:
    assert parse_time_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("10", 10),
        ("10b", 10),
        ("64k", 65536),
        ("64kb", 65536),
        ("256m", 268435456),
        ("256M", 268435456),
        ("2g", 2147483648),
        ("1t", 1099511627776),
        ("1pb", 1125899906842624),
    ],
)
def test_sizes_are_read_as_spark_writes_them(text: str, num_bytes: int) -> None:
    assert parse_size_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "1s2", "1e3s", "0x10", "1,5s", "∞", "nan", "inf"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))) as caught:
        parse_time_s(text)
    assert "30s" in str(caught.value)


@pytest.mark.parametrize("text", ["", "m", "-1m", "1.5m", "1mm", "1e3", "0x10", "64 q", "nan", "inf"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))) as caught:
        parse_size_bytes(text)
    assert "256m" in str(caught.value)


@given(number=st.integers(0, 10**6), unit=st.sampled_from(list("kmgtp")))
def test_a_size_is_its_number_times_a_power_of_1024(number: int, unit: str) -> None:
    assert parse_size_bytes(f"{number}{unit}") == number * 1024 ** ("bkmgtp".index(unit))


@pytest.mark.parametrize("token", ["too short", "sixteen letters & a space", "", 1234567890123456])
def test_a_bad_token_is_refused_without_being_told(token: object) -> None:
    with pytest.raises(ConfigError, match=r"dashboard_token .* must be at least 16 letters, digits") as caught:
        resolve({"dashboard_token": token}, {})
    assert not token or str(token) not in str(caught.value)
    assert "0123456789abcdef" not in repr(resolve({"dashboard_token": "0123456789abcdef"}, {}))


def test_the_readme_table_has_a_row_for_every_key() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\|\s*`(spark\.(?:hdfs|tmp|tensorspark)\.[\w.]+)`\s*\|", text, re.MULTILINE)) == sorted(
        KEYS.values()
    )


def test_the_shipped_spark_defaults_have_every_key_and_no_other() -> None:
    text = (ROOT / "conf" / "spark-defaults.conf").read_text(encoding="utf-8")
    found = re.findall(r"^#?[ \t]*(spark\.(?:hdfs|tmp|tensorspark)\.[\w.]+)[ \t=]", text + "\n", re.MULTILINE)
    assert sorted(set(found)) == sorted(KEYS.values())


def test_the_shipped_spark_defaults_can_be_read() -> None:
    text = (ROOT / "conf" / "spark-defaults.conf").read_text(encoding="utf-8")
    pairs = re.findall(r"^#?[ \t]*(spark\.(?:hdfs|tmp|tensorspark)\.[\w.]+)[ \t=]+(\S+)[ \t]*$", text, re.MULTILINE)
    assert pairs
    for key, value in pairs:
        resolve({}, {key: value})


@pytest.mark.parametrize("text", ["abc", "1.5", ""])
def test_a_key_that_is_no_integer_is_said_to_be_none(text: str) -> None:
    expected = (
        rf"spark\.tensorspark\.batch\.size in the Spark configuration: expected an integer such as 100, got '{text}'"
    )
    with pytest.raises(ConfigError, match=expected):
        resolve({}, {"spark.tensorspark.batch.size": text})
