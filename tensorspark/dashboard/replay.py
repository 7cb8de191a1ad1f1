"""The page of a finished run, served to this machine's browser until the program is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.netutil import bind_sockets
from tornado.routing import Matcher, Rule, RuleRouter
from tornado.web import Application, RequestHandler

from tensorspark.dashboard import unauthorized
from tensorspark.dashboard.access import PATH, is_authorized, is_token, login
from tensorspark.dashboard.app import Dashboard
from tensorspark.errors import ConfigError
from tensorspark.telemetry.view import RunView

_HOST = "127.0.0.1"
_NUM_PORTS = 100


def serve(view: RunView, port: int, *, on_ready: Callable[[str], None], token: str) -> None:
    """Serves the page of `view` on 127.0.0.1 until the program is interrupted (Ctrl-C).

    Args:
        port: the next free one where it is taken; 0: any.
        on_ready: called with the page's address, token included, as soon as it answers.
        token: whoever has it may see the page.

    Raises:
        ConfigError: Bokeh is not installed, or there is no free port.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(view, port, on_ready, token))


async def _serve(view: RunView, port: int, on_ready: Callable[[str], None], token: str) -> None:
    dashboard = Dashboard(lambda: view)
    await dashboard.start()
    sockets = _bind(port)
    port = sockets[0].getsockname()[1]
    server = HTTPServer(guarded(dashboard.application, port, token))
    server.add_sockets(sockets)
    try:
        on_ready(f"http://{_HOST}:{port}{PATH}?{urlencode({'token': token})}")
        await asyncio.Event().wait()
    finally:
        server.stop()
        await dashboard.stop()
        await server.close_all_connections()


def _bind(port: int) -> list[Any]:
    for candidate in range(port, port + _NUM_PORTS if port else 1):
        try:
            return bind_sockets(candidate, _HOST)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise ConfigError(f"expected a free port among {port} to {port + _NUM_PORTS - 1}, but all are taken: give another")


def guarded(application: Application, port: int, token: str) -> RuleRouter:
    """`application` behind a door: the token opens it, and a cookie from then on.

    Args:
        port: names the cookie.
    """
    door = Application([(r".*", _Door, {"port": port, "token": token})])
    return RuleRouter([Rule(_Authorized(port, token), application), Rule(_Anybody(), door)])


class _Authorized(Matcher):
    """Requests for the page by those who may see it; who brings the token in the address goes to the door first."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        is_page = request.path != "/" and "token" not in request.query_arguments
        return {} if is_page and is_authorized(request.headers, self._port, self._token) else None


class _Anybody(Matcher):
    """All requests."""

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        return {}


class _Door(RequestHandler):
    """Lets in who has the token; tells others where to find it."""

    def initialize(self, port: int, token: str) -> None:
        self._port = port
        self._token = token

    def get(self) -> None:
        """Answers a request from outside."""
        given = self.get_query_argument("token", None)
        is_root = given is None and self.request.path == "/"
        if given is not None and is_token(given, self._token):
            status, headers, body = login(self.request.headers, self._port, self._token)
            self.set_status(status)
            for name, value in headers.items():
                self.set_header(name, value)
            self.finish(body)
        elif is_root and is_authorized(self.request.headers, self._port, self._token):
            self.redirect(PATH)
        else:
            self.set_status(401)
            self.set_header("Cache-Control", "no-store")
            self.finish(unauthorized.page())

    def head(self) -> None:
        """Answers as `get`, without the page."""
        self.get()
