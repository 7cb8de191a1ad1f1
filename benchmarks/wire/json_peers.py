"""A parameter server as the original Tensorspark's: JSON text over a WebSocket, on Tornado.

One message pulls all weights, one pushes them, each weight as nested lists of numbers; the server holds numpy arrays.
Other than the original, the server answers a push once it is in the weights, so that there is an end to measure.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import numpy as np
import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket
from numpy.typing import NDArray

from benchmarks.measuring.processes import DEADLINE_S, Span, wait_until

_HOST = "127.0.0.1"
_MAX_MESSAGE_BYTES = 2**30
_NUM_COLUMNS = 100

Weights = dict[str, NDArray[np.float32]]


class JsonServer:
    """Serves one matrix of random weights, on a thread, until the process ends."""

    def __init__(self, num_bytes: int) -> None:
        self._weights = _random_weights(num_bytes, seed=0)
        self._sockets = tornado.netutil.bind_sockets(0, address=_HOST)
        threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True).start()

    def port(self) -> int:
        port: int = self._sockets[0].getsockname()[1]
        return port

    async def _serve(self) -> None:
        application = tornado.web.Application(
            [(r"/", _Handler, {"weights": self._weights})], websocket_max_message_size=_MAX_MESSAGE_BYTES
        )
        server = tornado.httpserver.HTTPServer(application)
        server.add_sockets(self._sockets)
        await asyncio.Event().wait()


class _Handler(tornado.websocket.WebSocketHandler):
    def initialize(self, weights: Weights) -> None:
        self._weights = weights

    def on_message(self, message: str | bytes) -> None:
        request = json.loads(message)
        if request["worker_op"] == "pull":
            self.write_message({"parameters": _as_lists(self._weights)})
            return
        for name, delta in _as_arrays(request["parameters"]).items():
            self._weights[name] = self._weights[name] + delta
        self.write_message({"accepted": True})


class JsonClient:
    """A worker. Its methods return when the transfers began and ended."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self._delta = _random_weights(num_bytes, seed=1)
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(self._connect(port))
        self._initial = self._pull()
        self._num_pushes = 0

    def pull(self, start_at: float, count: int) -> Span:
        """Pulls `count` times."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            self._pull()
        return began, time.monotonic()

    def push(self, start_at: float, count: int) -> Span:
        """Pushes `count` times; ends when all are in the weights."""
        wait_until(start_at)
        began = time.monotonic()
        for _ in range(count):
            self._exchange({"worker_op": "push", "parameters": _as_lists(self._delta)})
        self._num_pushes += count
        return began, time.monotonic()

    def check_weights(self) -> None:
        """Raises ValueError unless the server's weights are the initial ones and all that was pushed."""
        weights = self._pull()
        for name, initial in self._initial.items():
            if not np.allclose(weights[name], initial + self._num_pushes * self._delta[name], atol=1e-4):
                raise ValueError(f"{name} is not the sum of {self._num_pushes} pushes")

    def close(self) -> None:
        self._connection.close()
        self._runner.close()

    def _pull(self) -> Weights:
        return _as_arrays(self._exchange({"worker_op": "pull"})["parameters"])

    async def _connect(self, port: int) -> tornado.websocket.WebSocketClientConnection:
        return await tornado.websocket.websocket_connect(
            f"ws://{_HOST}:{port}/", connect_timeout=DEADLINE_S, max_message_size=_MAX_MESSAGE_BYTES
        )

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._runner.run(asyncio.wait_for(self._ask(json.dumps(request)), DEADLINE_S))

    async def _ask(self, message: str) -> dict[str, Any]:
        await self._connection.write_message(message)
        answer = await self._connection.read_message()
        if answer is None:
            raise ConnectionError("the JSON server closed the connection")
        decoded: dict[str, Any] = json.loads(answer)
        return decoded


def _random_weights(num_bytes: int, seed: int) -> Weights:
    shape = (num_bytes // 4 // _NUM_COLUMNS, _NUM_COLUMNS)
    return {"weights": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def _as_lists(weights: Weights) -> dict[str, list[Any]]:
    return {name: weight.tolist() for name, weight in weights.items()}


def _as_arrays(lists: dict[str, list[Any]]) -> Weights:
    return {name: np.array(values, np.float32) for name, values in lists.items()}
