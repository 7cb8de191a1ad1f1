"""How TensorFlow is imported: silently, without the garbage collector, and so that an import that fails says why.

Each test has a process of its own, whose TensorFlow is a module that tells what it finds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_CHATTER = "import gc, os\nos.write(2, b'chatter of native code\\n')\nwas_collecting = gc.isenabled()\n"


def _run(directory: Path, tensorflow: str, program: str, **env: str) -> subprocess.CompletedProcess[str]:
    (directory / "tensorflow.py").write_text(tensorflow)
    return subprocess.run(
        [sys.executable, "-c", f"import gc\nfrom tensorspark.trainers.startup import importing\n{program}"],
        env={"PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_import_is_silent_and_the_collector_waits_for_its_end(tmp_path: Path) -> None:
    program = "with importing(): import tensorflow\nprint(tensorflow.was_collecting, gc.isenabled())"
    done = _run(tmp_path, _CHATTER, program)
    assert (done.stdout, done.stderr, done.returncode) == ("False True\n", "", 0)


def test_a_collector_that_the_program_stopped_stays_so(tmp_path: Path) -> None:
    done = _run(tmp_path, _CHATTER, "gc.disable()\nwith importing(): import tensorflow\nprint(gc.isenabled())")
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


def test_where_tensorflow_is_here_already_nothing_is_held_back(tmp_path: Path) -> None:
    program = "import os, tensorflow\nwith importing(): print(gc.isenabled(), flush=True); os.write(2, b'mine')"
    done = _run(tmp_path, "", program)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "mine", 0)


@pytest.mark.parametrize("level", ["0", "1"])
def test_who_asks_for_the_chatter_gets_it(tmp_path: Path, level: str) -> None:
    program = "with importing(): import tensorflow\nprint(tensorflow.was_collecting)"
    done = _run(tmp_path, _CHATTER, program, TF_CPP_MIN_LOG_LEVEL=level)
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "chatter of native code\n", 0)


def test_an_import_that_fails_shows_what_native_code_said(tmp_path: Path) -> None:
    program = "try:\n  with importing(): import tensorflow\nexcept ImportError as error: print(error, gc.isenabled())"
    done = _run(tmp_path, _CHATTER + "raise ImportError('no such library')", program)
    assert (done.stdout, done.stderr, done.returncode) == ("no such library True\n", "chatter of native code\n", 0)
