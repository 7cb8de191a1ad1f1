"""Writes what a training came to beside the run's own files: weights and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from examples.spark_mnist import Result
    from tensorspark import History


def write(result: Result) -> Path:
    """Writes to the run's directory in ``spark.tensorspark.log.dir``, a local one; prints the figures and the paths.

    Returns:
        The directory.
    """
    history = result.history
    assert history.log_dir is not None
    directory = Path(history.log_dir)
    weights = directory / "weights.npz"
    np.savez(weights, allow_pickle=False, **result.weights)
    plot = write_plot(history, result.test_accuracy, result.source, directory / "training.png")
    print(
        f"\ntest accuracy  {result.test_accuracy:.4f}\n"
        f"samples/s      {history.samples_per_s:,.0f}\n"
        f"seconds        {history.seconds:.1f}\n"
        f"weights        {weights}\n"
        f"plot           {plot or 'not drawn: pip install matplotlib'}\n"
        f"TensorBoard    tensorboard --logdir {directory.parent}\n"
        f"dashboard      python -m tensorspark dashboard --replay {directory}\n\n"
        f"Trained on {result.source}."
    )
    return directory


def write_plot(history: History, test_accuracy: float, source: str, path: Path) -> Path | None:
    """Draws loss and accuracy over steps; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    loss.plot(history.steps, history.scalars["loss"], color="tab:blue", linewidth=0.8)
    loss.set_ylabel("training loss")
    accuracy.plot(history.steps, history.scalars["accuracy"], color="tab:green", linewidth=0.8, label="training")
    accuracy.axhline(test_accuracy, color="tab:red", linestyle="--", label=f"test, at the end: {test_accuracy:.4f}")
    accuracy.set_ylabel("accuracy")
    accuracy.set_xlabel("local steps of all workers")
    accuracy.legend(loc="lower right")
    figure.suptitle(f"{history.name}: {history.num_samples:,} samples, {history.seconds:.1f} s\n{source}", fontsize=10)
    figure.savefig(path, dpi=110)
    return path
