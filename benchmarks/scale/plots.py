"""The curves of the scale benchmark as PNG files. Needs matplotlib, which the package's `plot` extra brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.scale.model import Outcome

_INCHES = (6.4, 4.0)
_DOTS_PER_INCH = 120


def plot_idle_by_staleness(directory: Path, shares: Mapping[int, float]) -> Path:
    """Workers' idle share against staleness."""
    return _plot(
        directory / "scale_idle.png",
        {"simulated": (list(shares), list(shares.values()))},
        ("staleness (rounds)", "idle share of workers"),
        is_logarithmic=False,
    )


def plot_rates(directory: Path, name: str, curves: Mapping[str, Mapping[int, Outcome]]) -> Path:
    """Samples/s against the number of workers, one line a mode."""
    lines = {
        mode: (list(curve), [outcome.steady_samples_per_s for outcome in curve.values()])
        for mode, curve in curves.items()
    }
    return _plot(directory / f"scale_{name}.png", lines, ("workers", "samples/s"), is_logarithmic=True)


def _plot(
    path: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    *,
    is_logarithmic: bool,
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for name, (across, up) in lines.items():
        axes.plot(across, up, marker="o", label=name)
    if is_logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
