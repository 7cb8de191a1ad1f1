"""One browser for all tests of the page; each test gets it in the same size and colour scheme."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.browser import Browser, started


@pytest.fixture(scope="session")
def chromium_window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium_window: Browser) -> Iterator[Browser]:
    """A window of 1280 by 900 that prefers light; what was said and asked for before is forgotten."""
    window = chromium_window
    window.resize(1280, 900)
    window.prefer("light")
    window.console()
    window.requested()
    yield window
    window.open("about:blank")


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go; those of the documentation are of a real training: see `test_training`."""
    return tmp_path
