"""Spark jobs that the driver can watch, cancel and interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pyspark import InheritableThread, SparkContext

_CANCEL_TIMEOUT_S = 30.0
_SUMMARY_LINES = 25


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


def num_slots(spark_context: SparkContext) -> int:
    """How many tasks the application can run at once, now; at least 1."""
    scala_context = spark_context._jsc.sc()
    profile = scala_context.resourceProfileManager().defaultResourceProfile()
    return max(1, int(scala_context.maxNumConcurrentTasks(profile)))


def summary(error: BaseException) -> str:
    """A Spark error's text without the JVM's stack: what failed, where, and a Python traceback where there is one."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.lstrip().startswith(("at ", "... "))]
    return "\n".join(lines[:_SUMMARY_LINES])
