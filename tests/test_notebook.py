"""The example notebook, run by a kernel as `jupyter` runs it: from its own directory, with the digits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
nbformat = pytest.importorskip("nbformat")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / "examples" / "notebook.ipynb"
CELL_DEADLINE_S = 240
LEARNED = 0.85  # chance is 0.1


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def environment() -> dict[str, str]:
    # Without PYTHONPATH, the notebook finds the repository by itself.
    kept = {name: value for name, value in os.environ.items() if name not in ("SPARK_HOME", "PYTHONPATH")}
    digits = str(REPOSITORY / "MNIST_data")
    return {**kept, "MNIST_DATA_DIR": digits, "SPARK_LOCAL_IP": "127.0.0.1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run(notebook: Any, environment: dict[str, str]) -> str:
    """What the cells print, top to bottom; raises at a cell that raises."""
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_DEADLINE_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_notebook_is_kept_without_outputs(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom_and_learns(notebook: Any, environment: dict[str, str]) -> None:
    printed = run(notebook, environment)
    assert "scikit-learn digits" in printed
    assert "1,500 images to train on, 297 to test on" in printed
    assert len(re.findall(r"^epoch \d: accuracy", printed, re.MULTILINE)) == 6
    evaluated = float(re.findall(r"'accuracy': (0\.\d+)", printed)[0])
    saved = float(re.findall(r"test accuracy of the saved model: (0\.\d+)", printed)[0])
    assert evaluated > LEARNED
    # However often it was drawn, the cell that trains has one bar.
    (fit,) = [cell for cell in notebook.cells if cell.id == "fit"]
    (bar,) = [output for output in fit.outputs if output.output_type == "display_data"]
    assert re.match(r"notebook: 100%\|█+\| epoch 6/6  step \d", bar.data["text/plain"])
    # The saved file holds what the workers trained: one row of 297 at most may differ by rounding.
    assert saved == pytest.approx(evaluated, abs=1.5 / 297)


@pytest.mark.slow
def test_each_cell_of_the_notebook_can_be_run_twice(notebook: Any, environment: dict[str, str]) -> None:
    twice = deepcopy(notebook)
    twice.cells = [deepcopy(cell) for cell in notebook.cells for _ in range(2 if cell.cell_type == "code" else 0)]
    for index, cell in enumerate(twice.cells):
        cell.id = f"cell-{index}"
    printed = run(twice, environment)
    accuracies = [float(number) for number in re.findall(r"epoch 1: accuracy (0\.\d+)", printed)]
    assert len(accuracies) == 2
    # The second run of the training cell goes on from the first one's weights.
    assert accuracies[1] > accuracies[0] + 0.1


@pytest.mark.slow
def test_an_interrupted_training_cell_leaves_a_session_that_trains_and_evaluates(
    notebook: Any, environment: dict[str, str]
) -> None:
    cells = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    assert "EPOCHS = 6" in cells["fit"]
    endless = cells["fit"].replace("EPOCHS = 6", "EPOCHS = 1_000_000")
    with kernel(environment) as (manager, client):
        for name in ("paths", "spark", "data", "model", "session"):
            assert execute(client, cells[name])["status"] == "ok"
        interrupted = execute(client, endless, when="  step ", then=manager.interrupt_kernel)
        assert (interrupted["status"], interrupted.get("ename")) == ("error", "KeyboardInterrupt")
        # No task of the interrupted job is left to take the slots of the next.
        active = "assert spark.sparkContext.statusTracker().getActiveJobsIds() == [], 'the job still runs'"
        assert execute(client, active)["status"] == "ok"
        for name in ("fit", "evaluate", "predict", "save", "end"):
            reply = execute(client, cells[name])
            assert reply["status"] == "ok", reply


@contextmanager
def kernel(environment: dict[str, str]) -> Iterator[tuple[Any, Any]]:
    """A kernel in the notebook's directory, and a client of it."""
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(env=environment, cwd=str(NOTEBOOK.parent), stdout=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=CELL_DEADLINE_S)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def execute(client: Any, source: str, when: str = "", then: Any = None) -> dict[str, Any]:
    """The kernel's reply to a cell; `then` is called once, as soon as the cell has shown `when`."""
    calls = [then] if then else []

    def look(message: dict[str, Any]) -> None:
        if when and calls and message["msg_type"] != "execute_input" and when in str(message["content"]):
            calls.pop()()

    deadline = time.monotonic() + CELL_DEADLINE_S
    reply = client.execute_interactive(source, timeout=CELL_DEADLINE_S, output_hook=look)
    assert time.monotonic() < deadline
    assert not calls, f"the cell never showed {when!r}: {reply}"
    content: dict[str, Any] = reply["content"]
    return content


def test_the_kernel_that_runs_the_notebook_is_this_python() -> None:
    spec = jupyter_client.kernelspec.KernelSpecManager().get_kernel_spec("python3")
    assert spec.argv[0] in ("python", "python3", sys.executable)
