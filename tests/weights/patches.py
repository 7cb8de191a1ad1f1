"""Patches that are at hand as a whole, for tests."""

from __future__ import annotations

from tensorspark.weights.changes import Units
from tensorspark.weights.layout import Buffer


def apply(units: Units, patch: Buffer, buffer: Buffer) -> None:
    """Writes a patch's units over those of `buffer`."""
    at = 0

    def fill(part: Buffer) -> None:
        nonlocal at
        part[:] = patch[at : at + len(part)]
        at += len(part)

    units.receive(fill, len(patch), buffer)
    assert at == len(patch)
