"""What a worker pulls, folds in and pushes between its steps, against a real server."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.data.columns import Columns
from tensorspark.data.feed import Stretch
from tensorspark.exchange import exchange_for
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import OrderKind, Registration, TimeSpent
from tensorspark.ps.server import ParameterServer
from tensorspark.steps import EpochClock, Steps
from tensorspark.trainers.base import Trainer
from tensorspark.weights.combiners import DeltaWeightCombiner, MeanWeightCombiner, WeightCombiner
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

SPECS = [TensorSpec("W", (3000, 40), "float32"), TensorSpec("h", (500,), "float16"), TensorSpec("n", (3,), "int64")]
LAYOUT = WeightLayout(SPECS)
DEADLINE_S = 20.0
NUM_INTERVALS = 5
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])


class Noise(Trainer):
    """Adds noise, and 2 to counters, in each step: the same each time."""

    columns = ()
    scalar_names = ()

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout
        self.weights = layout.allocate()
        self._random = np.random.default_rng(5)
        self.loaded: list[Buffer] = []

    def reset(self, partition: int, seed: int) -> None:
        pass

    def load(self, weights: Buffer) -> None:
        self.weights[:] = weights
        self.loaded.append(weights.copy())

    def read(self, out: Buffer) -> None:
        out[:] = self.weights

    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        for view in self.layout.views(self.weights).values():
            noise = self._random.standard_normal(view.shape)
            view += 2 if view.dtype.kind == "i" else noise.astype(view.dtype)
        return np.zeros(0)

    def close(self) -> None:
        pass


class NoiseInBlocks(Noise):
    """Gives its weights piece by piece, from memory that it takes again for the next one."""

    def read(self, out: Buffer) -> None:
        raise AssertionError("expected no wish for all weights at once")

    def read_blocks(self, wanted: Sequence[slice]) -> Iterator[Buffer]:
        piece = np.empty(max(block.stop - block.start for block in wanted), np.uint8)
        for block in wanted:
            num_bytes = block.stop - block.start
            piece[:num_bytes] = self.weights[block]
            yield piece[:num_bytes]
            piece[:] = 99


class CountedLayout(WeightLayout):
    """Counts the buffers that are made of it."""

    num_buffers = 0

    def allocate(self) -> Buffer:
        self.num_buffers += 1
        return super().allocate()


def initial() -> Buffer:
    return LAYOUT.pack({s.name: (1 + np.arange(s.num_elements) % 7).reshape(s.shape).astype(s.dtype) for s in SPECS})


@contextlib.contextmanager
def serving(combiner: WeightCombiner, compression: Compression) -> Iterator[tuple[ParameterServer, ServerAddress, int]]:
    with contextlib.closing(ParameterServer(LAYOUT, "127.0.0.1")) as server:
        run = server.begin_run(initial(), combiner, 1, compression=compression)
        yield server, ServerAddress("127.0.0.1", server.port, server.token, io_timeout_s=DEADLINE_S), run


def steps_of(trainer: Trainer, index: int) -> Steps:
    steps = Steps(trainer, 1, EpochClock())
    columns = (np.zeros(1, np.float32),)
    steps.run(Stretch(0, index, 1, 1, columns, NUM_INTERVALS, is_last_of_epoch=index + 1 == NUM_INTERVALS))
    return steps


def trained(
    trainer: Trainer, combiner: WeightCombiner, compression: Compression, *, overlap: bool, has_epochs: bool = False
) -> tuple[Buffer, int]:
    """A worker that trains one partition to its end; the server's weights then, and what it pulled, in bytes."""
    with serving(combiner, compression) as (server, address, run):
        with ParameterClient(address, trainer.layout, compression) as client:
            granted = client.register(Registration(run, 0, 1, LAYOUT.fingerprint, "here"))
            accumulates = compression.leaves_error
            exchange = exchange_for(
                combiner.pushes,
                0.0,
                client,
                trainer,
                granted.sequence,
                has_epochs=has_epochs,
                overlap=overlap,
                accumulates=accumulates,
            )
            with contextlib.closing(exchange):
                for index in range(NUM_INTERVALS):
                    assert exchange.before().kind is OrderKind.TRAIN
                    exchange.after(steps_of(trainer, index))
                exchange.end()
            client.finish(TimeSpent())
        out = LAYOUT.allocate()
        assert server.read_weights(out) == NUM_INTERVALS
        (report,) = server.records()[1]
        assert report.finished
        return out, report.num_bytes_pulled


def sum_of_noise() -> dict[str, NDArray[Any]]:
    """What all steps add to the first weights."""
    alone = Noise(LAYOUT)
    alone.load(initial())
    for _ in range(NUM_INTERVALS):
        alone.train((), 1)
    return LAYOUT.views(alone.weights)


@pytest.mark.parametrize(("kind", "overlap"), [(Noise, False), (Noise, True), (NoiseInBlocks, True)])
@pytest.mark.parametrize("combiner", [DeltaWeightCombiner, lambda: MeanWeightCombiner(1)], ids=["delta", "weights"])
def test_alone_a_worker_takes_the_server_where_its_steps_lead(kind: type[Noise], combiner: Any, overlap: bool) -> None:
    weights, _ = trained(kind(LAYOUT), combiner(), Compression(), overlap=overlap)
    expected = sum_of_noise()
    for name, view in LAYOUT.views(weights).items():
        tolerance = {"float32": 1e-5, "float16": 0.05, "int64": 0}[view.dtype.name]
        np.testing.assert_allclose(view.astype(np.float64), expected[name].astype(np.float64), rtol=0, atol=tolerance)


@OVERLAP
@pytest.mark.parametrize(
    ("spec", "combiner"),
    [
        *itertools.product(["int8", "bfloat16"], [DeltaWeightCombiner, lambda: MeanWeightCombiner(1)]),
        ("topk:0.1", DeltaWeightCombiner),
    ],
)
def test_where_the_error_is_added_up_changes_no_bit(spec: str, combiner: Any, overlap: bool) -> None:
    results = [
        trained(kind(LAYOUT), combiner(), Compression(spec, leaves_error=leaves_error), overlap=overlap)[0]
        for kind, leaves_error in [(Noise, False), (Noise, True), (NoiseInBlocks, True)]
    ]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    views, expected = LAYOUT.views(results[0]), sum_of_noise()
    assert views["n"].tolist() == expected["n"].tolist()
    assert not np.array_equal(views["W"], expected["W"])  # a lossy codec it is


@OVERLAP
@pytest.mark.parametrize(
    ("compression", "num_buffers"),
    [(Compression(), 2), (Compression("int8", "bfloat16", leaves_error=True), 2)],
    ids=["raw", "lossy"],
)
def test_a_worker_that_reads_piece_by_piece_holds_two_buffers(
    compression: Compression, num_buffers: int, overlap: bool
) -> None:
    layout = CountedLayout(SPECS)
    trainer = NoiseInBlocks(layout) if overlap or compression.leaves_error else Noise(layout)
    layout.num_buffers = 0
    trained(trainer, DeltaWeightCombiner(), compression, overlap=overlap)
    # With overlap and a codec the change has a buffer of its own: what is left out stays in it.
    assert layout.num_buffers == num_buffers + (overlap and compression.leaves_error)


@pytest.mark.parametrize("has_epochs", [False, True])
def test_what_nobody_trains_on_is_not_pulled(has_epochs: bool) -> None:
    _, num_bytes = trained(Noise(LAYOUT), DeltaWeightCombiner(), Compression(), overlap=True, has_epochs=has_epochs)
    num_pulls = NUM_INTERVALS + has_epochs  # at the end of an epoch the server has a word to say
    assert num_bytes == num_pulls * LAYOUT.num_bytes


def test_overlapped_steps_begin_from_what_was_pulled_and_what_was_changed_since() -> None:
    trainer = Noise(LAYOUT)
    trained(trainer, DeltaWeightCombiner(), Compression(), overlap=True)
    alone = Noise(LAYOUT)
    alone.load(initial())
    # Before the second interval nothing has come, so the first one's steps go on.
    alone.train((), 1)
    for loaded in trainer.loaded[1:]:
        alone.train((), 1)
        ours, expected = LAYOUT.views(loaded), LAYOUT.views(alone.weights)
        np.testing.assert_allclose(ours["W"], expected["W"], rtol=0, atol=1e-5)
        assert ours["n"].tolist() == expected["n"].tolist()
    assert len(trainer.loaded) == NUM_INTERVALS
