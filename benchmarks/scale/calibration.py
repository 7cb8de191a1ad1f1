"""Measures on this machine what the scale simulation needs to know: `calibrate`.

Seconds are those that threads have used of a core, so that work that runs at the same time is not counted twice. They
are measured in rounds as training has them, with the real server and workers, for an almost empty message and for
larger ones: a push that is repeated and nothing else finds all that it needs in the caches, and takes half the time.

Once with one worker that computes nothing, for clusters: it is a busy server's limits that are asked for there, and a
server that sleeps between messages needs up to four times as long for a small one. Once with as many workers as there
are cores, with steps, for runs of workers and server on this machine: there all cores are busy, and share caches and
the way to the memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.processes import DEADLINE_S, Peer, started, together
from benchmarks.measuring.report import say
from benchmarks.scale.model import Codec, Costs, Steps
from benchmarks.scale.peers import Server, Step, Worker
from benchmarks.workloads.weights import layout_of
from tensorspark.ps.messages import Cursor, Decision, Fold, Publish, Push, Registration
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan

SIZES = (128, 102_400, 400_000, 1_024_000, 2_000_000, 10_000_000, 100_000_000)
"""Bytes of the weights, multiples of 128; the first is as good as none."""
CODECS = ("bfloat16", "int8", "topk:0.01")

_STEP_S = 0.005
_CYCLES_S, _ROUGH_S_PER_BYTE, _MIN_REPEATED = 0.8, 1.2e-9, 5
_WINDOW_PART_BYTES, _NUM_WINDOW_PARTS, _STALLED_S = 10_000_000, 20, 0.1
_CODEC_BYTES = 20_000_000
_CODEC_PHASES = ("encode", "encode and keep the error", "copy", "decode")
_STATE_WORKERS = (16, 512)


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        alone: of a busy server, and a worker that has a machine of its own.
        crowded: where workers and server share this one.
        window_bytes: that a connection on loopback takes in while nobody reads.
        step: of a real model, for an example.
    """

    alone: Costs
    crowded: Costs
    window_bytes: int
    step: Steps
    codecs: dict[str, Codec]


def calibrate(num_rounds: int, sizes: Sequence[int] = SIZES) -> Calibration:
    """Measures everything, each figure the median over so many rounds; takes about ten seconds a round."""
    decide_s = _decide_s(num_rounds)
    alone = _costs(1, 0.0, num_rounds, sizes, decide_s)
    crowded = _costs(max(2, len(os.sched_getaffinity(0))), _STEP_S, num_rounds, sizes, decide_s)
    say("calibrating: a step, codecs")
    return Calibration(alone, crowded, _window_bytes(), _step(), {spec: _codec(spec, num_rounds) for spec in CODECS})


def _costs(num_workers: int, step_s: float, num_rounds: int, sizes: Sequence[int], decide_s: float) -> Costs:
    measured = []
    for num_bytes in sizes:
        say(f"calibrating: {num_bytes / 1e6:g} MB, {num_workers} worker{'s' if num_workers > 1 else ''}")
        measured.append(_measure_size(num_bytes, num_workers, step_s, num_rounds))

    def curve(figure: str) -> list[tuple[float, float]]:
        return [(num_bytes, figures[figure]) for num_bytes, figures in zip(sizes, measured, strict=True)]

    return Costs(
        client_push=curve("push"),
        server_push=curve("loop push"),
        fold=curve("arithmetic"),
        client_pull=curve("pull"),
        server_pull=curve("loop pull"),
        prepare=curve("prepare"),
        decide_s=decide_s,
    )


def _measure_size(num_bytes: int, num_workers: int, step_s: float, num_rounds: int) -> dict[str, float]:
    """Seconds of a core, by what took them, for one push and its pull."""
    count = max(_MIN_REPEATED, round(_CYCLES_S / (_STEP_S + num_bytes * _ROUGH_S_PER_BYTE) / num_workers))
    seconds: dict[str, list[float]] = defaultdict(list)
    with Peer("parameter server", Server, num_bytes, num_workers, None) as server:
        address = server.call("address")
        peers = [Peer(f"worker {index}", Worker, address, index, num_bytes) for index in range(num_workers)]
        with started(peers) as workers:
            together(workers, "cycle", max(_MIN_REPEATED, count // 5), step_s)  # warms buffers and TCP's windows up
            for _ in range(num_rounds):
                share = _push_share(server, workers[0], count)
                before = server.call("processor_s")
                cycles = together(workers, "cycle", count, step_s)
                after = server.call("processor_s")
                # Each of them has pulled once more, before it began.
                used = {name: (after[name] - before[name]) / (count * num_workers) for name in after}
                loop_s = used["loop"] / (1 + (1 - share) / count)
                seconds["loop push"].append(loop_s * share)
                seconds["loop pull"].append(loop_s * (1 - share))
                seconds["arithmetic"].append(used["arithmetic"])
                for name in ("prepare", "push", "pull"):
                    seconds[name].append(statistics.mean(cycle[name] for cycle in cycles))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _push_share(server: Peer, worker: Peer, count: int) -> float:
    """Of the loop's time for a push and a pull, what the push takes."""
    used = []
    for operation in ("push", "pull"):
        before = server.call("processor_s")["loop"]
        worker.call("repeat", operation, count)
        used.append(server.call("processor_s")["loop"] - before)
    return float(used[0] / sum(used))


def _decide_s(num_rounds: int) -> float:
    """Seconds that the decisions on a push and its pull take longer for each worker that a run has more."""
    few, many = _STATE_WORKERS
    slopes = []
    for _ in range(max(2, num_rounds)):
        by_number = {num_workers: _seconds_a_push(num_workers) for num_workers in (few, many)}
        slopes.append((by_number[many] - by_number[few]) / (many - few))
    return max(0.0, statistics.median(slopes))


def _seconds_a_push(num_workers: int) -> float:
    """Of a bulk-synchronous round, whose decisions depend on all workers."""
    layout = layout_of(128)
    state = RunState(1, layout, num_workers, SyncPlan(0, num_first=num_workers))
    for worker in range(num_workers):
        state.register(worker, Registration(1, worker, worker, layout.fingerprint, "here"), 0.0)
    for worker in range(num_workers):
        state.pull(worker)
    began = time.perf_counter()
    folds: list[Fold] = []
    for worker in range(num_workers):
        decisions: list[Decision] = state.push(worker, Push(1, Cursor(0, 1), num_steps=1, num_samples=1))
        state.pull(worker)
        for decision in decisions:
            if isinstance(decision, Fold):
                state.folded(decision, 0.0)
                folds.append(decision)
            elif isinstance(decision, Publish):
                state.published(folds, 0.0)
    return (time.perf_counter() - began) / num_workers


def _window_bytes() -> int:
    """Of a connection whose buffers have grown, as they do in a run of large weights."""
    data, received = memoryview(bytearray(_WINDOW_PART_BYTES)), bytearray(_WINDOW_PART_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as ours:
        theirs = listening.accept()[0]
        with theirs, ThreadPoolExecutor(1) as reader:
            theirs.settimeout(DEADLINE_S)
            for _ in range(_NUM_WINDOW_PARTS):
                read = reader.submit(_fill, theirs, received)
                ours.sendall(data)
                read.result(DEADLINE_S)
            ours.settimeout(_STALLED_S)
            num_bytes = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    num_bytes += ours.send(data[: 2**17])
    return num_bytes


def _fill(connection: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        view = view[connection.recv_into(view) :]


def _step() -> Steps:
    """In a process of its own, whose linear algebra keeps to one thread."""
    variable, number = "OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ[variable] = "1"
    try:
        with Peer("step", Step) as peer:
            steps: Steps = peer.call("measure")
    finally:
        if number is None:
            del os.environ[variable]
        else:
            os.environ[variable] = number
    return steps


def _codec(spec: str, num_rounds: int) -> Codec:
    """What a codec makes of the change of a model's weights, and how fast."""
    from tensorspark.weights.codecs import codec_of

    codec = codec_of(spec)
    assert codec is not None
    layout = layout_of(_CODEC_BYTES)
    change, work = layout.allocate(), layout.allocate()
    change.view(np.float32)[:] = np.random.default_rng(6).normal(0, 1e-3, _CODEC_BYTES // 4)
    out = np.empty(max(codec.capacity(layout), layout.num_bytes), np.uint8)
    seconds: dict[str, list[float]] = defaultdict(list)
    num_encoded = 0
    for _ in range(max(3, num_rounds)):
        work[:] = change
        times = [time.thread_time()]
        num_encoded = codec.encode(layout, work, out)
        times.append(time.thread_time())
        codec.encode_keeping_error(layout, work, out)
        times.append(time.thread_time())
        work[layout.num_bytes - num_encoded :] = out[:num_encoded]
        times.append(time.thread_time())
        codec.decode(layout, work, num_encoded)
        times.append(time.thread_time())
        for name, (began, ended) in zip(_CODEC_PHASES, itertools.pairwise(times), strict=True):
            seconds[name].append((ended - began) / layout.num_bytes)
    encode_s, with_error_s, _, decode_s = (statistics.median(seconds[name]) for name in _CODEC_PHASES)
    ratio = num_encoded / layout.num_bytes if num_encoded else 1.0
    return Codec(spec, ratio, encode_s, decode_s, max(0.0, with_error_s - encode_s))
