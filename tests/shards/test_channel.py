"""Calls between the driver and a shard's process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
import pytest

from tensorspark.errors import ShardLostError
from tensorspark.shards.channel import Channel, Handler, Listener, Reply, dial
from tensorspark.weights.layout import Buffer

DEADLINE_S = 20.0
KEY = b"k" * 32


def buffer(num_bytes: int, seed: int = 1) -> Buffer:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


class Pair:
    """Two channels, connected: `near` calls, `far` answers, unless the test has it otherwise."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.lost: list[str] = []
        self.reasons: list[str] = []
        self.is_lost = threading.Semaphore(0)
        self.near_socket, self.far_socket = socket.socketpair()
        self.near = Channel(self.near_socket, "the shard", {"whoami": _name("near")}, self._on_lost("near"))
        self.far = Channel(self.far_socket, "the driver", handlers, self._on_lost("far"))

    def _on_lost(self, name: str) -> Callable[[str], None]:
        def on_lost(why: str) -> None:
            self.lost.append(name)
            self.reasons.append(why)
            self.is_lost.release()

        return on_lost

    def wait_lost(self) -> None:
        """Until both sides know."""
        for _ in range(2):
            assert self.is_lost.acquire(timeout=DEADLINE_S)

    def close(self) -> None:
        self.near.close()
        self.far.close()


def _name(name: str) -> Handler:
    return lambda values, raw: ({"name": name}, ())


def echo(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
    return {"got": dict(values)}, [each[::-1].copy() for each in raw]


Start = Callable[..., Pair]


@pytest.fixture
def start() -> Iterator[Start]:
    pairs: list[Pair] = []

    def start_pair(**handlers: Handler) -> Pair:
        pairs.append(Pair({"echo": echo, "whoami": _name("far"), **handlers}))
        return pairs[-1]

    yield start_pair
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("sizes", [(), (1,), (0,), (5, 0, 7), (3_000_000, 100)])
def test_values_and_buffers_go_there_and_come_back(start: Start, sizes: tuple[int, ...]) -> None:
    sent = [buffer(size, seed) for seed, size in enumerate(sizes)]
    arguments = {"version": 2**40, "name": "ß", "share": 0.1, "none": None, "bytes": b"\x00\xff", "list": [1, [2]]}
    values, raw = start().near.call("echo", arguments, sent).result(DEADLINE_S)
    assert values == {"got": arguments}
    assert [each.tobytes() for each in raw] == [each[::-1].tobytes() for each in sent]


def test_both_sides_can_call(start: Start) -> None:
    pair = start()
    assert pair.near.call("whoami").result(DEADLINE_S) == ({"name": "far"}, [])
    assert pair.far.call("whoami").result(DEADLINE_S) == ({"name": "near"}, [])


def test_calls_are_answered_in_any_order(start: Start) -> None:
    may_answer = threading.Event()

    def slow(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        assert may_answer.wait(DEADLINE_S)
        return {"slow": True}, ()

    pair = start(slow=slow)
    first = pair.near.call("slow")
    assert pair.near.call("whoami").result(DEADLINE_S) == ({"name": "far"}, [])
    assert not first.done()
    may_answer.set()
    assert first.result(DEADLINE_S) == ({"slow": True}, [])


def test_calls_of_many_threads_are_not_mixed_up(start: Start) -> None:
    pair = start()

    def ask(number: int) -> bool:
        sent = buffer(1 + 40_000 * (number % 5), number)
        values, raw = pair.near.call("echo", {"number": number}, [sent]).result(DEADLINE_S)
        return values == {"got": {"number": number}} and raw[0].tobytes() == sent[::-1].tobytes()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))


def test_an_exception_is_the_answer_and_says_whose(start: Start) -> None:
    def fail(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        raise ZeroDivisionError(f"on purpose, {values['number']}")

    pair = start(fail=fail)
    with pytest.raises(ShardLostError, match=r"^the shard: ZeroDivisionError: on purpose, 7$"):
        pair.near.call("fail", {"number": 7}).result(DEADLINE_S)
    assert pair.near.call("whoami").result(DEADLINE_S)[0] == {"name": "far"}


def test_a_call_of_what_is_not_there_is_answered_with_an_error(start: Start) -> None:
    pair = start()
    with pytest.raises(ShardLostError, match="the shard: KeyError: 'reboot'"):
        pair.near.call("reboot").result(DEADLINE_S)
    assert pair.near.call("whoami").result(DEADLINE_S)[0] == {"name": "far"}


@pytest.mark.parametrize("who", ["near", "far"])
def test_when_either_side_closes_open_calls_fail_and_both_sides_know(start: Start, who: str) -> None:
    is_called, may_answer = threading.Event(), threading.Event()

    def hang(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        is_called.set()
        may_answer.wait(DEADLINE_S)
        return {}, ()

    pair = start(hang=hang)
    calls = [pair.near.call("hang") for _ in range(3)]
    assert is_called.wait(DEADLINE_S)
    (pair.near if who == "near" else pair.far).close()
    pair.wait_lost()
    may_answer.set()
    for call in calls:
        with pytest.raises(ShardLostError, match="the shard is gone"):
            call.result(DEADLINE_S)
    assert sorted(pair.lost) == ["far", "near"]
    assert pair.reasons == ["is gone", "is gone"]
    with pytest.raises(ShardLostError, match="the shard is gone"):
        pair.near.call("whoami").result(0)
    pair.near.close()  # again


@pytest.mark.parametrize("num_bytes", [2, 30])
def test_a_connection_that_breaks_within_a_message_is_lost(start: Start, num_bytes: int) -> None:
    pair = start()
    pair.far_socket.sendall((100).to_bytes(4, "big") + bytes(num_bytes))  # of a message of 100 bytes
    pair.far_socket.shutdown(socket.SHUT_RDWR)
    pair.wait_lost()
    with pytest.raises(ShardLostError, match="is gone"):
        pair.near.call("whoami").result(0)


def test_an_answer_to_nothing_harms_nobody() -> None:
    near_socket, far_socket = socket.socketpair()
    near = Channel(near_socket, "the shard")
    try:
        with Connection(far_socket.detach()) as far:
            far.send_bytes(msgpack.packb({"number": 99, "raw": 1, "values": {}}))
            far.send_bytes(b"buffer")
            call = near.call("whoami")
            asked = msgpack.unpackb(far.recv_bytes())
            assert (asked["call"], asked["values"], asked["raw"]) == ("whoami", {}, 0)
            far.send_bytes(msgpack.packb({"number": asked["number"], "raw": 0, "values": {"late": 1}}))
            assert call.result(DEADLINE_S) == ({"late": 1}, [])
    finally:
        near.close()


# Signs of life

SILENCE_S = 0.5


class Watched:
    """A channel that wants signs of life, and the other end of its connection, which the test plays."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        self.is_lost = threading.Event()
        self.why = ""
        self.near = Channel(near, "the shard", on_lost=self._on_lost, silence_timeout_s=SILENCE_S)

    def _on_lost(self, why: str) -> None:
        self.why = why
        self.is_lost.set()

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def watched() -> Iterator[Watched]:
    opened = Watched()
    yield opened
    opened.close()


@pytest.mark.parametrize("num_bytes", [0, 2**27])
def test_who_gives_no_sign_of_life_is_lost_though_the_connection_stands(watched: Watched, num_bytes: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        called = threads.submit(watched.near.call, "take", {}, [buffer(num_bytes)])  # which it does not read
        assert watched.is_lost.wait(DEADLINE_S)
        with pytest.raises(ShardLostError, match=r"^the shard has given no sign of life for 0\.5 s$"):
            called.result(DEADLINE_S).result(DEADLINE_S)
    assert watched.why == "has given no sign of life for 0.5 s"


def test_who_sends_a_large_message_slowly_is_not_lost(watched: Watched) -> None:
    watched.far.sendall((100).to_bytes(4, "big"))
    for _ in range(15):
        watched.far.sendall(b"x")
        assert not watched.is_lost.wait(SILENCE_S / 5)


def test_who_takes_a_large_message_slowly_is_not_lost(watched: Watched) -> None:
    with ThreadPoolExecutor(1) as threads:
        called = threads.submit(watched.near.call, "take", {}, [buffer(2**24)])
        for _ in range(15):
            watched.far.recv(2**19)
            assert not watched.is_lost.wait(SILENCE_S / 5)
        watched.near.close()
        called.result(DEADLINE_S)


def test_who_is_busy_with_all_threads_is_not_lost() -> None:
    may_answer = threading.Event()

    def hang(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        may_answer.wait(DEADLINE_S)
        return {}, ()

    near_socket, far_socket = socket.socketpair()
    is_lost = threading.Event()
    far = Channel(far_socket, "the driver", {"hang": hang})
    near = Channel(near_socket, "the shard", on_lost=lambda why: is_lost.set(), silence_timeout_s=SILENCE_S)
    try:
        calls = [near.call("hang") for _ in range(20)]
        assert not is_lost.wait(4 * SILENCE_S)
        may_answer.set()
        for call in calls:
            assert call.result(DEADLINE_S) == ({}, [])
    finally:
        near.close()
        far.close()


# Who may connect


class Door:
    """A listener, and those that it let in."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.sockets: list[socket.socket] = []
        self.listener = Listener("127.0.0.1", KEY, self._on_connected)

    def _on_connected(self, plain: socket.socket) -> None:
        self.sockets.append(plain)
        self.arrived.release()

    def close(self) -> None:
        self.listener.close()
        for plain in self.sockets:
            plain.close()


@pytest.fixture
def door() -> Iterator[Door]:
    opened = Door()
    yield opened
    opened.close()


def test_who_knows_the_key_is_let_in_and_can_be_spoken_with(door: Door) -> None:
    plain = dial("127.0.0.1", door.listener.port, KEY)
    assert door.arrived.acquire(timeout=DEADLINE_S)
    ours = Channel(plain, "the driver")
    theirs = Channel(door.sockets.pop(), "a shard", {"echo": echo})
    try:
        assert ours.call("echo", {"a": 1}).result(DEADLINE_S) == ({"got": {"a": 1}}, [])
    finally:
        ours.close()
        theirs.close()


def test_a_listener_may_advertise_an_address_that_is_none_of_this_machines() -> None:
    arrived: list[socket.socket] = []
    is_there = threading.Event()

    def on_connected(plain: socket.socket) -> None:
        arrived.append(plain)
        is_there.set()

    listener = Listener("192.0.2.1", KEY, on_connected)  # of a network that is for documents only (RFC 5737)
    try:
        with dial("127.0.0.1", listener.port, KEY):
            assert is_there.wait(DEADLINE_S)
    finally:
        listener.close()
        for plain in arrived:
            plain.close()


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"x" * 32])
def test_the_wrong_key_is_refused_and_the_right_one_let_in_still(door: Door, key: bytes) -> None:
    with pytest.raises(AuthenticationError):
        dial("127.0.0.1", door.listener.port, key)
    with dial("127.0.0.1", door.listener.port, KEY):
        assert door.arrived.acquire(timeout=DEADLINE_S)
    assert len(door.sockets) == 1


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), (5).to_bytes(4, "big") + b"hello", b"\x7f\xff\xff\xff" + bytes(99)],
)
def test_a_stranger_is_not_let_in_and_holds_nobody_up(door: Door, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", door.listener.port), timeout=DEADLINE_S) as stranger:
        stranger.sendall(said)
        with dial("127.0.0.1", door.listener.port, KEY):
            assert door.arrived.acquire(timeout=DEADLINE_S)
        if len(said) >= 4:  # else it has ten seconds to say more
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(2**12):
                    pass
    assert len(door.sockets) == 1


def test_who_dials_wants_a_proof_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            plain, _ = impostor.accept()
            with Connection(plain.detach()) as connection:
                connection.send_bytes(b"#CHALLENGE#" + bytes(20))
                connection.recv_bytes(1000)
                connection.send_bytes(b"#WELCOME#")  # whatever was answered
                connection.recv_bytes(1000)
                connection.send_bytes(b"who knows")  # to the challenge in turn

        answered = threads.submit(answer)
        with pytest.raises(AuthenticationError):
            dial("127.0.0.1", impostor.getsockname()[1], KEY)
        wait([answered], DEADLINE_S)


def test_dialling_where_nobody_listens_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError):
        dial("127.0.0.1", port, KEY)


def test_dialling_one_who_hangs_up_is_an_error_of_those_that_are_promised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as rude, ThreadPoolExecutor(1) as threads:
        hung_up = threads.submit(lambda: rude.accept()[0].close())
        with pytest.raises((OSError, AuthenticationError)):
            dial("127.0.0.1", rude.getsockname()[1], KEY)
        hung_up.result(DEADLINE_S)


def test_a_closed_listener_takes_nobody(door: Door) -> None:
    door.listener.close()
    with pytest.raises(OSError):
        dial("127.0.0.1", door.listener.port, KEY)
