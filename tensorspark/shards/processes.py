"""Shards as processes of the driver's machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import tensorspark
from tensorspark.shards.host import ShardJob

_END_TIMEOUT_S = 10.0


class ShardProcesses:
    """A process each for the jobs, until `close`."""

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for job in jobs:
                self._processes.append(_start(job))
        except BaseException:
            self.close()
            raise

    def failure(self) -> str | None:
        """How a process ended that should not have."""
        for index, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                return f"the process of shard {index} (pid {process.pid}) ended with exit status {process.returncode}"
        return None

    def close(self, lost: Collection[int] = ()) -> None:
        """Waits for the processes, which end when their driver's channel does, and ends those that do not.

        Args:
            lost: shards that are not waited for.
        """
        deadline = time.monotonic() + _END_TIMEOUT_S
        for index, process in enumerate(self._processes, 1):
            try:
                process.wait(0.0 if index in lost else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # also one that is stopped
                process.wait()
        self._processes.clear()


def _start(job: ShardJob) -> subprocess.Popen[bytes]:
    root = str(Path(tensorspark.__file__).parents[1])
    path = os.pathsep.join(part for part in (root, *sys.path) if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorspark.shards.host"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C in a shell is the driver's, which ends its shards
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # one that is gone is found by `failure`
        process.stdin.write(pickle.dumps(job))
    return process
