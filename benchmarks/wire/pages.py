"""What watching costs the workers: one server while nobody watches, while it is watched, and with five pages open.

All is measured on one server and the same clients, one after the other in each round: two servers alike differ by more,
by where their memory lies. Everything that a session does to be watched goes on in the server's process: it keeps
spans, is observed twice a second, looks at the weights, and has the dashboard mounted. The pages are connections that
speak the page's protocol to the end, as a browser does, and draw nothing: on two cores five browsers' drawing would be
measured, not the server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from bokeh.util.token import generate_jwt_token, generate_session_id
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from benchmarks.measuring.processes import Peer, seconds_of, started, together
from benchmarks.measuring.report import Report, median_ratio, say
from benchmarks.wire.fleet import DEADLINE_S, Fleet, traffic_of
from benchmarks.wire.parameter_server import RECEIVE_BUFFER_BYTES, Client, Server, Traffic
from tensorspark.dashboard.site import Site
from tensorspark.driver.watching import RunWatch
from tensorspark.ps.server import ParameterServer
from tensorspark.telemetry.collector import Collector
from tensorspark.telemetry.records import RunBegan, Tensor
from tensorspark.telemetry.view import RunView
from tensorspark.weights.combiners import DeltaWeightCombiner

NUM_PAGES = 5
_AT_LEAST = 0.97
_TOKEN = "a-token-of-the-benchmark"
_NUM_CLIENTS = 2
_OPERATIONS = ("pull", "alternate")
# By size, how many times a client does it in one measurement: some seconds, as pages are told once a second.
_NUM_TRANSFERS = {0.4: 4000, 10.0: 250}
_NUM_QUICK_TRANSFERS = {0.4: 600}
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 7, 2
_UNWATCHED, _WATCHED, _SHOWN = "unwatched", "watched", f"{NUM_PAGES} pages"
_OPEN_S = 30.0


class WatchedServer(Server):
    """As a session's server; what a session does so that it can be watched begins and ends between measurements."""

    def __init__(self, traffic: Traffic, num_clients: int) -> None:
        self._traffic = traffic
        self._idle_bytes = 0
        self._num_clients = num_clients
        self._view = RunView()
        self._site = Site(lambda: self._view, _TOKEN, has_dashboard=True)
        self._watch: RunWatch | None = None
        self._server = server = ParameterServer(
            traffic.layout(), "127.0.0.1", receive_buffer_bytes=RECEIVE_BUFFER_BYTES, site=self._site
        )
        server.begin_run(
            traffic.initial(),
            DeltaWeightCombiner(),
            num_clients,
            compression=traffic.compression,
            keeps_spans=True,
        )
        self.unwatch()

    def port(self) -> int:
        return self._server.port

    def watch(self) -> None:
        """Begins what a session does for who watches."""
        if self._watch is not None:
            return
        self._collector().keeps_spans = True
        self._watch = RunWatch(
            self._server,
            self._view,
            [],
            self._began(),
            log_dir=None,
            trace=None,
            wants_weights=lambda: self._site.is_watched,
        )

    def unwatch(self) -> None:
        """Ends it."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end(None)
        self._collector().keeps_spans = False

    def close(self) -> None:
        self.unwatch()
        super().close()

    def _collector(self) -> Collector:
        assert isinstance(self._server, ParameterServer)
        run = self._server._run
        assert run is not None
        return run._observer.collector

    def _began(self) -> RunBegan:
        layout = self._server.layout
        return RunBegan(
            seconds=0.0,
            run=1,
            name="wire",
            started_at=time.time(),
            mode="asynchronous",
            num_partitions=self._num_clients,
            num_epochs=1,
            combiner="DeltaWeightCombiner",
            settings={},
            tensors=tuple(Tensor(spec.name, tuple(spec.shape), spec.dtype) for spec in layout.specs),
            model_bytes=layout.num_bytes,
            tensorspark_version="",
        )


class Pages:
    """Pages that are open, or not, on a thread of this process."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._num_frames: list[int] = []
        self._failure = ""
        self._loop = asyncio.new_event_loop()
        self._showing: concurrent.futures.Future[None] | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def open(self, num_pages: int) -> None:
        """Opens pages, and returns when each has had a frame."""
        self._num_frames = [0] * num_pages
        self._showing = asyncio.run_coroutine_threadsafe(self._run(), self._loop)
        deadline = time.monotonic() + _OPEN_S
        while not all(self._num_frames):
            if self._failure or time.monotonic() > deadline:
                raise TimeoutError(f"{num_pages} pages were not shown within {_OPEN_S:g} s {self._failure}")
            time.sleep(0.1)

    def close_all(self) -> None:
        """Closes them."""
        showing, self._showing = self._showing, None
        if showing is not None:
            showing.cancel()
            with contextlib.suppress(concurrent.futures.CancelledError):
                showing.result(_OPEN_S)

    def num_frames(self) -> list[int]:
        """Frames that came so far, to each page."""
        if self._failure:
            raise RuntimeError(self._failure)
        return list(self._num_frames)

    async def _run(self) -> None:
        try:
            await asyncio.gather(*(self._show(page) for page in range(len(self._num_frames))))
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"

    async def _show(self, page: int) -> None:
        """Opens a page, asks for its frames, and takes them until the server goes."""
        url = f"ws://127.0.0.1:{self._port}/dashboard/ws"
        request = HTTPRequest(url, headers={"Authorization": f"Bearer {_TOKEN}"})
        token = generate_jwt_token(generate_session_id())
        with contextlib.closing(await websocket_connect(request, subprotocols=["bokeh", token])) as socket:
            await _read(socket)  # that it is open
            await _write(socket, "PULL-DOC-REQ", {})
            _, document = await _read(socket)
            carrier = re.search(r'"name":"[\w.]*TensorsparkCarrier","id":"(\w+)"', document)
            assert carrier is not None, document[:1000]
            change = {"kind": "ModelChanged", "model": {"id": carrier[1]}, "attr": "asked", "new": 1}
            await _write(socket, "PATCH-DOC", {"events": [change]})
            while True:
                kind, _ = await _read(socket)
                self._num_frames[page] += kind == "PATCH-DOC"


async def _read(socket: WebSocketClientConnection) -> tuple[str, str]:
    """A message of Bokeh's protocol: its kind and content."""
    header, _, content = [await socket.read_message() for _ in range(3)]
    if header is None or content is None:
        raise EOFError("the server closed a page's connection")
    fields = json.loads(header)
    for _ in range(2 * fields.get("num_buffers", 0)):
        await socket.read_message()
    return fields["msgtype"], str(content)


async def _write(socket: WebSocketClientConnection, kind: str, content: Mapping[str, Any]) -> None:
    for part in ({"msgid": str(time.monotonic()), "msgtype": kind}, {}, content):
        await socket.write_message(json.dumps(part))


def measure(report: Report, is_quick: bool) -> None:
    """Adds the rows of all sizes."""
    for size_mb, count in (_NUM_QUICK_TRANSFERS if is_quick else _NUM_TRANSFERS).items():
        _measure_size(report, size_mb, count, _NUM_QUICK_ROUNDS if is_quick else _NUM_ROUNDS)


def _measure_size(report: Report, size_mb: float, count: int, num_rounds: int) -> None:
    traffic = traffic_of(size_mb)
    say(f"{size_mb:g} MB: unwatched, watched, and with {NUM_PAGES} pages open, {num_rounds} rounds")
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    core_ms: dict[tuple[str, str], list[float]] = defaultdict(list)
    num_frames: list[int] = []
    with (
        _serving(traffic) as fleet,
        Peer("pages", Pages, fleet.server.call("port"), deadline_s=DEADLINE_S) as pages,
    ):
        for number in range(num_rounds + 1):  # the first warms up
            names = [_UNWATCHED, _WATCHED, _SHOWN]
            for name in names if number % 2 else reversed(names):  # none is always behind the same
                fleet.server.call("unwatch" if name == _UNWATCHED else "watch")
                if name == _SHOWN:
                    pages.call("open", NUM_PAGES)
                for operation in _OPERATIONS:
                    before = fleet.server.call("processor_s")
                    seconds = seconds_of(together(fleet.clients, operation, count, deadline_s=DEADLINE_S))
                    spent_s = fleet.server.call("processor_s") - before
                    if number:
                        rates[operation, name].append(_NUM_CLIENTS * count / seconds)
                        core_ms[operation, name].append(1000 * spent_s / (_NUM_CLIENTS * count))
                if name == _SHOWN:
                    num_frames.append(min(pages.call("num_frames")))
                    pages.call("close_all")
        fleet.check()
    report.add(f"{size_mb:g} MB, frames that each page was told in a round", statistics.median(num_frames), "")
    for operation in _OPERATIONS:
        what = f"{'pull' if operation == 'pull' else 'push and pull'} {size_mb:g} MB"
        report.add(f"{what}, unwatched", statistics.median(rates[operation, _UNWATCHED]), "/s")
        for name in (_UNWATCHED, _WATCHED, _SHOWN):
            report.add(f"{what}, {name}, of a server's core", statistics.median(core_ms[operation, name]), "ms each")
        for name in (_WATCHED, _SHOWN):
            ratio = median_ratio(rates[operation, name], rates[operation, _UNWATCHED])
            report.add(f"{what}, {name} / unwatched", ratio, "x", at_least=_AT_LEAST)


@contextlib.contextmanager
def _serving(traffic: Traffic) -> Iterator[Fleet]:
    with Peer("parameter server", WatchedServer, traffic, _NUM_CLIENTS, deadline_s=DEADLINE_S) as server:
        where = server.call("where")
        clients = [
            Peer(f"client {index}", Client, where, index, traffic, deadline_s=DEADLINE_S)
            for index in range(_NUM_CLIENTS)
        ]
        with started(clients):
            yield Fleet(traffic, server, clients)
