"""The Keras examples as users run them: their figures show that they learned, and their helps teach."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks.clusters.standalone import BIN
from tests.programs import execute

EXAMPLES = ("keras_mnist", "keras_pipeline", "keras_text", "keras_streaming")


def figure(output: str, pattern: str) -> float:
    """The number that the first group of `pattern` finds, which must be there."""
    found = re.search(pattern, output, re.MULTILINE)
    assert found, f"no {pattern!r} in:\n{output}"
    return float(found[1].replace(",", ""))


@pytest.mark.slow
def test_the_mnist_example_trains_evaluates_and_saves_the_same_model(tmp_path: Path) -> None:
    output = execute([sys.executable, "-m", "examples.keras_mnist", "--output", str(tmp_path)])
    assert "Training on scikit-learn digits" in output
    assert len(re.findall(r"^epoch +\d+  loss", output, re.MULTILINE)) == 10
    accuracy = figure(output, r"^test accuracy +(\d\.\d+)")
    assert accuracy > 0.9
    assert figure(output, r"^saved model +(\d\.\d+)") == pytest.approx(accuracy, abs=1.5 / 297)
    assert (tmp_path / "digits.keras").is_file()
    assert output.strip().splitlines()[-1].startswith("Trained on scikit-learn digits")


@pytest.mark.slow
def test_the_mnist_example_runs_by_spark_submit() -> None:
    submit = [str(BIN / "spark-submit"), "--master", "local[2]"]
    output = execute([*submit, "examples/keras_mnist.py", "--epochs", "4", "--staleness", "async"])
    assert len(re.findall(r"^epoch +\d+  loss", output, re.MULTILINE)) == 4
    assert figure(output, r"^test accuracy +(\d\.\d+)") > 0.7


@pytest.mark.slow
def test_the_pipeline_example_chooses_the_network_that_can_tell_the_kinds_apart() -> None:
    output = execute([sys.executable, "-m", "examples.keras_pipeline"])
    linear, hidden = (figure(output, rf"^{name} +(\d\.\d+) over the folds") for name in ("linear", "hidden"))
    assert hidden > linear + 0.2
    assert re.search(r"^chosen +hidden$", output, re.MULTILINE)
    accuracy = figure(output, r"^test accuracy +(\d\.\d+);")
    assert accuracy > 0.8
    assert figure(output, r"^test accuracy .* (\d\.\d+) when saved and loaded") == accuracy


@pytest.mark.slow
def test_the_text_example_learns_from_strings_and_numbers() -> None:
    output = execute([sys.executable, "-m", "examples.keras_text"])
    base_rate = figure(output, r"always the same answer: (\d\.\d+)")
    assert 0.4 < base_rate < 0.65
    accuracy = figure(output, r"^test accuracy +(\d\.\d+)")
    assert accuracy > base_rate + 0.2
    # What evaluate says of the model is what predict does with it: a row or two at 0.5 may round otherwise.
    assert figure(output, r"^predictions +(\d\.\d+)") == pytest.approx(accuracy, abs=0.002)
    assert figure(output, r"^test AUC +(\d\.\d+)") > 0.9


@pytest.mark.slow
def test_the_streaming_example_gets_better_from_file_to_file_and_marks_another_stream() -> None:
    output = execute([sys.executable, "-m", "examples.keras_streaming"])
    assert len(re.findall(r"^micro-batch \d+: accuracy", output, re.MULTILINE)) == 4
    before = figure(output, r"^first file +(\d\.\d+)")
    assert before < 0.75
    assert figure(output, r"^last file +(\d\.\d+)") > before + 0.1
    assert figure(output, r"^trained +([\d,]+) samples") == 4 * 2000 * 2
    assert figure(output, r"^marked +([\d,]+) rows") == 2000
    assert figure(output, r"^marked .* (\d\.\d+) of them rightly") > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_help_names_every_option_with_its_default(name: str) -> None:
    output = execute([sys.executable, "-m", f"examples.{name}", "--help"])
    options = re.findall(r"^  (--[a-z-]+)", output, re.MULTILINE)
    assert "--workers" in options
    assert "--seed" in options
    entries = re.split(r"^  --", output, flags=re.MULTILINE)[1:]
    lacking = [entry for entry in entries if not re.search(r"\(default:\s", entry)]
    assert lacking == []


def test_an_unknown_option_is_refused_before_spark_starts() -> None:
    output = execute([sys.executable, "-m", "examples.keras_mnist", "--worker-count", "3"], check=False)
    assert "unrecognized arguments: --worker-count 3" in output
    assert "Spark" not in output.replace("Spark workers", "")
