"""Programs as users start them: in processes of their own, from the repository's root."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from benchmarks import REPOSITORY

DEADLINE_S = 240


def environment(**more: str) -> dict[str, str]:
    # Without PYTHONPATH, executors have of this repository what is installed: the package, not examples or tests.
    kept = {name: value for name, value in os.environ.items() if name not in ("SPARK_HOME", "PYTHONPATH")}
    digits = str(REPOSITORY / "MNIST_data")
    return {**kept, "MNIST_DATA_DIR": digits, "SPARK_LOCAL_IP": "127.0.0.1", "TF_CPP_MIN_LOG_LEVEL": "3", **more}


def execute(command: list[str], stdin: str | None = None, check: bool = True, **env: str) -> str:
    """Runs a command from the repository's root and returns what it printed; its process group ends with it."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(**env),
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(stdin, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done after {DEADLINE_S} s:\n{output}")
    if check:
        assert process.returncode == 0, output
    return output
