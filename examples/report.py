"""Writes what a training came to: weights, TensorBoard event files and a plot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tensorspark.trainers.startup import quiet

with quiet():
    import tensorflow.compat.v1 as tf

if TYPE_CHECKING:
    from examples.spark_mnist import Result
    from tensorspark import History


def write(result: Result, output: str) -> Path:
    """Writes into a new directory under `output`, prints the figures and the paths, and returns the directory."""
    history = result.history
    directory = Path(output) / f"{history.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory.mkdir(parents=True)
    weights = directory / "weights.npz"
    np.savez(weights, allow_pickle=False, **result.weights)
    events = write_events(history, result.test_accuracy, directory / "tensorboard")
    plot = write_plot(history, result.test_accuracy, result.source, directory / "training.png")
    print(
        f"\ntest accuracy  {result.test_accuracy:.4f}\n"
        f"samples/s      {history.samples_per_s:,.0f}\n"
        f"seconds        {history.seconds:.1f}\n"
        f"weights        {weights}\n"
        f"TensorBoard    {events}   (tensorboard --logdir {output})\n"
        f"plot           {plot or 'not drawn: pip install matplotlib'}\n\n"
        f"Trained on {result.source}."
    )
    return directory


def write_events(history: History, test_accuracy: float, directory: Path) -> Path:
    """Writes the history's scalars, at their own times, as TensorBoard event files."""
    began = time.time() - history.seconds
    with tf.Graph().as_default(), tf.summary.FileWriter(str(directory)) as writer:
        for point in history.points:
            rate = point.num_samples / point.seconds if point.seconds > 0 else 0.0
            scalars = {f"train/{name}": value for name, value in point.scalars.items()} | {"train/samples_per_s": rate}
            writer.add_event(_event(scalars, began + point.seconds, point.num_steps))
        writer.add_event(_event({"test/accuracy": test_accuracy}, began + history.seconds, history.num_steps))
    return directory


def _event(scalars: dict[str, float], wall_time: float, step: int) -> tf.Event:
    values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    return tf.Event(wall_time=wall_time, step=step, summary=tf.Summary(value=values))


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
