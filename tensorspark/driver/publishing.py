"""How a trainer's content reaches the executors: through the staging directory, or as a Spark broadcast."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from pyspark import Broadcast, SparkContext

from tensorspark.data.staging import StagedFile, StagingDirectory, fetch, make_local_run_dir, remove_local
from tensorspark.driver.jobs import num_slots

logger = logging.getLogger(__name__)


class Publisher:
    """A session's files: published once, read by every executor, removed at the end. For the driver.

    Args:
        run_id: names the directories; unique.
        hdfs_dir: where to publish; None broadcasts.
        user: who to write to HDFS as.

    Raises:
        StagingError: `tmp_dir` cannot be used on the driver.
    """

    def __init__(self, spark_context: SparkContext, run_id: str, hdfs_dir: str | None, tmp_dir: str, user: str) -> None:
        self._spark_context = spark_context
        self._run_id = run_id
        self._hdfs_dir = hdfs_dir
        self._tmp_dir = tmp_dir
        self._user = user
        self._staging: StagingDirectory | None = None
        self._broadcast: Broadcast[bytes] | None = None
        self._published: tuple[str, Callable[[], bytes]] | None = None
        make_local_run_dir(tmp_dir, run_id)

    def publish(self, content: bytes, content_hash: str) -> Callable[[], bytes]:
        """Makes `content` available and returns what reads it on an executor; the last content is not sent again.

        Raises:
            StagingError: the staging directory cannot be used.
        """
        if self._published is None or self._published[0] != content_hash:
            self._published = (content_hash, self._send(content, content_hash))
        return self._published[1]

    def remove(self) -> None:
        """Removes the files from the staging directory, this host and, as far as Spark still runs, the executors'.

        Raises:
            StagingError: the staging directory does not answer.
        """
        with contextlib.ExitStack() as stack:  # what cannot be removed keeps nothing else from being removed
            if self._staging is not None:
                stack.callback(self._staging.remove)
                self._staging = None
            stack.callback(remove_local, self._tmp_dir, self._run_id)
            if self._published is not None and self._spark_context._jsc is not None:
                stack.callback(self._destroy_broadcast)
                self._remove_on_executors()

    def _send(self, content: bytes, content_hash: str) -> Callable[[], bytes]:
        if self._hdfs_dir is None:
            self._destroy_broadcast()
            self._broadcast = self._spark_context.broadcast(content)
            return _broadcast_reader(self._broadcast)
        if self._staging is None:
            self._staging = StagingDirectory(self._hdfs_dir, self._run_id, user=self._user)
        staged = self._staging.publish(f"graph-{content_hash[:16]}", content)
        return _staged_reader(staged, self._tmp_dir, self._run_id)

    def _destroy_broadcast(self) -> None:
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is not None:
            try:
                broadcast.destroy()
            except Exception as error:  # Spark is on its way out, and its files with it
                logger.info("a broadcast was left to Spark's own clean-up: %s", error)

    def _remove_on_executors(self) -> None:
        tmp_dir, run_id = self._tmp_dir, self._run_id
        try:
            slots = num_slots(self._spark_context)
            self._spark_context.parallelize(range(slots), slots).foreach(lambda _: remove_local(tmp_dir, run_id))
        except Exception as error:  # whatever Spark could not do: the run itself is over and well
            logger.warning("temporary files may be left in %s on executors: %s", tmp_dir, error)


def _staged_reader(staged: StagedFile, tmp_dir: str, run_id: str) -> Callable[[], bytes]:
    return lambda: fetch(staged, tmp_dir, run_id).read_bytes()


def _broadcast_reader(broadcast: Broadcast[bytes]) -> Callable[[], bytes]:
    return lambda: broadcast.value
