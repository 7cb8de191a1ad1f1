"""A finished run's page: its door, its port, its end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from tensorspark.dashboard.access import cookie_name, cookie_value
from tests.dashboard.browser import Browser

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "a-token/with+signs="
_PROGRAM = """
import sys
from tensorspark.dashboard.replay import serve
from tensorspark.telemetry.view import RunView
from tests.dashboard.synthetic import SyntheticRun
view = RunView(record for records in SyntheticRun(2, duration_s=20.0, name="old run").rounds() for record in records)
serve(view, int(sys.argv[1]), on_ready=lambda url: print(url, flush=True), token=sys.argv[2])
print("left", flush=True)
"""


@dataclass
class Replay:
    """A replay in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    wanted: int

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.body = response.read().decode()  # type: ignore[attr-defined]
        connection.close()
        return response


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    """One on the port after one that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = taken.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(wanted), TOKEN],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield Replay(process, process.stdout.readline().strip(), wanted)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[0].strip() == "left", "an interrupt ends it as it should"
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_the_next_free_port_is_taken_and_said(replay: Replay) -> None:
    assert replay.wanted < replay.port < replay.wanted + 100


def test_the_address_lets_in_and_leaves_the_token_behind(replay: Replay) -> None:
    address = urlsplit(replay.url)
    answer = replay.get(f"{address.path}?{address.query}")
    assert (answer.status, answer.headers["Location"]) == (303, "/dashboard")
    cookie = answer.headers["Set-Cookie"].split(";")[0]
    page = replay.get("/dashboard", Cookie=cookie)
    assert page.status == 200
    assert "data-token" in page.body  # type: ignore[attr-defined]
    assert TOKEN not in page.body  # type: ignore[attr-defined]
    assert cookie.partition("=")[2] not in page.body, "nor does the page tell scripts the cookie"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["/dashboard", "/dashboard?token=wrong", "/", "/static/js/bokeh.min.js", "/dashboard/ws"]
)
def test_without_the_token_a_page_explains(replay: Replay, path: str) -> None:
    answer = replay.get(path)
    assert answer.status == 401
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "/dashboard?token=" in answer.body  # type: ignore[attr-defined]


def test_another_sites_page_gets_no_connection(replay: Replay) -> None:
    cookie = f"{cookie_name(replay.port)}={cookie_value(TOKEN)}"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    upgrade |= {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==", "Cookie": cookie}
    assert replay.get("/dashboard/ws", Origin="http://evil.example", **upgrade).status == 401


@pytest.mark.browser
def test_a_browser_opens_it_by_a_link_on_another_site_too(replay: Replay, browser: Browser) -> None:
    browser.open("data:text/html," + quote(f"<a id=go href='{replay.url}'>dashboard</a>"))
    browser.run("document.getElementById('go').click()")
    browser.until(lambda: browser.run("return document.body?.dataset.frames ?? null"), "the page showed no frame")
    assert browser.run("return location.href.split('#')[0]") == f"http://127.0.0.1:{replay.port}/dashboard"
    assert browser.text("#name") == "old run"
    assert "finished" in browser.text("#state")
    assert browser.console() == []
    assert not [url for url in browser.strangers(replay.url) if not url.startswith("data:")]


@pytest.mark.browser
def test_the_page_of_who_has_no_token_fits_a_phone(replay: Replay, browser: Browser) -> None:
    browser.resize(360, 700, mobile=True)
    browser.open(f"http://127.0.0.1:{replay.port}/dashboard")
    browser.driver.delete_all_cookies()  # those of this host, wherever the browser was before
    browser.open(f"http://127.0.0.1:{replay.port}/dashboard")
    assert "needs the run’s token" in browser.text("h1")
    assert browser.run("return document.documentElement.scrollWidth") == 360
