"""Keeps a combiner's rule to the weights that are trained, and averages what is not trained (batch statistics, say)."""

from __future__ import annotations

from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import CombinerState, Contribution, WeightCombiner, is_ours
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.rounds import RoundCombiner


class StateAveragingCombiner(RoundCombiner):
    """Another combiner for the first tensors of a layout, the mean of the deltas for the others.

    Moving averages such as those of batch normalization are estimates of one thing: added up over workers, or moved by
    an optimizer with momentum, they would leave the range of what they estimate.

    Args:
        combiner: of deltas, for the tensors that are trained.
        num_trained: how many tensors these are; they come first in the layout.

    Raises:
        ValueError: `combiner` merges no deltas.

    >>> import numpy as np
    >>> from tensorspark.weights.combiners import DeltaWeightCombiner
    >>> from tensorspark.weights.layout import TensorSpec
    >>> layout = WeightLayout([TensorSpec("W", (1,), "float32"), TensorSpec("mean", (1,), "float32")])
    >>> values = ({"W": 1, "mean": 1}, {"W": 2, "mean": 4}, {"W": 2, "mean": 0})
    >>> w, a, b = (layout.pack({n: np.array([v], np.float32) for n, v in value.items()}) for value in values)
    >>> combiner = StateAveragingCombiner(DeltaWeightCombiner(), num_trained=1)
    >>> combiner.fold(layout, w, None, a, Contribution(0)) and combiner.fold(layout, w, a, b, Contribution(1))
    True
    >>> combiner.finish(layout, w, b, num_pushes=2, num_workers=2)
    True
    >>> {name: view.tolist() for name, view in layout.views(b).items()}
    {'W': [5.0], 'mean': [3.0]}
    """

    def __init__(self, combiner: WeightCombiner, num_trained: int) -> None:
        if combiner.pushes != "delta":
            raise ValueError(f"expected a combiner of deltas, got {type(combiner).__name__}")
        self._combiner = combiner
        self._num_trained = num_trained
        self._mean = MeanDeltaCombiner()
        self._layouts: tuple[WeightLayout, WeightLayout] | None = None

    def reset_value(self) -> None:
        self._combiner.reset_value()

    def state(self) -> CombinerState:
        return self._combiner.state()

    def restore_state(self, layout: WeightLayout, state: CombinerState) -> None:
        self._combiner.restore_state(self._split(layout)[0], state)

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        return {"combiner": type(self._combiner).__name__, **self._combiner.settings}

    @property
    def is_elementwise(self) -> bool:
        return is_ours(type(self)) and self._combiner.is_elementwise

    def for_range(self, layout: WeightLayout, start: int, stop: int) -> WeightCombiner:
        trained = self._split(layout)[0]
        num_trained = sum(
            start < trained.offsets[s.name] + s.num_bytes and trained.offsets[s.name] < stop
            for s in trained.specs
            if s.num_bytes
        )
        if stop <= trained.num_bytes:
            return self._combiner.for_range(trained, start, stop)
        return StateAveragingCombiner(self._combiner, num_trained) if num_trained else self._mean

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        trained, others = self._split(layout)
        cut = trained.num_bytes
        head, tail = (None, None) if partial is None else (partial[:cut], partial[cut:])
        # The mean's fold keeps no state that a refusal of the other would have to undo.
        return self._mean.fold(others, current[cut:], tail, pushed[cut:], contribution) and self._combiner.fold(
            trained, current[:cut], head, pushed[:cut], contribution
        )

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        trained, others = self._split(layout)
        cut = trained.num_bytes
        return self._mean.finish(
            others, current[cut:], folded[cut:], num_pushes, num_workers
        ) and self._combiner.finish(trained, current[:cut], folded[:cut], num_pushes, num_workers)

    def _split(self, layout: WeightLayout) -> tuple[WeightLayout, WeightLayout]:
        if self._layouts is None or sum(part.num_bytes for part in self._layouts) != layout.num_bytes:
            self._layouts = layout.split(self._num_trained)
        return self._layouts
