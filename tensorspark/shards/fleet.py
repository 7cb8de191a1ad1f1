"""The processes of all shards but the driver's, and the channels to them."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any, Protocol

from tensorspark.errors import CombinerError, ShardLostError, TensorsparkError
from tensorspark.plain import as_plain
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.shards.channel import SILENCE_TIMEOUT_S, Channel, Listener, Reply
from tensorspark.shards.host import Driver, ShardJob
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import Buffer

_CALL_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 60.0  # at least: `start_timeout_s` may be longer

# What a network must bring at least, for what it moves to arrive in time.
_MIN_BYTES_PER_S = 10**7

_WHAT_NOW = (
    "the part of the weights that it served is lost, and the run with it; go on from the last checkpoint with "
    "SparkSession.restore"
)

_WHY_SLOW = (
    f"its machine has too much to do, or the network between it and the driver brings less than "
    f"{_MIN_BYTES_PER_S / 10**6:g} MB/s; give it more of either, or take fewer shards (spark.tensorspark.num.shards)"
)
_WHY_LATE = {
    "await_epoch": "a push of the epoch, which the driver's shard has, did not come to it; look at Spark's failed tasks"
    " for the worker that died, and whether there was a slot for its successor (spark.tensorspark.recovery.timeout)"
}


def deadline_after(num_bytes: int = 0) -> float:
    """When a call must be answered, on the monotonic clock, that moves so many bytes."""
    return time.monotonic() + _CALL_TIMEOUT_S + num_bytes / _MIN_BYTES_PER_S


class Hosts(Protocol):
    """The processes of shards, or the Spark tasks."""

    def failure(self) -> str | None:
        """How one of them ended that should not have."""

    def close(self, lost: Collection[int] = ()) -> None:
        """Waits for them, which end when their driver's channel does, and ends those that do not.

        Args:
            lost: shards that give no sign of life: there is nothing to wait for.
        """


class Fleet:
    """The processes of all shards but the driver's, for one run.

    Args:
        listen_host: the driver's address, which the processes connect to.
        start: starts the processes.

    Attributes:
        is_closing: whether the driver is done with them, so that their end is none of a failure.
    """

    def __init__(
        self, listen_host: str, jobs: Sequence[ShardJob], start: Callable[[Sequence[ShardJob]], Hosts]
    ) -> None:
        self._failure: TensorsparkError | None = None
        self._channels: dict[int, Channel] = {}
        self._lost: set[int] = set()  # of the channels
        self._arrived = threading.Condition()
        self.is_closing = False
        self._start_timeout_s = max([_START_TIMEOUT_S, *(job.sync.start_timeout_s for job in jobs)])
        key = secrets.token_bytes(32)
        self._indices = [job.index for job in jobs]
        self._listener = Listener(listen_host, key, self._connected)
        self._driver = Driver(listen_host, self._listener.port, key)
        try:
            self._hosts = start([replace(job, driver=self._driver) for job in jobs])
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
            num_bytes, answers = 0, []
            for index, (weights, state, resume) in zip(self._indices, parts, strict=True):
                raw = [weights, *state.slots.values()]
                num_bytes += sum(buffer.nbytes for buffer in raw)
                answers.append(self._channels[index].call("begin", _begin_values(state, resume), raw))
            return [values for values, _ in self.wait("begin", answers, deadline_after(num_bytes))]
        except BaseException:
            self.close()
            raise

    def request(self, name: str, values: Mapping[str, Any] | None = None) -> list[Future[Reply]]:
        """Calls all, without waiting: their answers, in the order of the shards."""
        return [self._channels[index].call(name, values) for index in self._indices]

    def ask(
        self, name: str, values: Mapping[str, Any] | None = None, num_bytes: int = 0, *, waits_s: float = 0.0
    ) -> list[Reply]:
        """Calls all, and waits as long as their answers, of `num_bytes` altogether, may take.

        Args:
            waits_s: how long a shard may have to wait for others before it can do it.

        Raises:
            ShardLostError: one is gone, could not do it, or took longer.
        """
        return self.wait(name, self.request(name, values), deadline_after(num_bytes) + waits_s)

    def ask_one(self, position: int, name: str, num_bytes: int) -> Reply:
        """As `ask`, of the shard at this position among these."""
        channel = self._channels[self._indices[position]]
        return _answer_of(channel, name, channel.call(name), deadline_after(num_bytes))

    def wait(self, name: str, answers: Sequence[Future[Reply]], deadline: float) -> list[Reply]:
        """The answers to `request`, all of which must be there by the deadline."""
        channels = [self._channels[index] for index in self._indices]
        return [_answer_of(channel, name, answer, deadline) for channel, answer in zip(channels, answers, strict=True)]

    def failure(self) -> TensorsparkError | None:
        ended = self._hosts.failure()
        if ended is None:
            return self._failure
        return ShardLostError(f"{ended}: {_WHAT_NOW}; what it said is in the driver's standard error")

    def lost(self) -> ShardLostError | None:
        """The shard that is gone. Waits until each has given a sign of life, or has not for too long."""
        deadline = time.monotonic() + SILENCE_TIMEOUT_S + 1.0
        with contextlib.suppress(ShardLostError):
            self.wait("answer", self.request("answer"), deadline)
        failure = self.failure()
        return failure if isinstance(failure, ShardLostError) else None

    def close(self) -> None:
        self.is_closing = True
        self._listener.close()
        for channel in list(self._channels.values()):
            with contextlib.suppress(ShardLostError, FutureTimeoutError):
                channel.call("end").result(1.0)
            channel.close()
        self._hosts.close(self._lost)

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        with self._arrived:
            while missing := [str(index) for index in self._indices if index not in self._channels]:
                if failure := self.failure():
                    raise failure
                if time.monotonic() > deadline:
                    raise ShardLostError(
                        f"shards {', '.join(missing)} did not start within {self._start_timeout_s:g} s "
                        f"(spark.tensorspark.start.timeout, at least {_START_TIMEOUT_S:g} s): they connect to the "
                        f"driver at {self._driver.host}:{self._driver.port}, a free port, which a firewall may close; "
                        f"on executors each takes a slot; what they said is in their standard error"
                    )
                self._arrived.wait(0.1)

    def _connected(self, plain: socket.socket) -> None:
        has_channel = threading.Event()
        channel: Channel

        def hello(values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
            has_channel.wait()
            channel.who = f"shard {values['index']} (process {values['pid']} on {values['host']})"
            with self._arrived:
                self._channels[values["index"]] = channel
                self._arrived.notify_all()
            return {}, ()

        def lost(why: str) -> None:
            has_channel.wait()
            if not self.is_closing:
                with self._arrived:
                    self._lost.update(index for index, known in self._channels.items() if known is channel)
                self._failure = self._failure or ShardLostError(f"{channel.who} {why}: {_WHAT_NOW}")

        handlers = {"hello": hello, "failed": self._failed}
        channel = Channel(plain, "a shard's process", handlers, lost, silence_timeout_s=SILENCE_TIMEOUT_S)
        has_channel.set()

    def _failed(self, values: Mapping[str, Any], raw: Sequence[Buffer]) -> Reply:
        kind = CombinerError if values["kind"] == CombinerError.__name__ else ShardLostError
        self._failure = self._failure or kind(values["message"])
        return {}, ()


def _answer_of(channel: Channel, name: str, answer: Future[Reply], deadline: float) -> Reply:
    began = time.monotonic()
    try:
        return answer.result(max(0.0, deadline - began) + 1.0)
    except FutureTimeoutError as error:
        raise ShardLostError(
            f"{channel.who} lives, but has not done {name!r} within {time.monotonic() - began:.0f} s: "
            f"{_WHY_LATE.get(name, _WHY_SLOW)}"
        ) from error


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
