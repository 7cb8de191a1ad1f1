"""The base of combiners that merge whole rounds of deltas, and the checks of their hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import CheckpointError
from tensorspark.weights.blocks import add_scaled
from tensorspark.weights.combiners import CombinerState, Contribution, WeightCombiner, is_ours
from tensorspark.weights.layout import Buffer, WeightLayout


class RoundCombiner(WeightCombiner):
    """A rule for a round of deltas. `fold` adds them up; a subclass says in `finish` what becomes of the sum.

    There is no rule for one tensor: `compute`, called directly, raises TypeError, and so does the definition of a
    subclass with a `compute` of its own, which nothing would call.
    """

    pushes: ClassVar[Literal["weights", "delta", "elastic"]] = "delta"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.compute is not RoundCombiner.compute:
            raise TypeError(
                f"{cls.__name__}.compute would never be called, as {cls.__mro__[1].__name__} merges whole rounds: "
                f"override fold or finish, or subclass WeightCombiner or DeltaWeightCombiner to write compute"
            )

    def compute(
        self,
        origin_weight: NDArray[Any],
        new_weight: NDArray[Any],
        worker_id: int | str = -1,
        name: str | None = None,
    ) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} merges rounds of pushes, not single tensors: call merge, or fold and finish; "
            f"DeltaWeightCombiner and MeanWeightCombiner have a compute"
        )

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        return add_scaled(layout, partial, pushed, 1.0)

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must define finish: fold only adds the deltas up")

    def merge(self, layout: WeightLayout, current: Buffer, pushed: Buffer, worker_id: int) -> bool:
        """Merges a round of one push, the only worker's."""
        folded = self.fold(layout, current, None, pushed, Contribution(worker_id))
        return folded and self.finish(layout, current, pushed, num_pushes=1, num_workers=1)

    @property
    def is_elementwise(self) -> bool:
        return is_ours(type(self))


def checked_number(
    combiner: WeightCombiner,
    name: str,
    value: float,
    *,
    low: float = 0.0,
    high: float = math.inf,
    includes_low: bool = False,
) -> float:
    """The hyperparameter as a float; it must be over `low` (or equal, as `includes_low` says) and under `high`.

    Raises:
        ValueError: it is no number or lies outside.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if is_number and (low < value < high or (includes_low and value == low)):
        return float(value)
    least = f"{'of at least' if includes_low else 'over'} {low:g}"
    most = "" if high == math.inf else f" and under {high:g}"
    raise ValueError(f"{type(combiner).__name__}: {name} must be a finite number {least}{most}, got {value!r}")


def require_slots(combiner: WeightCombiner, layout: WeightLayout, slots: Mapping[str, Buffer], *names: str) -> None:
    """Raises `CheckpointError` unless `slots` are those named, in the layout's size."""
    expected = dict.fromkeys(sorted(names), layout.num_bytes)
    got = {name: slots[name].nbytes for name in sorted(slots)}
    if got != expected:
        raise CheckpointError(
            f"{type(combiner).__name__}'s state must hold the slots {expected} (name: bytes), got {got}: the "
            f"checkpoint is of another combiner or model"
        )


def count_in(combiner: WeightCombiner, state: CombinerState, name: str) -> int:
    """A count in a combiner's state; raises `CheckpointError` where it is missing or no count."""
    value = state.values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{type(combiner).__name__}'s state must hold {name}, an integer of at least 0, got {value!r}: the "
            f"checkpoint is of another combiner, or damaged"
        )
    return value
