"""Runs one training as a program, watches the memory of all its processes, and reads its course."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers_course import Course

REPOSITORY = Path(__file__).resolve().parent.parent
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


def shared_out_bytes(smaps_rollup: str) -> int:
    """A process's anonymous memory, pages that it shares with n - 1 others as an n-th.

    >>> shared_out_bytes("Rss:  900 kB\\nPss:  600 kB\\nPss_Anon:  500 kB\\n")
    512000
    """
    lines = (line.split() for line in smaps_rollup.splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == "Pss_Anon:"), 0)


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:  # the command's name, in parentheses, may hold anything
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children[parent].append(int(entry.name))
    found, new = [pid], [pid]
    while new:
        new = [child for parent in new for child in children[parent]]
        found += new
    return found


def memory_bytes(pid: int) -> int:
    """Of a process and its descendants, at this moment."""
    total = 0
    for member in family(pid):
        try:
            total += shared_out_bytes(Path(f"/proc/{member}/smaps_rollup").read_text())
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
            continue
    return total


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
    for pid in family(process.pid):
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
