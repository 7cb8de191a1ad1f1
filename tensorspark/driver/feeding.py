"""The feed, as Spark gives it to tasks: as many partitions as can run at once, and rows known to be whole."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from typing import IO, Any

from pyspark import RDD, SparkContext
from pyspark.serializers import CPickleSerializer, FramedSerializer, Serializer, SpecialLengths

from tensorspark.data.columns import VALIDATION_MARKER
from tensorspark.errors import FeedLostError

logger = logging.getLogger(__name__)

_END_OF_DATA = struct.pack("!i", SpecialLengths.END_OF_DATA_SECTION)


def coalesced(feed_rdd: RDD[Any], num_partitions: int) -> RDD[Any]:
    """Joins neighbouring partitions to `num_partitions`, always the same ones in the same order.

    `RDD.coalesce` goes by where partitions are cached or stored, which differs from run to run: a restored run could
    not tell which rows its cursors stand for, and a repeated one would add up other batches.
    """
    return _grouped(feed_rdd, _shares(feed_rdd.getNumPartitions(), num_partitions))


def with_validation(feed_rdd: RDD[Any], validation_rdd: RDD[Any], num_partitions: int) -> RDD[Any]:
    """Joins partitions to `num_partitions`: in each, rows to train on, a `VALIDATION_MARKER`, and held-out rows."""
    if not feed_rdd._jrdd_deserializer == validation_rdd._jrdd_deserializer == RawSerializer():
        feed_rdd, validation_rdd = feed_rdd._reserialize(), validation_rdd._reserialize()
    markers = _markers(feed_rdd.context, num_partitions, feed_rdd._jrdd_deserializer)
    num_feed, num_validation = feed_rdd.getNumPartitions(), validation_rdd.getNumPartitions()
    after_markers = num_feed + num_partitions
    groups = zip(_shares(num_feed, num_partitions), _shares(num_validation, num_partitions), strict=True)
    return _grouped(
        feed_rdd.context.union([feed_rdd, markers, validation_rdd]),
        [
            [*feed, num_feed + index, *(after_markers + partition for partition in validation)]
            for index, (feed, validation) in enumerate(groups)
        ],
    )


class RawSerializer(FramedSerializer):
    """Elements that are bytes already, as those of an RDD made in the JVM."""

    def loads(self, obj: bytes) -> bytes:
        return obj

    def dumps(self, obj: bytes) -> bytes:
        return obj


def _shares(num_partitions: int, num_shares: int) -> list[range]:
    """Neighbouring partitions, in as equal shares as they come."""
    return [
        range(index * num_partitions // num_shares, (index + 1) * num_partitions // num_shares)
        for index in range(num_shares)
    ]


def _markers(context: SparkContext, num_partitions: int, serializer: Serializer) -> RDD[Any]:
    """A marker in each partition, serialized as the other rows are, without a Python worker."""
    is_raw = isinstance(serializer, RawSerializer)
    pickler: Any = CPickleSerializer()
    element = VALIDATION_MARKER if is_raw else pickler.dumps([VALIDATION_MARKER])
    elements = context._jvm.java.util.ArrayList()  # type: ignore[union-attr]
    for _ in range(num_partitions):
        elements.add(bytearray(element))
    return RDD(context._jsc.parallelize(elements, num_partitions), context, serializer)


def _grouped(rdd: RDD[Any], groups: Sequence[Sequence[int]]) -> RDD[Any]:
    """An RDD with a partition for each group of `rdd`'s partitions, whose rows follow in ascending order."""
    context, java_rdd = rdd.context, rdd._jrdd
    jvm: Any = context._jvm
    joined: list[RDD[Any]] = []
    for group in groups:
        chosen = jvm.java.util.HashSet()
        for partition in group:
            chosen.add(partition)
        is_chosen = jvm.scala.jdk.javaapi.CollectionConverters.asScala(chosen).toSet()  # a Scala set is a predicate
        pruned = jvm.org.apache.spark.rdd.PartitionPruningRDD.create(java_rdd.rdd(), is_chosen)
        one = jvm.org.apache.spark.api.java.JavaRDD(pruned, java_rdd.classTag()).coalesce(1)
        joined.append(RDD(one, context, rdd._jrdd_deserializer))
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
