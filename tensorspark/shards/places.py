"""Where workers find shards."""

from __future__ import annotations

from dataclasses import dataclass

from tensorspark.ps.link import ServerAddress
from tensorspark.weights.shards import Shard


@dataclass(frozen=True)
class ShardPlace:
    """Where workers find a shard; the first is the driver's own server.

    Attributes:
        run: number of the run there.
    """

    shard: Shard
    address: ServerAddress
    run: int
