"""Where workers find shards."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from tensorspark.errors import TransportError
from tensorspark.ps.client import ParameterClient
from tensorspark.ps.link import ServerAddress
from tensorspark.weights.ranges import Shard


@dataclass(frozen=True)
class ShardPlace:
    """Where workers find a shard; the first is the driver's own server.

    Attributes:
        run: number of the run there.
    """

    shard: Shard
    address: ServerAddress
    run: int


def problem_here(addresses: Sequence[ServerAddress]) -> TransportError | None:
    """What keeps a worker in this process from speaking with the shards beside the first, for the first that it cannot.

    Args:
        addresses: of these shards, in their order.
    """
    for index, address in enumerate(addresses, 1):
        try:
            ParameterClient(address).close()
        except TransportError as error:
            return type(error)(
                f"host {socket.gethostname()} cannot reach shard {index} at {address} ({error.__cause__ or error}); it "
                f"listens on a free port of its own: open the ports of {address.host} to the executors (on Linux those "
                f"of net.ipv4.ip_local_port_range); where that is the driver under a name that executors do not know, "
                f"set server_host (or spark.tensorspark.server.host); or take one server, with num_shards=1 (or "
                f"spark.tensorspark.num.shards)"
            )
    return None
