"""The page of a real training, in a real Chromium: it is watched while a worker is killed, and keeps how the run ended.

With ``TENSORSPARK_SCREENSHOTS`` set to a directory, the screenshots in the documentation are made there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tensorspark import SparkSession
from tensorspark.history import History
from tensorspark.trainers.startup import importing
from tests.dashboard import browser as browsers
from tests.dashboard.browser import Browser

if TYPE_CHECKING:
    from pyspark import SparkContext

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DEADLINE_S = 90.0
NUM_ROWS, NUM_FEATURES, NUM_CLASSES = 8000, 20, 10
NUM_EPOCHS, LAST_EPOCH_BEFORE_THE_KILL = 24, 16
PARTITION, STATE, HOST, ATTEMPTS = range(4)  # columns of the page's table of workers
SCREENSHOTS = os.environ.get("TENSORSPARK_SCREENSHOTS")
# A run that is over in a moment has no curves that move: epochs take a while by a pause or, for pictures, by work.
UNITS, PAUSE_S = ((768, 768), 0.0) if SCREENSHOTS else ((64,), 0.3)


def labelled_rows() -> list[tuple[Any, int]]:
    """What a random network makes of random numbers: 20 of them, and one of ten classes."""
    random = np.random.default_rng(3)
    x = random.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    hidden = np.tanh(x @ random.normal(size=(NUM_FEATURES, 32)))
    scores = hidden @ random.normal(size=(32, NUM_CLASSES)) + random.normal(size=(NUM_ROWS, NUM_CLASSES))
    return list(zip(x, scores.argmax(axis=1).tolist(), strict=True))


def classifier() -> Any:
    with importing():
        import keras

    keras.utils.set_random_seed(7)
    hidden = [keras.layers.Dense(units, "relu") for units in UNITS]
    model = keras.Sequential([keras.Input((NUM_FEATURES,)), *hidden, keras.layers.Dense(NUM_CLASSES, "softmax")])
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def reader(directory: Path) -> Callable[[int, Any], Any]:
    """Passes rows on; says which process reads them, and has a worker's successor wait until its loss was seen."""
    deadline_s = DEADLINE_S

    def read(index: int, rows: Any) -> Any:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        if context.attemptNumber() > 0:
            deadline = time.monotonic() + deadline_s
            while not (directory / "seen").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        (directory / f"pid-{index}").write_text(str(os.getpid()))
        return passed_on(index, context.attemptNumber(), rows)

    def passed_on(index: int, attempt: int, rows: Any) -> Iterator[Any]:
        if attempt > 0:
            logging.getLogger("feed").warning("attempt %d reads partition %d again", attempt, index)
        yield from rows

    return read


def paced(is_recovered: threading.Event) -> Any:
    """A callback by which epochs take a while, and the last ones wait until what is tried was seen."""
    with importing():
        import keras

    def end_epoch(epoch: int, logs: Any) -> None:
        threading.Event().wait(PAUSE_S)
        if epoch == LAST_EPOCH_BEFORE_THE_KILL:
            is_recovered.wait(DEADLINE_S)

    return keras.callbacks.LambdaCallback(on_epoch_end=end_epoch)


@dataclass
class Training:
    """A run that goes on in a thread of its own.

    Attributes:
        url: of its page, as it was printed.
        is_recovered: set it, and the run goes on to its end.
    """

    session: SparkSession
    history: Future[History]
    url: str
    directory: Path
    is_recovered: threading.Event

    def kill_worker(self, partition: int) -> None:
        """Kills the Python process that trains a partition, as one that runs out of memory is."""
        os.kill(int((self.directory / f"pid-{partition}").read_text()), signal.SIGKILL)


@pytest.fixture
def training(sc: SparkContext, tmp_path: Path) -> Iterator[Training]:
    stderr, is_recovered = io.StringIO(), threading.Event()
    feed = sc.parallelize(labelled_rows(), 2).mapPartitionsWithIndex(reader(tmp_path))
    (tmp_path / "hdfs").mkdir()
    session = SparkSession(
        sc, classifier(), name="ten classes", staleness=2, sync_interval=5, batch_size=40,
        hdfs_dir=str(tmp_path / "hdfs"), checkpoint_interval_s=2,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool, contextlib.redirect_stderr(stderr):
        try:
            history = pool.submit(
                session.fit, feed, epochs=NUM_EPOCHS, validation_split=0.1, callbacks=[paced(is_recovered)], seed=3
            )
            yield Training(session, history, printed_url(stderr, history), tmp_path, is_recovered)
        finally:
            is_recovered.set()
            session.close()  # which ends a run that a test has left


def printed_url(stderr: io.StringIO, history: Future[History]) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := re.search(r"dashboard at (http://\S+)", stderr.getvalue())):
        assert not history.done(), history.exception()
        assert time.monotonic() < deadline, f"no URL was printed: {stderr.getvalue()}"
        time.sleep(0.02)  # between two looks at what another thread prints
    return found[1]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    (tmp_path / "profile").mkdir()
    with browsers.started(tmp_path / "profile") as browser:
        browser.resize(1280, 900)
        yield browser


def workers(browser: Browser) -> dict[str, list[str]]:
    """The cells of the page's table of workers, by partition."""
    script = (
        "return [...document.querySelectorAll('#worker-table tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent));"
    )
    return {row[PARTITION]: row for row in browser.run(script) if len(row) > ATTEMPTS}


def is_in(state: str, browser: Browser, partition: str, attempts: str) -> bool:
    row = workers(browser).get(partition)
    return row is not None and row[STATE].split()[-1] in state.split("|") and row[ATTEMPTS] == attempts


def num_values(browser: Browser) -> dict[str, int]:
    """How much the figures show by now."""
    return {
        "loss": browser.length("loss", "loss-training", "ys"),
        "throughput": browser.length("throughput", "throughput-paces", "x"),
        "epochs": browser.length("loss", "loss-dots", "y"),
    }


def require_growth(browser: Browser, before: dict[str, int]) -> None:
    def has_grown() -> bool:
        now = num_values(browser)
        return all(now[name] > before[name] for name in before)

    browser.until(has_grown, f"not all of {before} grew", DEADLINE_S)


def photograph(browser: Browser, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        # Figures are drawn in the frame after the one that gives them their size.
        browser.driver.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0], 200)))"
        )
        browser.screenshot(Path(SCREENSHOTS) / f"dashboard-{name}.png")


def test_a_training_is_watched_from_its_begin_through_a_workers_death_to_its_end(
    training: Training, browser: Browser
) -> None:
    url = training.url
    browser.open(re.sub("token=.*", "token=another-runs-token", url))
    assert browser.text("h1") == "This page needs the run’s token"
    (refused,) = browser.console()
    assert "401" in refused

    browser.open_dashboard(url)
    assert "token" not in browser.run("return location.href")
    browser.until(lambda: browser.text("#state") == "● running", "the run did not begin", DEADLINE_S)
    assert browser.text("#name") == "ten classes"
    assert browser.text("#mode") == "stale-synchronous (2)"

    # The curves move, and again.
    browser.until(lambda: num_values(browser)["epochs"] > 0, "no epoch ended", DEADLINE_S)
    for _ in range(2):
        require_growth(browser, num_values(browser))

    # A worker dies, and is seen to; then comes its successor.
    browser.until(lambda: is_in("live|waiting", browser, "1", "1"), "partition 1 was not live", DEADLINE_S)
    training.kill_worker(1)
    browser.until(lambda: is_in("lost", browser, "1", "1"), "the killed worker was not lost", DEADLINE_S)
    assert workers(browser)["1"][HOST] == socket.gethostname()
    assert workers(browser)["0"][STATE].split()[-1] in ("live", "waiting")
    browser.until(lambda: "✕ 1 lost" in browser.text("#bar-workers"), "the head of the page told of no loss")
    assert browser.text("#announcements") == "ten classes running, 1 worker lost"
    browser.run("document.querySelector('#workers').scrollIntoView({behavior: 'instant'})")
    photograph(browser, "lost")
    (training.directory / "seen").touch()
    browser.until(lambda: is_in("live|waiting", browser, "1", "2"), "no successor was shown", DEADLINE_S)
    browser.until(lambda: "lost" not in browser.text("#bar-workers"), "the head of the page goes on to tell of a loss")
    events = browser.text("#event-table tbody")
    assert "lost" in events
    assert browser.until(lambda: "attempt 1 reads partition 1 again" in browser.text("#log-table"), "no warning came")
    training.is_recovered.set()
    require_growth(browser, num_values(browser))
    browser.run("window.scrollTo({top: 0, behavior: 'instant'})")
    photograph_all(browser)

    # It ends, and the page says how, also when nobody serves it any more.
    history = training.history.result(DEADLINE_S)
    assert [worker.num_attempts for worker in history.workers] == [1, 2]
    browser.until(lambda: browser.text("#state") == "✓ finished", "the run did not end on the page", DEADLINE_S)
    assert f"{history.num_steps:,}" in browser.text("#facts").replace("\u202f", ",").replace(" ", ",")
    assert browser.console() == []
    assert browser.strangers(url) == []
    shown = num_values(browser)
    assert shown["epochs"] == NUM_EPOCHS
    training.session.close()
    browser.until(lambda: browser.run("return !document.querySelector('#connection').hidden"), "no goodbye was said")
    assert browser.text("#state") == "✓ finished"
    assert num_values(browser) == shown


def photograph_all(browser: Browser) -> None:
    """The page as it is now: by day, by night and on a phone."""
    if not SCREENSHOTS:
        return
    browser.until(lambda: num_values(browser)["epochs"] >= NUM_EPOCHS - 6, "the epochs do not go on", DEADLINE_S)
    browser.resize(1280, 1400)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        photograph(browser, scheme)
    browser.prefer("light")
    browser.resize(390, 844, mobile=True, scale=2)
    photograph(browser, "phone")
    browser.resize(1280, 900)
