"""The processes of all shards but the driver's, and the channels to them."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any, Protocol

from tensorspark.errors import CombinerError, ShardLostError, TensorsparkError
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.records import as_plain
from tensorspark.shards.channel import Channel, Listener, Reply
from tensorspark.shards.host import Driver, ShardJob
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import Buffer

_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 60.0


class Hosts(Protocol):
    """The processes of shards, or the Spark tasks."""

    def failure(self) -> str | None:
        """How one of them ended that should not have."""

    def close(self) -> None: ...


class Fleet:
    """The processes of all shards but the driver's, for one run.

    Args:
        listen_host: the driver's address, which the processes connect to.
        start: starts the processes.
    """

    def __init__(
        self, listen_host: str, jobs: Sequence[ShardJob], start: Callable[[Sequence[ShardJob]], Hosts]
    ) -> None:
        self._failure: TensorsparkError | None = None
        self._channels: dict[int, Channel] = {}
        self._arrived = threading.Condition()
        self._is_closing = False
        key = secrets.token_bytes(32)
        self._indices = [job.index for job in jobs]
        self._listener = Listener(listen_host, key, self._connected)
        driver = Driver(listen_host, self._listener.port, key)
        try:
            self._hosts = start([replace(job, driver=driver) for job in jobs])
        except BaseException:
            self._listener.close()
            raise

    def begin(self, parts: Sequence[tuple[Buffer, CombinerState, RunCheckpoint | None]]) -> list[Mapping[str, Any]]:
        """Gives each its weights, its combiner's state, and where a restored run stood; returns what workers need.

        Raises:
            ShardLostError: one did not start.
        """
        try:
            self._wait_for_all()
            answers = [
                self._channels[index].call("begin", _begin_values(state, resume), [weights, *state.slots.values()])
                for index, (weights, state, resume) in zip(self._indices, parts, strict=True)
            ]
            return [answer.result(_CALL_TIMEOUT_S)[0] for answer in answers]
        except BaseException:
            self.close()
            raise

    def request(self, name: str, values: Mapping[str, Any] | None = None) -> list[Future[Reply]]:
        return [self._channels[index].call(name, values) for index in self._indices]

    def failure(self) -> TensorsparkError | None:
        ended = self._hosts.failure()
        if ended is None:
            return self._failure
        return ShardLostError(
            f"{ended}: the part of the weights that it served is lost, and the run with it; what it said is in the "
            f"driver's standard error; go on from the last checkpoint with SparkSession.restore"
        )

    def close(self) -> None:
        self._is_closing = True
        self._listener.close()
        for channel in list(self._channels.values()):
            with contextlib.suppress(ShardLostError, FutureTimeoutError):
                channel.call("end").result(1.0)
            channel.close()
        self._hosts.close()

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        with self._arrived:
            while len(self._channels) < len(self._indices):
                if failure := self.failure():
                    raise failure
                if time.monotonic() > deadline:
                    raise ShardLostError(
                        f"{len(self._indices) - len(self._channels)} of {len(self._indices)} shards did not start "
                        f"within {_START_TIMEOUT_S:g} s"
                    )
                self._arrived.wait(0.1)

    def _connected(self, plain: socket.socket) -> None:
        has_channel = threading.Event()
        channel: Channel

        def hello(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
            has_channel.wait()
            with self._arrived:
                self._channels[values["index"]] = channel
                self._arrived.notify_all()
            return {}, ()

        channel = Channel(plain, "a shard's process", {"hello": hello, "failed": self._failed}, self._lost)
        has_channel.set()

    def _failed(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        kind = CombinerError if values["kind"] == CombinerError.__name__ else ShardLostError
        self._failure = self._failure or kind(values["message"])
        return {}, ()

    def _lost(self) -> None:
        if not self._is_closing:
            self._failure = self._failure or ShardLostError("the connection to a shard's process broke")


def _begin_values(state: CombinerState, resume: RunCheckpoint | None) -> dict[str, Any]:
    return {
        "has_state": bool(state.slots or state.values),
        "slots": list(state.slots),
        "combiner_values": as_plain(state.values),
        "resume": resume
        and {
            "version": resume.version,
            "partitions": as_plain(resume.partitions),
            "epochs": as_plain(resume.epochs),
            "is_complete": resume.is_complete,
        },
    }
