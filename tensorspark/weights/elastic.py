"""Elastic averaging: workers keep weights of their own, and they and the server's draw each other closer.

This is EASGD (Zhang, Choromanska and LeCun, "Deep learning with Elastic Averaging SGD", 2015, equations 3 and 4, and
Algorithm 1 for asynchronous workers). With the worker's weights x, the server's x̃ (the center) and a moving rate α::

    e = α (x - x̃)      the elastic difference
    x ← x - e          the worker's half: `elastic_difference`
    x̃ ← x̃ + Σ e        the server's half: `ElasticAveragingCombiner`

We depart from the asynchronous algorithm in one thing: there an exchange is atomic; here the center may have moved
between the worker's pull and its push. Both halves are of one e all the same, so that what a worker gives up is what
the center gains.
"""

from __future__ import annotations

import numpy as np

from tensorspark.weights.blocks import add_scaled, blocks, is_integer, widened
from tensorspark.weights.combiners import Contribution
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.rounds import RoundCombiner, checked_number


class ElasticAveragingCombiner(RoundCombiner):
    """Moves the server's weights by the workers' elastic differences; see the module for the algebra.

    A worker's weights are not replaced by the server's when it pulls: it explores on its own. `staleness=0` makes the
    synchronous form, one push a round the asynchronous one.

    Args:
        moving_rate: α, over 0 and under 1: how far a worker and the center move towards each other at an exchange.
            The paper takes 0.9 / n for n workers: the center is stable while n α is at most 1.

    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> local, center = (layout.pack({"W": np.array(v, np.float32)}) for v in ([8, 0], [4, 4]))
    >>> combiner, difference = ElasticAveragingCombiner(0.25), layout.allocate()
    >>> elastic_difference(layout, local, center, combiner.moving_rate, difference)
    >>> combiner.fold(layout, center, None, difference, Contribution(worker_id=0))
    True
    >>> layout.views(local)["W"].tolist(), layout.views(difference)["W"].tolist()
    ([7.0, 1.0], [5.0, 3.0])
    """

    pushes = "elastic"

    def __init__(self, moving_rate: float) -> None:
        self.moving_rate = checked_number(self, "moving_rate", moving_rate, high=1.0)

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        return {"moving_rate": self.moving_rate}

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        return add_scaled(layout, current if partial is None else partial, pushed, 1.0)

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        return True  # `fold` began at the server's weights


def elastic_difference(layout: WeightLayout, local: Buffer, center: Buffer, moving_rate: float, out: Buffer) -> None:
    """Writes e = moving_rate * (local - center) over `out` and takes it off `local`, in place.

    Integers are rounded towards zero, which loses nothing: what e leaves out stays in `local`. What is not finite is
    written as it comes: the server refuses it, by name.

    Args:
        center: the server's weights as pulled; stay as they are, unless `out` is the same buffer, as it may be.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype, block in blocks(layout):
            mine, difference = local[block].view(dtype), out[block].view(dtype)
            theirs = center[block].view(dtype)
            if is_integer(dtype):
                signed = np.subtract(mine, theirs).view(f"i{dtype.itemsize}")  # unsigned, -1 is 255
                difference[...] = (moving_rate * signed).astype(np.int64).astype(dtype)
            elif dtype.itemsize < 4:
                difference[...] = moving_rate * (widened(mine) - widened(theirs))
            else:
                np.subtract(mine, theirs, out=difference)
                np.multiply(difference, moving_rate, out=difference)
            np.subtract(mine, difference, out=mine)
