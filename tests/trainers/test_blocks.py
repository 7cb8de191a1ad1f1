"""Weights that trainers give piece by piece: the same bytes as at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.trainers.base import Trainer
from tensorspark.trainers.flat import FlatTrainer, FlatVariables
from tensorspark.trainers.graph import GraphTrainer
from tensorspark.trainers.startup import importing
from tensorspark.weights.blocks import blocks
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

with importing():
    import tensorflow as tf

# More than a block, gaps in the middle and at the end, and several dtypes.
LAYOUT = WeightLayout(
    [
        TensorSpec("W", (300, 700), "float32"),
        TensorSpec("nothing", (0,), "float32"),
        TensorSpec("b", (5,), "float32"),
        TensorSpec("empty", (0, 3), "float32"),
        TensorSpec("n", (7,), "int64"),
        TensorSpec("h", (9,), "float16"),
        TensorSpec("g", (3,), "bfloat16"),
    ]
)


def variables(seed: int = 1) -> list[tf.Variable]:
    random = np.random.default_rng(seed)
    return [tf.Variable(tf.cast(9 * random.standard_normal(spec.shape), spec.dtype)) for spec in LAYOUT.specs]


class Flat(FlatTrainer):
    columns = ()
    scalar_names = ()

    def __init__(self, values: Sequence[tf.Variable], *, reverts: bool) -> None:
        self.layout = LAYOUT
        self.variables = values
        self._hold(FlatVariables(LAYOUT, values), reverts=reverts)

    def reset(self, partition: int, seed: int) -> None:
        pass

    def train(self, columns: Any, batch_size: int) -> NDArray[np.float64]:
        self._settle()
        self.variables[0].assign_add(tf.ones_like(self.variables[0]))
        return np.zeros(0)

    def close(self) -> None:
        pass


class Graph(GraphTrainer):
    def __init__(self, values: Sequence[tf.Variable]) -> None:
        self.layout = LAYOUT
        self._values = values

    def _read(self) -> list[NDArray[Any]]:
        return [value.numpy() for value in self._values]


def in_blocks(trainer: Trainer) -> Buffer:
    return np.concatenate([piece.copy() for piece in trainer.read_blocks([block for _, block in blocks(LAYOUT)])])


def at_once(trainer: Flat | Graph) -> Buffer:
    out = LAYOUT.allocate()
    trainer.read(out)
    return out


@pytest.mark.parametrize("trainer", [Graph(variables()), Flat(variables(), reverts=False)], ids=["graph", "flat"])
def test_pieces_are_the_bytes_that_are_read_at_once(trainer: Flat | Graph) -> None:
    expected = LAYOUT.pack({spec.name: value.numpy() for spec, value in zip(LAYOUT.specs, variables(), strict=True)})
    assert np.array_equal(in_blocks(trainer), expected)
    assert np.array_equal(at_once(trainer), expected)
    wanted = [block for _, block in blocks(LAYOUT)]
    assert np.array_equal(np.concatenate(list(Trainer.read_blocks(trainer, wanted))), expected)


def test_pieces_are_of_what_was_loaded_and_trained_since() -> None:
    trainer = Flat(variables(), reverts=True)
    loaded = at_once(Flat(variables(2), reverts=False))
    trainer.load(loaded)
    assert np.array_equal(in_blocks(trainer), loaded)
    trainer.train((), 1)
    LAYOUT.views(loaded)["W"][:] += 1
    assert np.array_equal(in_blocks(trainer), loaded)


def test_pieces_of_weights_that_are_not_finite_are_those_that_were_loaded_where_the_trainer_reverts() -> None:
    loaded = at_once(Flat(variables(2), reverts=False))
    for reverts in (True, False):
        trainer = Flat(variables(), reverts=reverts)
        trainer.load(loaded)
        trainer.train((), 1)
        trainer.variables[5].assign([np.nan] * 9)
        assert np.array_equal(in_blocks(trainer), loaded) == reverts
        assert np.array_equal(at_once(trainer), loaded) == reverts
