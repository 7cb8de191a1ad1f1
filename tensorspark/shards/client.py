"""A worker's conversation with all shards, as if they were one server."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from tensorspark.errors import ProtocolError
from tensorspark.ps.client import Granted, ParameterClient
from tensorspark.ps.messages import Order, OrderKind, Push, Registration, TimeSpent
from tensorspark.shards.places import ShardPlace
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer

# Pushes are based on one of the snapshots pulled last.
_NUM_VERSIONS = 8

_T = TypeVar("_T")


class ShardedClient:
    """A `ParameterClient` for each shard, with the methods of one; pushes and pulls go to all at the same time.

    The first shard decides: it grants the partition before the others are asked for it, takes the metrics, and says
    whether to train, to evaluate or to finish. A successor begins at the earliest cursor of any shard: those that have
    the push already do not count it again.

    Args:
        places: of all shards, in their order.
    """

    def __init__(self, places: Sequence[ShardPlace], compression: Compression) -> None:
        self._shards = [place.shard for place in places]
        self._runs = [place.run for place in places]
        self._threads = ThreadPoolExecutor(len(places), thread_name_prefix="tensorspark-shards")
        # By the first shard's version, all shards' versions of the snapshots pulled last.
        self._versions: OrderedDict[int, list[int]] = OrderedDict()
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
        return replace(earliest, finished=False)

    def pull(self, out: Buffer, holds: int | None = None) -> Order:
        """As `ParameterClient.pull`; versions are the first shard's."""
        nothing: list[int | None] = [None] * len(self._clients)
        held = nothing if holds is None else [*self._versions.get(holds, nothing)]
        orders = self._in_parallel(
            lambda index: self._clients[index].pull(self._shards[index].of(out), held[index]),
            range(len(self._clients)),
        )
        first = orders[0]
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
        for client in reversed(self._clients):
            client.skip_epoch(epoch)

    def report_evaluation(self, epoch: int, totals: bytes, num_samples: int) -> None:
        """As `ParameterClient.report_evaluation`; only the first shard wants the totals."""
        for client in reversed(self._clients[1:]):
            client.report_evaluation(epoch, b"", num_samples)
        self._clients[0].report_evaluation(epoch, totals, num_samples)

    def report(self, message: str, traceback: str) -> None:
        """As `ParameterClient.report`."""
        self._clients[0].report(message, traceback)

    def _in_parallel(self, function: Callable[[int], _T], indices: Sequence[int]) -> list[_T]:
        """Waits for all, then raises what the first of them raised."""
        futures = [self._threads.submit(function, index) for index in indices]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]
