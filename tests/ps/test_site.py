"""The pages for people and their tools, behind the server's door: who gets in, with what, and where; and at which port.

Each request is sent by hand, so that it is what a browser, a scraper or a stranger sends, and not what a library makes
of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pytest

from tensorspark.config import resolve
from tensorspark.dashboard import access
from tensorspark.dashboard import server as bokeh_pages
from tensorspark.dashboard.site import Site, is_installed
from tensorspark.driver.resources import start_server
from tensorspark.errors import PortTakenError
from tensorspark.ps import protocol
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.tls import client_context
from tensorspark.telemetry.records import RunBegan
from tensorspark.telemetry.view import RunView
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import TensorSpec, WeightLayout
from tests.ps.wire import Wire, ask

LAYOUT = WeightLayout([TensorSpec("W:0", (4, 3), "float32")])
TOKEN = "view/token+of=the.pages"
PLAIN_401 = b"401 Unauthorized\n"
BEGAN = RunBegan(0.0, 3, "digits", 1.7e9, "asynchronous", 2, 5, "DeltaWeightCombiner", {}, (), 52, "2.0.0")


class Answer(NamedTuple):
    """A response, and whether nothing else came."""

    status: int
    headers: dict[str, str]
    body: bytes


class Door:
    """A server with a site, and a run."""

    def __init__(
        self, stack: contextlib.ExitStack, *, has_dashboard: bool = True, has_run: bool = True, **options: Any
    ):
        self.view = RunView([BEGAN])
        self.site = Site(lambda: self.view, TOKEN, has_dashboard=has_dashboard)
        self.server = stack.enter_context(ParameterServer(LAYOUT, "127.0.0.1", site=self.site, **options))
        if has_run:
            self.begin_run()

    def begin_run(self) -> int:
        weights = LAYOUT.pack({"W:0": np.full((4, 3), 2, np.float32)})
        return self.server.begin_run(weights, DeltaWeightCombiner(), 4)

    def ask(self, target: str, *fields: str, method: str = "GET", context: ssl.SSLContext | None = None) -> Answer:
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{self.server.port}", *fields, "Connection: close"]
        return parsed(ask(self.server, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), context))

    @property
    def cookie(self) -> str:
        """As a browser sends it that was given it."""
        given = self.ask(f"/dashboard?token={quote(TOKEN)}").headers["set-cookie"]
        return f"Cookie: {given.partition(';')[0]}"


def parsed(response: bytes) -> Answer:
    head, _, body = response.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    return Answer(int(status_line.split(" ")[1]), {name.lower(): value for name, value in fields.items()}, body)


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


VISITOR = bearer(TOKEN)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def shared() -> Iterator[Door]:
    """A door that no test changes anything behind."""
    with contextlib.ExitStack() as stack:
        yield Door(stack)


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever is asked is answered, and is no error of the server's."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# Without a token


@pytest.mark.parametrize("target", ["/dashboard", "/dashboard/", "/dashboard/ws", "/static/js/bokeh.min.js", "/static"])
def test_a_person_without_the_token_gets_a_page_that_explains(shared: Door, target: str) -> None:
    answer = shared.ask(target)
    assert answer.status == 401
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert b"needs the run" in answer.body
    assert answer.body.endswith(b"</html>\n")
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert not {"server", "set-cookie"} & answer.headers.keys()


def test_the_page_needs_nothing_from_anywhere(shared: Door) -> None:
    body = shared.ask("/dashboard").body.decode()
    assert re.findall(r"<(?:script|img|iframe|object|base)\b", body) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', body) == ["data:,"]
    assert "url(" not in body


def test_a_head_without_the_token_has_the_pages_headers_alone(shared: Door) -> None:
    answer = shared.ask("/dashboard", method="HEAD")
    assert (answer.status, answer.body) == (401, b"")
    assert int(answer.headers["content-length"]) == len(shared.ask("/dashboard").body)


@pytest.mark.parametrize(
    "target",
    [
        *("/", "/status", "/metrics", "/workers", "/other", "/dashboards", "/Dashboard", "/staticx", "dashboard", "*"),
        *("//dashboard", "/./dashboard", "/%64ashboard", "http://127.0.0.1/dashboard"),
        *("//[/dashboard", "//[::1/dashboard?token=x", "/\xff\xfe", "/status?token=" + quote(TOKEN)),
    ],
)
def test_whatever_else_a_stranger_asks_for_is_answered_alike(shared: Door, target: str) -> None:
    answer = shared.ask(target)
    assert (answer.status, answer.body) == (401, PLAIN_401)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"])
def test_with_the_token_of_the_pages_nothing_can_be_changed(shared: Door, method: str) -> None:
    for target in ("/dashboard", f"/dashboard?token={quote(TOKEN)}", "/status"):
        answer = shared.ask(target, VISITOR, "Content-Length: 0", method=method)
        assert (answer.status, answer.body) == (401, PLAIN_401)


def test_liveness_is_as_open_as_ever(shared: Door) -> None:
    assert shared.ask("/healthz").body == b'{"status": "ok"}'
    assert shared.ask("/healthz", method="HEAD")[::2] == (200, b"")


# The address that was printed


def test_the_address_that_was_printed_gives_a_cookie_and_leaves_no_token_in_the_address_bar(shared: Door) -> None:
    url = shared.site.url("127.0.0.1", shared.server.port, is_encrypted=False)
    assert url == f"http://127.0.0.1:{shared.server.port}/dashboard?token={quote(TOKEN)}"
    answer = shared.ask(url.partition(str(shared.server.port))[2])
    assert (answer.status, answer.headers["location"], answer.body) == (303, "/dashboard", b"")
    name, _, attributes = answer.headers["set-cookie"].partition("=")
    assert name == f"tensorspark-{shared.server.port}"
    assert attributes.partition("; ")[2] == "Path=/; HttpOnly; SameSite=Strict"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    for token in (TOKEN, quote(TOKEN), shared.server.token):
        assert token not in str(answer.headers)


def test_a_head_gets_the_same(shared: Door) -> None:
    answer = shared.ask(f"/dashboard?token={quote(TOKEN)}", method="HEAD")
    assert (answer.status, answer.headers["location"], answer.body) == (303, "/dashboard", b"")


def test_who_comes_from_a_link_on_another_site_is_sent_on_by_a_page(shared: Door) -> None:
    answer = shared.ask(f"/dashboard?token={quote(TOKEN)}", "Sec-Fetch-Site: cross-site")
    assert answer.status == 200
    assert "set-cookie" in answer.headers
    assert b'content="0; url=/dashboard"' in answer.body
    assert TOKEN.encode() not in answer.body


@pytest.mark.parametrize(
    "query",
    [
        *("token=", "token=wrong", f"token={quote(TOKEN)}x", f"token={quote(TOKEN)[:-1]}", f"Token={quote(TOKEN)}"),
        *("token=%ff%fe", "token=%00", "token=\xfc", "token=wrong&a=b;c", "token=" + "x" * 8000),
    ],
)
def test_a_wrong_token_gives_no_cookie_and_the_page_that_explains(shared: Door, query: str) -> None:
    answer = shared.ask(f"/dashboard?{query}")
    assert answer.status == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert "set-cookie" not in answer.headers


def test_a_wrong_token_is_told_also_to_who_has_the_cookie(shared: Door) -> None:
    """Of a run before, say: else the page of this one would pass for it."""
    assert shared.ask("/dashboard?token=wrong", shared.cookie).status == 401


def test_the_workers_token_is_none_of_the_pages_address(shared: Door) -> None:
    assert shared.ask(f"/dashboard?token={shared.server.token}").status == 401


def test_only_the_dashboards_own_address_exchanges_the_token(shared: Door) -> None:
    for target in ("/dashboard/ws", "/static/js/bokeh.min.js"):
        answer = shared.ask(f"{target}?token={quote(TOKEN)}")
        assert answer.status == 401
        assert "set-cookie" not in answer.headers


# With the cookie, or a token


def test_the_cookie_opens_the_dashboard_and_what_it_is_made_of(shared: Door) -> None:
    page = shared.ask("/dashboard", shared.cookie)
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    assert b"tensorspark" in page.body
    assert shared.ask("/static/js/bokeh.min.js", shared.cookie).status == 200
    assert not shared.site.is_watched  # no page has asked for its frames


def test_either_token_opens_the_dashboard_too(shared: Door) -> None:
    for token in (TOKEN, shared.server.token):
        assert shared.ask("/dashboard", bearer(token)).status == 200


@pytest.mark.parametrize("field", ["the cookie", "the pages' token", "the workers' token"])
def test_status_and_metrics_are_for_all_who_may_see_the_pages(shared: Door, field: str) -> None:
    shown = {
        "the cookie": shared.cookie,
        "the pages' token": VISITOR,
        "the workers' token": bearer(shared.server.token),
    }[field]
    status = shared.ask("/status", shown)
    assert status.headers["content-type"] == "application/json"
    assert json.loads(status.body)["run"] == 1
    metrics = shared.ask("/metrics", shown)
    assert metrics.status == 200
    assert b'name="digits"' in metrics.body
    assert "server" not in metrics.headers


def test_a_scraper_gets_the_format_that_it_asks_for(shared: Door) -> None:
    plain = shared.ask("/metrics", VISITOR)
    assert plain.headers["content-type"].startswith("text/plain")
    openmetrics = shared.ask("/metrics", VISITOR, "Accept: application/openmetrics-text;version=1.0.0")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.body.endswith(b"# EOF\n")


def test_the_scheme_is_read_in_any_case_and_nothing_else_passes_for_the_token(shared: Door) -> None:
    assert shared.ask("/status", f"authorization: bEaReR   {TOKEN}").status == 200
    for field in (f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer", "Bearer \xff", f"Bearer{TOKEN}"):
        assert shared.ask("/status", f"Authorization: {field}").status == 401


def test_the_token_of_the_pages_opens_nothing_of_the_workers(shared: Door) -> None:
    upgrade = ("Connection: Upgrade", f"Upgrade: {protocol.UPGRADE}")
    for target in ("/workers", "/other"):
        for shown in (VISITOR, shared.cookie):
            answer = shared.ask(target, shown, *upgrade)
            assert (answer.status, answer.body) == (401, PLAIN_401)
    with Wire(shared.server) as worker:
        assert b" 101 " in worker.response


def test_a_post_by_who_holds_the_workers_token_is_not_allowed(shared: Door) -> None:
    for target in ("/status", "/metrics", "/dashboard"):
        answer = shared.ask(target, bearer(shared.server.token), "Content-Length: 0", method="POST")
        assert answer.status in (403, 405)


def test_a_head_of_a_page_is_not_offered_and_ends_well(shared: Door) -> None:
    for target in ("/status", "/metrics"):
        answer = shared.ask(target, VISITOR, method="HEAD")
        assert (answer.status, answer.body) == (405, b"")


@pytest.mark.parametrize(
    "cookie",
    [
        *("", "tensorspark", "tensorspark-{port}", "tensorspark-{port}=", "tensorspark-{port}={token}"),
        *("tensorspark-1={value}", "a={value}", "TENSORSPARK-{port}={value}", "tensorspark-{port}=\xff{value}"),
    ],
)
def test_no_other_cookie_opens_anything(shared: Door, cookie: str) -> None:
    value = access.cookie_value(TOKEN)
    sent = cookie.format(port=shared.server.port, token=TOKEN, value=value)
    assert shared.ask("/status", f"Cookie: {sent}").status == 401
    right = f"a=b; tensorspark-{shared.server.port}={value};c"
    assert shared.ask("/status", f"Cookie: {right}").status == 200


def test_two_servers_on_one_host_have_cookies_of_their_own(shared: Door, stack: contextlib.ExitStack) -> None:
    """Browsers send those of all ports to each."""
    other = Door(stack)
    first, second = (door.cookie.removeprefix("Cookie: ") for door in (shared, other))
    assert first.partition("=")[0] != second.partition("=")[0]
    assert other.ask("/status", f"Cookie: {first}").status == 401
    for door in (shared, other):
        assert door.ask("/status", f"Cookie: {first}; {second}").status == 200


def test_another_sites_page_gets_nothing_in_the_name_of_who_looks_at_it(shared: Door) -> None:
    port, cookie = shared.server.port, shared.cookie
    for origin in (f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}"):
        assert shared.ask("/status", cookie, f"Origin: {origin}").status == 200
    hostile = (
        "http://evil.example",
        "null",
        "",
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
        "http://[",
        "\xff",
    )
    for origin in hostile:
        for shown in (cookie, VISITOR):
            assert shared.ask("/status", shown, f"Origin: {origin}").status == 401
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: a==")
        assert shared.ask("/dashboard/ws", cookie, f"Origin: {origin}", *upgrade).status == 401


def test_each_request_on_a_connection_is_asked_for_what_opens_it(shared: Door) -> None:
    host = f"Host: 127.0.0.1:{shared.server.port}"
    requests = f"GET /status HTTP/1.1\r\n{host}\r\n{VISITOR}\r\n\r\nGET /status HTTP/1.1\r\n{host}\r\n\r\n"
    response = ask(shared.server, requests.encode())
    assert re.findall(rb"HTTP/1\.1 (\d+)", response) == [b"200", b"401"]


# What is not there


def test_a_site_without_a_dashboard_has_metrics_alone(stack: contextlib.ExitStack) -> None:
    door = Door(stack, has_dashboard=False)
    assert door.site.url("127.0.0.1", door.server.port, is_encrypted=False) is None
    for shown in ("A: b", VISITOR):
        answer = door.ask("/dashboard", shown)
        assert (answer.status, answer.body) == (401, PLAIN_401)
    assert door.ask("/dashboard", bearer(door.server.token)).status == 404
    assert door.ask("/metrics", VISITOR).status == 200


def test_a_server_without_a_site_has_neither() -> None:
    with ParameterServer(LAYOUT, "127.0.0.1") as server:
        for target in ("/metrics", "/dashboard"):
            request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{bearer(server.token)}\r\n\r\n"
            assert parsed(ask(server, request.encode())).status == 404
            assert parsed(ask(server, request.replace(server.token, TOKEN).encode())).status == 401


def test_without_the_client_library_metrics_say_what_to_install(shared: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = shared.ask("/metrics", VISITOR)
    assert answer.status == 501
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"pip install 'tensorspark[prometheus]'" in answer.body
    monkeypatch.undo()
    assert shared.ask("/metrics", VISITOR).status == 200


def test_without_bokeh_the_dashboard_says_what_to_install(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_installed()
    for name in ["bokeh", *(name for name in sys.modules if name.startswith("bokeh."))]:
        monkeypatch.setitem(sys.modules, name, None)
    bokeh_pages.load.cache_clear()
    door = Door(stack)
    assert not is_installed()
    for _ in range(2):
        answer = door.ask("/dashboard", VISITOR)
        assert answer.status == 501
        assert answer.body == (
            b"the dashboard needs Bokeh, which is not installed: pip install 'tensorspark[dashboard]'\n"
        )
    assert not door.site.is_watched
    assert door.ask("/status", VISITOR).status == 200


# Runs come and go


def test_before_the_first_run_there_is_nothing_to_tell_and_pages_are_open(stack: contextlib.ExitStack) -> None:
    door = Door(stack, has_run=False)
    assert not door.server.has_run
    assert json.loads(door.ask("/status", VISITOR).body) == {"run": 0}
    assert door.ask("/dashboard", VISITOR).status == 200


def test_a_server_that_has_forgotten_its_run_shows_its_pages_on_and_takes_another(stack: contextlib.ExitStack) -> None:
    door = Door(stack)
    assert json.loads(door.ask("/status", VISITOR).body)["num_partitions"] == 4
    with Wire(door.server) as worker:
        worker.register(door.server, 1)
        door.server.retire()
        assert worker.socket.recv(1) == b""
    assert json.loads(door.ask("/status", VISITOR).body) == {"run": 0}
    assert b'name="digits"' in door.ask("/metrics", VISITOR).body
    assert door.ask("/dashboard", door.cookie).status == 200
    assert door.ask("/workers", bearer(door.server.token), f"Upgrade: {protocol.UPGRADE}").status == 503
    assert door.begin_run() == 2
    assert json.loads(door.ask("/status", VISITOR).body)["run"] == 2


def test_a_site_outlasts_its_server_and_the_cookie_its_first_page(stack: contextlib.ExitStack) -> None:
    door = Door(stack)
    assert door.ask("/dashboard", VISITOR).status == 200
    port, cookie = door.server.port, door.cookie
    door.server.close()
    door.server = stack.enter_context(ParameterServer(LAYOUT, "127.0.0.1", port, site=door.site))
    assert door.ask("/dashboard", cookie).status == 200


def test_a_loss_that_is_not_finite_is_null_in_the_status(stack: contextlib.ExitStack) -> None:
    door = Door(stack)
    with Wire(door.server) as worker:
        worker.register(door.server, 1)
        header = {"sequence": 1, "epoch": 0, "batch": 1, "num_steps": 1, "num_samples": 10, "version": 0}
        push = {**header, "sums": {"loss": float("nan")}, "progress": 0.5}
        worker.send(protocol.Kind.PUSH, push, LAYOUT.pack({"W:0": np.zeros((4, 3), np.float32)}))
        worker.receive(protocol.Kind.ACCEPTED)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    status = json.loads(door.ask("/status", VISITOR).body, parse_constant=refuse)
    assert status["scalars"] == {"loss": None}


def test_no_log_and_no_repr_holds_a_token(stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        door = Door(stack)
        for shown in (VISITOR, "A: b"):
            door.ask(f"/dashboard?token={quote(TOKEN)}", shown)
        for target in ("/status", "/metrics", "/dashboard"):
            for shown in (VISITOR, bearer(door.server.token), "A: b"):
                door.ask(target, shown)
        cookie = door.cookie.partition("=")[2]
    said = caplog.text + repr(door.site) + repr(door.server)
    for secret in (TOKEN, quote(TOKEN), door.server.token, cookie):
        assert secret not in said


# TLS


def test_pages_are_served_encrypted_where_workers_are(stack: contextlib.ExitStack) -> None:
    door = Door(stack, tls=True)
    assert door.server.certificate is not None
    url = door.site.url("127.0.0.1", door.server.port, is_encrypted=True)
    assert url is not None
    assert url.startswith(f"https://127.0.0.1:{door.server.port}/dashboard?token=")
    context = client_context(door.server.certificate)
    given = door.ask(f"/dashboard?token={quote(TOKEN)}", context=context)
    assert given.status == 303
    cookie = f"Cookie: {given.headers['set-cookie'].partition(';')[0]}"
    for target in ("/dashboard", "/status", "/metrics"):
        assert door.ask(target, cookie, context=context).status == 200
    assert door.ask("/dashboard", context=context).status == 401


def test_an_ipv6_address_is_bracketed_and_the_token_quoted() -> None:
    site = Site(lambda: None, "a&b c/ü", has_dashboard=True)
    assert site.url("::1", 4040, is_encrypted=False) == "http://[::1]:4040/dashboard?token=a%26b%20c/%C3%BC"


# Ports that are taken


@contextlib.contextmanager
def taken(*ports: int) -> Iterator[list[int]]:
    """Listens at the ports that are free among these, so that all are taken; 0 finds one."""
    with contextlib.ExitStack() as listeners:
        found = []
        for port in ports:
            listener = listeners.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen()
                found.append(listener.getsockname()[1])
        yield found


def test_a_server_takes_the_next_free_port_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with taken(0) as (port,):
        site = Site(lambda: None, TOKEN, has_dashboard=False)
        with start_server(LAYOUT, resolve({"server_port": port}, {}), "127.0.0.1", site=site) as server:
            assert port < server.port <= port + 16
            assert f"port {port} (spark.tensorspark.server.port) is taken: the server listens at {server.port}" in (
                caplog.text
            )


def test_a_port_that_is_free_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with taken(0) as (port,):
        pass
    with start_server(LAYOUT, resolve({"server_port": port}, {}), "127.0.0.1") as server:
        assert server.port == port
    assert caplog.text == ""


def test_where_all_are_taken_the_error_names_the_setting() -> None:
    message = r"port \d+ cannot be opened .*choose another server_port"
    with (
        taken(0) as (port,),
        taken(*range(port + 1, port + 17)),
        pytest.raises(PortTakenError, match=message) as e,
    ):
        start_server(LAYOUT, resolve({"server_port": port}, {}), "127.0.0.1")
    assert f"port {port + 16} " in str(e.value)


def test_there_is_no_port_after_the_last() -> None:
    with taken(65535), pytest.raises(PortTakenError, match="port 65535 cannot be opened"):
        start_server(LAYOUT, resolve({"server_port": 65535}, {}), "127.0.0.1")


def test_the_root_leads_who_may_see_the_dashboard_to_it(shared: Door) -> None:
    admitted = shared.ask("/", shared.cookie)
    assert (admitted.status, admitted.headers["location"]) == (303, "/dashboard")
