"""What a benchmark reports: one row a figure, printed as a table and drawn for people, written as JSON for machines.

The JSON is the same for every benchmark of the project::

    {"machine": {...}, "rows": [{"name": str, "value": number, "unit": str, "target": number or null, "met": bool}]}
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PLOT_WIDTH, _PANEL_HEIGHT, _BAR_HEIGHT, _PLOT_DPI = 14.0, 0.7, 0.25, 100
_WIDE_RANGE = 30.0
_COLORS = {None: "tab:blue", True: "tab:green", False: "tab:red"}


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured; unique in a report.
        unit: such as ``GB/s``; ``x`` for a ratio.
        target: what the value is to reach; None for a figure that only informs.
        is_upper_bound: whether the value is to stay below the target instead of reaching it.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    is_upper_bound: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached; true where there is none."""
        if self.target is None:
            return True
        return self.value < self.target if self.is_upper_bound else self.value >= self.target


class Report:
    """Collects rows.

    >>> report = Report("demo", packages=["numpy"])
    >>> report.add("pull / raw TCP", 0.9, "x", at_least=0.85)
    >>> report.add("peak memory", 9.0, "models", below=8)
    >>> print(report.table())
    figure          value  unit    target
    pull / raw TCP  0.900  x       >= 0.85  met
    peak memory      9.00  models  < 8      MISSED
    """

    def __init__(self, title: str, packages: Sequence[str]) -> None:
        self._title = title
        self._machine = describe_machine(packages)
        self.rows: list[Row] = []

    def add(
        self, name: str, value: float, unit: str, *, at_least: float | None = None, below: float | None = None
    ) -> None:
        """Adds a figure, with one target or none."""
        if at_least is not None and below is not None:
            raise ValueError(f"{name}: expected at_least or below, got both")
        if any(row.name == name for row in self.rows):
            raise ValueError(f"the report holds {name!r} already")
        self.rows.append(Row(name, value, unit, below if at_least is None else at_least, below is not None))

    def table(self) -> str:
        """The rows, aligned."""
        cells = [("figure", "value", "unit", "target", ""), *(_cells(row) for row in self.rows)]
        name, value, unit, target = (max(len(line[column]) for line in cells) for column in range(4))
        lines = (f"{c[0]:{name}}  {c[1]:>{value}}  {c[2]:{unit}}  {c[3]:{target}}  {c[4]}" for c in cells)
        return "\n".join(line.rstrip() for line in lines)

    def conclude(self, json_path: Path | None, out_dir: Path | None = None, name: str = "") -> int:
        """Prints everything, writes the files that are wanted, and returns the exit status: 0, or 1 for a miss.

        Args:
            json_path: gets the JSON.
            out_dir: gets the JSON and a plot, as ``NAME.json`` and ``NAME.png``; is made where it is not there.
            name: of these files; empty takes `program_name`.
        """
        print(f"\n{self._title}\n{_sentence(self._machine)}\n\n{self.table()}\n")
        with_target = [row for row in self.rows if row.target is not None]
        missed = [row for row in with_target if not row.met]
        print(f"{len(with_target) - len(missed)} of {len(with_target)} targets met")
        stem = name or program_name()
        for path in [json_path, out_dir and out_dir / f"{stem}.json"]:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.as_json())
                print(f"written: {path}")
        if out_dir is not None:
            self.draw(out_dir / f"{stem}.png")
            print(f"written: {out_dir / f'{stem}.png'}")
        return 1 if missed else 0

    def draw(self, path: Path) -> None:
        """Draws the rows as bars, a panel for each unit, with their targets; needs matplotlib.

        Args:
            path: of the PNG file.
        """
        # Not pyplot, which would choose a backend and keep the figure.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        by_unit: dict[str, list[Row]] = {}
        for row in self.rows:
            by_unit.setdefault(row.unit, []).append(row)
        num_rows = [len(rows) for rows in by_unit.values()]
        figure = Figure(figsize=(_PLOT_WIDTH, 1 + _PANEL_HEIGHT * len(by_unit) + _BAR_HEIGHT * sum(num_rows)))
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(by_unit), squeeze=False, height_ratios=[2 + count for count in num_rows])
        for (unit, rows), (panel,) in zip(by_unit.items(), panels, strict=True):
            _draw_panel(panel, unit, rows)
        figure.suptitle(self._title)
        figure.tight_layout(rect=(0, 0, 1, 0.98))
        figure.savefig(path, dpi=_PLOT_DPI)

    def as_json(self) -> str:
        """The report in the project's form."""
        rows = [
            {"name": row.name, "value": row.value, "unit": row.unit, "target": row.target, "met": row.met}
            for row in self.rows
        ]
        return json.dumps({"machine": self._machine, "rows": rows}, indent=1, allow_nan=False) + "\n"


def program_name() -> str:
    """Of the benchmark that runs, a package or a module: such as ``wire``."""
    program = Path(sys.argv[0])
    return program.parent.name if program.stem == "__main__" else program.stem


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program_name()}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, as JSON")
    parser.add_argument(
        "--out", type=_plot_directory, metavar="DIR", help="write the figures and a plot of them to DIR"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it works, not to compare")
    return parser


def say(text: str) -> None:
    """Tells whoever waits what happens now; on stderr, so that stdout holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down takes both sides of it and cancels out."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def describe_machine(packages: Sequence[str]) -> dict[str, str | int | float]:
    """What the figures depend on: processor, memory, kernel, versions, date."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _sentence(machine: dict[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    value = _three_digits(row.value)
    if row.target is None:
        return row.name, value, row.unit, "", ""
    return row.name, value, row.unit, f"{'<' if row.is_upper_bound else '>='} {row.target:g}", _verdict(row)


def _verdict(row: Row) -> str:
    return "met" if row.met else "MISSED"


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent, thousands grouped: 0.0912, 2.61, 341,000."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def _plot_directory(text: str) -> Path:
    """Tells that there will be no plot before anything is measured, not afterwards."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("plots need matplotlib, which is not installed: pip install tensorspark[plot]")
    return Path(text)


def _draw_panel(panel: Any, unit: str, rows: Sequence[Row]) -> None:
    """The rows from top to bottom; a missed target's bar is red, a met one's green, and the target a black line."""
    positions = range(len(rows))
    colors = [_COLORS[None if row.target is None else row.met] for row in rows]
    bars = panel.barh(positions, [row.value for row in rows], color=colors)
    panel.bar_label(bars, [_three_digits(row.value) for row in rows], padding=3, fontsize=8)
    for position, row in zip(positions, rows, strict=True):
        if row.target is not None:
            panel.plot([row.target] * 2, [position - 0.45, position + 0.45], color="black", linewidth=2)
    panel.set_yticks(positions, [row.name for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(unit)
    panel.margins(x=0.12)
    values = [row.value for row in rows]
    if min(values) > 0 and max(values) / min(values) > _WIDE_RANGE:
        panel.set_xscale("log")
