"""A worker's conversation with all shards, as if they were one server."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import TypeVar

from tensorspark.errors import ProtocolError
from tensorspark.ps.client import Granted, ParameterClient
from tensorspark.ps.messages import Asked, Order, OrderKind, Push, Registration, TimeSpent
from tensorspark.shards.places import ShardPlace
from tensorspark.telemetry.notes import Line, Timing
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer

# Pushes are based on one of the snapshots pulled last.
_NUM_VERSIONS = 8

# So long the first shard may take for its order, before the others are told that the worker waits for it.
_REST_AFTER_S = 0.5

_T = TypeVar("_T")


class ShardedClient:
    """A `ParameterClient` for each shard, with the methods of one; pushes and pulls go to all at the same time.

    The first shard decides: it grants the partition before the others are asked for it, takes the metrics and
    evaluations, and says whether to train, to evaluate or to finish; between epochs it is asked before the others. A
    successor begins at the earliest cursor of any shard: those that have the push already do not count it again.

    Args:
        places: of all shards, in their order.
    """

    def __init__(self, places: Sequence[ShardPlace], compression: Compression) -> None:
        self._shards = [place.shard for place in places]
        self._runs = [place.run for place in places]
        self._threads = ThreadPoolExecutor(len(places), thread_name_prefix="tensorspark-shards")
        # By the first shard's version, all shards' versions of the snapshots pulled last.
        self._versions: OrderedDict[int, list[int]] = OrderedDict()
        self._num_ahead = [0] * len(places)  # pushes of the predecessor that a shard has, and not all others
        self._is_between_epochs = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            self._clients = [
                stack.enter_context(ParameterClient(place.address, place.shard.layout, compression)) for place in places
            ]
            self._open = stack.pop_all()

    def __enter__(self) -> ShardedClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def register(self, registration: Registration) -> Granted:
        """Asks the first shard for a partition, and waits while another attempt holds it; then tells the others."""
        asked = [
            replace(registration, run=run, fingerprint=shard.layout.fingerprint)
            for run, shard in zip(self._runs, self._shards, strict=True)
        ]
        first = self._clients[0].register(asked[0])
        if first.finished:
            return first
        others = self._in_parallel(lambda index: self._clients[index].register(asked[index]), range(1, len(asked)))
        earliest = min([first, *others], key=lambda granted: granted.sequence)
        self._num_ahead = [granted.sequence - earliest.sequence for granted in (first, *others)]
        return replace(earliest, finished=False)

    def pull(self, out: Buffer, holds: int | None = None) -> Order:
        """As `ParameterClient.pull`; versions are the first shard's."""
        nothing: list[int | None] = [None] * len(self._clients)
        held = nothing if holds is None else [*self._versions.get(holds, nothing)]

        def pull_from(index: int, asked: Asked, epoch: int | None = None) -> Order:
            return self._clients[index].pull(self._shards[index].of(out), held[index], asked, epoch)

        indices = range(len(self._clients))
        if any(self._num_ahead):  # they have an epoch's end before them already, maybe, and are not to wait for it
            orders = self._in_parallel(
                lambda i: pull_from(i, Asked.PEEK if self._num_ahead[i] else Asked.NEXT), indices
            )
        elif self._is_between_epochs:
            first = self._first_order(lambda: pull_from(0, Asked.NEXT))
            if first.kind is OrderKind.FINISH:
                return first
            asked, epoch = Asked.NEXT, None
            if first.kind is OrderKind.EVALUATE:
                asked, epoch = Asked.EVALUATE, first.epoch
            orders = [first, *self._in_parallel(lambda index: pull_from(index, asked, epoch), indices[1:])]
        else:
            orders = self._in_parallel(lambda index: pull_from(index, Asked.NEXT), indices)
        return self._agreed(orders)

    def _first_order(self, pull: Callable[[], Order]) -> Order:
        """What the first shard orders; where it has the worker wait, the others' epoch is not to wait for it."""
        future = self._threads.submit(pull)
        try:
            return future.result(_REST_AFTER_S)
        except FutureTimeoutError:
            if not future.done():
                self._in_parallel(lambda index: self._clients[index].rest(), range(1, len(self._clients)))
            return future.result()

    def _agreed(self, orders: Sequence[Order]) -> Order:
        first = orders[0]
        if first.version in self._versions:
            # Of two snapshots with the same version of the first shard, whoever has one has at least the older parts.
            before = self._versions[first.version]
            self._versions[first.version] = [min(a, order.version) for a, order in zip(before, orders, strict=True)]
        else:
            self._versions[first.version] = [order.version for order in orders]
        if len(self._versions) > _NUM_VERSIONS:
            self._versions.popitem(last=False)
        kinds = {order.kind for order in orders}
        if OrderKind.FINISH in kinds:  # the driver's word has not reached all shards yet
            return replace(first, kind=OrderKind.FINISH)
        if len(kinds) > 1:
            raise ProtocolError(f"expected all shards to say the same, got {[order.kind.value for order in orders]}")
        return first

    def push(self, weights: Buffer, push: Push) -> None:
        """As `ParameterClient.push`."""
        versions = self._versions.get(push.version) or [push.version] * len(self._clients)

        def push_to(index: int) -> None:
            part = replace(push, version=versions[index])
            if index:
                part = replace(part, sums={}, totals=b"")
            self._clients[index].push(self._shards[index].of(weights), part)

        self._in_parallel(push_to, range(len(self._clients)))
        self._num_ahead = [max(0, num - 1) for num in self._num_ahead]
        self._is_between_epochs = push.cursor.batch == 0

    def flush(self) -> None:
        """Waits until all pushes are accepted."""
        for client in self._clients:
            client.flush()

    def finish(self, spent: TimeSpent) -> None:
        """As `ParameterClient.finish`; the first shard is told last, so that what it calls finished is."""
        for client in reversed(self._clients):
            client.finish(spent)

    def skip_epoch(self, epoch: int) -> None:
        """As `ParameterClient.skip_epoch`."""
        self._is_between_epochs = True
        for client in reversed(self._clients):
            client.skip_epoch(epoch)

    def report_evaluation(self, epoch: int, totals: bytes, num_samples: int) -> None:
        """As `ParameterClient.report_evaluation`, to the first shard alone."""
        self._clients[0].report_evaluation(epoch, totals, num_samples)

    def report(self, message: str, traceback: str) -> None:
        """As `ParameterClient.report`."""
        self._clients[0].report(message, traceback)

    def note(self, lines: Sequence[Line], timings: Sequence[Timing]) -> bool:
        """As `ParameterClient.note`, to the first shard."""
        return self._clients[0].note(lines, timings)

    def _in_parallel(self, function: Callable[[int], _T], indices: Sequence[int]) -> list[_T]:
        """Waits for all, then raises what the first of them raised."""
        futures = [self._threads.submit(function, index) for index in indices]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]
