"""The virtual environment that elephas runs in, made once and kept in the user's cache directory."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.measuring.report import say

ELEPHAS = "elephas==7.3.0"
_PINS = ("tensorflow", "keras", "numpy", "pyspark")
_DEADLINE_S = 900.0
_NUM_TAIL_LINES = 15
_MARKER = "installed.txt"
_CHECK = "import elephas.spark_model"


class EnvironmentFailedError(Exception):
    """pip could not install elephas, or it cannot be imported."""


def requirements() -> tuple[str, ...]:
    """What elephas runs with: the versions that tensorspark runs with here, newer than its own metadata allow."""
    return (*(f"{name}=={importlib.metadata.version(name)}" for name in _PINS), "flask")


def default_directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tensorspark" / f"peers-{ELEPHAS.replace('==', '-')}"


def elephas_python(directory: Path, elephas: str = ELEPHAS) -> Path:
    """The environment's Python; makes the environment where it is not there as wanted.

    Args:
        directory: of the environment; one that holds something else is replaced.
        elephas: the requirement.

    Raises:
        EnvironmentFailedError: says what failed, with the end of its output.
    """
    python, marker = directory / "bin" / "python", directory / _MARKER
    wanted = "\n".join([*requirements(), elephas])
    if marker.is_file() and marker.read_text() == wanted and python.exists():
        return python
    say(f"installing {elephas} into {directory} (once; some minutes)")
    if directory.exists() and not (directory / "pyvenv.cfg").is_file():
        raise EnvironmentFailedError(f"{directory} is no virtual environment: name another directory, or remove it")
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Its metadata want TensorFlow below 2.20, numpy below 2 and old pins of the rest; it works with the newest.
    for command in ([*pip, *requirements()], [*pip, "--no-deps", elephas], [str(python), "-c", _CHECK]):
        _run(command)
    marker.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailedError(f"{' '.join(command)} did not end within {_DEADLINE_S:g} s") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_NUM_TAIL_LINES:])
        raise EnvironmentFailedError(
            f"elephas cannot be measured: {' '.join(command)} failed. --only measures what it names, without elephas. "
            f"Its end was (Python {sys.version_info.major}.{sys.version_info.minor}):\n{tail}"
        )
