"""A run's summary for notebooks: a table, a curve and the workers, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tensorspark.history import text

if TYPE_CHECKING:
    from tensorspark.history.course import History
    from tensorspark.history.reports import WorkerReport

_MAX_WORKERS = 200
_MAX_CURVE_POINTS = 240
_CURVE_WIDTH, _CURVE_HEIGHT = 240, 48
_LEFT = 'style="text-align: left"'
_BOLD = "text-align: left; font-weight: bold"
_NUMBERS = "text-align: right; white-space: nowrap"
_COLUMNS = (
    *("partition", "host", "steps", "samples", "pushed", "pulled", "computing (s)", "exchange (s)"),
    *("refused", "repeated", "reconnects", "tasks", "finished"),
)


def summary(history: History) -> str:
    """What `History._repr_html_` returns: text is escaped, colours are the page's, light or dark."""
    rows = "".join(
        f'<tr><th scope="row" {_LEFT}>{escape(label)}</th><td {_LEFT}>{_value(history, label, value)}</td></tr>'
        for label, value in text.facts(history).items()
    )
    return (
        f'<div><table><caption style="caption-side: top; {_BOLD}">{escape(text.headline(history))}</caption>'
        f"<tbody>{rows}{_curve_row(history)}</tbody></table>{_workers(history)}</div>"
    )


def _value(history: History, label: str, value: str) -> str:
    url = history.dashboard_url
    if label != "dashboard" or not url or urlsplit(url).scheme not in ("http", "https"):
        return escape(value)
    return f'<a href="{escape(url)}" target="_blank" rel="noopener noreferrer">{escape(value)}</a>'


def _curve_row(history: History) -> str:
    name = next(iter(history.scalars), None)
    curve = _curve(name, history.scalars[name].tolist()) if name is not None else ""
    return f'<tr><th scope="row" {_LEFT}>{escape(name)}</th><td {_LEFT}>{curve}</td></tr>' if name and curve else ""


def _curve(name: str, values: Sequence[float]) -> str:
    """A line over the points, as SVG; nothing where fewer than two are numbers. Gaps are where one is none."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    stride = math.ceil(len(values) / _MAX_CURVE_POINTS)
    low, high = min(finite), max(finite)
    said = f"{name} from {text.number(finite[0])} to {text.number(finite[-1])} over the run"
    path, pen = [], "M"
    for index in sorted({*range(0, len(values), stride), len(values) - 1}):
        if not math.isfinite(values[index]):
            pen = "M"
            continue
        x = 2 + (_CURVE_WIDTH - 4) * index / (len(values) - 1)
        share = (values[index] - low) / (high - low) if high > low else 0.5
        path.append(f"{pen}{x:.1f} {2 + (_CURVE_HEIGHT - 4) * (1 - share):.1f}")
        pen = "L"
    return (
        f'<svg role="img" aria-label="{escape(said)}" width="{_CURVE_WIDTH}" height="{_CURVE_HEIGHT}" '
        f'viewBox="0 0 {_CURVE_WIDTH} {_CURVE_HEIGHT}"><title>{escape(said)}</title>'
        f'<path d="{"".join(path)}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg> '
        f"{text.number(finite[0])} to {text.number(finite[-1])}"
    )


def _workers(history: History) -> str:
    if not history.workers:
        return ""
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    shown = history.workers[:_MAX_WORKERS]
    body = "".join(f"<tr>{_cells(worker)}</tr>" for worker in shown)
    left_out = len(history.workers) - len(shown)
    more = f"<p>{left_out:,} more: see <code>workers_to_pandas()</code></p>" if left_out else ""
    return (
        f'<details><summary style="cursor: pointer">by partition</summary>'
        f'<div style="overflow-x: auto"><table style="{_NUMBERS}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
        f"</details>"
    )


def _cells(worker: WorkerReport) -> str:
    cells = (
        *(escape(worker.host), f"{worker.num_steps:,}", f"{worker.num_samples:,}"),
        *(text.size(worker.num_bytes_pushed), text.size(worker.num_bytes_pulled)),
        *(f"{worker.step_s:.1f}", f"{worker.sync_s:.1f}"),
        *(str(worker.num_refused), str(worker.num_repeated), str(worker.num_reconnects), str(worker.num_attempts)),
        "yes" if worker.finished else "no",
    )
    return f'<th scope="row">{worker.partition}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
