"""What the server says over HTTP, and to whom: a door in front of everything, and pages behind it.

The door decides on a request's line and headers alone, before Tornado parses a target, picks a handler or reads a body:

| request | without the token | with it |
|---|---|---|
| ``GET`` or ``HEAD /healthz``, exactly | 200, connection closed | the same |
| ``GET /workers`` with ``Upgrade: tensorspark/<version>`` | 401 | 101, then frames |
| ``GET /dashboard...``, where there is one | 401 and a page, connection closed | the dashboard |
| anything else, whether it exists or not | 401, connection closed | its page, or 404, 405, 426, 501, 503 |
| not HTTP, or headers over 16 KiB | 400 without a word, or nothing; connection closed | the same |

The token is expected as ``Authorization: Bearer <token>`` and compared in constant time. There are two: the workers'
opens everything; that of the pages (`Site`) opens ``/dashboard``, ``/metrics`` and ``/status``, and may come as the
dashboard's ``?token=``, which is exchanged for a cookie. The last row is Tornado's own
doing, before any code of ours: ``HTTP/1.1 400 Bad Request`` and no headers, or, for headers without an end, a closed
connection. No answer names the software.

Whoever has not shown the token has one deadline for the TLS handshake, the request line and all headers together, and
gets one answer: such a connection never lives longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http.client
import itertools
import json
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import tornado.httpserver
import tornado.web
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, StreamClosedError
from tornado.routing import AnyMatches, PathMatches, Rule, RuleRouter

from tensorspark.errors import ConfigError
from tensorspark.ps import protocol
from tensorspark.ps.listen import notice_vanished_peer
from tensorspark.ps.run import Run

logger = logging.getLogger(__name__)

CurrentRun = Callable[[], Run | None]

_MAX_HEADER_BYTES = 2**14
_MAX_BODY_BYTES = 2**14
_WARNING_INTERVAL_S = 60.0

_READING = ("GET", "HEAD")
_HEALTH_TARGET = "/healthz"
_SITE_TARGETS = ("/metrics", "/status")  # that the site's token opens too
_HEALTH = ("200 OK", "Content-Type: application/json; charset=UTF-8", '{"status": "ok"}')
_UNAUTHORIZED = (
    "401 Unauthorized",
    "WWW-Authenticate: Bearer\r\nContent-Type: text/plain; charset=utf-8",
    "401 Unauthorized\n",
)
_SWITCHING = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: {protocol.UPGRADE}\r\nConnection: Upgrade\r\n\r\n"


class Site(Protocol):
    """Pages for people and their tools, beside the server's own: see `dashboard.site`."""

    def takes(self, path: str) -> bool: ...

    def admits(self, headers: Mapping[str, str], port: int) -> bool: ...

    def receive(
        self, target: str, headers: Mapping[str, str], port: int
    ) -> tuple[int, Mapping[str, str], str] | None: ...

    def metrics(self, accept: str) -> tuple[bytes, str]: ...

    async def application(self) -> HTTPServerConnectionDelegate: ...

    async def stop(self) -> None: ...


class LimitedServer(tornado.httpserver.HTTPServer):
    """Tornado's HTTP server, with a limit to its open connections, those of workers included. The loop owns it.

    Args:
        door: to all requests.
        max_connections: one more is closed as soon as it is accepted.
        handshake_timeout_s: deadline for the TLS handshake and the headers together; another one for a body.
        max_frame_bytes: the longest frame of a worker.
        ssl_context: None speaks plain TCP.
    """

    def initialize(  # type: ignore[override]  # what Tornado has in place of __init__; its own takes thrice as many
        self,
        door: Door,
        *,
        max_connections: int,
        handshake_timeout_s: float,
        max_frame_bytes: int,
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        super().initialize(
            door,
            ssl_options=ssl_context,
            max_buffer_size=max_frame_bytes + 2**20,
            max_header_size=_MAX_HEADER_BYTES,
            max_body_size=_MAX_BODY_BYTES,
            idle_connection_timeout=handshake_timeout_s,
            body_timeout=handshake_timeout_s,
        )
        self._max_connections = max_connections
        self._streams: set[IOStream] = set()
        self._num_refused = 0
        self._warned_at = -math.inf

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if len(self._streams) >= self._max_connections:
            stream.close()
            self._tell_of_refusal(address)
            return
        self._streams.add(stream)
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        assert isinstance(server_conn, HTTP1ServerConnection)
        self._streams.discard(server_conn.stream)

    def close_streams(self) -> None:
        """Closes every connection, without waiting for what they are at."""
        for stream in list(self._streams):
            stream.close()

    def _tell_of_refusal(self, address: Any) -> None:
        self._num_refused += 1
        now = time.monotonic()
        if now < self._warned_at + _WARNING_INTERVAL_S:
            return
        logger.warning(
            "%d connection(s) closed at once, the last from %s: %d are open, the most that are allowed "
            "(spark.tensorspark.server.max.connections): each worker needs one",
            self._num_refused,
            address[0],
            self._max_connections,
        )
        self._num_refused, self._warned_at = 0, now


class Door(HTTPServerConnectionDelegate):
    """Lets requests with the token in, hands workers' connections to the current run, and turns all others away.

    Args:
        token: of the run, ASCII.
        current_run: None while there is no run.
        io_timeout_s: how soon, about, a worker is noticed that vanished without a word.
        port: that the server listens at.
        site: more pages.
    """

    def __init__(
        self, token: str, current_run: CurrentRun, io_timeout_s: float, port: int = 0, site: Site | None = None
    ) -> None:
        self.site = site
        self.port = port
        self._expected = f"Bearer {token}".encode("ascii")
        self._current_run = current_run
        self._io_timeout_s = io_timeout_s
        self._numbers = itertools.count(1)
        pages = tornado.web.Application(
            [(r"/status", _StatusPage), (r"/metrics", _Metrics), (protocol.PATH, _Workers)],
            current_run=current_run,
            site=site,
            default_handler_class=_NotFound,
            log_function=_log_request,
        )
        self._router = RuleRouter([Rule(AnyMatches(), pages)])
        self._mounted: HTTPServerConnectionDelegate | None = None

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        return _Request(self, server_conn, request_conn)

    def is_authorized(self, headers: HTTPHeaders) -> bool:
        return hmac.compare_digest(headers.get("Authorization", "").encode(), self._expected)

    def page(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Who takes a request that was let in."""
        return self._router.start_request(server_conn, request_conn)

    async def mount(self) -> None:
        """Has the site's application ready beside the other pages.

        Raises:
            ConfigError: it lacks a package.
        """
        assert self.site is not None
        application = await self.site.application()
        if self._mounted is not application:
            self._mounted = application
            self._router.rules.insert(0, Rule(PathMatches(r"/(dashboard|static)(/.*)?"), application))

    def worker_run(self, start_line: RequestStartLine, headers: HTTPHeaders) -> Run | None:
        """The run that a request asks to join as a worker; None if it asks for something else, or there is no run."""
        is_upgrade = headers.get("Upgrade") == protocol.UPGRADE
        if start_line.method == "GET" and start_line.path == protocol.PATH and is_upgrade:
            return self._current_run()
        return None

    async def serve_worker(self, stream: IOStream, run: Run) -> None:
        """Speaks frames on `stream` until the worker goes."""
        # Tornado would log a cancellation, by which the loop ends us when the server closes, as an error.
        with contextlib.closing(stream), contextlib.suppress(StreamClosedError, asyncio.CancelledError):
            if stream.closed():
                return
            stream.set_nodelay(True)
            notice_vanished_peer(stream.socket, self._io_timeout_s)
            stream.write(_SWITCHING.encode("ascii"))
            await run.serve(next(self._numbers), stream)


class _Request(HTTPMessageDelegate):
    """One request at the door. `headers_received` decides; what follows the headers goes to the page, if there is one.

    A worker is served within `headers_received`, so that Tornado counts its connection as open for as long as it is.
    """

    def __init__(self, door: Door, server_conn: object, request_conn: HTTP1Connection) -> None:
        self._door = door
        self._server_conn = server_conn
        self._request_conn = request_conn
        self._page: HTTPMessageDelegate | None = None

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, RequestStartLine)
        if start_line.method in ("GET", "HEAD") and start_line.path == _HEALTH_TARGET:
            self._answer(start_line, *_HEALTH)
            return None
        is_worker, site = self._door.is_authorized(headers), self._door.site
        if not is_worker and not self._is_visitor(site, start_line, headers):
            return None
        run = self._door.worker_run(start_line, headers) if is_worker else None
        if run is not None:
            return self._door.serve_worker(self._request_conn.detach(), run)
        if site is not None and site.takes(_path(start_line)):
            return self._mount(start_line, headers)
        return self._pass_on(start_line, headers)

    def _is_visitor(self, site: Site | None, start_line: RequestStartLine, headers: HTTPHeaders) -> bool:
        """Whether the site lets the request in; else it is answered."""
        if site is None or start_line.method not in _READING:
            self._answer(start_line, *_UNAUTHORIZED)
            return False
        answer = site.receive(start_line.path, headers, self._door.port)
        if answer is not None:
            status, fields, body = answer
            lines = "\r\n".join(f"{name}: {value}" for name, value in fields.items())
            self._answer(start_line, f"{status} {http.client.responses[status]}", lines, body)
            return False
        path = _path(start_line)
        is_page = path in _SITE_TARGETS or site.takes(path)
        if start_line.method in _READING and is_page and site.admits(headers, self._door.port):
            return True
        self._answer(start_line, *_UNAUTHORIZED)
        return False

    async def _mount(self, start_line: RequestStartLine, headers: HTTPHeaders) -> None:
        try:
            await self._door.mount()
        except ConfigError as error:
            self._answer(start_line, "501 Not Implemented", "Content-Type: text/plain; charset=utf-8", f"{error}\n")
            return
        except asyncio.CancelledError:  # the server is being closed
            self._request_conn.detach().close()
            return
        received = self._pass_on(start_line, headers)
        if received is not None:
            await received

    def _pass_on(self, start_line: RequestStartLine, headers: HTTPHeaders) -> Awaitable[None] | None:
        self._page = self._door.page(self._server_conn, self._request_conn)
        return self._page.headers_received(start_line, headers)

    def _answer(self, start_line: RequestStartLine, status: str, headers: str, body: str) -> None:
        """Writes a whole response, which fits into any socket's buffer, and closes the connection."""
        content = body.encode()
        head = f"HTTP/1.1 {status}\r\n{headers}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        response = head.encode("ascii") + (b"" if start_line.method == "HEAD" else content)
        with contextlib.closing(self._request_conn.detach()) as stream, contextlib.suppress(StreamClosedError):
            stream.write(response)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._page.data_received(chunk) if self._page else None

    def finish(self) -> None:
        if self._page:
            self._page.finish()

    def on_connection_close(self) -> None:
        if self._page:
            self._page.on_connection_close()


class _Page(tornado.web.RequestHandler):
    """Answers errors as one line of plain text, and keeps Tornado's version to itself."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code} {self._reason}\n")

    def current_run(self) -> Run | None:
        current_run: CurrentRun = self.application.settings["current_run"]
        return current_run()


class _StatusPage(_Page):
    def get(self) -> None:
        run = self.current_run()
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(_without_nan(asdict(run.status())) if run else {"run": 0}))


class _Metrics(_Page):
    async def get(self) -> None:
        site: Site | None = self.application.settings["site"]
        if site is None:
            raise tornado.web.HTTPError(404)
        try:
            # On another thread: of many workers it takes milliseconds, for which no pull is to wait.
            body, content_type = await asyncio.get_running_loop().run_in_executor(
                None, site.metrics, self.request.headers.get("Accept", "")
            )
        except ConfigError as error:
            self.set_status(501)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"{error}\n")
            return
        self.set_header("Content-Type", content_type)
        self.finish(body)


class _Workers(_Page):
    """Gets what could not become a worker's connection."""

    def get(self) -> None:
        if self.request.headers.get("Upgrade") == protocol.UPGRADE:
            raise tornado.web.HTTPError(503, reason="No run has begun")
        self.set_header("Upgrade", protocol.UPGRADE)
        raise tornado.web.HTTPError(426, reason=f"Upgrade to {protocol.UPGRADE} required")


class _NotFound(_Page):
    def prepare(self) -> None:
        raise tornado.web.HTTPError(404)


def _path(start_line: RequestStartLine) -> str:
    return start_line.path.partition("?")[0]


def _without_nan(status: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for it."""
    scalars = {name: value if math.isfinite(value) else None for name, value in status["scalars"].items()}
    return {**status, "scalars": scalars}


def _log_request(handler: tornado.web.RequestHandler) -> None:
    """Logs path and status alone: a header may hold the token."""
    logger.debug("%s %r %d", handler.request.method, handler.request.path, handler.get_status())
