"""A pytest plugin that turns skipped tests into failures where the environment promises what they need.

``TENSORSPARK_REQUIRE=hdfs,mnist`` names marks; a test that carries one of them and skips, fails with the skip's reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

VARIABLE = "TENSORSPARK_REQUIRE"
_REQUIRED = pytest.StashKey[frozenset[str]]()


def pytest_configure(config: pytest.Config) -> None:
    required = frozenset(name for name in re.split(r"[,\s]+", os.environ.get(VARIABLE, "")) if name)
    # A line of the setting `markers` reads "name: text" or "name(arguments): text".
    markers = {re.split(r"[:(]", line)[0].strip() for line in config.getini("markers")}
    if unknown := sorted(required - markers):
        raise pytest.UsageError(f"{VARIABLE} names no mark of this project: {', '.join(unknown)}")
    config.stash[_REQUIRED] = required


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    yield from _fail_where_required(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield from _fail_where_required(item)


def _fail_where_required(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    except pytest.skip.Exception as skipped:
        required = item.config.stash[_REQUIRED]
        marks = required.intersection(mark.name for mark in item.iter_markers())
        if not marks:
            raise
        raise pytest.fail.Exception(_message(marks, skipped.msg), pytrace=False) from None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips while it is imported has no tests to ask for their marks: its text is asked instead."""
    report = yield
    if report.skipped and isinstance(collector, pytest.Module):
        required = collector.config.stash[_REQUIRED]
        if marks := required.intersection(re.findall(r"\bmark\.(\w+)", collector.path.read_text(encoding="utf-8"))):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            report.outcome = "failed"
            report.longrepr = _message(marks, reason)
    return report


def _message(marks: frozenset[str], reason: str | None) -> str:
    return f"{reason or 'skipped without a reason'} (skipped, but {VARIABLE} has {', '.join(sorted(marks))})"
