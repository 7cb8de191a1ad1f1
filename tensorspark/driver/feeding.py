"""The feed, as Spark gives it to tasks: as many partitions as can run at once, and rows known to be whole."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from typing import IO, Any

from pyspark import RDD
from pyspark.serializers import Serializer, SpecialLengths

from tensorspark.errors import FeedLostError

logger = logging.getLogger(__name__)

_END_OF_DATA = struct.pack("!i", SpecialLengths.END_OF_DATA_SECTION)


def coalesced(feed_rdd: RDD[Any], num_partitions: int) -> RDD[Any]:
    """Joins neighbouring partitions to `num_partitions`, always the same ones in the same order.

    `RDD.coalesce` goes by where partitions are cached or stored, which differs from run to run: a restored run could
    not tell which rows its cursors stand for, and a repeated one would add up other batches.
    """
    context, java_feed = feed_rdd.context, feed_rdd._jrdd
    jvm: Any = context._jvm
    total = feed_rdd.getNumPartitions()
    joined: list[RDD[Any]] = []
    for index in range(num_partitions):
        chosen = jvm.java.util.HashSet()
        for partition in range(index * total // num_partitions, (index + 1) * total // num_partitions):
            chosen.add(partition)
        is_chosen = jvm.scala.jdk.javaapi.CollectionConverters.asScala(chosen).toSet()  # a Scala set is a predicate
        pruned = jvm.org.apache.spark.rdd.PartitionPruningRDD.create(java_feed.rdd(), is_chosen)
        one = jvm.org.apache.spark.api.java.JavaRDD(pruned, java_feed.classTag()).coalesce(1)
        joined.append(RDD(one, context, feed_rdd._jrdd_deserializer))
    return context.union(joined)


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
