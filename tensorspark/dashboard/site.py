"""What the parameter server shows to people and their tools, on its own port: the dashboard and ``/metrics``."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs, quote

from tornado.httputil import HTTPServerConnectionDelegate

from tensorspark.dashboard import access, unauthorized
from tensorspark.dashboard.app import Dashboard
from tensorspark.telemetry.view import RunView

PATHS = ("/dashboard", "/static")

_HTML = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}


class Site:
    """The pages of a session, whatever its server. All but `url` is called on the server's loop.

    Args:
        view: the current run's.
        token: opens the pages; not a worker's.
        has_dashboard: whether there is more than ``/metrics``.
    """

    def __init__(self, view: Callable[[], RunView | None], token: str, *, has_dashboard: bool) -> None:
        self._view = view
        self._token = token
        self._has_dashboard = has_dashboard
        self._dashboard: Dashboard | None = None
        self._starting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Site(has_dashboard={self._has_dashboard})"

    def url(self, host: str, port: int, *, is_encrypted: bool) -> str | None:
        """What a browser is to be given; None where there is no dashboard."""
        if not self._has_dashboard:
            return None
        scheme, name = ("https" if is_encrypted else "http"), (f"[{host}]" if ":" in host else host)
        return f"{scheme}://{name}:{port}{access.PATH}?token={quote(self._token)}"

    @property
    def is_watched(self) -> bool:
        """Whether anybody has the dashboard open. On any thread."""
        dashboard = self._dashboard
        return dashboard is not None and dashboard.num_pages > 0

    def takes(self, path: str) -> bool:
        """Whether a request's path, without its query, is one of the dashboard's."""
        return self._has_dashboard and any(path == prefix or path.startswith(f"{prefix}/") for prefix in PATHS)

    def admits(self, headers: Mapping[str, str], port: int) -> bool:
        """Whether whoever asks has shown the token, or the cookie that it was exchanged for."""
        return access.is_authorized(headers, port, self._token)

    def receive(self, target: str, headers: Mapping[str, str], port: int) -> tuple[int, Mapping[str, str], str] | None:
        """What one who is not admitted, or brings the token, is answered: status, headers, body.

        None: nothing that is not said of any other target.
        """
        path, _, query = target.partition("?")
        if path == "/" and self._has_dashboard and self.admits(headers, port):
            return 303, {"Location": access.PATH}, ""
        if not self.takes(path):
            return None
        given = parse_qs(query).get("token", [])
        if path in (access.PATH, f"{access.PATH}/") and any(access.is_token(token, self._token) for token in given):
            return access.login(headers, port, self._token)
        return None if self.admits(headers, port) and not given else (401, _HTML, unauthorized.page())

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The body and content type of ``/metrics``; on any thread.

        Raises:
            ConfigError: the official client library is not installed.
        """
        from tensorspark.telemetry.prometheus import exposition

        return exposition(self._view(), accept)

    async def application(self) -> HTTPServerConnectionDelegate:
        """The dashboard, which is made when somebody wants to see it: that imports Bokeh."""
        async with self._starting:
            if self._dashboard is None:
                dashboard = Dashboard(self._view)
                await dashboard.start()
                self._dashboard = dashboard
        return self._dashboard.application

    async def stop(self) -> None:
        """Tells open pages the last there is to tell; the next server's `application` makes new ones."""
        dashboard, self._dashboard = self._dashboard, None
        if dashboard is not None:
            await dashboard.stop()
        self._starting = asyncio.Lock()


def is_installed() -> bool:
    """Whether the dashboard's packages are there; imports none of them."""
    return importlib.util.find_spec("bokeh") is not None
