"""The application: what it costs, what it needs, and how pages are told."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tensorspark.dashboard import server
from tensorspark.dashboard.app import Dashboard
from tensorspark.telemetry.records import TrainingPoint
from tensorspark.telemetry.view import RunView
from tests.dashboard.synthetic import SyntheticRun

_DEADLINE_S = 15


def view_of(num_rounds: int = 5, num_workers: int = 3, name: str = "first") -> RunView:
    rounds = SyntheticRun(num_workers, name=name).rounds()
    return RunView(record for _ in range(num_rounds) for record in next(rounds))


class Page:
    """A page without a browser: speaks what Bokeh's script speaks, as much of it as there is to say."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self.socket = socket

    @classmethod
    async def opened(cls, url: str) -> Page:
        html = (await AsyncHTTPClient().fetch(url)).body.decode()
        match = re.search(r'data-token="([^"]+)"', html)
        assert match is not None
        socket = await websocket_connect(url.replace("http", "ws", 1) + "/ws", subprotocols=["bokeh", match[1]])
        page = cls(socket)
        assert (await page.message("ACK"))[0]["msgtype"] == "ACK"
        return page

    async def message(self, kind: str) -> tuple[Any, Any]:
        """Header and content of the next message of a kind."""
        while True:
            fragments = [await asyncio.wait_for(self.socket.read_message(), _DEADLINE_S) for _ in range(3)]
            assert None not in fragments, "the server closed the connection"
            header, _, content = (json.loads(str(fragment)) for fragment in fragments)
            if header["msgtype"] == kind:
                return header, content

    async def ask(self) -> None:
        """Says that it is ready for frames, or wants all."""
        await self._send("PULL-DOC-REQ", {})
        _, content = await self.message("PULL-DOC-REPLY")
        (root,) = content["doc"]["roots"]
        change = {"kind": "ModelChanged", "model": {"id": root["id"]}, "attr": "asked", "new": 1}
        await self._send("PATCH-DOC", {"events": [change]})

    async def _send(self, kind: str, content: Any) -> None:
        for fragment in ({"msgid": f"{kind}-1", "msgtype": kind}, {}, content):
            await self.socket.write_message(json.dumps(fragment))

    async def frame(self) -> Any:
        """The next frame."""
        _, content = await self.message("PATCH-DOC")
        (event,) = content["events"]
        return json.loads(event["new"].partition(" ")[2])


def serve(scenario: Callable[[Dashboard, str], Any], view: Callable[[], RunView | None], prefix: str = "") -> None:
    """Runs a scenario against a dashboard on the same loop."""

    async def run() -> None:
        dashboard = Dashboard(view, prefix=prefix)
        await dashboard.start()
        sockets = bind_sockets(0, "127.0.0.1")
        http_server = HTTPServer(dashboard.application)
        http_server.add_sockets(sockets)
        try:
            url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}{prefix}/dashboard"
            await asyncio.wait_for(scenario(dashboard, url), 40)
        finally:
            http_server.stop()
            await dashboard.stop()
            await http_server.close_all_connections()

    asyncio.run(run())


def test_a_page_gets_all_there_is_and_then_what_is_new() -> None:
    view = view_of()

    async def scenario(dashboard: Dashboard, url: str) -> None:
        page = await Page.opened(url)
        await page.ask()
        frame = await page.frame()
        assert frame["full"]
        assert len(frame["points"]["steps"]) == 4
        view.apply(TrainingPoint(1e3, 5000, 9, {"loss": 0.5}))
        frame = await page.frame()
        assert "full" not in frame
        assert frame["points"]["steps"][1:] == [5000]
        page.socket.close()

    serve(scenario, lambda: view)


def test_pages_that_come_later_get_all_while_the_others_go_on() -> None:
    view = view_of()

    async def scenario(dashboard: Dashboard, url: str) -> None:
        first = await Page.opened(url)
        await first.ask()
        assert (await first.frame())["full"]
        view.apply(TrainingPoint(1e3, 5000, 9, {"loss": 0.5}))
        second = await Page.opened(url)
        await second.ask()
        late, news = await second.frame(), await first.frame()
        assert (late["full"], late["points"]["steps"][-1]) == (True, 5000)
        assert ("full" in news, news["points"]["steps"][-1]) == (False, 5000)
        first.socket.close()
        second.socket.close()

    serve(scenario, lambda: view)


def test_a_new_run_begins_the_pages_anew() -> None:
    views = [view_of(), view_of(name="second")]
    current = [views[0]]

    async def scenario(dashboard: Dashboard, url: str) -> None:
        page = await Page.opened(url)
        await page.ask()
        assert (await page.frame())["run"]["name"] == "first"
        current[0] = views[1]
        frame = await page.frame()
        assert (frame["full"], frame["run"]["name"]) == (True, "second")
        page.socket.close()

    serve(scenario, lambda: current[0])


def test_what_came_last_is_told_when_the_server_stops() -> None:
    view = view_of()

    async def scenario(dashboard: Dashboard, url: str) -> None:
        page = await Page.opened(url)
        await page.ask()
        await page.frame()
        view.apply(TrainingPoint(1e3, 7777, 9, {"loss": 0.5}))
        await dashboard.stop()
        assert (await page.frame())["points"]["steps"][-1] == 7777
        page.socket.close()

    serve(scenario, lambda: view)


def test_a_page_that_is_closed_is_forgotten_and_one_that_never_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_UNUSED_LIFETIME_MS", 300)
    monkeypatch.setattr(server, "_CHECK_UNUSED_MS", 200)
    view = view_of()

    async def scenario(dashboard: Dashboard, url: str) -> None:
        await AsyncHTTPClient().fetch(url)
        page = await Page.opened(url)
        await page.ask()
        await page.frame()
        assert len(dashboard.application.get_sessions("/dashboard")) == 2  # type: ignore[attr-defined]
        page.socket.close()
        deadline = asyncio.get_running_loop().time() + 25
        while dashboard.application.get_sessions("/dashboard"):  # type: ignore[attr-defined]
            assert asyncio.get_running_loop().time() < deadline, "closed pages are kept"
            await asyncio.sleep(0.2)  # Bokeh looks at its sessions now and then, and tells nobody

    serve(scenario, lambda: view)


def test_frames_of_many_pages_take_less_than_a_hundredth_of_the_loops_time() -> None:
    view = view_of(200, num_workers=200)
    rounds = SyntheticRun(200, seed=8).rounds()
    for _ in range(200):
        next(rounds)

    async def scenario(dashboard: Dashboard, url: str) -> None:
        pages = [await Page.opened(url) for _ in range(5)]
        for page in pages:
            await page.ask()
        for _ in range(4):
            for record in next(rounds):
                view.apply(record)
            for page in pages:
                await page.frame()
        assert 0 < dashboard.cost_s < 0.1
        assert dashboard.interval_s >= max(1.0, 100 * dashboard.cost_s) - 1e-9
        assert dashboard.opening_cost_s > 0
        for page in pages:
            page.socket.close()

    serve(scenario, lambda: view)


def test_everything_is_served_beneath_a_prefix_from_the_packages_own_files() -> None:
    async def scenario(dashboard: Dashboard, url: str) -> None:
        client, root = AsyncHTTPClient(), url.removesuffix("/proxy/dashboard")
        html = (await client.fetch(url)).body.decode()
        addresses = re.findall(r'(?:src|href)="([^"#]+)"', html)
        assert not [address for address in addresses if address.startswith("http")]
        served = [address for address in addresses if address.startswith("/")]
        assert len(served) == 3, "a style sheet, Bokeh's script and the page's"
        for address in [*served, "/proxy/dashboard/assets/figures.json"]:
            assert address.startswith("/proxy/")
            answer = await client.fetch(root + address)
            assert len(answer.body) > 1000
        answer = await client.fetch(HTTPRequest(root + "/proxy/dashboard/assets/main.js"))
        again = HTTPRequest(answer.effective_url, headers={"If-None-Match": answer.headers["Etag"]})
        assert (await client.fetch(again, raise_error=False)).code == 304
        outside = await client.fetch(root + "/proxy/dashboard/assets/..%2fapp.py", raise_error=False)
        assert outside.code == 404

    serve(scenario, lambda: None, prefix="/proxy")


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_dashboard_does_not_import_bokeh() -> None:
    modules = [f"tensorspark.dashboard.{name}" for name in ("app", "server", "figures", "replay", "frame", "access")]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint('bokeh' in sys.modules)"
    )
    assert _python(code) == "False"


def test_without_bokeh_one_line_says_what_to_install() -> None:
    code = (
        "import asyncio, sys\n"
        "sys.modules['bokeh'] = None\n"
        "from tensorspark.dashboard.app import Dashboard\n"
        "from tensorspark.errors import ConfigError\n"
        "try: asyncio.run(Dashboard(lambda: None).start())\n"
        "except ConfigError as error: print(error)\n"
    )
    expected = "the dashboard needs Bokeh, which is not installed: pip install 'tensorspark[dashboard]'"
    assert _python(code) == expected
