"""Where the progress of a run is shown: terminals, notebooks, files."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_TERMINAL_INTERVAL_S = 0.2
_NOTEBOOK_INTERVAL_S = 1.0
_LOG_INTERVAL_S = 10.0

_NOTEBOOK_COLUMNS = 110
_USUAL_COLUMNS = 80
_MIN_COLUMNS = 24
# A terminal echoes ^C where the cursor is: on a full line it would begin the next one, and leave half a bar above.
_SPARE_COLUMNS = 3
_MAX_BAR_COLUMNS = 30
_BAR_STEP_COLUMNS = 5
_LATER_S = 3600.0


@dataclass(frozen=True)
class Part:
    """A piece of the line: ``step 1,200``.

    Attributes:
        rank: where the line is too long for the screen, parts go by their rank, the highest first.
    """

    text: str
    rank: int


def fitting(parts: Sequence[Part], width: int) -> str:
    """The parts side by side, as many as `width` columns hold."""
    kept = list(parts)
    while len(kept) > 1 and len(_joined(kept)) > width:
        kept.remove(max(kept, key=lambda part: part.rank))
    return _joined(kept)[: max(width, 0)]


def _joined(parts: Sequence[Part]) -> str:
    return "  ".join(part.text for part in parts)


class Display(Protocol):
    """Where a line is shown.

    Attributes:
        interval_s: at least this long from one drawing to the next.
        shows_start: whether there is a line before the first step, too.
    """

    interval_s: float
    shows_start: bool

    def draw(self, name: str, share: float | None, parts: Sequence[Part]) -> None:
        """Shows the line; `share` of the training is done, 0 to 1, or None: nobody knows."""

    def write(self, text: str) -> None:
        """Shows a line that stays."""

    def end(self, *, has_failed: bool) -> None:
        """Leaves the line as it is; what is drawn after it begins another."""


class _LogLines:
    """Plain lines, one below the other: files, pipes, ``spark-submit`` in cluster mode."""

    interval_s = _LOG_INTERVAL_S
    shows_start = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, name: str, share: float | None, parts: Sequence[Part]) -> None:
        done = [] if share is None else [Part(f"{int(100 * share)}%", 0)]
        self.write(f"{name}: {_joined([*parts, *done])}")

    def write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self, *, has_failed: bool) -> None:
        pass


class _Bar:
    """A bar of tqdm's, which other bars and their notes know of: in a terminal, or a notebook's widget.

    Args:
        columns: how many to write to; asked before each drawing, as windows change. None: a widget.
    """

    shows_start = True

    def __init__(self, stream: TextIO, columns: Callable[[], int] | None) -> None:
        self._stream = stream
        self._is_widget = columns is None
        self._columns = columns or (lambda: _NOTEBOOK_COLUMNS)
        self.interval_s = _NOTEBOOK_INTERVAL_S if self._is_widget else _TERMINAL_INTERVAL_S
        bar_class = importlib.import_module("tqdm.notebook").tqdm if self._is_widget else _text_bar()
        # tqdm's watch over bars that are not drawn is a thread; ours is drawn again and again.
        self._bar_class: Any = type("_UnwatchedBar", (bar_class,), {"monitor_interval": 0})
        self._bar: Any = None

    def draw(self, name: str, share: float | None, parts: Sequence[Part]) -> None:
        columns = self._columns()
        layout = _laid_out(name, share, parts, columns)
        # Spark's shell draws its own bar on the same line: each drawing of ours fills it.
        bar_format = layout.widget_format if self._is_widget else layout.text_format + " " * columns
        if self._bar is None:
            self._bar = self._new_bar(bar_format)
        self._bar.bar_format, self._bar.n, self._bar.ncols = bar_format, share or 0.0, columns
        # `refresh` itself would keep the lock, which all bars share, where Ctrl-C comes while it draws.
        with self._bar_class.get_lock():
            self._bar.refresh(nolock=True)

    def _new_bar(self, bar_format: str) -> Any:
        """A bar; text is not drawn yet, so that Ctrl-C while it is drawn finds a bar to end."""
        if self._is_widget:
            return self._bar_class(total=1.0, bar_format=bar_format)
        bar = self._bar_class(total=1.0, bar_format=bar_format, file=self._stream, leave=True, delay=_LATER_S)
        bar.delay = 0
        return bar

    def write(self, text: str) -> None:
        self._bar_class.write(text, file=self._stream)
        self._stream.flush()

    def end(self, *, has_failed: bool) -> None:
        if self._bar is None:
            return
        if not has_failed and self._is_widget:
            # It would colour a run that its callbacks ended early as a failure.
            self._bar.total = 0
        self._bar.close()
        self._stream.flush()
        self._bar = None


class _CellBar:
    """A bar as text in a notebook's cell: one output that is replaced. Text that is overwritten would be kept, a piece
    for each drawing, in the notebook's file."""

    interval_s = _NOTEBOOK_INTERVAL_S
    shows_start = True

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._handle: Any = None

    def draw(self, name: str, share: float | None, parts: Sequence[Part]) -> None:
        bar_format = _laid_out(name, share, parts, _NOTEBOOK_COLUMNS).text_format
        shown = {"text/plain": _text_bar().format_meter(share or 0.0, 1.0, 0.0, bar_format=bar_format)}
        if self._handle is None:
            self._handle = importlib.import_module("IPython.display").display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self, *, has_failed: bool) -> None:
        self._handle = None


def _text_bar() -> Any:
    return importlib.import_module("tqdm.std").tqdm


@dataclass(frozen=True)
class _Layout:
    """A line that fits: what is before the bar, how long that is, and what is behind it.

    Attributes:
        num_bar: columns; 0: there is no bar.
    """

    head: str
    num_bar: int
    tail: str

    @property
    def text_format(self) -> str:
        """For tqdm, which puts the bar in, and takes what is in single braces as a field."""
        head, tail = (text.replace("{", "{{").replace("}", "}}") for text in (self.head, self.tail))
        return head + (f"{{bar:{self.num_bar}}}" if self.num_bar else "") + tail

    @property
    def widget_format(self) -> str:
        """The same for tqdm's widget, which looks for the bar's place before it looks for fields."""
        head, tail = (text.replace("{", "(").replace("}", ")") for text in (self.head, self.tail))
        return head + ("{bar}" if self.num_bar else "") + tail


def _laid_out(name: str, share: float | None, parts: Sequence[Part], columns: int) -> _Layout:
    name = " ".join(name.split())  # a line break would tear the bar
    if len(name) > columns // 3:
        name = name[: columns // 3 - 1] + "…"
    if share is None:
        head = f"{name}: "
        return _Layout(head, 0, fitting(parts, columns - len(head)))
    head = f"{name}: {int(100 * share):3d}%|"
    room = columns - len(head) - len("| ")
    text = fitting(parts, room - (10 if columns >= _USUAL_COLUMNS - _SPARE_COLUMNS else 4))
    num_bar = max(1, min(_MAX_BAR_COLUMNS, room - len(text)))
    if num_bar > _BAR_STEP_COLUMNS:  # so that it is not longer and shorter with each number's digits
        num_bar -= num_bar % _BAR_STEP_COLUMNS
    return _Layout(head, num_bar, f"| {text}")


def choose_display(stream: TextIO | None) -> Display:
    """The display for a stream, as it is; None: stderr, or the cell of a notebook."""
    if stream is None and _has_kernel():
        if importlib.util.find_spec("ipywidgets") is not None:
            return _Bar(sys.stderr, None)
        return _CellBar(sys.stderr)
    stream = stream or sys.stderr
    if not stream.isatty():
        return _LogLines(stream)
    return _Bar(stream, lambda: _columns_of(stream))


def _has_kernel() -> bool:
    """Whether this process is a notebook's: IPython in a terminal has no kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _columns_of(stream: TextIO) -> int:
    """How many to write to."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return max(_MIN_COLUMNS, (columns or _USUAL_COLUMNS) - _SPARE_COLUMNS)
