"""Tells the end of a partition from the end of the connection that its rows come through."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, Any

from pyspark import RDD
from pyspark.serializers import Serializer, SpecialLengths

from tensorspark.errors import FeedLostError

_END_OF_DATA = struct.pack("!i", SpecialLengths.END_OF_DATA_SECTION)


def require_whole_partitions(tasks: RDD[Any]) -> None:
    """Makes the tasks of `tasks` (not yet run) raise `FeedLostError` where Spark stops sending rows halfway.

    pyspark's deserializers take a connection that closes for the end of the data. It closes when what computes the
    rows fails in the JVM: an upstream Python worker, a shuffle's or file's source, the executor itself. Spark repeats
    such a task, but without this its rows so far would count as the whole partition.
    """
    tasks._prev_jrdd_deserializer = WholeStream(tasks._prev_jrdd_deserializer)  # type: ignore[attr-defined]


class WholeStream(Serializer):
    """Reads what `inner` reads, and raises `FeedLostError` unless it ended with Spark's mark."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def load_stream(self, stream: Any) -> Iterator[Any]:
        watched = _Watched(stream)
        yield from self._inner.load_stream(watched)
        if watched.last != _END_OF_DATA:
            raise FeedLostError(
                "Spark stopped sending this partition's rows before their end; look for what failed "
                "earlier in the executor's log"
            )


class _Watched:
    """A stream that remembers what was read last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, num_bytes: int = -1) -> bytes:
        self.last = self._stream.read(num_bytes)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
