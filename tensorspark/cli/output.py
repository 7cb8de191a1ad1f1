"""How commands speak: results to stdout, what is wrong to the caller, who writes it to stderr."""

from __future__ import annotations

import sys

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """A command line that cannot work; the text says why."""


def say(line: str) -> None:
    """Writes a result, at once."""
    if sys.stdout is None:  # closed by who started us
        return
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
