"""Pushes that a codec has written, against a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensorspark.errors import NonFiniteError, RefusedError
from tensorspark.ps import protocol
from tensorspark.ps.protocol import Kind
from tensorspark.weights.codecs import codec_of
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.test_snapshots import LAYOUT, Cluster, Start, filled, start
from tests.ps.wire import Wire

__all__ = ["start"]

# Over the size from which arithmetic, and decoding, leaves the loop.
LARGE = WeightLayout([TensorSpec("W", (600_000,), "float32")])
CODECS = [("float16", 0.51), ("bfloat16", 0.51), ("int8", 0.27), ("topk:0.1", 0.16)]
LAYOUTS = pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["on the loop", "on a thread"])


def random_delta(layout: WeightLayout, seed: int = 3) -> Buffer:
    rng = np.random.default_rng(seed)
    return layout.pack({s.name: (rng.standard_normal(s.shape) * 3).astype(s.dtype) for s in layout.specs})


def encoded(layout: WeightLayout, values: Buffer, spec: str) -> Buffer:
    codec = codec_of(spec)
    assert codec is not None
    room = np.empty(layout.num_bytes, np.uint8)
    return room[: codec.encode(layout, values, room)]


def decoded(layout: WeightLayout, data: Buffer, spec: str) -> Buffer:
    codec = codec_of(spec)
    assert codec is not None
    out = layout.allocate()
    out[layout.num_bytes - len(data) :] = data
    codec.decode(layout, out, len(data))
    return out


def sum_of(layout: WeightLayout, *buffers: Buffer) -> dict[str, np.ndarray]:
    views = [layout.views(buffer) for buffer in buffers]
    return {name: sum(view[name] for view in views[1:]) + views[0][name] for name in views[0]}


def push_header(sequence: int = 1, **more: Any) -> dict[str, Any]:
    header = {"sequence": sequence, "epoch": 0, "batch": sequence, "num_steps": 1, "num_samples": 10, "version": 0}
    return {**header, "sums": {}, "progress": None, **more}


@pytest.mark.parametrize(
    ("layout", "spec", "share"),
    [
        *((LAYOUT, *codec) for codec in CODECS),
        *((LARGE, *codec) for codec in CODECS),
        (LAYOUT, "rows", 0.2),
    ],
)
def test_an_encoded_push_is_folded_as_what_it_decodes_to(
    start: Start, layout: WeightLayout, spec: str, share: float
) -> None:
    delta = random_delta(layout)
    if spec == "rows":
        layout.views(delta)["embedding"][3:] = 0
    cluster = start(Compression(push=spec), layout=layout)
    before = cluster.weights()
    worker = cluster.worker()
    expected = sum_of(layout, before, decoded(layout, encoded(layout, delta, spec), spec))
    num_bytes = len(encoded(layout, delta, spec))
    worker.push(delta)
    worker.client.flush()
    for name, view in layout.views(cluster.weights()).items():
        assert np.array_equal(view, expected[name])
    report = cluster.server.records()[1][0]
    assert (report.num_pushed, report.num_applied, report.num_bytes_pushed) == (1, 1, num_bytes)
    assert 0 < num_bytes < share * layout.num_bytes


def test_a_push_that_does_not_pay_to_encode_goes_as_it_is(start: Start) -> None:
    layout = WeightLayout([TensorSpec("n", (1000,), "int64"), TensorSpec("W", (10,), "float32")])
    cluster = start(Compression(push="topk:0.9"), layout=layout, weights=filled(layout, 2))
    worker = cluster.worker()
    worker.push(filled(layout, 3))
    worker.client.flush()
    assert cluster.value() == 5
    assert cluster.server.records()[1][0].num_bytes_pushed == layout.num_bytes


GARBAGE: dict[str, Callable[[Buffer], Buffer]] = {
    "zeros": lambda good: np.zeros(500, np.uint8),
    "ones": lambda good: np.full(LAYOUT.num_bytes - 1, 255, np.uint8),
    "one byte": lambda good: good[:1],
    "another codec": lambda good: encoded(LAYOUT, random_delta(LAYOUT), "float16"),
    "cut off": lambda good: good[:-1],
    "too long": lambda good: np.concatenate([good, good[:5]]),
    "a directory that lies": lambda good: np.concatenate([good[:4], good[4:8] ^ 1, good[8:]]),
}


@LAYOUTS
@pytest.mark.parametrize("how", GARBAGE)
def test_bytes_that_do_not_decode_are_refused_by_the_partitions_name_and_change_nothing(
    start: Start, how: str, layout: WeightLayout
) -> None:
    cluster = start(Compression(push="int8"), layout=layout)
    before = cluster.weights()
    good = encoded(layout, random_delta(layout), "int8")
    bad = GARBAGE[how](good)
    if len(bad) >= layout.num_bytes:
        bad = bad[: layout.num_bytes - 1]
    with Wire(cluster.server) as wire:
        wire.register(cluster.server, cluster.run, 1)
        wire.send(Kind.PUSH, push_header(encoded=len(bad)), np.ascontiguousarray(bad))
        error = protocol.refusal(wire.receive(Kind.REFUSED))
        assert type(error) is RefusedError
        assert "the push of partition 1 does not decode: expected weights encoded as 'int8'" in str(error)
        assert np.array_equal(cluster.weights(), before)
        report = cluster.server.records()[1][1]
        assert (report.num_pushed, report.num_applied, report.num_refused) == (1, 0, 1)
        # The connection is in step still, and the partition's next push is its first.
        wire.send(Kind.PUSH, push_header(encoded=len(good)), good)
        assert wire.receive(Kind.ACCEPTED)["sequence"] == 1
    expected = sum_of(layout, before, decoded(layout, good, "int8"))
    for name, view in layout.views(cluster.weights()).items():
        assert np.array_equal(view, expected[name])


@LAYOUTS
def test_nan_in_an_encoded_push_is_refused_by_the_tensors_name(start: Start, layout: WeightLayout) -> None:
    cluster = start(Compression(push="int8"), layout=layout)
    before = cluster.weights()
    worker = cluster.worker()
    delta = random_delta(layout)
    layout.views(delta)["W"][2999] = np.nan
    worker.push(delta)
    with pytest.raises(NonFiniteError, match="in W, pushed by partition 0"):
        worker.client.flush()
    assert np.array_equal(cluster.weights(), before)


def is_closed_on(cluster: Cluster, header: dict[str, Any], payload: Buffer) -> bool:
    with Wire(cluster.server) as wire:
        wire.register(cluster.server, cluster.run, 1)
        wire.send(Kind.PUSH, header, payload)
        try:
            wire.receive(Kind.ACCEPTED)
        except ConnectionResetError:
            return True
    return False


def test_an_encoded_push_closes_the_connection_where_the_run_has_no_codec(start: Start) -> None:
    cluster = start(NO_COMPRESSION)
    before = cluster.weights()
    data = encoded(LAYOUT, random_delta(LAYOUT), "int8")
    assert is_closed_on(cluster, push_header(encoded=len(data)), data)
    assert is_closed_on(cluster, push_header(encoded=LAYOUT.num_bytes), filled(LAYOUT, 1))
    assert not is_closed_on(cluster, push_header(), LAYOUT.allocate())  # which is as it should be
    assert np.array_equal(cluster.weights(), before)


@pytest.mark.parametrize("num_bytes", [0, -1, LAYOUT.num_bytes, 2**63, "5", None, 5.0])
def test_a_length_that_cannot_be_closes_the_connection(start: Start, num_bytes: object) -> None:
    cluster = start(Compression(push="int8"))
    before = cluster.weights()
    assert is_closed_on(cluster, push_header(encoded=num_bytes), random_delta(LAYOUT))
    assert np.array_equal(cluster.weights(), before)


def test_a_length_that_is_not_the_payloads_closes_the_connection(start: Start) -> None:
    cluster = start(Compression(push="int8"))
    data = encoded(LAYOUT, random_delta(LAYOUT), "int8")
    assert is_closed_on(cluster, push_header(encoded=len(data) - 1), data)
    assert is_closed_on(cluster, push_header(encoded=len(data) + 1), data)
    worker = cluster.worker(0)
    worker.push(random_delta(LAYOUT))
    worker.client.flush()


def test_a_run_with_a_codec_takes_raw_pushes_too(start: Start) -> None:
    cluster = start(Compression(push="int8"), weights=filled(LAYOUT, 2))
    with Wire(cluster.server) as wire:
        wire.register(cluster.server, cluster.run, 1)
        wire.push(filled(LAYOUT, 3))
    assert cluster.value() == 5


@pytest.mark.parametrize(("spec", "bound"), [("int8", 1.3 / 127), ("topk:0.1", 11.0)])
def test_what_pushes_leave_out_comes_in_time(start: Start, spec: str, bound: float) -> None:
    # A tenth of each delta is tiny: without error feedback, int8 would send zeros for that, and 60 / 256 would be
    # missing of it. Of numbers that are all one, top-k would always send the same tenth: 60 would be of the others.
    cluster = start(Compression(push=spec), weights=filled(LAYOUT, 2))
    worker = cluster.worker()
    num_pushes = 60
    delta = filled(LAYOUT, 1)
    for name in ("embedding", "W"):
        LAYOUT.views(delta)[name].reshape(-1)[::10] = 1 / 256
    for _ in range(num_pushes):
        worker.push(delta.copy())
    worker.client.flush()
    ours, each = LAYOUT.views(cluster.weights()), LAYOUT.views(delta)
    assert ours["step"][0] == 2 + num_pushes
    for name in ("embedding", "W"):
        missing = 2 + num_pushes * each[name].astype(np.float64) - ours[name]
        assert np.abs(missing).max() <= bound


@pytest.mark.parametrize("cut", [{"up": 40}, {"up": 10_000}, {"down": 0}], ids=["header", "payload", "answer"])
@pytest.mark.parametrize("spec", ["int8", "topk:0.1"])
def test_an_encoded_push_counts_once_wherever_the_connection_is_cut(
    start: Start, spec: str, cut: dict[str, int]
) -> None:
    undisturbed, cluster = start(Compression(push=spec)), start(Compression(push=spec))
    for each in (undisturbed, cluster):
        worker = each.worker()
        for seed in (1, 2, 3):
            if each is cluster and seed == 2:
                each.proxy.cuts.update(cut)
            worker.push(random_delta(LAYOUT, seed))
        worker.client.flush()
    report = cluster.server.records()[1][0]
    assert (report.num_applied, report.num_reconnects) == (3, 1)
    assert np.array_equal(cluster.weights(), undisturbed.weights())
