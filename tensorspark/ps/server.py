"""The parameter server: a Tornado HTTP server on a thread of the driver, in front of one `Run` at a time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import hmac
import itertools
import json
import logging
import math
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import tornado.httpserver
import tornado.web

from tensorspark.errors import ConfigError, SessionClosedError, TensorsparkError
from tensorspark.history import Point, WorkerReport
from tensorspark.ps import protocol
from tensorspark.ps.connection import Connection
from tensorspark.ps.run import Run
from tensorspark.ps.state import Status
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_T = TypeVar("_T")


class ParameterServer:
    """Serves the weights of one layout; runs follow one another on it. Its methods may be called from any thread.

    ``GET /healthz`` is open and says that the server lives. ``GET /status`` answers JSON, and ``GET /workers`` upgrades
    to frames; both want the header ``Authorization: Bearer <token>`` and answer 401 without it.

    Args:
        layout: of the weights.
        host: advertised to workers. The server listens on this address alone if it is one of this machine's, else
            on all interfaces (a forwarded address, say).
        port: 0 takes a free one.
        receive_buffer_bytes: bound of the memory for pushes in arrival; one push always fits.
        io_timeout_s: deadline of one transfer.

    Raises:
        ConfigError: the port is taken, or the host has no address.

    >>> from tensorspark.weights.layout import TensorSpec
    >>> with ParameterServer(WeightLayout([TensorSpec("w", (2,), "float32")]), "127.0.0.1") as server:
    ...     server.port > 0
    True
    """

    def __init__(
        self,
        layout: WeightLayout,
        host: str,
        port: int = 0,
        *,
        receive_buffer_bytes: int = 2**28,
        io_timeout_s: float = 120.0,
    ) -> None:
        self.layout = layout
        self.host = host
        self.token = secrets.token_urlsafe(32)
        self._receive_buffer_bytes = receive_buffer_bytes
        self._io_timeout_s = io_timeout_s
        self._run: Run | None = None
        self._num_runs = 0
        self._connection_numbers = itertools.count(1)
        self._sockets = _bind(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tensorspark-merge")
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name="tensorspark-server", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"ParameterServer(host={self.host!r}, port={self.port}, closed={self._closed})"

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Runs

    def begin_run(self, weights: Buffer, combiner: WeightCombiner, num_partitions: int) -> int:
        """Starts a run from `weights` (copied) and returns its number; workers of earlier runs are refused from now."""

        def begin() -> int:
            if self._run is not None:
                self._run.close()
                self._run = None  # so that its buffers are not held beside the new run's
            self._num_runs += 1
            self._run = Run(
                self._num_runs,
                self.layout,
                weights,
                combiner,
                num_partitions,
                receive_buffer_bytes=self._receive_buffer_bytes,
                executor=self._executor,
            )
            return self._num_runs

        return self._call(begin)

    def stop_run(self, failure: TensorsparkError | None = None) -> None:
        """Ends the current run: from now on its workers are refused."""
        self._call(lambda: self._current().stop(failure))

    def status(self) -> Status:
        return self._call(lambda: self._current().status())

    def failure(self) -> TensorsparkError | None:
        """The first thing that went wrong in the current run, as a worker or the combiner reported it."""
        return self._call(lambda: self._current().state.failure)

    def records(self) -> tuple[tuple[Point, ...], tuple[WorkerReport, ...]]:
        """The current run's course so far, and what every worker did."""
        return self._call(lambda: (self._current().points(), self._current().reports()))

    def read_weights(self, out: Buffer) -> int:
        """Copies the newest weights to `out` and returns their version: the number of pushes in them."""
        run = self._current()
        snapshot = self._call(run.store.pin)
        try:
            out[:] = snapshot.buffer
        finally:
            self._call(lambda: run.store.unpin(snapshot))
        return snapshot.version

    def close(self) -> None:
        """Ends the run, closes all connections and the port, and ends the threads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_CALL_TIMEOUT_S)
        self._executor.shutdown(wait=False, cancel_futures=True)  # a user's combiner may be at it for long

    # The loop's thread

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        application = tornado.web.Application(
            [(r"/healthz", _Health), (r"/status", _StatusPage), (protocol.PATH, _Workers)],
            parameter_server=self,
            log_function=_log_request,
        )
        http = tornado.httpserver.HTTPServer(
            application, max_buffer_size=self.layout.num_bytes + 2**20, max_header_size=2**14, max_body_size=2**14
        )
        http.add_sockets(self._sockets)
        await self._closing.wait()
        http.stop()
        if self._run is not None:
            self._run.close()
        await http.close_all_connections()

    def _call(self, function: Callable[[], _T]) -> _T:
        """Runs `function` on the loop and returns its result."""
        if self._closed:
            raise SessionClosedError("the parameter server is closed: stop_param_server() or close() ended it")
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return future.result(_CALL_TIMEOUT_S)

    def _current(self) -> Run:
        if self._run is None:
            raise RuntimeError("no run has begun on this server")
        return self._run

    # For the handlers

    def is_authorized(self, header: str | None) -> bool:
        """Whether an ``Authorization`` header carries this server's token."""
        return hmac.compare_digest((header or "").encode(), f"Bearer {self.token}".encode())

    async def serve_worker(self, handler: tornado.web.RequestHandler) -> None:
        """Takes over the connection of an upgraded request, until the worker goes."""
        run = self._run
        if run is None:
            raise tornado.web.HTTPError(503, reason="No run has begun")
        handler.set_status(101)
        handler.set_header("Upgrade", protocol.UPGRADE)
        handler.set_header("Connection", "Upgrade")
        handler.finish()
        stream = handler.detach()
        stream.set_nodelay(True)
        _notice_vanished_peer(stream.socket, self._io_timeout_s)
        number = next(self._connection_numbers)
        await run.serve(Connection(number, stream, run.layout, run.pool, self._io_timeout_s))


class _Handler(tornado.web.RequestHandler):
    """Answers errors as one line of plain text, and keeps Tornado's version to itself."""

    @property
    def parameter_server(self) -> ParameterServer:
        server: ParameterServer = self.application.settings["parameter_server"]
        return server

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code} {self._reason}\n")

    def require_token(self) -> None:
        if not self.parameter_server.is_authorized(self.request.headers.get("Authorization")):
            raise tornado.web.HTTPError(401)


class _Health(_Handler):
    def get(self) -> None:
        self.write({"status": "ok"})


class _StatusPage(_Handler):
    def get(self) -> None:
        self.require_token()
        run = self.parameter_server._run
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(_without_nan(asdict(run.status())) if run else {"run": 0}))


class _Workers(_Handler):
    async def get(self) -> None:
        self.require_token()
        if self.request.headers.get("Upgrade") != protocol.UPGRADE:
            self.set_header("Upgrade", protocol.UPGRADE)
            raise tornado.web.HTTPError(426, reason=f"Upgrade to {protocol.UPGRADE} required")
        await self.parameter_server.serve_worker(self)


def _without_nan(status: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for it."""
    scalars = {name: value if math.isfinite(value) else None for name, value in status["scalars"].items()}
    return {**status, "scalars": scalars}


def _log_request(handler: tornado.web.RequestHandler) -> None:
    """Logs path and status alone: a header may hold the token."""
    logger.debug("%s %s %d", handler.request.method, handler.request.path, handler.get_status())


def _notice_vanished_peer(connection: socket.socket, deadline_s: float) -> None:
    """Has the kernel close the connection of a host that lost power or network and will never say so.

    Without it the lease of such a worker would last for ever, and Spark's retry of the partition wait as long.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, round(deadline_s / 4))
    for option, value in (("TCP_KEEPIDLE", probe_s), ("TCP_KEEPINTVL", probe_s), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS calls the first TCP_KEEPALIVE
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _bind(host: str, port: int) -> list[socket.socket]:
    try:
        return _listening_sockets(host, port)
    except socket.gaierror as error:
        raise ConfigError(
            f"server_host {host!r} has no address on the driver ({error}); set server_host "
            f"(or spark.tensorspark.server.host) to a name or address of the driver that executors can reach"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and host:
            logger.warning("server_host %s is not an address of this machine: listening on all interfaces", host)
            return _bind("", port)
        raise ConfigError(
            f"port {port} cannot be opened on {host or 'any interface'}: {error}; choose another server_port "
            f"(or spark.tensorspark.server.port), or 0 for a free one"
        ) from error


def _listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One socket for each of the host's addresses, all on one port."""
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if _is_own_name(host) and all(str(address[4][0]).startswith("127.") for address in addresses):
        # Debian resolves a machine's own name to 127.0.1.1; elsewhere it stands for an address of the network.
        return _listening_sockets("", port)
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(addresses):
        try:
            listener = socket.create_server((address[0], port), family=family, backlog=1024)
        except OSError as error:
            if sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # "localhost" may have an IPv6 address that the machine does not
            for opened in sockets:
                opened.close()
            raise
        listener.setblocking(False)
        port = listener.getsockname()[1]
        sockets.append(listener)
    return sockets


def _is_own_name(host: str) -> bool:
    return host not in ("", "localhost") and host in (socket.gethostname(), socket.getfqdn())
