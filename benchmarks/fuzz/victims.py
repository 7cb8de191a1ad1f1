"""What `benchmarks.fuzz` attacks, each in a process of its own: the frame parser, and a parameter server with a run."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.fuzz.mutations import Mutator
from benchmarks.measuring.procfs import status_bytes
from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import EpochPlan
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.combiners import Contribution, DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (16, 4), "float32"), TensorSpec("step:0", (), "int64")])
HONEST_PARTITION = 0
NUM_HOLDERS = 15
SNAPSHOT_HEADER = {
    "version": 3,
    "form": "whole",
    "order": "train",
    "epoch": 2,
    "num_steps": 90,
    "num_workers": 2,
    "values": {"learning_rate": 0.5},
}
EPOCHS = EpochPlan(num_epochs=3, validates=True, num_totals=2, values={"learning_rate": 0.5})

_HOST = "127.0.0.1"
_NUM_BUFFERS = 4
_IO_TIMEOUT_S = 5.0
_MAX_FAILURES = 20
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("message", "traceback", "fingerprint", "host", "code", "order"), str),
    **dict.fromkeys(("progress", "step_s", "sync_s"), float),
    **dict.fromkeys(("is_resuming", "finished"), bool),
    **dict.fromkeys(("sums", "values"), dict),
}
_COUNTS = (
    *("run", "partition", "attempt", "sequence", "epoch", "batch", "num_steps", "num_samples", "version"),
    "num_workers",
)


def initial_weights() -> Buffer:
    """Weights to begin with, none of them zero."""
    values = np.random.default_rng(7).normal(1, 0.1, (16, 4)).astype(np.float32)
    return LAYOUT.pack({"W:0": values, "step:0": np.array(3, np.int64)})


@dataclass(frozen=True)
class Observation:
    """A process at one moment.

    Attributes:
        threads: names of those that live.
        errors: log records of level ERROR, and exceptions that nobody caught.
    """

    rss_bytes: int
    peak_bytes: int
    num_sockets: int
    threads: tuple[str, ...]
    errors: tuple[str, ...]

    def failures_since(self, baseline: Observation) -> list[str]:
        """What is wrong with this one, in words."""
        failures = list(self.errors)
        if dead := sorted(set(baseline.threads) - set(self.threads)):
            failures.append(f"threads died: {', '.join(dead)}")
        if self.num_sockets > baseline.num_sockets:
            failures.append(f"{self.num_sockets - baseline.num_sockets} connections were not closed")
        return failures


class _Errors(logging.Handler):
    """Keeps what was logged as an error, and what no code caught; formats all records from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.num_warnings = 0
        logging.getLogger().addHandler(self)
        threading.excepthook = lambda args: self._keep(f"thread {args.thread}: {args.exc_type}: {args.exc_value}")
        sys.unraisablehook = lambda args: self._keep(f"unraisable: {args.err_msg}: {args.exc_value}")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception as error:
            self._keep(f"{record.msg!r} cannot be formatted: {error}")
            return
        self.num_warnings += 1
        if record.levelno >= logging.ERROR:
            cause = "".join(traceback.format_exception(*record.exc_info)[-4:]) if record.exc_info else ""
            self._keep(f"{record.name} logged {text[:300]}\n{cause[-1500:]}")

    def _keep(self, text: str) -> None:
        if len(self.texts) < _MAX_FAILURES:
            self.texts.append(text)


def observe(errors: Sequence[str]) -> Observation:
    """This process now."""
    num_sockets = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what was closed since
            num_sockets += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    names = tuple(thread.name for thread in threading.enumerate())
    return Observation(status_bytes("VmRSS"), status_bytes("VmHWM"), num_sockets, names, tuple(errors))


class FuzzedParser:
    """Reads mutated frames as either side of a connection would, and every field of their headers as every type."""

    def __init__(self, frames: list[bytes], seed: int) -> None:
        refusal = protocol.encode(Kind.REFUSED, {"code": "lease_lost", "message": "of partition 7"})
        self._mutator = Mutator([*frames, refusal, protocol.encode(Kind.SNAPSHOT, SNAPSHOT_HEADER)], seed)
        self._num_inputs: collections.Counter[str] = collections.Counter()
        self._answers: collections.Counter[str] = collections.Counter()
        self._failures: list[str] = []

    def parse(self, num_inputs: int) -> None:
        for _ in range(num_inputs):
            kind, frames = self._mutator.next()
            self._num_inputs[kind] += 1
            for frame in frames:
                self._parse_one(frame)

    def _parse_one(self, frame: bytes) -> None:
        try:
            parse(frame)
        except ProtocolError:
            self._answers["ProtocolError"] += 1
        except Exception as error:
            self._answers[type(error).__name__] += 1
            if len(self._failures) < _MAX_FAILURES:
                self._failures.append(f"{type(error).__name__}: {error} of a frame that begins {frame[:100]!r}")
        else:
            self._answers["a frame"] += 1

    def observe(self) -> Observation:
        return observe(self._failures)

    def results(self) -> tuple[collections.Counter[str], collections.Counter[str], tuple[str, ...]]:
        """Inputs by kind, what came of frames, failures."""
        return self._num_inputs, self._answers, tuple(self._failures)


def parse(frame: bytes) -> None:
    """Reads a frame as the receiver does; raises ProtocolError, and nothing else, where it is none.

    A field of the wrong type does not end it: all are read.
    """
    data = frame[: protocol.PREFIX_BYTES].ljust(protocol.PREFIX_BYTES, b"\0")
    limit = LAYOUT.num_bytes + EPOCHS.totals_bytes
    prefix = protocol.decode_prefix(data, frozenset(Kind), limit)
    if prefix.payload_bytes > limit:
        raise AssertionError(f"a payload of {prefix.payload_bytes} bytes was let through")
    header = protocol.decode_header(memoryview(frame)[protocol.PREFIX_BYTES :][: prefix.header_bytes])
    readers: list[Callable[[], object]] = [
        *(partial(protocol.count, header, name) for name in _COUNTS),
        *(partial(protocol.field, header, name, kind) for name, kind in _FIELDS.items()),
        partial(protocol.numbers, header, "epoch_samples", int),
        partial(protocol.numbers, header, "epoch_seconds", float),
        partial(protocol.refusal, header),
    ]
    for read in readers:
        with contextlib.suppress(ProtocolError):
            read()


class FuzzedServer:
    """A server with a run of an honest worker, and with partitions for attackers where they are to hold some."""

    def __init__(self, role: str) -> None:
        self._errors = _Errors()
        self._server = ParameterServer(
            LAYOUT, _HOST, receive_buffer_bytes=_NUM_BUFFERS * LAYOUT.num_bytes, io_timeout_s=_IO_TIMEOUT_S
        )
        are_holders = role == "holders"
        self._server.begin_run(
            initial_weights(),
            OnlyHonest() if are_holders else DeltaWeightCombiner(),
            1 + NUM_HOLDERS * are_holders,
            sync=SyncPlan(staleness=None if are_holders else 0),
            epochs=EPOCHS,
        )

    def address(self) -> ServerAddress:
        return ServerAddress(_HOST, self._server.port, self._server.token, io_timeout_s=20.0, reconnect_timeout_s=0.0)

    def observe(self) -> Observation:
        gc.collect()  # a task whose exception nobody retrieved tells of it now
        failure = self._server.failure()
        return observe([*self._errors.texts, *([f"the run failed: {failure}"] if failure else [])])

    def weights(self) -> bytes:
        out = LAYOUT.allocate()
        self._server.read_weights(out)
        return out.tobytes()

    def close(self) -> None:
        self._server.close()


class OnlyHonest(DeltaWeightCombiner):
    """Does the arithmetic for every push, and keeps what came of it for the honest worker's alone."""

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        is_finite = super().fold(layout, current, partial, pushed, contribution)
        if contribution.worker_id != HONEST_PARTITION:
            pushed[:] = current if partial is None else partial
        return is_finite
