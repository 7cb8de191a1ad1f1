"""What a worker does between its local steps: pulls and loads, reads and pushes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.ps.client import ParameterClient
from tensorspark.ps.messages import Order, OrderKind, Push
from tensorspark.shards.client import ShardedClient
from tensorspark.steps import Steps
from tensorspark.telemetry.notes import Timed, untimed
from tensorspark.trainers.base import Trainer
from tensorspark.weights.blocks import blocks
from tensorspark.weights.codecs.base import Scratch
from tensorspark.weights.elastic import elastic_difference
from tensorspark.weights.layout import Buffer, WeightLayout

Client = ParameterClient | ShardedClient
"""A worker's conversation with the server, or with all of its shards."""


class Exchange:
    """Trains on from what is pulled, and pushes what came of it.

    Args:
        accumulates: whether a push leaves in its buffer what a lossy codec left out: what is pushed is added to that.
        timed: times what the worker does.

    Attributes:
        sync_s: time spent in it, during which no step was made.
        hidden_s: time that pushes, pulls and waiting took while steps were made.
    """

    def __init__(
        self,
        client: Client,
        trainer: Trainer,
        sequence: int,
        *,
        accumulates: bool = False,
        timed: Timed = untimed,
    ) -> None:
        self._timed = timed
        self._client = client
        self._trainer = trainer
        self._sequence = sequence
        self._accumulates = accumulates
        self._order: Order | None = None
        self._pulled = trainer.layout.allocate()
        self._local = trainer.layout.allocate()
        self._holds: int | None = None  # the version that `pulled` is
        self.sync_s = 0.0
        self.hidden_s = 0.0

    def before(self) -> Order:
        """Before an interval's steps: asks what to do, and makes the weights ready for it."""
        began = time.perf_counter()
        order = self._pull()
        if order.kind is not OrderKind.FINISH:
            self._load(order)
        self.sync_s += time.perf_counter() - began
        return order

    def after(self, steps: Steps) -> None:
        """After an interval's steps."""
        began = time.perf_counter()
        with self._timed("read weights"):
            outgoing = self._outgoing()
        self._push(outgoing, steps)
        self.sync_s += time.perf_counter() - began

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While the pulled weights are evaluated."""
        yield

    def _outgoing(self) -> Buffer:
        """What is pushed; it stays as it is until the next pull."""
        if self._accumulates:
            for new, block in self._weights():
                _add(new, block, self._local)
        else:
            self._trainer.read(self._local)
        return self._local

    def end(self) -> None:
        """After the last interval: waits for what is under way."""

    def close(self) -> None:
        """Gives up what is under way; called also when the worker has failed."""

    def _weights(self) -> Iterator[tuple[NDArray[Any], slice]]:
        """The trainer's weights in blocks of one dtype, and where each lies in a buffer."""
        parts = list(blocks(self._trainer.layout))
        pieces = self._trainer.read_blocks([block for _, block in parts])
        for (dtype, block), piece in zip(parts, pieces, strict=True):
            yield piece.view(dtype), block

    def _pull(self) -> Order:
        with self._timed("pull"):
            self._order = self._client.pull(self._pulled, self._holds)
        self._holds = self._order.version
        return self._order

    def _load(self, order: Order) -> None:
        with self._timed("load weights"):
            self._trainer.load(self._pulled)
        self._guide(order)

    def _guide(self, order: Order) -> None:
        self._trainer.guide(order.num_steps, order.num_workers, order.values)

    def _push(self, buffer: Buffer, steps: Steps) -> None:
        assert self._order is not None
        self._sequence += 1
        with self._timed("push"):
            self._client.push(buffer, steps.as_push(self._sequence, self._order.version))


class _DeltaExchange(Exchange):
    """Pushes how the steps changed what was pulled."""

    def _outgoing(self) -> Buffer:
        if not self._accumulates:
            super()._outgoing()
            subtract(self._trainer.layout, self._local, self._pulled)
            return self._local
        scratch = Scratch()
        for new, block in self._weights():
            _add(_change(new, block, self._pulled, scratch), block, self._local)
        return self._local


class _ElasticExchange(Exchange):
    """Keeps weights of its own, which it and the server draw to each other: see `weights.elastic`.

    A successor of a worker that died has lost them, and begins at the server's.
    """

    def __init__(
        self,
        client: Client,
        trainer: Trainer,
        sequence: int,
        moving_rate: float,
        has_epochs: bool,
        timed: Timed = untimed,
    ) -> None:
        super().__init__(client, trainer, sequence, timed=timed)
        self._moving_rate = moving_rate
        self._difference = trainer.layout.allocate()
        self._has_epochs = has_epochs
        self._has_begun = False
        self._is_between_epochs = True

    def before(self) -> Order:
        if self._order is not None and not (self._has_epochs and self._is_between_epochs):
            self._guide(self._order)  # it came with the pull at the end of the interval before
            return self._order
        return super().before()

    def after(self, steps: Steps) -> None:
        super().after(steps)
        self._is_between_epochs = steps.has_ended_epoch

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self._trainer.load(self._pulled)
        yield
        if self._has_begun:
            self._trainer.load(self._local)

    def _load(self, order: Order) -> None:
        if order.kind is OrderKind.TRAIN and not self._has_begun:
            self._trainer.load(self._pulled)
            self._has_begun = True
        self._guide(order)

    def _outgoing(self) -> Buffer:
        super()._outgoing()
        self._pull()
        elastic_difference(self._trainer.layout, self._local, self._pulled, self._moving_rate, self._difference)
        self._trainer.load(self._local)
        return self._difference


class _OverlappedExchange(Exchange):
    """Goes on with local steps while a push and the pull behind it are under way: as Pipe-SGD does (Li et al.,
    "Pipe-SGD: A Decentralized Pipelined SGD Framework for Distributed Deep Net Training", 2018), one interval deep.

    What has been pulled is folded in at the interval's end: the weights become the pulled ones plus their change since
    the push. So every interval begins from weights that lack the others' last interval, which is a round of staleness,
    and counts as one (`Config.gate_staleness`). At the end of an epoch nothing is under way.

    Args:
        pushes_delta: whether changes are pushed, or weights.
    """

    def __init__(
        self,
        client: Client,
        trainer: Trainer,
        sequence: int,
        *,
        pushes_delta: bool,
        has_epochs: bool,
        accumulates: bool = False,
        timed: Timed = untimed,
    ) -> None:
        super().__init__(client, trainer, sequence, accumulates=accumulates, timed=timed)
        self._pushes_delta = pushes_delta
        self._has_epochs = has_epochs
        self._base = self._local  # what the interval's steps began from
        if accumulates:
            self._local = trainer.layout.allocate()
        self._base_version = 0  # the newest whose changes by others are in it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorspark-exchange")
        self._flight: Future[tuple[Order, float]] | None = None
        self._must_land = False

    def before(self) -> Order:
        if self._order is not None and self._order.kind is OrderKind.FINISH:
            return self._order
        if self._flight is not None and not self._must_land:
            assert self._order is not None
            return self._order  # that of the interval before: `after` looks at what has come
        began = time.perf_counter()
        order = self._land() if self._flight is not None else self._pull()
        if order.kind is not OrderKind.FINISH:
            self._begin_from_pulled(order)
        self.sync_s += time.perf_counter() - began
        return order

    def after(self, steps: Steps) -> None:
        began = time.perf_counter()
        has_landed = self._flight is not None
        order = self._land() if has_landed else self._order
        assert order is not None
        if order.kind is OrderKind.TRAIN:  # else the run ends, and the interval with it
            version = self._base_version
            outgoing = self._advance(has_landed)
            if has_landed:
                self._trainer.load(self._base)
                self._guide(order)
                self._base_version = order.version
            self._must_land = self._has_epochs and steps.has_ended_epoch
            is_last = not self._has_epochs and steps.has_ended_training
            self._sequence += 1
            push = steps.as_push(self._sequence, version)
            self._flight = self._thread.submit(self._fly, outgoing, push, order if is_last else None)
        self.sync_s += time.perf_counter() - began

    def end(self) -> None:
        if self._flight is not None:
            began = time.perf_counter()
            self._land()
            self.sync_s += time.perf_counter() - began

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_from_pulled(self, order: Order) -> None:
        self._load(order)
        if order.kind is OrderKind.TRAIN:
            self._base, self._pulled = self._pulled, self._base
            self._base_version, self._holds = order.version, None

    def _advance(self, has_landed: bool) -> Buffer:
        """Has `base` be what the next steps begin from: the weights or, with what has been pulled, that and the steps'
        change.

        Returns:
            What is to be pushed. Where changes are, it is the buffer that the next pull is received into: no byte of
            that comes before the push is accepted.
        """
        scratch = Scratch()
        for new, block in self._weights():
            base, pulled = self._base[block].view(new.dtype), self._pulled[block].view(new.dtype)
            change = _change(new, block, self._base, scratch)
            if has_landed:
                with np.errstate(invalid="ignore", over="ignore"):
                    np.add(change, pulled, out=base)
            else:
                np.copyto(base, new)
            if self._accumulates:
                _add(change if self._pushes_delta else base, block, self._local)
            elif self._pushes_delta:
                np.copyto(pulled, change)
        self._holds = None
        if self._accumulates:
            return self._local
        return self._pulled if self._pushes_delta else self._base

    def _fly(self, outgoing: Buffer, push: Push, last: Order | None) -> tuple[Order, float]:
        """Pushes and pulls; after the last push of all, whose order is `last`, nobody wants what would be pulled."""
        began = time.perf_counter()
        with self._timed("push"):
            self._client.push(outgoing, push)
        with self._timed("pull"):
            order = last or self._client.pull(self._pulled)
        return order, time.perf_counter() - began

    def _land(self) -> Order:
        assert self._flight is not None
        began = time.perf_counter()
        flight, self._flight = self._flight, None
        self._order, flight_s = flight.result()
        self._holds = self._order.version
        self.hidden_s += max(0.0, flight_s - (time.perf_counter() - began))
        return self._order


def exchange_for(
    pushes: str,
    moving_rate: float,
    client: Client,
    trainer: Trainer,
    sequence: int,
    *,
    has_epochs: bool,
    overlap: bool = False,
    accumulates: bool = False,
    timed: Timed = untimed,
) -> Exchange:
    """How a run's combiner wants it.

    Args:
        pushes: "weights", "delta" or "elastic".
        moving_rate: of elastic averaging.
        has_epochs: whether workers wait for each other at the end of an epoch.
        overlap: whether steps go on while a push and a pull are under way; not in elastic averaging.
        accumulates: whether the client leaves in what it pushes what a lossy codec lost (`Compression.leaves_error`);
            not in elastic averaging.
        timed: times what the worker does.
    """
    if pushes == "elastic":
        return _ElasticExchange(client, trainer, sequence, moving_rate, has_epochs, timed)
    if overlap:
        return _OverlappedExchange(
            client,
            trainer,
            sequence,
            pushes_delta=pushes == "delta",
            has_epochs=has_epochs,
            accumulates=accumulates,
            timed=timed,
        )
    exchange = _DeltaExchange if pushes == "delta" else Exchange
    return exchange(client, trainer, sequence, accumulates=accumulates, timed=timed)


def subtract(layout: WeightLayout, new: Buffer, base: Buffer) -> None:
    """Turns weights into their change, in place: new - base."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is the server's to refuse, by name
        for segment in layout.segments:
            values = segment.of(new)
            np.subtract(values, segment.of(base), out=values)


def _change(new: NDArray[Any], block: slice, base: Buffer, scratch: Scratch) -> NDArray[Any]:
    """new - base, in memory that the next call takes."""
    change = scratch.array("change", new.dtype, len(new))
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(new, base[block].view(new.dtype), out=change)
    return change


def _add(values: NDArray[Any], block: slice, total: Buffer) -> None:
    """Adds to a block of `total`, in place."""
    result = total[block].view(values.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        np.add(values, result, out=result)
