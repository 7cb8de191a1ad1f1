"""Runs one training as a program, watches the memory of all its processes, and reads its course."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import REPOSITORY
from benchmarks.measuring import procfs
from benchmarks.peers.course import Course

_POLL_S = 0.1
_NUM_POLLS_PER_LOOK = 10  # a look walks page tables: a few percent of a core at ten times this rate
_NUM_TAIL_LINES = 25


class TrainingFailedError(Exception):
    """A training's program failed, or did not end in time."""


@dataclass(frozen=True)
class Trained:
    """A training's course, and what it took.

    Attributes:
        peak_bytes: the most anonymous memory of all its processes together, what some share divided among them.
    """

    course: Course
    peak_bytes: int


def train(module: str, arguments: Sequence[str], *, python: Path | None = None, deadline_s: float) -> Trained:
    """Runs a program until it has written its course.

    Args:
        module: of the program, which takes ``--result FILE``.
        python: of another environment; None takes this one's.

    Raises:
        TrainingFailedError: with the end of its output.
    """
    interpreter = str(python or sys.executable)
    with tempfile.TemporaryDirectory() as directory:
        result, log = Path(directory, "course.npz"), Path(directory, "output.txt")
        command = [interpreter, "-m", module, *arguments, "--result", str(result)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=_environment(interpreter),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            peak_bytes = _watch(process, deadline_s)
        finally:
            _end(process)
        if peak_bytes is None or process.returncode or not result.is_file():
            how = f"exit code {process.returncode}" if peak_bytes is not None else f"not over after {deadline_s:g} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_NUM_TAIL_LINES:])
            raise TrainingFailedError(f"{' '.join(command[1:-2])}: {how}\n{tail}")
        return Trained(Course.load(result), peak_bytes)


def memory_bytes(pid: int) -> int:
    """Anonymous memory of a process and its descendants; in each, a page that n processes share counts as an n-th."""
    return sum(procfs.shared_out_bytes(member, "Pss_Anon") for member in procfs.family(pid))


def _watch(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    """The peak of memory once the process has ended; None where it does not in time."""
    deadline = time.monotonic() + deadline_s
    peak_bytes, num_polls = 0, 0
    while time.monotonic() < deadline:
        if num_polls % _NUM_POLLS_PER_LOOK == 0:
            peak_bytes = max(peak_bytes, memory_bytes(process.pid))
        num_polls += 1
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
        return peak_bytes
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its descendants, where they have not ended."""
    if process.poll() is not None:
        return
    for pid in procfs.family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _environment(interpreter: str) -> dict[str, str]:
    """This process's, for Spark on this machine, with the same Python on both sides.

    TensorFlow has one thread where the program leaves it open, as elephas does: two workers share two cores.
    """
    kept = {name: value for name, value in os.environ.items() if name != "SPARK_HOME"}
    return {
        **kept,
        "PYSPARK_PYTHON": interpreter,
        "PYSPARK_DRIVER_PYTHON": interpreter,
        "PYTHONPATH": str(REPOSITORY),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
    }
