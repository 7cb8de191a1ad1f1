"""A run's curves, drawn with matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import ConfigError

if TYPE_CHECKING:
    from tensorspark.history.course import History

X = Literal["steps", "seconds", "samples"]

_LABELS = {
    "steps": "local steps of all workers",
    "seconds": "time since the start (s)",
    "samples": "samples trained on",
}
_VALIDATION = "val_"
_WIDTH_INCHES = 7.0
_HEIGHT_INCHES = 2.6
_MARGIN_INCHES = 0.6
# matplotlib's first colours are apart for who cannot tell red from green, too.
_TRAINING_COLOUR, _VALIDATION_COLOUR = "C0", "C1"


def plot(history: History, metrics: str | Sequence[str] | None, *, x: X, ax: Any) -> Any:
    """See `History.plot`."""
    _require_matplotlib()
    if x not in get_args(X):
        raise ConfigError(f"expected x to be one of {', '.join(get_args(X))}, got {x!r}")
    names = _chosen(history, metrics)
    axes = _new_axes(history, len(names)) if ax is None else _given_axes(ax, names)
    for one, name in zip(axes, names, strict=True):
        _draw(one, history, name, x)
    # Axes that share an x axis have its label below the last one only.
    for one in axes if ax is not None else axes[-1:]:
        one.set_xlabel(_LABELS[x])
    return axes[0] if len(names) == 1 else axes


def _chosen(history: History, metrics: str | Sequence[str] | None) -> list[str]:
    """Names of metrics, without ``val_``.

    Raises:
        ConfigError: there is nothing to draw, or no such metric.
    """
    numbers = {name: values for name, values in history.history.items() if _are_numbers(values)}
    valid = list(dict.fromkeys([*history.scalars, *(name.removeprefix(_VALIDATION) for name in numbers)]))
    if not history.points:
        raise ConfigError("this history has no points: nothing was trained, so that there is nothing to draw")
    if not valid:
        raise ConfigError("this history has no metrics: name what to fetch in SparkSession.run to have their curves")
    asked = valid if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    unknown = [name for name in asked if name.removeprefix(_VALIDATION) not in valid]
    if unknown or not asked:
        got = ", ".join(map(repr, unknown)) or "none"
        raise ConfigError(f"expected metrics of {', '.join(valid)}, got {got}")
    return list(dict.fromkeys(name.removeprefix(_VALIDATION) for name in asked))


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number) for value in values)


def _new_axes(history: History, num: int) -> NDArray[np.object_]:
    pyplot = importlib.import_module("matplotlib.pyplot")
    size = (_WIDTH_INCHES, _HEIGHT_INCHES * num + _MARGIN_INCHES)
    figure, axes = pyplot.subplots(num, 1, sharex=True, squeeze=False, figsize=size, layout="constrained")
    mode = f", {history.mode}" if history.mode else ""
    rate = f"{history.num_samples:,} samples, {history.samples_per_s:,.0f} samples/s"
    figure.suptitle(f"{_plain(history.name or 'run')}{mode}: {rate}", fontsize="medium")
    column: NDArray[np.object_] = axes[:, 0]
    return column


def _given_axes(ax: Any, names: Sequence[str]) -> NDArray[np.object_]:
    given = np.ravel(np.asarray(ax, dtype=object))
    if len(given) != len(names) or not all(hasattr(one, "plot") for one in given):
        raise ConfigError(
            f"expected {len(names)} matplotlib Axes in ax, one for each of {', '.join(names)}, got {len(given)} of "
            f"{', '.join(sorted({type(one).__name__ for one in given})) or 'nothing'}; choose with metrics=..."
        )
    return given


def _draw(ax: Any, history: History, name: str, x: X) -> None:
    values = history.scalars.get(name)
    if values is not None:
        ax.plot(_positions(history, x), values, color=_TRAINING_COLOUR, linewidth=0.8, alpha=0.7, label="training")
    ends = _epoch_ends(history, x)
    style = {"marker": "o", "markersize": 4, "linewidth": 1.2}
    held_out = _by_epoch(history, _VALIDATION + name)
    if (means := _by_epoch(history, name)) is not None:
        # What is neither a curve nor measured on held-out rows may be no mean over rows at all: a learning rate.
        label = "by epoch" if values is None and held_out is None else "training, mean of the epoch"
        ax.plot(ends, means, color=_TRAINING_COLOUR, linestyle=":", label=label, **style)
    if held_out is not None:
        ax.plot(ends, held_out, color=_VALIDATION_COLOUR, label="held-out rows", **style)
    ax.set_title(_plain(name), fontsize="medium", loc="left")
    ax.set_ylabel(_plain(name))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def _by_epoch(history: History, name: str) -> NDArray[np.float64] | None:
    values = history.history.get(name)
    return np.asarray(values, np.float64) if values and _are_numbers(values) else None


def _positions(history: History, x: X) -> NDArray[np.float64]:
    attribute = "seconds" if x == "seconds" else f"num_{x}"
    return np.array([getattr(point, attribute) for point in history.points], np.float64)


def _epoch_ends(history: History, x: X) -> NDArray[np.float64]:
    """Where the epochs ended on the x axis, `[num_epochs] float64`: by the rows trained in each; where not all workers
    know that any more, as a task was repeated, in equal parts, since an epoch trains all rows."""
    num = len(history.epoch)
    counts = [worker.epoch_samples for worker in history.workers]
    if counts and all(len(count) == num for count in counts):
        ends = np.cumsum(np.sum(np.asarray(counts, np.float64).reshape(len(counts), num), axis=0))
    else:
        ends = history.num_samples * np.arange(1, num + 1, dtype=np.float64) / max(1, num)
    if x == "samples":
        return ends
    places: NDArray[np.float64] = np.interp(ends, _positions(history, "samples"), _positions(history, x))
    return places


def _plain(text: str) -> str:
    """For matplotlib, to which text between two dollars is mathematics."""
    return text.replace("$", r"\$")


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib ({error}): pip install 'tensorspark[plot]'") from error
