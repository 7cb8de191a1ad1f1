"""A server and clients that a part of the wire benchmark measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring.processes import Peer, started, together
from benchmarks.wire.parameter_server import Client, Server, Traffic

MB = 10**6
# Sixty-four clients start on two cores, and move gigabytes.
DEADLINE_S = 240.0


@dataclass(frozen=True)
class Fleet:
    """A server and clients, each a process of its own."""

    traffic: Traffic
    server: Peer
    clients: Sequence[Peer]

    def together(self, num_clients: int, operation: str, count: int) -> list[Any]:
        """Has the first clients do so many of an operation each, all at once."""
        return together(self.clients[:num_clients], operation, count, deadline_s=DEADLINE_S)

    def check(self) -> None:
        """Raises unless the weights are the sum of all pushes, and those that are pulled: who loses some is fast."""
        num_pushes = [client.call("num_pushes") for client in self.clients]
        unsent = [] if self.traffic.is_exact else [client.call("unsent") for client in self.clients]
        self.server.call("check_weights", num_pushes, unsent, deadline_s=DEADLINE_S)
        self.server.call("check_pulled", self.clients[0].call("pulled"), deadline_s=DEADLINE_S)


@contextlib.contextmanager
def serving(traffic: Traffic, num_clients: int) -> Iterator[Fleet]:
    """A server and so many clients, until the end of the block."""
    with Peer("parameter server", Server, traffic, num_clients, deadline_s=DEADLINE_S) as server:
        where = server.call("where")
        clients = [
            Peer(f"client {index}", Client, where, index, traffic, deadline_s=DEADLINE_S)
            for index in range(num_clients)
        ]
        with started(clients):
            yield Fleet(traffic, server, clients)


def traffic_of(size_mb: float, **how: Any) -> Traffic:
    """Weights of about so many megabytes: whole rows of a table, and both halves aligned."""
    return Traffic(round(size_mb * MB) // 1024 * 1024, **how)
