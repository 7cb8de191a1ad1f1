"""Combiners that weigh deltas: their mean, and their sum with stale ones made smaller."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from tensorspark.weights.blocks import add_mean, add_scaled
from tensorspark.weights.combiners import CombinerState, Contribution
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.rounds import RoundCombiner, count_in


@dataclass(frozen=True)
class _Sums:
    """What was added up over pushes."""

    num_samples: int = 0
    num_pushes: int = 0

    def plus(self, num_samples: int, num_pushes: int = 1) -> _Sums:
        return _Sums(self.num_samples + num_samples, self.num_pushes + num_pushes)

    @property
    def mean(self) -> float:
        return self.num_samples / self.num_pushes


class MeanDeltaCombiner(RoundCombiner):
    """Adds the mean of the workers' deltas: w + (1/n) Σ dᵢ.

    With `weighted`, a delta counts by the samples sᵢ that it was trained on: w + Σ sᵢ dᵢ / Σ sᵢ, which is FedAvg
    (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017, Algorithm 1:
    their mean of the workers' weights is this, as all began the round at w).

    A round with fewer pushes than the run has workers (n) is not in the paper. An asynchronous push moves the weights
    by d/n, with `weighted` by (s/s̄) d/n, where s̄ is the mean of samples per push in the run so far, this round
    included: over n pushes of s̄ samples that makes the mean again. All of these are one rule, Σ sᵢ dᵢ / (n s̄), as in
    a complete round s̄ is the round's own mean.

    Integer tensors (a step counter) move by the plain mean over the round's pushes, rounded towards zero, not by 1/n
    of it: asynchronously, a counter would otherwise stand still wherever a worker adds less than n. The sum of the
    deltas is kept in the weights' dtype, where an int8 soon wraps around.

    Args:
        weighted: whether deltas count by their samples. A round without any samples changes no floating tensor.

    >>> import numpy as np
    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> w, a, b = (layout.pack({"W": np.array(v, np.float32)}) for v in ([1, 1], [4, 0], [0, 8]))
    >>> combiner = MeanDeltaCombiner(weighted=True)
    >>> combiner.fold(layout, w, None, a, Contribution(worker_id=0, num_samples=30))
    True
    >>> combiner.fold(layout, w, a, b, Contribution(worker_id=1, num_samples=10))
    True
    >>> combiner.finish(layout, w, b, num_pushes=2, num_workers=2)
    True
    >>> layout.views(b)["W"].tolist()
    [4.0, 3.0]
    """

    def __init__(self, weighted: bool = False) -> None:
        if not isinstance(weighted, bool):
            raise ValueError(f"{type(self).__name__}: weighted must be True or False, got {weighted!r}")
        self._weighted = weighted
        self.reset_value()

    def reset_value(self) -> None:
        self._run = _Sums()  # of the rounds that are in the weights
        self._round = _Sums()
        self._usual = 0.0  # u

    def state(self) -> CombinerState:
        if not self._weighted:
            return CombinerState()
        return CombinerState(values={"num_samples": self._run.num_samples, "num_pushes": self._run.num_pushes})

    def restore_state(self, layout: WeightLayout, state: CombinerState) -> None:
        self.reset_value()
        if self._weighted:
            self._run = _Sums(count_in(self, state, "num_samples"), count_in(self, state, "num_pushes"))

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        return {"weighted": self._weighted}

    # What is folded is Σ (sᵢ/u) dᵢ, where u is s̄ as it stood at the round's first push with samples: shares of about 1
    # keep the sum in the range of narrow dtypes, as samples would not.

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        before = _Sums() if partial is None else self._round
        after = before.plus(contribution.num_samples)
        usual = self._usual if before.num_samples else self._run.plus(*astuple(after)).mean
        if not add_scaled(layout, partial, pushed, self._share(contribution.num_samples, usual)):
            return False
        self._round, self._usual = after, usual
        return True

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        run, divisor = self._run.plus(*astuple(self._round)), float(num_workers)
        if self._weighted and self._round.num_samples:  # without samples the floating sums are zero, whatever divides
            mean = self._round.mean if num_pushes == num_workers else run.mean
            divisor *= mean / self._usual
        self._run, self._round = run, _Sums()
        return add_mean(layout, current, folded, divisor, num_pushes)

    def _share(self, num_samples: int, usual: float) -> float:
        if not self._weighted:
            return 1.0
        return num_samples / usual if usual else 0.0


class StalenessScaledCombiner(RoundCombiner):
    """Adds each delta divided by one more than its staleness: w + Σ dᵢ / (1 + τᵢ).

    After Zhang, Gupta, Lian and Liu, "Staleness-aware Async-SGD for Distributed Deep Learning" (2016), who divide the
    learning rate of a gradient by its staleness τ where that is over 0. We depart in two things: what is scaled is a
    delta, which may be of many local steps, and the divisor is 1 + τ, so that a push that is one version late counts
    less than one that is not. The staleness is that of the weights' versions: in a bulk-synchronous run it is 0, and
    the rule is `DeltaWeightCombiner`'s.

    Integer tensors (a step counter) are added whole.

    >>> import numpy as np
    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> w, d = (layout.pack({"W": np.array(v, np.float32)}) for v in ([1, 1], [4, 8]))
    >>> StalenessScaledCombiner().fold(layout, w, None, d, Contribution(worker_id=0, staleness=3))
    True
    >>> layout.views(d)["W"].tolist()
    [2.0, 3.0]
    """

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        scale = 1 / (1 + contribution.staleness)
        return add_scaled(layout, current if partial is None else partial, pushed, scale)

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        return True  # `fold` began at the server's weights
