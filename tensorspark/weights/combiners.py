"""How the server merges what a worker pushes into its weights.

A combiner is a `WeightCombiner`. The server calls `merge`, which works on flat buffers; `compute`, on one tensor, is
the original Tensorspark's interface, what a subclass of your own writes, and what the default `merge` calls.

| combiner | worker pushes | new server weights |
|---|---|---|
| `DeltaWeightCombiner` | delta: local weights - pulled weights | w + delta (Downpour SGD, Dean et al. 2012) |
| `MeanWeightCombiner(num)` | weights | ((num - 1) w + pushed) / num: a moving average |
| `UpdateMeanWeightCombiner` | weights | pushed at first, then (w + pushed) / 2 |
| `averaging.MeanDeltaCombiner` | delta | w + mean of the deltas, or by samples (FedAvg, McMahan et al. 2017) |
| `averaging.StalenessScaledCombiner` | delta | w + delta / (1 + its staleness) (after Zhang et al. 2016) |
| `elastic.ElasticAveragingCombiner(moving_rate)` | elastic difference | w + difference (EASGD, Zhang et al. 2015) |
| `server_optimizers.ServerSGD`, `.ServerAdagrad`, `.ServerAdam` | delta | an optimizer's step along the mean of the \
deltas (FedOpt, Reddi et al. 2021; DiLoCo, Douillard et al. 2023) |

The first three are here and have a `compute`; the others, in modules of their own, merge whole rounds (`rounds`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import CombinerError
from tensorspark.weights.blocks import blocks, is_finite, is_integer
from tensorspark.weights.layout import Buffer, WeightLayout

_OURS = "tensorspark.weights."


@dataclass(frozen=True)
class Contribution:
    """What the server knows of a push beside its numbers.

    Attributes:
        worker_id: index of the worker's partition.
        num_samples: rows that the worker trained on since its last push.
        staleness: versions that the server has published since the worker pulled what its push is based on.
    """

    worker_id: int
    num_samples: int = 1
    staleness: int = 0


@dataclass
class CombinerState:
    """What a combiner carries from one round to the next, for checkpoints.

    Attributes:
        slots: by name, a buffer in the layout of the weights (a momentum, say).
        values: numbers, strings and booleans by name.
    """

    slots: dict[str, Buffer] = field(default_factory=dict)
    values: dict[str, int | float | str | bool] = field(default_factory=dict)


class WeightCombiner:
    """Base of all combiners: subclass it and write `compute`.

    The server takes pushes in *rounds*: one push each where workers are asynchronous, those of all running workers, in
    the order of their partitions, where they are bulk-synchronous. It calls `fold` for each push and `finish` at the
    end; what `finish` leaves is the next version of the weights. Here `fold` calls `merge`, one push on top of the
    other.

    One thread calls a combiner at a time. An instance belongs to one session; `reset_value` makes it forget.

    >>> class Slow(WeightCombiner):
    ...     def compute(self, origin_weight, new_weight, worker_id=-1, name=None):
    ...         return origin_weight + 0.1 * (new_weight - origin_weight)
    """

    pushes: ClassVar[Literal["weights", "delta", "elastic"]] = "weights"
    """What a worker sends: its weights, their change since its last pull, or an elastic difference (`elastic`)."""

    moving_rate: float = 0.0
    """Elastic averaging's alpha; of use only where `pushes` is "elastic"."""

    def compute(
        self,
        origin_weight: NDArray[Any],
        new_weight: NDArray[Any],
        worker_id: int | str = -1,
        name: str | None = None,
    ) -> NDArray[Any]:
        """New server weights for one tensor.

        Args:
            origin_weight: the server's value.
            new_weight: the worker's value, of the same shape and dtype. Both arrays are yours.
            worker_id: index of the worker's partition.
            name: the tensor's name, such as ``"W:0"``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute(origin_weight, new_weight, ...)")

    def reset_value(self) -> None:
        """Forgets what earlier pushes left in the combiner. An instance that serves several runs keeps it otherwise."""

    def state(self) -> CombinerState:
        """What a checkpoint must hold for a new instance to go on as this one would. The slots are not copied."""
        return CombinerState()

    def restore_state(self, layout: WeightLayout, state: CombinerState) -> None:
        """Goes on where `state`, taken from an instance with the same `settings`, ended. Takes the slots over."""

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        """The hyperparameters: a run is continued with the same combiner and settings only."""
        return {}

    def for_range(self, layout: WeightLayout, start: int, stop: int) -> WeightCombiner:
        """The rule for a range of the layout's buffers, which a shard serves; `layout` is of the whole buffer."""
        return self

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        """Takes a push into the round, in place over `pushed`, which is the next push's `partial`.

        Args:
            layout: how the buffers (``[num_bytes] uint8``) are to be read.
            current: the server's weights; stay as they are.
            partial: what the round's `fold` before left; None for the round's first push. Stays as it is.
            pushed: weights or a delta, as `pushes` says.

        Returns:
            Whether the push and what came of it is finite. If not, the push is refused; `partial` is still the round.

        Raises:
            CombinerError: see `merge`.
        """
        return self.merge(layout, current if partial is None else partial, pushed, contribution.worker_id)

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        """Turns what the round's last `fold` left into the new weights, in place over `folded`.

        Args:
            num_pushes: folded in this round, at least 1.
            num_workers: whose pushes make up the run: those of the round where workers are bulk-synchronous, all that
                run at the moment where a round is one push. At least `num_pushes`.

        Returns:
            Whether every number written is finite. If not, the run fails.
        """
        return True

    @property
    def is_elementwise(self) -> bool:
        """Whether `merge` is quick arithmetic over the flat buffers, and calls nothing that a user wrote."""
        return False

    def merge(self, layout: WeightLayout, current: Buffer, pushed: Buffer, worker_id: int) -> bool:
        """Writes the new weights over `pushed`; `current` stays as it is.

        Args:
            layout: how the two buffers (``[num_bytes] uint8``) are to be read.
            pushed: weights or deltas, as `pushes` says.
            worker_id: index of the worker's partition.

        Returns:
            Whether every number written is finite. If not, it may have stopped in the middle.

        Raises:
            CombinerError: `compute` raised, or what it returned has another shape, no fitting dtype, or is not finite
                where the push is.
        """
        origins, updates = layout.views(current), layout.views(pushed)
        for name, update in updates.items():
            if not is_finite(update.reshape(-1)):
                return False
            result = self._checked(origins[name], self._new_weight(origins[name], update), worker_id, name)
            with np.errstate(invalid="ignore", over="ignore"):
                update[...] = result
            if not is_finite(update.reshape(-1)):
                raise CombinerError(f"{type(self).__name__} made NaN or infinity in {name} from finite weights")
        return True

    def _new_weight(self, origin: NDArray[Any], update: NDArray[Any]) -> NDArray[Any]:
        if self.pushes == "weights":
            return update.copy()
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(origin + update)

    def _checked(self, origin: NDArray[Any], new: NDArray[Any], worker_id: int, name: str) -> NDArray[Any]:
        who = f"{type(self).__name__}.compute for {name}"
        try:
            result = np.asarray(self.compute(origin.copy(), new, worker_id=worker_id, name=name))
        except Exception as error:
            raise CombinerError(f"{who} raised {type(error).__name__}: {error}") from error
        if result.shape != origin.shape:
            raise CombinerError(f"{who} returned shape {list(result.shape)}, expected {list(origin.shape)}")
        if not np.can_cast(result.dtype, origin.dtype, "same_kind"):
            raise CombinerError(f"{who} returned dtype {result.dtype}, expected {origin.dtype}")
        return result


class ElementwiseCombiner(WeightCombiner):
    """A rule that treats every number alike: `update` sees flat blocks of one dtype, still warm in the cache."""

    def update(self, current: NDArray[Any], pushed: NDArray[Any]) -> None:
        """Writes the rule's result over `pushed`; both are `[block] dtype`."""
        raise NotImplementedError

    def merge(self, layout: WeightLayout, current: Buffer, pushed: Buffer, worker_id: int) -> bool:
        if not type(self).compute.__module__.startswith(_OURS):
            # `update` does not say what a subclass's own `compute` says.
            return super().merge(layout, current, pushed, worker_id)
        with np.errstate(invalid="ignore", over="ignore"):
            for dtype, block in blocks(layout):
                result = pushed[block].view(dtype)
                self.update(current[block].view(dtype), result)
                if not is_finite(result):
                    return False
        return True

    @property
    def is_elementwise(self) -> bool:
        return is_ours(type(self))


class DeltaWeightCombiner(ElementwiseCombiner):
    """Adds up what the workers changed: w + (new - pulled).

    This is the asynchronous update of Downpour SGD (Dean et al., "Large Scale Distributed Deep Networks", 2012). In a
    run, the base of a delta is what the worker last pulled. `compute`, called directly, keeps the original's contract:
    the base is what it last returned for this worker and tensor, and zeros before that.

    >>> combiner = DeltaWeightCombiner()
    >>> combiner.compute(np.array([0, 0, 0]), np.array([2, 2, 2]), worker_id="1").tolist()
    [2, 2, 2]
    """

    pushes = "delta"

    def __init__(self) -> None:
        self.last_weight: dict[int | str, dict[str | None, NDArray[Any]]] = {}

    def compute(
        self,
        origin_weight: NDArray[Any],
        new_weight: NDArray[Any],
        worker_id: int | str = -1,
        name: str | None = None,
    ) -> NDArray[Any]:
        """Adds `new_weight` less the worker's base; raises ValueError without a `worker_id`."""
        if worker_id == -1:
            raise ValueError("DeltaWeightCombiner.compute needs the worker_id of the worker that pushed, got -1")
        bases = self.last_weight.setdefault(worker_id, {})
        base = bases.get(name)
        updated: NDArray[Any] = origin_weight + (new_weight if base is None else new_weight - base)
        bases[name] = updated.copy()
        return updated

    def reset_value(self) -> None:
        self.last_weight = {}

    def update(self, current: NDArray[Any], pushed: NDArray[Any]) -> None:
        np.add(current, pushed, out=pushed)

    def _checked(self, origin: NDArray[Any], new: NDArray[Any], worker_id: int, name: str) -> NDArray[Any]:
        # A subclass that calls our compute: `new` is origin + delta, so origin is the base that gives the delta back.
        self.last_weight.setdefault(worker_id, {})[name] = origin.copy()
        return super()._checked(origin, new, worker_id, name)


class MeanWeightCombiner(ElementwiseCombiner):
    """Moves the server's weights 1/num of the way to the worker's: ((num - 1) w + new) / num.

    Args:
        num: usually the number of workers; at least 1.

    >>> MeanWeightCombiner(4).compute(np.array([8.0]), np.array([12.0])).tolist()
    [9.0]
    """

    def __init__(self, num: int) -> None:
        if isinstance(num, bool) or not isinstance(num, int | np.integer) or num < 1:
            raise ValueError(f"MeanWeightCombiner: num must be an integer of at least 1, got {num!r}")
        self._num = int(num)

    def compute(
        self,
        origin_weight: NDArray[Any],
        new_weight: NDArray[Any],
        worker_id: int | str = -1,
        name: str | None = None,
    ) -> NDArray[Any]:
        updated: NDArray[Any] = ((self._num - 1) * origin_weight + new_weight) / self._num
        return updated

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        return {"num": self._num}

    def update(self, current: NDArray[Any], pushed: NDArray[Any]) -> None:
        _mean(current, pushed, self._num)


class UpdateMeanWeightCombiner(ElementwiseCombiner):
    """Takes the first push as it is, then the mean of the server's weights and each push.

    Args:
        server: taken for the original's programs, which passed their server; not needed.

    >>> combiner = UpdateMeanWeightCombiner()
    >>> combiner.compute(np.array([0.0]), np.array([4.0])).tolist(), combiner.compute(
    ...     np.array([4.0]), np.array([5.0])).tolist()
    ([4.0], [4.5])
    """

    _has_merged = False  # whether any push is in the weights

    def __init__(self, server: object = None) -> None:
        del server
        self._seen: set[str | None] = set()  # tensors of which `compute` has had one

    def compute(
        self,
        origin_weight: NDArray[Any],
        new_weight: NDArray[Any],
        worker_id: int | str = -1,
        name: str | None = None,
    ) -> NDArray[Any]:
        if name not in self._seen:
            self._seen.add(name)
            return new_weight
        updated: NDArray[Any] = (origin_weight + new_weight) / 2
        return updated

    def reset_value(self) -> None:
        self._seen = set()
        self._has_merged = False

    def state(self) -> CombinerState:
        return CombinerState(values={"has_merged": self._has_merged})

    def restore_state(self, layout: WeightLayout, state: CombinerState) -> None:
        self.reset_value()
        self._has_merged = bool(state.values.get("has_merged"))

    def fold(
        self, layout: WeightLayout, current: Buffer, partial: Buffer | None, pushed: Buffer, contribution: Contribution
    ) -> bool:
        has_merged = self._has_merged
        self._has_merged = has_merged or partial is not None
        try:
            return super().fold(layout, current, partial, pushed, contribution)
        finally:
            self._has_merged = has_merged  # until `finish`: a round that is given up leaves nothing in the weights

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        self._has_merged = True
        return True

    def merge(self, layout: WeightLayout, current: Buffer, pushed: Buffer, worker_id: int) -> bool:
        self._seen = {spec.name for spec in layout.specs} if self._has_merged else set()
        finite = super().merge(layout, current, pushed, worker_id)
        self._has_merged = self._has_merged or finite  # a refused push is not the first
        return finite

    def update(self, current: NDArray[Any], pushed: NDArray[Any]) -> None:
        if self._has_merged:
            _mean(current, pushed, 2)


def is_ours(combiner: type[WeightCombiner]) -> bool:
    """Whether all of a combiner's methods but `__init__` are written in this package."""
    theirs = [cls for cls in combiner.__mro__ if not cls.__module__.startswith(_OURS)]
    return not any(
        inspect.isfunction(value) for cls in theirs for name, value in vars(cls).items() if name != "__init__"
    )


def _mean(current: NDArray[Any], pushed: NDArray[Any], num: int) -> None:
    """Writes ((num - 1) current + pushed) / num over `pushed`; integers (a step counter, say) round towards zero."""
    if is_integer(pushed.dtype):  # in their own dtype the sum could wrap
        np.divide(current * float(num - 1) + pushed, num, out=pushed, casting="unsafe")
        return
    np.add(pushed, current * current.dtype.type(num - 1), out=pushed)
    np.divide(pushed, num, out=pushed, casting="unsafe")
