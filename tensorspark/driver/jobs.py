"""Spark jobs that the driver can watch, cancel and interrupt."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from pyspark import InheritableThread, SparkContext

_CANCEL_TIMEOUT_S = 30.0
_SUMMARY_LINES = 25
# Executors of an application that has just started may still be on their way; they come within seconds of each other.
_YOUNG_S = 60.0
_SETTLED_S = 3.0
_POLL_S = 0.1


class SparkJob:
    """An action that runs on a thread of its own, in a job group of its own, while the caller watches.

    When it has ended, `result` or `error` holds what came of it. Leaving the ``with`` block before (Ctrl-C, an error)
    cancels the action and waits for its end.

    Args:
        action: what starts the job and waits for it, such as ``rdd.count``.
        group: the job group's id, unique in the application.
        description: for Spark's web page.
    """

    def __init__(self, spark_context: SparkContext, action: Callable[[], Any], *, group: str, description: str) -> None:
        self._spark_context = spark_context
        self._action = action
        self._group = group
        self._description = description
        self._ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread: Any = InheritableThread(self._run, daemon=True, name=f"tensorspark-job-{group}")

    def __enter__(self) -> SparkJob:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._ended.is_set():
            self.cancel()
            self.wait(_CANCEL_TIMEOUT_S)

    def wait(self, timeout_s: float) -> bool:
        """Waits until the action has ended, at most `timeout_s`; returns whether it has."""
        return self._ended.wait(timeout_s)

    def cancel(self) -> None:
        """Asks Spark to end the job's tasks."""
        self._spark_context.cancelJobGroup(self._group)

    def _run(self) -> None:
        try:
            self._spark_context.setJobGroup(self._group, self._description, interruptOnCancel=True)
            self.result = self._action()
        except BaseException as error:  # the caller's to raise, on its own thread
            self.error = error
        finally:
            self._ended.set()


def count_slots(spark_context: SparkContext) -> int:
    """How many tasks the application can run at once, now; 0 where no executor has registered yet."""
    scala_context = spark_context._jsc.sc()
    return int(scala_context.maxNumConcurrentTasks(scala_context.resourceProfileManager().defaultResourceProfile()))


def num_slots(spark_context: SparkContext) -> int:
    """How many tasks the application can run at once, now; at least 1."""
    return max(1, count_slots(spark_context))


def settled_slots(spark_context: SparkContext, wanted: int, timeout_s: float) -> int:
    """`num_slots` of a cluster that may have just started: its executors register one after the other.

    Waits until there are as many slots as `wanted`, or no more have come for some seconds; at most `timeout_s`.
    """
    num = count_slots(spark_context)
    is_young = num == 0 or time.time() - spark_context.startTime / 1000 < _YOUNG_S
    if num >= wanted or not is_young or spark_context._jsc.sc().isLocal():
        return num
    deadline = time.monotonic() + timeout_s
    grown_at = time.monotonic()

    def ask() -> int:  # tasks make dynamic allocation start executors
        return spark_context.parallelize(range(wanted), wanted).count()

    group = f"tensorspark-slots-{secrets.token_hex(4)}"
    with SparkJob(spark_context, ask, group=group, description="tensorspark: waits for slots") as job:
        while num < wanted and time.monotonic() < min(deadline, grown_at + _SETTLED_S):
            if job.wait(_POLL_S):
                time.sleep(_POLL_S)
            if (now_there := count_slots(spark_context)) > num or now_there == 0:
                num, grown_at = now_there, time.monotonic()
    return max(1, num)


def summary(error: BaseException) -> str:
    """A Spark error's text without the JVM's stack: what failed, where, and a Python traceback where there is one."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.lstrip().startswith(("at ", "... "))]
    return "\n".join(lines[:_SUMMARY_LINES])
