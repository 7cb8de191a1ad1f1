"""What the wire benchmark measures with: real servers and clients, and weights that are checked."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import REPOSITORY
from benchmarks.measuring.report import Report
from benchmarks.wire import __main__ as wire
from benchmarks.wire import clients as wire_clients
from benchmarks.wire import codecs, memory, shards
from benchmarks.wire.parameter_server import Client, Server, Traffic

NOW = 0.0
NUM_BYTES = 2**20


@contextlib.contextmanager
def in_process(traffic: Traffic, num_clients: int = 1) -> Iterator[tuple[Server, list[Client]]]:
    """A server and clients in this process."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.closing(Server(traffic, num_clients)))
        clients = [Client(server.where(), index, traffic) for index in range(num_clients)]
        for client in clients:
            stack.enter_context(contextlib.closing(client))
        yield server, clients


def values_of(report: Report) -> dict[str, float]:
    return {row.name: row.value for row in report.rows}


# What travels


def test_deltas_of_clients_differ_and_hold_no_zero() -> None:
    first, second = (Traffic(NUM_BYTES).delta(client).view(np.float32) for client in range(2))
    assert not np.array_equal(first, second)
    assert first.all()
    assert second.all()
    assert len(first) == NUM_BYTES // 4


def test_with_rows_a_delta_changes_one_row_of_a_hundred() -> None:
    table = Traffic(400 * 1024, push="rows").delta(7).view(np.float32).reshape(400, 256)
    assert np.flatnonzero(table.any(axis=1)).tolist() == [7, 107, 207, 307]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_sum_of_all_pushes_is_in_the_weights(num_shards: int) -> None:
    with in_process(Traffic(NUM_BYTES, num_shards=num_shards), num_clients=2) as (server, clients):
        clients[0].push(NOW, 3)
        clients[1].alternate(NOW, 2)
        server.check_weights([client.num_pushes() for client in clients])
        server.check_pulled(clients[1].pulled())
        assert [client.num_pushes() for client in clients] == [3, 2]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_push_that_is_missing_is_noticed(num_shards: int) -> None:
    with in_process(Traffic(NUM_BYTES, num_shards=num_shards), num_clients=2) as (server, clients):
        clients[0].push(NOW, 3)
        clients[1].push(NOW, 1)
        with pytest.raises(ValueError, match="not the sum"):
            server.check_weights([1, 3])  # as many, but by others


def test_two_shards_are_two_servers_with_half_of_the_weights_each() -> None:
    with in_process(Traffic(NUM_BYTES, num_shards=2)) as (server, _):
        places = server.where()
        assert isinstance(places, tuple)
        assert [place.shard.layout.num_bytes for place in places] == [NUM_BYTES // 2] * 2
        assert len({place.address.port for place in places}) == 2


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "topk:0.01", "rows"])
def test_what_a_codec_sends_and_holds_back_is_the_sum_of_the_pushes(codec: str) -> None:
    with in_process(Traffic(NUM_BYTES, push=codec)) as (server, [client]):
        client.push(NOW, 5)
        server.check_weights([5], [client.unsent()])


def test_what_top_k_holds_back_is_missed_where_it_is_not_counted() -> None:
    with in_process(Traffic(NUM_BYTES, push="topk:0.01")) as (server, [client]):
        client.push(NOW, 5)
        with pytest.raises(ValueError, match="not the sum"):
            server.check_weights([5])


@pytest.mark.parametrize("codec", ["none", "float16", "bfloat16", "int8", "rows"])
def test_other_weights_than_the_servers_are_noticed(codec: str) -> None:
    with in_process(Traffic(NUM_BYTES, pull=codec)) as (server, [client]):
        pulled = client.pulled().copy()
        server.check_pulled(pulled)
        pulled.view(np.float32)[1000] += 1
        with pytest.raises(ValueError, match="pulled other weights"):
            server.check_pulled(pulled)


def test_each_transfer_has_its_seconds() -> None:
    with in_process(Traffic(NUM_BYTES, pull="rows")) as (server, [client]):
        began, ended = client.alternate(NOW, 3)
        assert ended > began
        for seconds in (client.pull_seconds(NOW, 4), client.round_seconds(NOW, 4), client.pull_changes(NOW, 4)):
            assert len(seconds) == 4
            assert min(seconds) > 0
        assert client.num_pushes() == 3 + 4 + 4
        # Whole pulls: 3 and 4 alternating, 4 alone, and the first of the changes; 11 rows of 1,024 in each patch.
        num_pushed, num_pulled = server.bytes_on_the_wire()
        assert num_pushed == 11 * NUM_BYTES
        assert 12 * NUM_BYTES + 4 * 11 * 1024 <= num_pulled < 12 * NUM_BYTES + 4 * 11 * 1200


# The parts


def test_throughput_is_reported_for_each_number_of_clients_and_compared() -> None:
    report = Report("test", packages=[])
    wire_clients.measure_throughput(report, 0.1, {1: 3, 2: 2}, num_rounds=1, compared=(1, 2))
    values = values_of(report)
    assert values["push 0.1 MB, 2 clients, in all"] / values["push 0.1 MB, 1 client, in all"] == pytest.approx(
        values["push 0.1 MB, 2 clients / 1"]
    )
    assert all(row.value > 0 for row in report.rows)
    assert [row.name for row in report.rows if row.unit == "ms each"] == [
        f"{operation} 0.1 MB, {clients}, of a server's core"
        for operation in ("pull", "push")
        for clients in ("1 client", "2 clients")
    ]
    assert {row.name: row.target for row in report.rows if row.unit == "x"} == {
        "pull 0.1 MB, 2 clients / 1": 0.8,
        "push 0.1 MB, 2 clients / 1": 0.8,
        "raw TCP, pull 0.1 MB, 2 clients / 1": None,  # what the machine does, not the server
        "raw TCP, push 0.1 MB, 2 clients / 1": None,
    }


def test_few_transfers_are_as_slow_as_the_99th_percentile() -> None:
    report = Report("test", packages=[])
    wire_clients.measure_latencies(report, 0.1, {2: 5}, num_rounds=1)
    values = values_of(report)
    assert 0 < values["pull 0.1 MB, 2 clients, p50"] <= values["pull 0.1 MB, 2 clients, p99"]
    assert 0 < values["push and pull 0.1 MB, 2 clients, p50"] <= values["push and pull 0.1 MB, 2 clients, p99"]


def test_codecs_are_measured_alone_and_top_k_without_a_target() -> None:
    report = Report("test", packages=[])
    codecs.measure_alone(report, 1.0, ["float16", "topk:0.01"], num_rounds=1)
    values = values_of(report)
    assert values["float16, bytes"] == pytest.approx(0.5, abs=0.001)
    assert values["topk:0.01, bytes"] == pytest.approx(0.015, abs=0.001)
    assert {row.name for row in report.rows if row.target is not None} == {
        f"float16, {step}" for step in ("encode", "encode_keeping_error", "decode")
    }
    # Half of the bytes are saved: 0.5 / (1 / encode_keeping_error + 1 / decode).
    pays_below = 0.5 / (1 / values["float16, encode_keeping_error"] + 1 / values["float16, decode"])
    assert values["float16, a push pays on a link below"] == pytest.approx(pays_below, rel=0.001)


def test_codecs_are_measured_end_to_end_and_top_k_is_not_pulled() -> None:
    report = Report("test", packages=[])
    codecs.measure_together(report, 1.0, ["topk:0.01", "rows"], count=2, num_rounds=1)
    values = values_of(report)
    shares = {name: value for name, value in values.items() if name.endswith("on the wire")}
    assert shares == pytest.approx(
        {
            "push 1 MB, none, bytes on the wire": 1.0,
            "push 1 MB, topk:0.01, bytes on the wire": 0.015,
            "push 1 MB, rows, bytes on the wire": 0.0103,
            "pull 1 MB, none, bytes on the wire": 1.0,
            "pull 1 MB, rows, bytes on the wire": 0.0103,
        },
        abs=0.001,
    )


def test_shards_are_compared_with_one_server() -> None:
    report = Report("test", packages=[])
    shards.measure_size(report, 0.1, {1: 2}, num_rounds=1)
    assert [row.name for row in report.rows if row.unit == "x"] == [
        "pull 0.1 MB, 1 client, 2 shards / 1",
        "push 0.1 MB, 1 client, 2 shards / 1",
    ]


def test_a_workers_buffers_are_counted() -> None:
    report = Report("test", packages=[])
    cases = [memory.WorkerCase(), memory.WorkerCase(overlap=True)]
    memory.measure_workers(report, 20.0, cases, num_turns=3)
    values = values_of(report)
    # What is pulled and what is pushed; while steps go on, what they began from and what is pushed, then pulled.
    assert values["worker's peak, 20 MB, raw"] == pytest.approx(2, abs=0.4)
    assert values["worker's peak, 20 MB, raw, overlap"] == pytest.approx(2, abs=0.4)


def test_a_servers_memory_is_held_against_the_pool() -> None:
    report = Report("test", packages=[])
    memory.measure_servers(report, 20.0, [memory.ServerCase(1)], num_turns=3)
    pool, peak = report.rows
    assert pool.value == pytest.approx(2**28 / 20e6, rel=0.001)
    assert peak.target == pytest.approx(3 + pool.value)
    assert 1.9 < peak.value < 3 + pool.value  # the weights, and the push that arrives


# The program


def test_a_part_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    command = [sys.executable, "-m", "benchmarks.wire", "--only", "codecs,speed"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert f"expected parts of {', '.join(wire.PARTS)}, got 'speed'" in " ".join(ended.stderr.split())


def test_only_the_parts_asked_for_are_measured_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []

    def note(part: str, report: Report, is_quick: bool) -> None:
        measured.append((part, is_quick))

    for part in wire.PARTS:
        monkeypatch.setitem(wire.PARTS, part, functools.partial(note, part))
    assert wire.main(["--only", "json, raw", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    assert measured == [("raw", True), ("json", True)]
    assert (tmp_path / "figures.json").exists()
