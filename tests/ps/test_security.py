"""Who gets what from a live server, and how many may ask at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest

from tensorspark.ps import listen, protocol
from tensorspark.ps.http import Door, LimitedServer
from tensorspark.ps.listen import connection_limit, notice_vanished_peer
from tensorspark.ps.run import Run
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.wire import TIMEOUT_S, Wire, ask, connect, read_to_end

LAYOUT = WeightLayout([TensorSpec("W:0", (4, 3), "float32")])
UNAUTHORIZED_HEAD = (
    b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 17\r\nConnection: close\r\n\r\n"
)
UNAUTHORIZED = UNAUTHORIZED_HEAD + b"401 Unauthorized\n"
HEALTH_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=UTF-8\r\n"
    b"Content-Length: 16\r\nConnection: close\r\n\r\n"
)
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\n\r\n"


def filled(value: float) -> Buffer:
    return LAYOUT.pack({"W:0": np.full((4, 3), value, np.float32)})


Start = Callable[..., ParameterServer]


@pytest.fixture
def start() -> Iterator[Start]:
    with contextlib.ExitStack() as servers:

        def start_server(**options: Any) -> ParameterServer:
            server = servers.enter_context(ParameterServer(LAYOUT, "127.0.0.1", **options))
            server.begin_run(filled(2), DeltaWeightCombiner(), 4)
            return server

        yield start_server


@pytest.fixture(scope="module")
def shared() -> Iterator[ParameterServer]:
    with ParameterServer(LAYOUT, "127.0.0.1", handshake_timeout_s=0.5) as server:
        server.begin_run(filled(2), DeltaWeightCombiner(), 4)
        yield server


# Without the token

UPGRADE = f"Connection: Upgrade\r\nUpgrade: {protocol.UPGRADE}"
STRANGERS = {
    "a page": "GET /status HTTP/1.1\r\nHost: x",
    "a worker's upgrade": f"GET /workers HTTP/1.1\r\nHost: x\r\n{UPGRADE}",
    "what does not exist": "GET /other HTTP/1.1\r\nHost: x",
    "another method": "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 0",
    "liveness by another method": "POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0",
    "options": "OPTIONS * HTTP/1.1\r\nHost: x",
    "connect": "CONNECT example.com:443 HTTP/1.1\r\nHost: x",
    "an unknown method": "BREW /workers HTTP/1.1\r\nHost: x",
    "liveness with a query": "GET /healthz?a=b HTTP/1.1\r\nHost: x",
    "liveness with more behind it": "GET /healthz/../status HTTP/1.1\r\nHost: x",
    "an absolute target": "GET http://example.com/status HTTP/1.1\r\nHost: x",
    "a target that is no URL": "GET http://[ HTTP/1.1\r\nHost: x",
    "a target of bad escapes": "GET /%ff%00%zz HTTP/1.1\r\nHost: x",
    "a target without a slash": "GET status HTTP/1.1\r\nHost: x",
    "no host": "GET /status HTTP/1.1",
    "HTTP/1.0": "GET /status HTTP/1.0",
    "a body that does not come": "POST /workers HTTP/1.1\r\nHost: x\r\nContent-Length: 100",
    "a body too large": "POST /workers HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999",
    "a body in chunks": "POST /workers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
    "a body on demand": "POST /workers HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue",
    "a body of another kind": "POST /x HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data\r\nContent-Length: 0",
}


@pytest.mark.parametrize("request_head", STRANGERS.values(), ids=STRANGERS.keys())
def test_whoever_lacks_the_token_gets_401_and_nothing_else(shared: ParameterServer, request_head: str) -> None:
    assert ask(shared, f"{request_head}\r\n\r\n".encode()) == UNAUTHORIZED


@pytest.mark.parametrize("target", ["/status", "/workers", "/other"])
def test_a_head_without_the_token_gets_the_401_without_its_body(shared: ParameterServer, target: str) -> None:
    assert ask(shared, f"HEAD {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) == UNAUTHORIZED_HEAD


WRONG: dict[str, Callable[[str], str]] = {
    "empty": lambda token: "",
    "no scheme": lambda token: token,
    "another scheme": lambda token: f"Basic {token}",
    "only the scheme": lambda token: "Bearer ",
    "another token": lambda token: f"Bearer {token[::-1]}",
    "a token cut short": lambda token: f"Bearer {token[:-1]}",
    "a token and more": lambda token: f"Bearer {token}A",
    "not ASCII": lambda token: f"Bearer {token}\N{LATIN SMALL LETTER E WITH ACUTE}",
    "twice": lambda token: f"Bearer {token}\r\nAuthorization: Bearer {token}",
}


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("head", ["GET /status HTTP/1.1\r\nHost: x", STRANGERS["a worker's upgrade"]])
def test_a_wrong_token_opens_nothing(shared: ParameterServer, head: str, authorization: Callable[[str], str]) -> None:
    request = f"{head}\r\nAuthorization: {authorization(shared.token)}\r\n\r\n"
    assert ask(shared, request.encode("latin-1")) == UNAUTHORIZED
    assert shared.status().num_live == 0


def test_a_token_in_the_target_opens_nothing(shared: ParameterServer) -> None:
    for target in (f"/status?token={shared.token}", f"/status?Authorization=Bearer%20{shared.token}"):
        assert ask(shared, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) == UNAUTHORIZED


def test_liveness_is_open_and_says_no_more(shared: ParameterServer) -> None:
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    assert ask(shared, get) == HEALTH_HEAD + b'{"status": "ok"}'
    assert ask(shared, get.replace(b"GET", b"HEAD")) == HEALTH_HEAD
    assert ask(shared, b"GET /healthz HTTP/1.0\r\n\r\n") == HEALTH_HEAD + b'{"status": "ok"}'


def test_liveness_does_not_open_the_connection_to_what_follows(shared: ParameterServer) -> None:
    asked_twice = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n"
    assert ask(shared, asked_twice) == HEALTH_HEAD + b'{"status": "ok"}'


NOT_HTTP = {
    "nothing but a line": b"HELLO\r\n\r\n",
    "two words": b"GET /healthz\r\n\r\n",
    "another version": b"GET /healthz HTTP/9.9\r\n\r\n",
    "a header without a colon": b"GET /healthz HTTP/1.1\r\nHost\r\n\r\n",
    "a header with a zero byte": b"GET /healthz HTTP/1.1\r\nHost: \0\r\n\r\n",
    "a header's name with a blank": b"GET /healthz HTTP/1.1\r\nA B: c\r\n\r\n",
    "a TLS client's hello": b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(200),
    "headers without an end": b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 2**15,
    "headers too large": b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 2**15 + b"\r\n\r\n",
    "a frame": protocol.encode(protocol.Kind.PULL, {}),
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_what_is_not_http_ends_its_connection_and_learns_nothing(shared: ParameterServer, data: bytes) -> None:
    assert ask(shared, data) in (b"", BAD_REQUEST)
    assert ask(shared, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(HEALTH_HEAD)


# With the token


def test_pages_behind_the_door_name_no_software_and_show_no_traceback(shared: ParameterServer) -> None:
    def status_of(request: str) -> int:
        headers = f"Host: x\r\nConnection: close\r\nAuthorization: Bearer {shared.token}"
        response = ask(shared, f"{request} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        assert b"Server:" not in response
        assert b"ornado" not in response
        assert b"Traceback" not in response
        return int(response.split(b" ", 2)[1])

    assert status_of("GET /status") == 200
    assert status_of("GET /workers") == 426
    assert status_of("GET /other") == 404
    assert status_of("GET /healthz") == 200
    assert status_of("POST /status") == 405
    assert status_of("BREW /status") == 405
    assert status_of("GET /status?%ff=%zz") == 200


def test_each_request_on_a_connection_must_show_the_token(shared: ParameterServer) -> None:
    plain = b"GET /status HTTP/1.1\r\nHost: x\r\n"
    authorized = plain + f"Authorization: Bearer {shared.token}\r\n\r\n".encode()
    response = ask(shared, authorized + authorized + plain + b"\r\n" + authorized)
    assert response.count(b"HTTP/1.1 200 OK") == 2
    assert response.endswith(UNAUTHORIZED)


def test_a_worker_is_told_that_no_run_has_begun() -> None:
    with ParameterServer(LAYOUT, "127.0.0.1") as server, Wire(server) as worker:
        assert worker.response.startswith(b"HTTP/1.1 503 ")


def test_the_upgrade_is_answered_with_its_headers_alone(shared: ParameterServer) -> None:
    with Wire(shared) as worker:
        expected = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: {protocol.UPGRADE}\r\nConnection: Upgrade\r\n\r\n"
        assert worker.response == expected.encode()


def test_frames_that_come_with_the_upgrade_are_answered(shared: ParameterServer) -> None:
    head = f"GET /workers HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\nAuthorization: Bearer {shared.token}\r\n\r\n"
    with connect(shared) as connection:
        connection.sendall(head.encode() + b"no frame of any kind, but long enough")
        assert read_to_end(connection).startswith(b"HTTP/1.1 101 ")  # and then closed


def test_no_log_and_no_repr_holds_the_token(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = start(handshake_timeout_s=0.2)
    with Wire(server) as worker:
        worker.register(server, 1)
    for head in set(STRANGERS.values()) - {STRANGERS["a worker's upgrade"]}:  # which would stay open
        ask(server, f"{head}\r\nConnection: close\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode())
    server.close()
    assert "/status" in caplog.text  # the log was on
    assert server.token not in caplog.text
    for shown in (repr(server), repr(server._loop), *(repr(thread) for thread in threading.enumerate())):
        assert server.token not in shown


# How many at once


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed the connection, now."""
    return bool(select.select([connection], [], [], 0)[0]) and read_to_end(connection) == b""


def open_silent(server: ParameterServer, count: int, connections: contextlib.ExitStack) -> list[socket.socket]:
    return [connections.enter_context(connect(server)) for _ in range(count)]


def until_it_gets_in(server: ParameterServer, context: ssl.SSLContext | None = None) -> Wire:
    """A worker that tries again until there is room for it."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return Wire(server, context)
        except (ConnectionError, ssl.SSLError):
            assert time.monotonic() < deadline, "no room within the deadline"


def test_one_connection_too_many_is_closed_at_once_and_told_once(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(max_connections=8, handshake_timeout_s=60)
    with contextlib.ExitStack() as connections:
        silent = open_silent(server, 8, connections)
        for _ in range(20):
            with connect(server) as late:
                assert read_to_end(late) == b""
        assert not any(is_closed(connection) for connection in silent)
    assert caplog.text.count("closed at once") == 1


def test_silent_connections_make_room_at_the_deadline(start: Start) -> None:
    server = start(max_connections=8, handshake_timeout_s=0.5)
    with contextlib.ExitStack() as connections:
        silent = open_silent(server, 8, connections)
        with connect(server) as late:
            assert read_to_end(late) == b""
        with until_it_gets_in(server) as worker:
            worker.register(server, 1)
            assert worker.pull(LAYOUT.allocate()) == 0
        assert [read_to_end(connection) for connection in silent] == [b""] * 8


def test_a_connection_that_dribbles_is_cut_off_at_the_same_deadline(start: Start) -> None:
    server = start(handshake_timeout_s=0.5)
    began = time.monotonic()
    with connect(server) as slow, contextlib.suppress(ConnectionError):
        slow.sendall(b"GET /status HTTP/1.1\r\nA: ")
        while not select.select([slow], [], [], 0.05)[0]:
            slow.sendall(b"a")
            assert time.monotonic() < began + TIMEOUT_S
        assert read_to_end(slow) == b""


def test_workers_hold_places_past_the_deadline_and_leave_them_when_they_go(start: Start) -> None:
    server = start(max_connections=2, handshake_timeout_s=0.2)
    with until_it_gets_in(server) as first:
        first.register(server, 1, partition=0)
        for _ in range(5):  # more than there are places
            with until_it_gets_in(server) as second:
                second.register(server, 1, partition=1)
                with connect(server) as late:
                    assert read_to_end(late) == b""
                # Past the deadline of connections that have not shown the token:
                assert select.select([first.socket, second.socket], [], [], 0.3)[0] == []
                assert second.pull(LAYOUT.allocate()) == 0
        assert first.pull(LAYOUT.allocate()) == 0


def test_connections_that_end_leave_their_places(start: Start) -> None:
    server = start(max_connections=1, handshake_timeout_s=60)
    requests = [
        b"GET /status HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"nonsense\r\n\r\n",
        f"GET /status HTTP/1.0\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode(),
        b"",
    ]
    for request in requests * 3:
        connect_and_leave(server, request)
        until_it_gets_in(server).close()


def connect_and_leave(server: ParameterServer, request: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(request)


def test_close_ends_every_connection_and_logs_no_error(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start(handshake_timeout_s=60)
    with contextlib.ExitStack() as connections:
        silent = open_silent(server, 3, connections)
        worker = connections.enter_context(Wire(server))
        worker.register(server, 1)
        server.close()
        for connection in [*silent, worker.socket]:
            assert read_to_end(connection) == b""
    assert not server._thread.is_alive()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


class _Busy:
    """A run that waits for what no closed connection brings about, as a real one may wait for a buffer."""

    async def serve(self, number: int, stream: Any) -> None:
        await asyncio.Event().wait()


def test_a_worker_that_is_cut_off_by_the_end_of_the_loop_is_no_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve() -> None:
        (listener,) = listen.bind("127.0.0.1", 0)
        door = Door("token", lambda: cast(Run, _Busy()), 1)
        http = LimitedServer(door, max_connections=1, handshake_timeout_s=5, max_frame_bytes=100, ssl_context=None)
        http.add_sockets([listener])
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(f"GET /workers HTTP/1.1\r\n{UPGRADE}\r\nAuthorization: Bearer token\r\n\r\n".encode())
        async with asyncio.timeout(TIMEOUT_S):
            await reader.readuntil(b"\r\n\r\n")
        http.stop()
        http.close_streams()
        writer.close()

    asyncio.run(serve())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    ("max_files", "asked", "expected"),
    [(20_000, 4096, 4096), (1024, 4096, 896), (1024, 100, 100), (200, 4096, 100), (resource.RLIM_INFINITY, 4096, 4096)],
)
def test_no_more_connections_are_allowed_than_the_process_may_open_files_for(
    monkeypatch: pytest.MonkeyPatch, max_files: int, asked: int, expected: int
) -> None:
    monkeypatch.setattr(listen.resource, "getrlimit", lambda which: (max_files, max_files))
    assert connection_limit(asked) == expected


def test_a_deadline_of_days_is_not_too_long_for_the_kernels_keepalive() -> None:
    with socket.socket() as connection:
        notice_vanished_peer(connection, 30 * 86400.0)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
