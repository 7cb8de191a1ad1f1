"""A real Chromium without a window, and what tests ask of it: Debian's packages `chromium` and `chromium-driver`."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

_T = TypeVar("_T")
DEADLINE_S = 20.0
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
    *("--disable-default-apps", "--disable-extensions", "--disable-features=OptimizationHints,MediaRouter,Translate"),
    "--force-prefers-no-reduced-motion",
)


class Browser:
    """One window of a Chromium of its own.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.command("Network.enable")

    def command(self, name: str, **arguments: Any) -> Any:
        """Tells Chromium by its own protocol (CDP)."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def open(self, url: str) -> None:
        """Opens a page; for the dashboard's see `open_dashboard`."""
        self.driver.get(url)

    def open_dashboard(self, url: str) -> None:
        """Opens the dashboard, and returns when it has shown a frame."""
        self.open(url)
        self.until(lambda: self.run("return document.body.dataset.frames") is not None, "the page showed no frame")

    def run(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """What an element says, where it is shown or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def length(self, figure: str, source: str, column: str) -> int:
        """How many values a column of a figure's source holds; of columns of lists: the first list."""
        script = (
            "const plot = Bokeh.documents[0].get_model_by_name(arguments[0]);"
            "const data = plot.renderers.map((r) => r.data_source).find((s) => s.name === arguments[1]).data;"
            "const column = data[arguments[2]]; return Array.isArray(column[0]) ? column[0].length : column.length;"
        )
        return int(self.run(script, figure, source, column))

    def until(self, condition: Callable[[], _T], what: str, deadline_s: float = DEADLINE_S) -> _T:
        """Waits until a condition holds, and returns what it returned; fails with `what` at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not (result := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"{what} within {deadline_s:.0f} s; the console says {self.console()}")
            time.sleep(0.05)  # between two looks at another process's page, which tells nobody when it changes
        return result

    def console(self) -> list[str]:
        """Errors and warnings of the page's console since the call before."""
        return [
            f"{entry['level']}: {entry['message'][:500]}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("WARNING", "SEVERE")
        ]

    def requested(self) -> list[str]:
        """Addresses that the page has asked for since the call before, WebSockets included."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                addresses.append(message["params"]["url"])
        return addresses

    def strangers(self, url: str) -> list[str]:
        """Of the addresses `requested`, those of other hosts or ports than that of `url`."""
        own = urlsplit(url).netloc
        schemes = ("http", "https", "ws", "wss", "ftp")
        return [a for a in self.requested() if urlsplit(a).scheme in schemes and urlsplit(a).netloc != own]

    def resize(self, width: int, height: int, *, mobile: bool = False, scale: float = 1.0) -> None:
        """Gives the page a size in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def prefer(self, scheme: str) -> None:
        """Prefers ``light`` or ``dark``, as the system's settings would."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media="", features=features)

    def press(self, keys: str) -> None:
        """Presses keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(keys).perform()

    def screenshot(self, path: Path) -> None:
        """Saves what the window shows."""
        self.driver.save_screenshot(str(path))

    def new_page(self) -> None:
        """Opens another tab, and goes on there."""
        self.driver.switch_to.new_window("tab")


def chromium() -> tuple[str, str]:
    """Where Chromium and its driver are; skips the test where they are not."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    return str(paths[0]), str(paths[1])


@contextlib.contextmanager
def started(directory: Path) -> Iterator[Browser]:
    """A browser with a profile in `directory`.

    Args:
        directory: for what it writes; empty.
    """
    binary, driver_path = chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*_OPTIONS, f"--user-data-dir={directory}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.set_page_load_timeout(DEADLINE_S)
        driver.set_script_timeout(DEADLINE_S)
        yield Browser(driver)
    finally:
        driver.quit()
