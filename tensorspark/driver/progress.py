"""Progress of a run, as one line."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tensorspark.ps.messages import Status

_TERMINAL_INTERVAL_S = 0.2
_LOG_INTERVAL_S = 10.0


class ProgressLine:
    """Shows a run's status on stderr, from the first step on: one line that is rewritten on a terminal, elsewhere a
    line every 10 s.

    Args:
        enabled: False shows nothing.
    """

    def __init__(self, name: str, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._name = name
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._first: tuple[float, Status] | None = None
        self._shown_at = 0.0
        self._num_shown = 0

    def show(self, status: Status, *, last: bool = False) -> None:
        """Shows `status` if it is time to; `last` always shows it and ends the line."""
        now = time.monotonic()
        interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S
        if not self._enabled or not (last or (status.num_steps and now - self._shown_at >= interval_s)):
            return
        self._shown_at = now
        self._first = self._first or (now, status)
        line = describe(self._name, status, self._first[1], now - self._first[0])
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._num_shown += 1

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        if self._enabled:
            self._stream.write(f"{self._name or 'tensorspark'}: {text}\n")
            self._stream.flush()

    def abandon(self) -> None:
        """Ends the line where it is, so that what follows (a traceback) begins on its own."""
        if self._is_terminal and self._num_shown:
            self._stream.write("\n")
            self._stream.flush()


def describe(name: str, status: Status, first: Status, seconds: float) -> str:
    """One line, such as ``mnist: step 1,200  loss 0.31  41,520 samples/s  2 live, 0 of 2 partitions done  ETA 0:12``.

    Args:
        first: the first status of the run that had steps, `seconds` ago: what came before it was start-up.
    """
    parts = [f"{name or 'tensorspark'}: step {status.num_steps:,}"]
    parts += [f"{scalar} {value:.4g}" for scalar, value in status.scalars.items()]
    if seconds > 0 and status.num_samples > first.num_samples:
        parts.append(f"{(status.num_samples - first.num_samples) / seconds:,.0f} samples/s")
    parts.append(f"{status.num_live} live, {status.num_finished} of {status.num_partitions} partitions done")
    if status.progress is not None and (first.progress or 0) < status.progress < 1:
        left_s = seconds * (1 - status.progress) / (status.progress - (first.progress or 0))
        parts.append(f"{status.progress:.0%}  ETA {int(left_s // 60)}:{int(left_s % 60):02d}")
    return "  ".join(parts)
