"""Optimizers on the server: the mean of the workers' deltas is a step's pseudo-gradient.

With the deltas dᵢ and n workers, Δ = (1/n) Σ dᵢ, and -Δ takes the gradient's place in an ordinary optimizer. This is
FedOpt (Reddi et al., "Adaptive Federated Optimization", 2021, Algorithm 2), and with Nesterov's momentum the outer
step of DiLoCo (Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023).

The papers' rounds are bulk-synchronous. An asynchronous push is a round of its own here, with Δ = d/n: the momenta then
decay n times as fast per sample, so betas want to be nearer to 1.

Floating tensors are updated, complex ones as pairs of real numbers. Integer tensors (a step counter) move by the plain
mean over the round's pushes, rounded towards zero. What an optimizer remembers is kept in the weights' own dtype, and
computed in float32 where that has less than 32 bits. A second moment in bfloat16 cannot follow a decay much slower
than 0.99; one in float16 loses squares under 6e-8, so epsilon should not be under 1e-3 there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import CombinerError
from tensorspark.weights.blocks import add_integer_mean, blocks, is_finite, is_integer, widened
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout
from tensorspark.weights.rounds import RoundCombiner, checked_number, require_slots

Block = NDArray[Any]


class ServerOptimizer(RoundCombiner):
    """Base of the three: a subclass names its slots and says in `step` what happens to a block of numbers.

    Args:
        learning_rate: of the server's step, η.
        slots: names and first values of the buffers that it keeps, each of the size of the weights.
        settings: the other hyperparameters.
    """

    def __init__(self, learning_rate: float, slots: dict[str, float], **settings: float | bool) -> None:
        self._learning_rate = checked_number(self, "learning_rate", learning_rate)
        self._first_values = slots
        self._settings = settings
        self.reset_value()

    def step(self, delta: Block, slots: dict[str, Block]) -> None:
        """Turns Δ, in place, into what is added to the weights; brings the slots up to date, in place.

        Args:
            delta: `[block]`, floating, of at least 32 bits.
            slots: by name, of the same shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(delta, slots)")

    def reset_value(self) -> None:
        self._slots: dict[str, Buffer] = {}  # made at the first round, when the layout is known
        self._slots_of = ""  # fingerprint of that layout

    def state(self) -> CombinerState:
        return CombinerState(slots=dict(self._slots))

    def restore_state(self, layout: WeightLayout, state: CombinerState) -> None:
        if state.slots:  # none before the first round
            require_slots(self, layout, state.slots, *self._first_values)
        self._slots, self._slots_of = dict(state.slots), layout.fingerprint

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        return {"learning_rate": self._learning_rate, **self._settings}

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        if not self._slots or self._slots_of != layout.fingerprint:  # another model begins anew
            self._slots_of = layout.fingerprint
            self._slots = {name: _filled(layout, value) for name, value in self._first_values.items()}
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for dtype, block in blocks(layout):
                weights, result = current[block].view(dtype), folded[block].view(dtype)
                if is_integer(dtype):
                    add_integer_mean(weights, result, num_pushes)
                    continue
                slots = {name: buffer[block].view(dtype) for name, buffer in self._slots.items()}
                self._step_widened(weights, result, slots, num_workers)
                if not is_finite(result):
                    return False
        return True

    def _step_widened(self, weights: Block, result: Block, slots: dict[str, Block], num_workers: int) -> None:
        delta = widened(result)
        wide_slots = {name: widened(slot) for name, slot in slots.items()}
        np.divide(delta, num_workers, out=delta)
        self.step(delta, wide_slots)
        np.add(delta, widened(weights), out=delta)
        if delta is not result:
            result[...] = delta
        for name, slot in slots.items():
            if wide_slots[name] is not slot:
                slot[...] = wide_slots[name]
            if not is_finite(slot):  # an infinite second moment would stand still, and look like a fine step
                raise CombinerError(
                    f"{type(self).__name__}'s {name} is beyond the range of {slot.dtype}: lower the workers' "
                    f"learning rate, or keep the weights in a wider dtype"
                )


class ServerSGD(ServerOptimizer):
    """SGD with momentum β: m ← β m + Δ; w ← w + η m, and with Nesterov's w ← w + η (Δ + β m).

    With momentum it is FedAvgM (Hsu et al. 2019; Reddi et al. 2021), with `learning_rate=0.7, momentum=0.9,
    nesterov=True` DiLoCo's outer optimizer, and as it stands `MeanDeltaCombiner`. As in PyTorch, and in DiLoCo, the
    momentum is a sum: Δ is not weighted with 1 - β.

    Args:
        learning_rate: η, over 0.
        momentum: β, from 0 to under 1.
        nesterov: whether to look ahead; needs momentum.

    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> w, d = (layout.pack({"W": np.array(v, np.float32)}) for v in ([1, 1], [4, -8]))
    >>> combiner = ServerSGD(learning_rate=0.5, momentum=0.5, nesterov=True)
    >>> combiner.finish(layout, w, d, num_pushes=1, num_workers=1)
    True
    >>> layout.views(d)["W"].tolist()
    [4.0, -5.0]
    """

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.0, nesterov: bool = False) -> None:
        self._momentum = _checked_decay(self, "momentum", momentum)
        if not isinstance(nesterov, bool) or (nesterov and not self._momentum):
            raise ValueError(
                f"{type(self).__name__}: nesterov must be True or False, and True needs a momentum over 0, got "
                f"{nesterov!r} with momentum {momentum!r}"
            )
        self._nesterov = nesterov
        slots = {"momentum": 0.0} if self._momentum else {}
        super().__init__(learning_rate, slots, momentum=self._momentum, nesterov=nesterov)

    def step(self, delta: Block, slots: dict[str, Block]) -> None:
        if self._momentum:
            momentum = slots["momentum"]
            np.multiply(momentum, self._momentum, out=momentum)
            np.add(momentum, delta, out=momentum)
            if self._nesterov:
                np.add(delta, momentum * self._momentum, out=delta)
            else:
                delta[...] = momentum
        np.multiply(delta, self._learning_rate, out=delta)


class _AdaptiveOptimizer(ServerOptimizer):
    """What Adagrad and Adam share: w ← w + η m / (√v + τ), m ← β₁ m + (1 - β₁) Δ, and v begins at τ².

    Reddi et al. ask for v of at least τ² to begin with, and correct no bias; so we do.
    """

    def __init__(self, learning_rate: float, beta_1: float, epsilon: float, **settings: float) -> None:
        self._beta_1 = _checked_decay(self, "beta_1", beta_1)
        self._epsilon = checked_number(self, "epsilon", epsilon)
        slots = {"second_moment": self._epsilon**2}
        if self._beta_1:  # else m is Δ
            slots["first_moment"] = 0.0
        super().__init__(learning_rate, slots, beta_1=self._beta_1, epsilon=self._epsilon, **settings)

    def grow(self, second_moment: Block, delta: Block, scratch: Block) -> None:
        """Brings v up to date, in place; `delta` stays as it is."""
        raise NotImplementedError

    def step(self, delta: Block, slots: dict[str, Block]) -> None:
        second, first = slots["second_moment"], slots.get("first_moment", delta)
        scratch = np.empty_like(delta)
        self.grow(second, delta, scratch)
        if first is not delta:
            np.multiply(first, self._beta_1, out=first)
            np.multiply(delta, 1 - self._beta_1, out=delta)
            np.add(first, delta, out=first)
        np.sqrt(second, out=scratch)
        np.add(scratch, self._epsilon, out=scratch)
        np.divide(first, scratch, out=delta)
        np.multiply(delta, self._learning_rate, out=delta)


class ServerAdagrad(_AdaptiveOptimizer):
    """FedAdagrad: v ← v + Δ²; m ← β₁ m + (1 - β₁) Δ; w ← w + η m / (√v + τ).

    Algorithm 2 of Reddi et al. 2021, no bias corrected and v beginning at τ², the least that it allows.

    Args:
        learning_rate: η, over 0; the paper's searches end between 0.01 and 1.
        beta_1: decay of m, from 0 (no m is kept) to under 1.
        epsilon: τ, over 0: the degree of adaptivity; small numbers adapt more.

    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> w, d = (layout.pack({"W": np.array(v, np.float32)}) for v in ([1, 1], [4, -8]))
    >>> combiner = ServerAdagrad(learning_rate=0.5)
    >>> combiner.finish(layout, w, d, num_pushes=1, num_workers=1)
    True
    >>> layout.views(d)["W"].round(2).tolist()
    [1.5, 0.5]
    """

    def __init__(self, learning_rate: float, beta_1: float = 0.0, epsilon: float = 1e-3) -> None:
        super().__init__(learning_rate, beta_1, epsilon)

    def grow(self, second_moment: Block, delta: Block, scratch: Block) -> None:
        np.multiply(delta, delta, out=scratch)
        np.add(second_moment, scratch, out=second_moment)


class ServerAdam(_AdaptiveOptimizer):
    """FedAdam: v ← β₂ v + (1 - β₂) Δ²; m ← β₁ m + (1 - β₁) Δ; w ← w + η m / (√v + τ).

    Algorithm 2 of Reddi et al. 2021: unlike Adam proper it corrects no bias, and v begins at τ², the least that the
    algorithm allows. The first steps are therefore about (1 - β₁) / √(1 - β₂) of η (one η with the values below).

    Args:
        learning_rate: η, over 0; the paper's searches end between 0.001 and 0.1.
        beta_1: decay of m, from 0 (no m is kept) to under 1.
        beta_2: decay of v, from 0 to under 1.
        epsilon: τ, over 0: the degree of adaptivity; small numbers adapt more.

    >>> from tensorspark.weights.layout import TensorSpec, WeightLayout
    >>> layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    >>> w, d = (layout.pack({"W": np.array(v, np.float32)}) for v in ([1, 1], [4, -8]))
    >>> combiner = ServerAdam(learning_rate=0.5)
    >>> combiner.finish(layout, w, d, num_pushes=1, num_workers=1)
    True
    >>> layout.views(d)["W"].round(2).tolist()
    [1.5, 0.5]
    """

    def __init__(self, learning_rate: float, beta_1: float = 0.9, beta_2: float = 0.99, epsilon: float = 1e-3) -> None:
        self._beta_2 = _checked_decay(self, "beta_2", beta_2)
        super().__init__(learning_rate, beta_1, epsilon, beta_2=self._beta_2)

    def grow(self, second_moment: Block, delta: Block, scratch: Block) -> None:
        np.multiply(delta, delta, out=scratch)
        np.multiply(scratch, 1 - self._beta_2, out=scratch)
        np.multiply(second_moment, self._beta_2, out=second_moment)
        np.add(second_moment, scratch, out=second_moment)


def _checked_decay(combiner: WeightCombiner, name: str, value: float) -> float:
    return checked_number(combiner, name, value, high=1.0, includes_low=True)


def _filled(layout: WeightLayout, value: float) -> Buffer:
    """A buffer with `value` in every floating tensor and zeros elsewhere, also between tensors."""
    buffer = layout.allocate()
    if value:
        for view in layout.views(buffer).values():
            if view.dtype.kind == "c":
                view[...] = complex(value, value)
            elif not is_integer(view.dtype):
                view[...] = value
    return buffer
