"""A run's summary for people, as plain text, and the wording that the notebook's table shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from tensorspark.history.course import History

_MAX_METRICS = 8
_MAX_TEXT = 40
_COLUMNS = 110
_LABEL_COLUMNS = 10


def summary(history: History) -> str:
    """The repr: a headline, then a line for each of `facts`; a long line is cut."""
    lines = [f"{label:{_LABEL_COLUMNS}} {value}" for label, value in facts(history).items()]
    return "\n  ".join([headline(history), *(_cut(line) for line in lines)])


def headline(history: History) -> str:
    """Which run it was."""
    mode = f", {history.mode}" if history.mode else ""
    return f"History of {_one_line(history.name) or 'a run'}{mode}, seed {history.seed}"


def facts(history: History) -> dict[str, str]:
    """What a reader wants first, by label; troubles only where there were any."""
    lines = {
        "trained": f"{history.num_steps:,} steps, {history.num_samples:,} samples in {duration(history.seconds)}: "
        f"{history.samples_per_s:,.0f} samples/s"
    }
    if history.epoch and history.history:
        lines[f"epoch {history.epoch[-1] + 1}"] = _metrics({name: list_[-1] for name, list_ in history.history.items()})
    elif history.points and history.points[-1].scalars:
        lines["at the end"] = _metrics(history.points[-1].scalars)
    if history.workers:
        lines["workers"] = workers(history)
        num_pushed = sum(worker.num_bytes_pushed for worker in history.workers)
        num_pulled = sum(worker.num_bytes_pulled for worker in history.workers)
        lines["traffic"] = f"{size(num_pushed)} pushed, {size(num_pulled)} pulled"
    if trouble := _trouble(history):
        lines["trouble"] = trouble
    if history.dashboard_url:
        lines["dashboard"] = without_secrets(history.dashboard_url)
    if history.log_dir:
        lines["log_dir"] = without_secrets(history.log_dir)
    if history.trace:
        lines["trace"] = without_secrets(history.trace)
    return lines


def workers(history: History) -> str:
    """Such as ``4 partitions on 2 hosts``."""
    hosts = {worker.host for worker in history.workers if worker.host}
    on = f" on {_count(len(hosts), 'host')}" if hosts else ""
    return f"{_count(len(history.workers), 'partition')}{on}"


def number(value: Any) -> str:
    """A metric's value; what is no number in brief."""
    if isinstance(value, Real):
        return f"{float(value):.4g}"
    return _cut(_one_line(str(value)), _MAX_TEXT)


def duration(seconds: float) -> str:
    """Such as ``12.3 s``, ``12 min 5 s`` or ``3 h 12 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:,} h {minute} min" if hours else f"{minute} min {second} s"


def size(num_bytes: int) -> str:
    """Such as ``814.1 kB``: powers of 1,000."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95:
            return f"{value:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
        value /= 1000
    return f"{value:,.1f} PB"


def without_secrets(url: str) -> str:
    """A URL without what may let somebody in: user and password, query and fragment; anything else as it is."""
    if "://" not in url:
        return _one_line(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return _one_line(url.partition("?")[0])
    return _one_line(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


def _metrics(values: Mapping[str, Any]) -> str:
    named = [f"{_one_line(name)} {number(value)}" for name, value in values.items()]
    more = len(named) - _MAX_METRICS
    return ", ".join(named[:_MAX_METRICS]) + (f" and {more} more" if more > 0 else "")


def _trouble(history: History) -> str:
    reports = history.workers
    counts = {
        "refused push": sum(report.num_refused for report in reports),
        "repeated push": sum(report.num_repeated for report in reports),
        "reconnect": sum(report.num_reconnects for report in reports),
        "repeated task": sum(max(0, report.num_attempts - 1) for report in reports),
        "unfinished partition": sum(not report.finished for report in reports if report.num_attempts),
    }
    return ", ".join(_count(count, what) for what, count in counts.items() if count)


def _count(num: int, what: str) -> str:
    if num != 1:
        what += "es" if what.endswith("sh") else "s"
    return f"{num:,} {what}"


def _one_line(value: str) -> str:
    return " ".join(value.split())


def _cut(line: str, columns: int = _COLUMNS) -> str:
    return line if len(line) <= columns else line[: columns - 1] + "…"
