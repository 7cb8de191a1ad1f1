"""Partition functions for ``RDD.partitionBy``."""

from __future__ import annotations

import pickle
import random
from typing import Any


class RandomPartitioner:
    """Sends each row to a random partition: ``rdd.partitionBy(n, RandomPartitioner(n))``.

    The draws are seeded by `seed` and the first row that a task sees, so a task that Spark repeats sends its rows to
    the same partitions again. Equal for equal `num_partition`, as in the original.

    Args:
        num_partition: at least 1.
        seed: None draws one.
    """

    def __init__(self, num_partition: int, seed: int | None = None) -> None:
        if num_partition < 1:
            raise ValueError(f"num_partition must be at least 1, got {num_partition}")
        self.num_partition = num_partition
        self.seed = random.getrandbits(64) if seed is None else seed
        self._random: random.Random | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomPartitioner) and self.num_partition == other.num_partition

    def __hash__(self) -> int:
        return hash(self.num_partition)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_random": None}

    def __call__(self, k: Any) -> int:
        if self._random is None:
            self._random = random.Random(pickle.dumps((self.seed, k)))
        return self._random.randrange(self.num_partition)
