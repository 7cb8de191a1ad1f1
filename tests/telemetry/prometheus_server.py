"""A real Prometheus server that scrapes a real run's page, for tests."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRAPE_INTERVAL_S = 0.2
DEADLINE_S = 20.0
_POLL_S = 0.05
_TOKEN = "a-token-that-only-the-tests-know"

Page = Callable[[str | None], tuple[bytes, str]]
"""Answers a scrape: takes the ``Accept`` header, returns body and content type."""


def require_binaries() -> None:
    """Skips where Debian's package is not installed."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here: apt-get install prometheus")


def wait_until(what: str, is_so: Callable[[], bool], describe: Callable[[], object] = str) -> None:
    """Asks again and again; fails, with what `describe` says, after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"not {what} after {DEADLINE_S} s: {describe()}")
        time.sleep(_POLL_S)


class PrometheusServer:
    """The HTTP API of a running server.

    Attributes:
        url: such as ``http://127.0.0.1:40989``.
        target: ``HOST:PORT`` that it scrapes: the label ``instance``.
        refusal: what it said of the target before it had the token.
        accepted: the ``Accept`` headers of its scrapes.
    """

    def __init__(self, url: str, target: str, accepted: set[str | None]) -> None:
        self.url = url
        self.target = target
        self.refusal = ""
        self.accepted = accepted

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer.

        Raises:
            AssertionError: it is an error.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert answer["status"] == "success"
        assert not answer.get("warnings")
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression at this moment."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector"
        result: list[dict[str, Any]] = data["result"]
        return result

    def last_error(self) -> str:
        """Of the newest scrape; empty after one that went well, and before the first."""
        targets = self.get("targets")["activeTargets"]
        return str(targets[0]["lastError"]) if targets else ""

    def is_up(self) -> bool:
        """Whether the newest scrape went well."""
        return [series["value"][1] for series in self.query("up")] == ["1"]

    def is_ready(self) -> bool:
        """Whether it takes requests."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=DEADLINE_S) as response:
                return bool(response.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def scraping(page: Page, directory: Path) -> Iterator[PrometheusServer]:
    """A server that scrapes `page` five times a second, by conf/prometheus.yml; ended afterwards.

    It has the wrong token at first, as one that has not heard of a new session.

    Args:
        directory: an empty one, for its configuration and data.
    """
    accepted: set[str | None] = set()
    token_file = directory / "token"
    token_file.write_text("of-the-session-before\n")
    with _serving(page, accepted) as target:
        config_file = directory / "prometheus.yml"
        config_file.write_text(derived_config(target, token_file))
        with _running(config_file, directory) as url:
            server = PrometheusServer(url, target, accepted)
            wait_until("ready", server.is_ready)
            wait_until("refused", lambda: bool(server.last_error()))
            server.refusal = server.last_error()
            token_file.write_text(f"{_TOKEN}\n")
            wait_until("up", server.is_up, server.last_error)
            yield server


def derived_config(target: str, token_file: Path) -> str:
    """The example with another target, token and interval."""
    config = (REPOSITORY / "conf" / "prometheus.yml").read_text(encoding="utf-8")
    replacements = {
        "driver.example.com:10080": target,
        "/etc/prometheus/tensorspark.token": str(token_file),
        "scrape_interval: 5s": f"scrape_interval: {round(SCRAPE_INTERVAL_S * 1000)}ms",
    }
    for old, new in replacements.items():
        assert config.count(old) == 1, old
        config = config.replace(old, new)
    return config


@contextlib.contextmanager
def _serving(page: Page, accepted: set[str | None]) -> Iterator[str]:
    """Serves ``/metrics`` on a free port of the loopback to who has the token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics" or self.headers["Authorization"] != f"Bearer {_TOKEN}":
                self.send_error(401 if self.path == "/metrics" else 404)
                return
            accepted.add(self.headers["Accept"])
            body, content_type = page(self.headers["Accept"])
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


@contextlib.contextmanager
def _running(config_file: Path, directory: Path) -> Iterator[str]:
    """Starts the server on a free port, which its log tells."""
    log_file = directory / "log"
    command = ["prometheus", f"--config.file={config_file}", f"--storage.tsdb.path={directory / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0", "--storage.tsdb.retention.time=1h"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory)
    try:
        wait_until("listening", lambda: process.poll() is not None or bool(_address(log_file)), log_file.read_text)
        assert process.poll() is None, log_file.read_text()
        yield f"http://{_address(log_file)}"
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(DEADLINE_S)


def _address(log_file: Path) -> str:
    found = re.search(r'msg="Listening on" address=(\S+)', log_file.read_text())
    return found[1] if found else ""
