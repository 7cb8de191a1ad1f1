"""Carries out what `RunState` decides about weights: folds pushes into rounds and publishes them, one by one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tensorspark.errors import CombinerError, NonFiniteError, ProtocolError, RefusedError, TensorsparkError
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.messages import Fold, Publish
from tensorspark.ps.snapshots import Derived, SnapshotStore
from tensorspark.weights.codecs import Codec
from tensorspark.weights.combiners import Contribution, WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout

# Larger weights, or a combiner in a user's code, leave the loop to another thread; for others the change costs more.
_INLINE_BYTES = 2**20

_T = TypeVar("_T")


class Listener(Protocol):
    """Who is told, on the loop, what came of it."""

    def is_next(self, fold: Fold) -> bool: ...

    def on_folded(self, fold: Fold, error: TensorsparkError | None) -> None: ...

    def on_published(self, folds: list[Fold], error: TensorsparkError | None) -> None: ...

    def on_timed(self, name: str, began_at: float, ended_at: float) -> None:
        """On any thread: how long an arithmetic took, on the monotonic clock."""


@dataclass(frozen=True)
class _Cut:
    """What is to be done between two rounds."""

    make: Callable[[], object]
    future: asyncio.Future[object]
    at_version: int
    holds: bool


class Rounds:
    """The weights of a run and the round that is being folded. All methods are called on the server's loop.

    Args:
        executor: does the arithmetic of large weights, one step at a time.
        codec: of pushes that are encoded.
    """

    def __init__(
        self,
        layout: WeightLayout,
        combiner: WeightCombiner,
        pool: BufferPool,
        store: SnapshotStore,
        executor: Executor,
        listener: Listener,
        codec: Codec | None = None,
    ) -> None:
        self._layout = layout
        self._combiner = combiner
        self._pool = pool
        self._store = store
        self._executor = executor
        self._listener = listener
        self._codec = codec
        self._is_inline = combiner.is_elementwise and layout.num_bytes <= _INLINE_BYTES
        self._payloads: dict[tuple[int, int], Buffer] = {}
        self._queue: deque[Fold | Publish] = deque()
        self._partial: Buffer | None = None
        self._folds: list[Fold] = []  # in `partial`
        self._derived = Derived()  # of what is to be published
        self._cuts: list[_Cut] = []
        self._is_held = False  # between two rounds, until `go_on`
        self._working: asyncio.Task[None] | None = None
        self._is_abandoned = False

    def keep(self, connection: int, sequence: int, payload: Buffer) -> None:
        """Keeps a push's payload (a pooled buffer) until its `Fold` is submitted."""
        self._payloads[connection, sequence] = payload

    def submit(self, decision: Fold | Publish) -> None:
        """Does it after all that was submitted before: right here if that is quick, else soon."""
        self._queue.append(decision)
        self._work()

    def between_rounds(self, cut: Callable[[], _T], *, at_version: int = 0, holds: bool = False) -> asyncio.Future[_T]:
        """Calls `cut` when no round is open and no arithmetic goes on, so that weights, combiner and state agree.

        Args:
            at_version: not before the weights are of this version. Where `holds` has stopped them, they go on up to it.
            holds: begins no round after it, until `go_on`.

        Returns:
            What `cut` returns; cancelled where the run is abandoned: its open round never ends.
        """
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        if self._is_abandoned:
            future.cancel()
            return future
        self._cuts.append(_Cut(cut, future, at_version, holds))  # type: ignore[arg-type]
        self._is_held = self._is_held and self._store.current.version >= at_version
        self._work()
        return future

    def go_on(self) -> None:
        """Ends what `between_rounds` holds."""
        self._is_held = False
        self._work()

    def abandon(self) -> None:
        """Forgets what is submitted and kept; a step that goes on ends first."""
        self._queue.clear()
        for payload in self._payloads.values():
            self._pool.put_back(payload)
        self._payloads.clear()
        for cut in self._cuts:
            cut.future.cancel()
        self._cuts.clear()
        self._is_abandoned = True

    def _work(self) -> None:
        if self._working is not None:
            return
        if not self._is_inline:
            self._working = asyncio.get_running_loop().create_task(self._work_through())
            return
        self._make_cuts()
        while self._queue and not self._is_held:
            step = self._queue.popleft()
            if isinstance(step, Fold):
                payload = self._take_payload(step)
                self._conclude_fold(step, payload, self._timed("fold", self._fold, step, payload))
            else:
                self._conclude_round(self._timed("publish", self._finish, step))
            self._make_cuts()

    def _make_cuts(self) -> None:
        for cut in self._due_cuts():
            self._is_held |= cut.holds and not cut.future.cancelled()
            _settle(cut.future, cut.make)

    async def _work_through(self) -> None:
        def elsewhere(function: Callable[..., _T], *arguments: object) -> asyncio.Future[_T]:
            return asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

        try:
            while True:
                for cut in self._due_cuts():
                    self._is_held |= cut.holds and not cut.future.cancelled()
                    await elsewhere(_settle_from_thread, asyncio.get_running_loop(), cut.future, cut.make)
                if not self._queue or self._is_held:
                    return
                step = self._queue.popleft()
                if isinstance(step, Fold):
                    payload = self._take_payload(step)
                    self._conclude_fold(step, payload, await elsewhere(self._timed, "fold", self._fold, step, payload))
                else:
                    self._store.prepare()
                    self._conclude_round(await elsewhere(self._timed, "publish", self._finish, step))
        finally:
            self._working = None

    def _take_payload(self, fold: Fold) -> Buffer:
        return self._payloads.pop((fold.connection, fold.push.sequence))

    def _due_cuts(self) -> list[_Cut]:
        if self._folds or not self._cuts:
            return []
        version = self._store.current.version
        due = [cut for cut in self._cuts if cut.at_version <= version]
        self._cuts = [cut for cut in self._cuts if cut.at_version > version]
        return due

    # Arithmetic, maybe on another thread

    def _timed(self, name: str, arithmetic: Callable[..., _T], *arguments: object) -> _T:
        began_at = time.monotonic()
        try:
            return arithmetic(*arguments)
        finally:
            self._listener.on_timed(name, began_at, time.monotonic())

    def _fold(self, fold: Fold, payload: Buffer) -> TensorsparkError | None:
        """Folds a push in place, and says what is wrong with it; then `payload` holds nothing of use."""
        if not self._listener.is_next(fold):
            return RefusedError("a push before this one was refused")
        current = self._store.current
        push = fold.push
        if push.encoded_bytes:
            assert self._codec is not None
            try:
                self._codec.decode(self._layout, payload, push.encoded_bytes)
            except ProtocolError as problem:
                return RefusedError(f"the push of partition {fold.partition} does not decode: {problem}")
        contribution = Contribution(fold.partition, push.num_samples, current.version - push.version)
        error = self._guarded(
            "fold", lambda: self._combiner.fold(self._layout, current.buffer, self._partial, payload, contribution)
        )
        if not isinstance(error, NonFiniteError):
            return error
        name = self._layout.find_non_finite(payload)
        return NonFiniteError(
            f"NaN or infinity in {name}, pushed by partition {fold.partition}: the push was refused and the server's "
            f"weights are as they were; look at the learning rate, at the loss for log(0), and for NaN in the rows"
        )

    def _finish(self, publish: Publish) -> TensorsparkError | None:
        if self._partial is None:  # all of the round's pushes were refused
            return None
        folded, num_pushes = self._partial, len(self._folds)
        num_workers = max(publish.num_workers or num_pushes, num_pushes)
        current = self._store.current.buffer
        error = self._guarded(
            "finish", lambda: self._combiner.finish(self._layout, current, folded, num_pushes, num_workers)
        )
        if error is None:
            self._derived = self._store.derive(folded)
        if not isinstance(error, NonFiniteError):
            return error
        return CombinerError(
            f"{type(self._combiner).__name__} made NaN or infinity in {self._layout.find_non_finite(folded)} from "
            f"finite pushes: lower its learning rate"
        )

    def _guarded(self, name: str, step: Callable[[], bool]) -> TensorsparkError | None:
        try:
            return None if step() else NonFiniteError("")
        except CombinerError as error:
            return error
        except Exception as error:
            return CombinerError(f"{type(self._combiner).__name__}.{name} raised {type(error).__name__}: {error}")

    # On the loop again

    def _conclude_fold(self, fold: Fold, payload: Buffer, error: TensorsparkError | None) -> None:
        if error is None:
            before, self._partial = self._partial, payload
            self._folds.append(fold)
        else:
            before = payload
        if before is not None:
            self._pool.put_back(before)
        self._listener.on_folded(fold, error)

    def _conclude_round(self, error: TensorsparkError | None) -> None:
        folded, self._partial = self._partial, None
        folds, self._folds = self._folds, []
        if folded is not None and error is None:
            self._store.publish(folded, self._derived)
        elif folded is not None:
            self._pool.put_back(folded)
        self._listener.on_published(folds, error)


def _settle(future: asyncio.Future[_T], function: Callable[[], _T]) -> None:
    """Puts what `function` returns or raises into `future`, unless nobody waits for it any more."""
    if future.cancelled():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _settle_from_thread(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[_T], function: Callable[[], _T]
) -> None:
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
    try:
        outcome.set_result(function())
    except Exception as error:
        outcome.set_exception(error)
    loop.call_soon_threadsafe(_settle, future, outcome.result)
