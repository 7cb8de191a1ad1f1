"""Progress in the cells of a real kernel."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 60
HAS_WIDGETS = importlib.util.find_spec("ipywidgets") is not None

SHOW = """
from itertools import count
from tensorspark.driver.progress import ProgressLine
from tests.driver.test_progress import status
line = ProgressLine("mnist", clock=count(step=5).__next__)
line.note("checkpoints go to file:///tmp/c")
for step in range(200):
    line.show(status(step, step / 400 if step else None))
"""
END = "line.show(status(400, 1.0), last=True)\n"
FAIL = "line.abandon()\nraise ValueError('no more')\n"


def executed(source: str) -> Any:
    """A notebook of one cell, with what it showed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = nbclient.NotebookClient(
        notebook, timeout=DEADLINE_S, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": "."}}
    )
    client.execute(
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    )
    return notebook


def outputs(source: str) -> list[Any]:
    """What one cell shows."""
    return list(executed(source).cells[0].outputs)


@pytest.mark.skipif(HAS_WIDGETS, reason="with ipywidgets there is a widget")
def test_a_cell_has_one_bar_however_often_it_is_drawn() -> None:
    note, bar = outputs(SHOW + END)
    assert (note.name, note.text) == ("stderr", "mnist: checkpoints go to file:///tmp/c\n")
    assert bar.output_type == "display_data"
    shown = bar.data["text/plain"]
    assert shown.startswith("mnist: 100%|██")
    assert "step 400  loss 1.235" in shown
    assert shown.isprintable()


@pytest.mark.skipif(HAS_WIDGETS, reason="with ipywidgets there is a widget")
def test_a_cell_that_raises_keeps_its_bar_above_the_traceback() -> None:
    _, bar, error = outputs(SHOW + FAIL)
    assert bar.data["text/plain"].startswith("mnist:  49%|██")
    assert (error.output_type, error.ename) == ("error", "ValueError")


@pytest.mark.skipif(HAS_WIDGETS, reason="with ipywidgets there is a widget")
def test_the_run_after_it_has_a_bar_of_its_own() -> None:
    shown = [output for output in outputs(SHOW + END + SHOW + END) if output.output_type == "display_data"]
    assert [output.data["text/plain"][:11] for output in shown] == ["mnist: 100%"] * 2


@pytest.mark.skipif(not HAS_WIDGETS, reason="needs ipywidgets")
@pytest.mark.parametrize(
    ("source", "value", "style", "share"),
    [
        (SHOW + END, 1.0, "success", "100%"),
        (SHOW + FAIL, 0.4975, "danger", "49%"),
        (SHOW.replace("200", "101") + END.replace("400, 1.0", "100, 0.25"), 0.25, "success", "25%"),
    ],
)
def test_a_cell_has_one_widget_where_there_are_widgets(source: str, value: float, style: str, share: str) -> None:
    notebook = executed(source)
    (widget,) = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    assert "application/vnd.jupyter.widget-view+json" in widget.data
    models = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    (bar,) = [model["state"] for model in models if model["model_name"] == "FloatProgressModel"]
    assert (bar["value"], bar["bar_style"]) == (value, style)
    texts = [model["state"]["value"].split() for model in models if model["model_name"] == "HTMLModel"]
    assert texts[0] == ["mnist:", share]
    assert texts[1][0] == "step"


def test_a_stream_of_ones_own_in_a_cell_gets_plain_lines() -> None:
    source = SHOW.replace('"mnist", ', '"mnist", stream=file, ').replace(
        "from itertools", "import io\nfile = io.StringIO()\nfrom itertools"
    )
    (output,) = outputs(source + "print('\\r' in file.getvalue(), file.getvalue().count('\\n'))")
    assert output.name == "stdout"
    drawn, num_lines = output.text.split()
    assert drawn == "False"
    assert int(num_lines) > 50
