"""Progress of a run, for who waits for it: a bar in terminals and notebooks, elsewhere a line now and then."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from tensorspark.driver.displays import Display, Part, choose_display
from tensorspark.ps.messages import Status

logger = logging.getLogger(__name__)

_RATE_WINDOW_S = 30.0
_FIRST_TO_DROP = 10


class ProgressLine:
    """Shows a run's status on stderr: in a terminal or a notebook as a bar, which is redrawn in place; elsewhere as a
    line every 10 s, without escape codes or carriage returns.

    The bar is the share of the training that is done; it never goes back, and there is none while the share is not
    known. For one thread at a time.

    Args:
        name: of the session; the line begins with it.
        enabled: False shows nothing.
        stream: None: stderr as it is now, and in a notebook the widget of ipywidgets where that is installed.
        clock: seconds, from anywhere.
    """

    def __init__(
        self,
        name: str,
        enabled: bool = True,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name or "tensorspark"
        self._display: Display | None = None
        if enabled:
            self._try(lambda: self._open(stream))
        self._pace: _Pace | None = None
        self._share: float | None = None
        self._clock = clock
        self._began = self._shown_at = clock()
        self._has_shown = False

    def show(self, status: Status, *, last: bool = False) -> None:
        """Shows `status` if it is time to; `last` always shows it and ends the line."""
        if self._display is None:
            return
        now = self._clock()
        is_first_step = bool(status.num_steps) and self._pace is None
        if is_first_step:
            self._pace = _Pace(now, status)
        if self._pace is not None:
            self._pace.add(now, status)
        if not (last or is_first_step or self._is_time(now)):
            return
        self._shown_at, self._has_shown = now, True
        if status.progress is not None:
            self._share = max(self._share or 0.0, min(status.progress, 1.0))
        parts = describe(status, self._pace, now - self._began if last else None)
        self._try(lambda: self._draw(parts, last=last))

    def note(self, text: str) -> None:
        """Shows a line that stays, above the bar."""
        display = self._display
        if display is not None:
            self._try(lambda: display.write(f"{self._name}: {text}"))

    def abandon(self) -> None:
        """Ends the line where it is, so that what follows (a traceback) begins on its own."""
        display = self._display
        if display is not None:
            self._try(lambda: display.end(has_failed=True))

    def _open(self, stream: TextIO | None) -> None:
        self._display = choose_display(stream)

    def _draw(self, parts: list[Part], *, last: bool) -> None:
        assert self._display is not None
        self._display.draw(self._name, self._share, parts)
        if last:
            self._display.end(has_failed=False)

    def _try(self, action: Callable[[], None]) -> None:
        """Shows something, if that can be done: a stderr that is closed, or whose reader is gone, ends no training."""
        try:
            action()
        except (OSError, ValueError, AttributeError) as error:
            self._display = None
            logger.info("progress is not shown any more: %s: %s", type(error).__name__, error)

    def _is_time(self, now: float) -> bool:
        assert self._display is not None
        is_first = not self._has_shown and self._display.shows_start
        return is_first or now - self._shown_at >= self._display.interval_s


class _Pace:
    """How fast a run goes, from its first step on: what came before it was start-up.

    Attributes:
        samples_per_s: over the last 30 s; None where that cannot be said yet.
        left_s: until the end, if the rest goes as what is done; None where that cannot be said.
    """

    def __init__(self, now: float, first: Status) -> None:
        self._first = (now, first.num_samples, first.progress)
        self._recent: deque[tuple[float, int]] = deque()
        self.samples_per_s: float | None = None
        self.left_s: float | None = None

    def add(self, now: float, status: Status) -> None:
        """Takes note of a status."""
        recent = self._recent
        recent.append((now, status.num_samples))
        while len(recent) > 2 and now - recent[1][0] >= _RATE_WINDOW_S:
            recent.popleft()
        seconds = now - recent[0][0]
        if seconds > 0 and status.num_samples > recent[0][1]:
            self.samples_per_s = (status.num_samples - recent[0][1]) / seconds
        self.left_s = self._left_s(now, status.progress)

    def mean_samples_per_s(self, status: Status) -> float | None:
        """Since the first step, up to the status noted last."""
        began, num_samples, _ = self._first
        seconds = self._recent[-1][0] - began
        return (status.num_samples - num_samples) / seconds if seconds > 0 < status.num_samples - num_samples else None

    def _left_s(self, now: float, share: float | None) -> float | None:
        began, _, first_share = self._first
        if share is None or not (first_share or 0.0) < share < 1:
            return None
        return (now - began) * (1 - share) / (share - (first_share or 0.0))


def describe(status: Status, pace: _Pace | None = None, took_s: float | None = None) -> list[Part]:
    """What the line says, in its order: ``epoch 2/5``, ``step 1,200``, ``loss 0.31``, ``41,520 samples/s``, ...

    Args:
        pace: None before the first step.
        took_s: how long the run has taken, once it is over.
    """
    if not status.num_steps and took_s is None:
        return [Part(f"starting, {status.num_live} live", 0)]
    parts = []
    if status.epoch is not None and status.num_epochs is not None:
        parts.append(Part(f"epoch {min(status.epoch + 1, status.num_epochs)}/{status.num_epochs}", 4))
    parts.append(Part(f"step {status.num_steps:,}", 5))
    for number, (scalar, value) in enumerate(status.scalars.items()):
        parts.append(Part(f"{scalar} {value:.4g}", 1 if number == 0 else _FIRST_TO_DROP + number))
    rate = None
    if pace is not None:
        rate = pace.samples_per_s if took_s is None else pace.mean_samples_per_s(status)
    if rate is not None:
        parts.append(Part(f"{rate:,.0f} samples/s", 6))
    if status.staleness:  # none where all wait for all
        parts.append(Part(f"staleness {status.staleness:.1f}", 8))
    parts += _workers(status)
    if took_s is not None:
        parts.append(Part(f"took {_clock(took_s)}", 2))
    elif pace is not None and pace.left_s is not None:
        parts.append(Part(f"ETA {_clock(pace.left_s)}", 2))
    return parts


def _workers(status: Status) -> list[Part]:
    parts = [Part(f"{status.num_live} live", 7)]
    if status.num_lost:
        parts.append(Part(f"{status.num_lost} lost", 3))
    if status.num_waiting:
        parts.append(Part(f"{status.num_waiting} waiting", 8))
    if status.num_resting:
        parts.append(Part(f"{status.num_resting} at the epoch's end", 8))
    return [*parts, Part(f"{status.num_finished} of {status.num_partitions} partitions done", 9)]


def _clock(seconds: float) -> str:
    """``0:12``, ``12:34``, ``1:02:03``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
