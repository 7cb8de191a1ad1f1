"""Rounds: pushes folded and published in order, on the loop or on another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorspark.errors import CombinerError, NonFiniteError, RefusedError, TensorsparkError
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.messages import Cursor, Fold, Publish, Push
from tensorspark.ps.rounds import Rounds
from tensorspark.ps.snapshots import SnapshotStore
from tensorspark.weights.combiners import DeltaWeightCombiner, MeanWeightCombiner, WeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

SMALL = WeightLayout([TensorSpec("W:0", (5,), "float32"), TensorSpec("b:0", (), "float64")])
# Over the size from which arithmetic leaves the loop.
LARGE = WeightLayout([TensorSpec("W:0", (600_000,), "float32")])
DEADLINE_S = 20.0


class Slow(DeltaWeightCombiner):
    """Adds up, once it is let; notes the threads it ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.threads: set[threading.Thread] = set()

    def merge(self, layout: WeightLayout, current: Buffer, pushed: Buffer, worker_id: int) -> bool:
        self.threads.add(threading.current_thread())
        self.has_begun.set()
        assert self.may_go_on.wait(DEADLINE_S)
        return super().merge(layout, current, pushed, worker_id)


class Raising(WeightCombiner):
    def compute(
        self, origin_weight: NDArray[Any], new_weight: NDArray[Any], worker_id: int | str = -1, name: str | None = None
    ) -> NDArray[Any]:
        raise ZeroDivisionError("in a user's code")


class Overflowing(DeltaWeightCombiner):
    """Makes infinities of finite pushes at the end of a round."""

    def finish(self, layout: WeightLayout, current: Buffer, folded: Buffer, num_pushes: int, num_workers: int) -> bool:
        for view in layout.views(folded).values():
            view[...] = np.inf
        return False


class Bench:
    """Rounds with a pool and a store of their own; listens to what comes of them."""

    def __init__(self, layout: WeightLayout, combiner: WeightCombiner, executor: Executor) -> None:
        self.layout = layout
        self.pool = BufferPool(layout, limit_bytes=4 * layout.num_bytes)
        self.store = SnapshotStore(self.layout, self.pool, self.filled(2))
        self.rounds = Rounds(layout, combiner, self.pool, self.store, executor, self)
        self.events: list[tuple[str, Any]] = []
        self.errors: list[TensorsparkError] = []
        self.last: dict[int, int] = {}
        self.num_open_rounds = 0
        self._happened = asyncio.Event()

    def filled(self, value: float) -> Buffer:
        return self.layout.pack({s.name: np.full(s.shape, value, s.dtype) for s in self.layout.specs})

    def weights(self) -> set[float]:
        return {float(v) for view in self.layout.views(self.store.current.buffer).values() for v in np.unique(view)}

    def push(self, partition: int, value: float, sequence: int = 1, version: int = 0) -> None:
        """Keeps a payload and submits its fold; partition i is on connection 10 + i."""
        buffer = self.pool.take_now()
        assert buffer is not None
        buffer[:] = self.filled(value)
        push = Push(sequence, Cursor(0, sequence), num_steps=1, num_samples=10, version=version)
        self.rounds.keep(10 + partition, sequence, buffer)
        self.rounds.submit(Fold(10 + partition, partition, push))

    def publish(self, num_workers: int | None = None) -> None:
        self.rounds.submit(Publish(num_workers))

    def num_free(self) -> int:
        """Empties the pool, so at a test's end only."""
        num = 0
        while self.pool.take_now() is not None:
            num += 1
        return num

    async def until(self, num_events: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.events) < num_events:
                self._happened.clear()
                await self._happened.wait()

    # Listener

    def is_next(self, fold: Fold) -> bool:
        return fold.push.sequence == self.last.get(fold.partition, 0) + 1

    def on_folded(self, fold: Fold, error: TensorsparkError | None) -> None:
        if error is None:
            self.last[fold.partition] = fold.push.sequence
        self._note(("folded" if error is None else "refused", fold.partition), error)

    def on_timed(self, name: str, began_at: float, ended_at: float) -> None:
        assert ended_at >= began_at

    def on_published(self, folds: list[Fold], error: TensorsparkError | None) -> None:
        self._note(("published", [fold.partition for fold in folds]), error)

    def _note(self, event: tuple[str, Any], error: TensorsparkError | None) -> None:
        self.events.append(event)
        if error is not None:
            self.errors.append(error)
        self._happened.set()


Scenario = Callable[[Bench], Awaitable[None]]


def run(scenario: Scenario, layout: WeightLayout, combiner: WeightCombiner) -> None:
    """Runs the scenario on a loop, with one more thread for arithmetic; checks that no buffer is lost."""

    async def main(executor: Executor) -> None:
        bench = Bench(layout, combiner, executor)
        await scenario(bench)
        assert bench.num_free() == 4 + 3 - 1 - bench.num_open_rounds, "buffers were lost"

    with ThreadPoolExecutor(1) as executor:
        coroutine: Coroutine[Any, Any, None] = main(executor)
        asyncio.run(coroutine)


@pytest.fixture(params=[SMALL, LARGE], ids=["inline", "elsewhere"])
def layout(request: pytest.FixtureRequest) -> WeightLayout:
    chosen: WeightLayout = request.param
    return chosen


def test_an_asynchronous_push_is_a_round_of_its_own(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        for partition, value in enumerate([3, 4]):
            bench.push(partition, value)
            bench.publish(2)
        await bench.until(4)
        assert bench.events == [("folded", 0), ("published", [0]), ("folded", 1), ("published", [1])]
        assert (bench.store.current.version, bench.weights()) == (2, {2 + 3 + 4})

    run(scenario, layout, DeltaWeightCombiner())


def test_pushes_of_one_round_are_one_version(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        before = bench.store.pin()
        for partition, value in enumerate([3, 4, 5]):
            bench.push(partition, value)
        await bench.until(3)
        assert bench.store.current is before  # as it was, until the round is published
        assert bench.weights() == {2}
        bench.publish()
        await bench.until(4)
        bench.store.unpin(before)
        assert bench.events[-1] == ("published", [0, 1, 2])
        assert (bench.store.current.version, bench.weights()) == (1, {2 + 3 + 4 + 5})

    run(scenario, layout, DeltaWeightCombiner())


def test_folds_happen_in_the_order_in_which_they_are_submitted(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        for partition, value in enumerate([6.0, 1.0, 5.0]):
            bench.push(partition, value)
        bench.publish()
        await bench.until(4)
        # A moving average tells orders apart: 2 -> (2 + 6) / 2 -> (4 + 1) / 2 -> (2.5 + 5) / 2.
        assert bench.weights() == {3.75}

    run(scenario, layout, MeanWeightCombiner(2))


def test_a_push_of_nan_leaves_no_trace_in_its_round(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, 3)
        bench.push(1, np.nan)
        bench.push(2, 5)
        bench.publish()
        await bench.until(4)
        assert bench.events == [("folded", 0), ("refused", 1), ("folded", 2), ("published", [0, 2])]
        assert isinstance(bench.errors[0], NonFiniteError)
        assert "W:0, pushed by partition 1" in str(bench.errors[0])
        assert bench.weights() == {2 + 3 + 5}

    run(scenario, layout, DeltaWeightCombiner())


def test_a_round_of_refused_pushes_publishes_nothing(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, np.inf)
        bench.publish()
        await bench.until(2)
        assert bench.events == [("refused", 0), ("published", [])]
        assert (bench.store.current.version, bench.weights()) == (0, {2})

    run(scenario, layout, DeltaWeightCombiner())


def test_a_push_behind_a_refused_one_is_refused(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, np.nan, sequence=1)
        bench.publish(1)
        bench.push(0, 3, sequence=2)
        bench.publish(1)
        await bench.until(4)
        assert [event for event, _ in bench.events] == ["refused", "published", "refused", "published"]
        assert type(bench.errors[1]) is RefusedError
        assert bench.weights() == {2}

    run(scenario, layout, DeltaWeightCombiner())


@pytest.mark.parametrize(
    ("combiner", "message"),
    [(Raising(), "Raising.* raised ZeroDivisionError: in a user's code"), (Overflowing(), "Overflowing made NaN")],
    ids=["raising", "overflowing"],
)
def test_a_combiner_that_fails_says_so_and_leaves_the_weights(
    layout: WeightLayout, combiner: WeightCombiner, message: str
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, 3)
        bench.publish()
        await bench.until(2)
        (error,) = bench.errors
        assert isinstance(error, CombinerError)
        with pytest.raises(CombinerError, match=message):
            raise error
        assert bench.weights() == {2}

    run(scenario, layout, combiner)


def test_a_users_combiner_leaves_the_loop_free() -> None:
    combiner = Slow()

    async def scenario(bench: Bench) -> None:
        bench.push(0, 3)
        bench.publish()
        assert await asyncio.to_thread(combiner.has_begun.wait, DEADLINE_S)
        assert bench.events == []
        combiner.may_go_on.set()
        await bench.until(2)
        assert threading.current_thread() not in combiner.threads
        assert bench.weights() == {2 + 3}

    run(scenario, LARGE, combiner)


def test_a_cut_between_rounds_is_made_at_once_when_nothing_goes_on(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        assert await asyncio.wait_for(bench.rounds.between_rounds(bench.weights), DEADLINE_S) == {2}

    run(scenario, layout, DeltaWeightCombiner())


def test_a_cut_between_rounds_waits_for_the_open_one(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, 3)
        await bench.until(1)
        cut = bench.rounds.between_rounds(lambda: (bench.weights(), list(bench.events)))
        bench.push(1, 4)
        await bench.until(2)
        assert not cut.done()
        bench.publish()
        weights, events = await asyncio.wait_for(cut, DEADLINE_S)
        assert weights == {2 + 3 + 4}
        assert events[-1] == ("published", [0, 1])  # who listens is up to date too

    run(scenario, layout, DeltaWeightCombiner())


def test_a_cut_that_raises_is_its_callers_trouble(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(bench.rounds.between_rounds(lambda: 1 // 0), DEADLINE_S)
        bench.push(0, 3)
        bench.publish()
        await bench.until(2)
        assert bench.weights() == {2 + 3}

    run(scenario, layout, DeltaWeightCombiner())


def test_what_is_abandoned_is_forgotten_and_its_buffers_are_free() -> None:
    combiner = Slow()

    async def scenario(bench: Bench) -> None:
        bench.push(0, np.nan)
        bench.push(1, 4)
        bench.publish()
        assert await asyncio.to_thread(combiner.has_begun.wait, DEADLINE_S)
        cut = bench.rounds.between_rounds(bench.weights)
        bench.rounds.abandon()
        combiner.may_go_on.set()
        await bench.until(1)
        assert cut.cancelled()
        assert bench.events == [("refused", 0)]
        assert bench.weights() == {2}

    run(scenario, LARGE, combiner)


def test_a_cut_after_an_open_round_was_abandoned_does_not_wait_for_it(layout: WeightLayout) -> None:
    async def scenario(bench: Bench) -> None:
        bench.push(0, 3)
        await bench.until(1)
        bench.num_open_rounds = 1
        bench.rounds.abandon()
        cut = bench.rounds.between_rounds(bench.weights)
        await asyncio.wait([cut], timeout=2)
        assert cut.cancelled()  # weights without it and a state with it would not agree

    run(scenario, layout, DeltaWeightCombiner())
