"""A short run of `benchmarks.fuzz`, hypothesis on the parser, and what fuzzing has found so far."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.iostream import IOStream

from benchmarks.fuzz.attackers import HonestWorker
from benchmarks.fuzz.campaigns import Outcome, fuzz_parser, fuzz_server
from benchmarks.fuzz.mutations import Mutator, record, split, with_fields, with_header
from benchmarks.fuzz.victims import EPOCHS, LAYOUT, initial_weights, parse
from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.connection import Connection
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import TensorSpec, WeightLayout
from tests.ps.wire import Wire

NUM_PARSED, NUM_FROM_STRANGERS, NUM_FROM_HOLDERS = 12_000, 7_000, 1_000
DEADLINE_S = 120.0
# The first points of a run's record, and the first of everything, cost some: a long run is what shows growth.
MAX_GROWTH_BYTES = 16 * 2**20


@cache
def frames() -> list[bytes]:
    return record(LAYOUT, EPOCHS)


def check(outcome: Outcome, num_inputs: int) -> None:
    assert outcome.failures == ()
    assert outcome.num_inputs.total() >= num_inputs
    assert set(Mutator.KINDS) <= set(outcome.num_inputs)
    assert outcome.growth_bytes < MAX_GROWTH_BYTES


def test_the_parser_answers_every_mutated_frame_with_a_frame_or_a_protocol_error() -> None:
    outcome = fuzz_parser(frames(), NUM_PARSED, seed=1)
    check(outcome, NUM_PARSED)
    assert set(outcome.answers) == {"a frame", "ProtocolError"}


@pytest.mark.slow
def test_strangers_and_standbys_leave_server_and_weights_as_they_are() -> None:
    outcome = fuzz_server("strangers", frames(), NUM_FROM_STRANGERS, 1, DEADLINE_S)
    check(outcome, NUM_FROM_STRANGERS)
    assert outcome.num_rounds > 0
    assert outcome.answers["REFUSED"] > 0
    assert set(outcome.answers).isdisjoint({"GRANTED", "SNAPSHOT", "ACCEPTED"})


@pytest.mark.slow
def test_workers_gone_mad_leave_the_server_and_the_others_as_they_are() -> None:
    outcome = fuzz_server("holders", frames(), NUM_FROM_HOLDERS, 1, DEADLINE_S)
    check(outcome, NUM_FROM_HOLDERS)
    assert outcome.num_rounds > 0
    assert outcome.answers["ACCEPTED"] > 0
    assert outcome.answers["SNAPSHOT"] > 0


# The parser


@given(st.data())
def test_any_change_of_a_recorded_frame_is_a_frame_or_a_protocol_error(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(frames())))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(frame)))
        end = data.draw(st.integers(start, min(len(frame), start + 20)))
        frame[start:end] = data.draw(st.binary(max_size=20))
    with contextlib.suppress(ProtocolError):
        parse(bytes(frame))


any_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=4), values, max_size=4),
    max_leaves=20,
)


@given(data=st.data(), value=any_value)
def test_a_field_of_any_type_is_read_or_refused_by_its_name(data: st.DataObject, value: object) -> None:
    frame = data.draw(st.sampled_from([frame for frame in frames() if frame[5] == Kind.REGISTER]))
    header = protocol.decode_header(with_fields(frame, attempt=value)[protocol.PREFIX_BYTES :])
    if type(value) is int and 0 <= value < 2**63:
        assert protocol.count(header, "attempt") == value
        return
    with pytest.raises(ProtocolError, match="'attempt'") as error:
        protocol.count(header, "attempt")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("depth", [10, 900, 1000, 1020])
def test_a_field_nested_as_deep_as_msgpack_goes_is_refused(depth: int) -> None:
    header = b"\x81\xa7message" + b"\x91" * depth + b"\xc0"
    with pytest.raises(ProtocolError):
        protocol.field(protocol.decode_header(header), "message", str)


# The fuzzer itself


def test_the_same_seed_makes_the_same_inputs_of_every_kind() -> None:
    first, second = (Mutator(frames(), seed=3) for _ in range(2))
    made = [first.next() for _ in range(500)]
    assert made == [second.next() for _ in range(500)]
    assert {kind for kind, _ in made} == set(Mutator.KINDS)


def test_recorded_frames_are_whole_and_of_every_kind_that_a_worker_sends() -> None:
    assert {frame[5] for frame in frames()} == protocol.FROM_WORKER
    assert split(b"".join(frames())) == frames()
    for frame in frames():
        parse(frame)


@pytest.fixture
def server() -> Iterator[ParameterServer]:
    with ParameterServer(LAYOUT, "127.0.0.1", io_timeout_s=10) as server:
        server.begin_run(initial_weights(), DeltaWeightCombiner(), 2)
        yield server


@pytest.fixture
def honest(server: ParameterServer) -> Iterator[HonestWorker]:
    worker = HonestWorker(ServerAddress("127.0.0.1", server.port, server.token, reconnect_timeout_s=0), seed=2)
    worker.start_and_wait()
    yield worker
    worker.stop()


def test_the_honest_worker_notices_a_push_that_is_not_its_own(server: ParameterServer, honest: HonestWorker) -> None:
    with Wire(server) as other:
        other.register(server, 1, partition=1)
        other.push(LAYOUT.pack({"W:0": np.zeros((16, 4), np.float32), "step:0": np.array(1, np.int64)}))
        assert honest.ended.wait(10)
    assert "not the sum of the pushes" in honest.failures[0]


# What fuzzing found


def test_a_refusal_that_quotes_a_worker_at_length_still_fits_into_a_frame(server: ParameterServer) -> None:
    with Wire(server) as worker:
        registration = next(frame for frame in frames() if frame[5] == Kind.REGISTER)
        worker.socket.sendall(with_fields(registration, fingerprint="f" * 65_400))
        assert worker.receive(Kind.REFUSED)["code"] == "layout_mismatch"


def test_a_field_that_nests_too_deep_closes_its_connection_as_any_wrong_one(
    server: ParameterServer, caplog: pytest.LogCaptureFixture
) -> None:
    with Wire(server) as worker:
        worker.register(server, 1)
        worker.socket.sendall(with_header(Kind.FAIL, b"\x81\xa7message" + b"\x91" * 1020 + b"\xc0"))
        with pytest.raises(ConnectionResetError):
            worker.receive(Kind.ACCEPTED)
    assert "expected header field 'message' to be str" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_worker_that_never_stops_talking_leaves_the_others_their_turn(
    server: ParameterServer, honest: HonestWorker
) -> None:
    enough, flooding = threading.Event(), protocol.encode(Kind.ALIVE, {}) * 20_000

    def flood(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not enough.is_set():
                connection.sendall(flooding)

    with Wire(server) as noisy:
        thread = threading.Thread(target=flood, args=(noisy.socket,), daemon=True)
        thread.start()
        target = honest.num_rounds + 100
        for _ in range(200):
            if honest.ended.wait(0.1) or honest.num_rounds >= target:
                break
        enough.set()
    thread.join(10)
    assert honest.num_rounds >= target
    assert honest.failures == []


def test_no_more_is_read_of_a_worker_that_does_not_take_its_answers() -> None:
    large = WeightLayout([TensorSpec("W:0", (2**22,), "float32")])

    async def converse() -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(1, IOStream(ours), large, BufferPool(large, 0), deadline_s=30)
        with theirs:
            theirs.sendall(protocol.encode(Kind.PULL, {}) * 2)
            assert (await connection.read()).kind is Kind.PULL
            connection.write(Kind.SNAPSHOT, {"version": 1}, large.allocate())
            second = asyncio.create_task(connection.read())
            for _ in range(50):  # of the loop's turns: the frame is there, one would do
                await asyncio.sleep(0)
            assert not second.done()
            await asyncio.to_thread(read_exactly, theirs, protocol.PREFIX_BYTES + 10 + large.num_bytes)
            assert (await asyncio.wait_for(second, 10)).kind is Kind.PULL
            connection.close()

    asyncio.run(converse())


def read_exactly(connection: socket.socket, num_bytes: int) -> None:
    connection.settimeout(10)
    while num_bytes:
        chunk = connection.recv(min(num_bytes, 2**20))
        assert chunk
        num_bytes -= len(chunk)
