"""What watching costs the workers: a server that nobody watches, one that is watched, and one with five pages open.

Everything that a session does to be watched goes on in the watched server's process: it keeps spans, is observed twice
a second, looks at the weights, and has the dashboard mounted. The pages are connections that speak the page's protocol
to the end, as a browser does, and draw nothing: on two cores five browsers' drawing would be measured, not the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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
from tensorspark.telemetry.records import RunBegan, Tensor
from tensorspark.telemetry.view import RunView
from tensorspark.weights.combiners import DeltaWeightCombiner

NUM_PAGES = 5
_AT_LEAST = 0.97
_TOKEN = "a-token-of-the-benchmark"
_NUM_CLIENTS = 2
_OPERATIONS = ("pull", "alternate")
# By size, how many times a client does it in one measurement: some seconds, as pages are told once a second.
_NUM_TRANSFERS = {0.4: 6000, 10.0: 300}
_NUM_QUICK_TRANSFERS = {0.4: 600}
_NUM_ROUNDS, _NUM_QUICK_ROUNDS = 7, 2
_OPEN_S = 30.0


class WatchedServer(Server):
    """As a session's server, with all that a session does so that it can be watched."""

    def __init__(self, traffic: Traffic, num_clients: int) -> None:
        self._traffic = traffic
        self._idle_bytes = 0
        self._view = RunView()
        self._site = Site(lambda: self._view, _TOKEN, has_dashboard=True)
        layout = traffic.layout()
        self._server = server = ParameterServer(
            layout, "127.0.0.1", receive_buffer_bytes=RECEIVE_BUFFER_BYTES, site=self._site
        )
        server.begin_run(
            traffic.initial(),
            DeltaWeightCombiner(),
            num_clients,
            compression=traffic.compression,
            keeps_spans=True,
        )
        began = RunBegan(
            seconds=0.0,
            run=1,
            name="wire",
            started_at=time.time(),
            mode="asynchronous",
            num_partitions=num_clients,
            num_epochs=1,
            combiner="DeltaWeightCombiner",
            settings={},
            tensors=tuple(Tensor(spec.name, tuple(spec.shape), spec.dtype) for spec in layout.specs),
            model_bytes=layout.num_bytes,
            tensorspark_version="",
        )
        self._watch = RunWatch(
            server,
            self._view,
            [],
            began,
            began_at=time.monotonic(),
            log_dir=None,
            trace=None,
            wants_weights=lambda: self._site.is_watched,
        )

    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        self._watch.end(None)
        super().close()


class Pages:
    """Pages that are open, on a thread of this process."""

    def __init__(self, port: int, num_pages: int) -> None:
        self._port = port
        self._num_frames = [0] * num_pages
        self._failure = ""
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()
        deadline = time.monotonic() + _OPEN_S
        while not all(self._num_frames):
            if self._failure or time.monotonic() > deadline:
                raise TimeoutError(f"{num_pages} pages were not shown within {_OPEN_S:g} s {self._failure}")
            time.sleep(0.1)

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
        socket = await websocket_connect(request, subprotocols=["bokeh", token])
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
    with (
        _serving("unwatched", Server, traffic) as unwatched,
        _serving("watched", WatchedServer, traffic) as watched,
        _serving("with pages", WatchedServer, traffic) as shown,
        Peer("pages", Pages, shown.server.call("port"), NUM_PAGES, deadline_s=DEADLINE_S) as pages,
    ):
        fleets = {"unwatched": unwatched, "watched": watched, f"{NUM_PAGES} pages": shown}
        first = pages.call("num_frames")
        for number in range(num_rounds + 1):  # the first warms up
            names = list(fleets)[number % 3 :] + list(fleets)[: number % 3]  # none is always behind the same
            for operation, name in itertools.product(_OPERATIONS, names):
                before = fleets[name].server.call("processor_s")
                seconds = seconds_of(together(fleets[name].clients, operation, count, deadline_s=DEADLINE_S))
                if number:
                    rates[operation, name].append(_NUM_CLIENTS * count / seconds)
                    spent_s = fleets[name].server.call("processor_s") - before
                    core_ms[operation, name].append(1000 * spent_s / (_NUM_CLIENTS * count))
        last = pages.call("num_frames")
        for fleet in fleets.values():
            fleet.check()
    report.add(f"{size_mb:g} MB, frames that each page was told", min(map(int.__sub__, last, first)), "")
    for operation in _OPERATIONS:
        alone = rates[operation, "unwatched"]
        what = f"{'pull' if operation == 'pull' else 'push and pull'} {size_mb:g} MB"
        report.add(f"{what}, unwatched", statistics.median(alone), "/s")
        for name in fleets:
            report.add(f"{what}, {name}, of a server's core", statistics.median(core_ms[operation, name]), "ms each")
            if name != "unwatched":
                ratio = median_ratio(rates[operation, name], alone)
                report.add(f"{what}, {name} / unwatched", ratio, "x", at_least=_AT_LEAST)


@contextlib.contextmanager
def _serving(name: str, make: Callable[[Traffic, int], Server], traffic: Traffic) -> Iterator[Fleet]:
    with Peer(f"server, {name}", make, traffic, _NUM_CLIENTS, deadline_s=DEADLINE_S) as server:
        where = server.call("where")
        clients = [
            Peer(f"client {index}, {name}", Client, where, index, traffic, deadline_s=DEADLINE_S)
            for index in range(_NUM_CLIENTS)
        ]
        with started(clients):
            yield Fleet(traffic, server, clients)
