"""The page in a real browser, beside a run that goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tensorspark.telemetry.records import EpochEnded, LogLine, RunEnded, Tensor, TrainingPoint, WorkerEvent
from tensorspark.telemetry.view import RunView
from tests.dashboard.browser import Browser
from tests.dashboard.serving import Feeder, Served
from tests.dashboard.synthetic import SyntheticRun

pytestmark = pytest.mark.browser

RGB = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"


@pytest.fixture
def live() -> Iterator[Served]:
    """A run of six in real time, half-way through; partition 4 is lost soon, and comes back."""
    view = RunView()
    run = SyntheticRun(lost_at=152.0, back_at=155.0)
    with Served(view) as served, Feeder(view, run.rounds(), until_s=150):
        yield served


def canvas_of(browser: Browser, figure: str) -> str:
    """The pixels of a figure, as a data URL."""
    script = (
        "const model = Bokeh.documents[0].get_model_by_name(arguments[0]);"
        "return Bokeh.index.find_one(model).canvas_view.compose().canvas.toDataURL()"
    )
    return str(browser.run(script, figure))


def row_of(browser: Browser, partition: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#worker-table tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    rows = browser.run(script)
    return next((row for row in rows if row[0] == str(partition)), [])


def test_curves_move_while_the_run_goes_on_and_nothing_comes_from_elsewhere(browser: Browser, live: Served) -> None:
    browser.open_dashboard(live.url)
    browser.until(lambda: browser.length("loss", "loss-training", "ys") > 100, "no curve")
    before, pixels = browser.length("loss", "loss-training", "ys"), canvas_of(browser, "loss")
    spans = canvas_of(browser, "timeline")
    browser.until(lambda: browser.length("loss", "loss-training", "ys") >= before + 2, "the loss stood still")
    browser.until(lambda: canvas_of(browser, "loss") != pixels, "the picture of the loss stood still")
    browser.until(lambda: canvas_of(browser, "timeline") != spans, "the timeline stood still")
    assert browser.text("#name") == "mnist-cnn"
    assert "running" in browser.text("#state")
    assert browser.console() == []
    assert browser.strangers(live.url) == []


def test_a_worker_that_is_lost_shows_as_lost_with_host_and_partition_and_comes_back(
    browser: Browser, live: Served
) -> None:
    browser.open_dashboard(live.url)
    row = browser.until(
        lambda: [c for c in row_of(browser, 4) if "lost" in c] and row_of(browser, 4), "nobody was lost"
    )
    assert row[:3] == ["4", "✕ lost", "worker-3.example.internal"]
    assert "1 lost" in browser.text("#bar-workers")
    assert "1 worker lost" in browser.text("#announcements"), "what a screen reader says"
    assert "lost" in browser.text("#event-table")
    browser.until(lambda: "live" in row_of(browser, 4)[1], "it did not come back")
    assert row_of(browser, 4)[3] == "2", "attempts"
    assert browser.console() == []


def test_the_last_state_stays_when_the_server_is_gone(browser: Browser) -> None:
    view = RunView()
    with Served(view) as served:
        with Feeder(view, SyntheticRun().rounds(), until_s=40):
            browser.open_dashboard(served.url)
            browser.until(lambda: browser.length("loss", "loss-training", "ys") > 20, "no curve")
        view.apply(RunEnded(view.sample.seconds + 1 if view.sample else 0.0, "failed", "partition 4 on worker-3: OOM"))
        browser.until(lambda: "failed" in browser.text("#state"), "the end was not told")
        assert "OOM" in browser.text("#failure")
        length = browser.length("loss", "loss-training", "ys")
        served.stop()
        browser.until(lambda: not browser.run("return document.getElementById('connection').hidden"), "no notice")
    assert "last state" in browser.text("#connection span")
    assert browser.length("loss", "loss-training", "ys") == length
    assert "failed" in browser.text("#state")
    assert browser.console() == []
    browser.run("document.getElementById('reconnect').click()")
    browser.until(lambda: "does not answer" in browser.text("#connection span"), "no answer to the button")
    assert browser.length("loss", "loss-training", "ys") == length


def test_without_a_run_the_page_says_so_and_follows_the_runs_that_begin(browser: Browser) -> None:
    with Served(None) as served:
        browser.open_dashboard(served.url)
        assert "No run has begun" in browser.text("#nothing")
        assert browser.run("return document.getElementById('main').hidden")
        first = SyntheticRun(3, name="first").rounds()
        served.view = RunView(record for _ in range(9) for record in next(first))
        browser.until(lambda: browser.text("#name") == "first", "the first run did not show")
        browser.until(lambda: browser.length("loss", "loss-training", "ys") == 8, "not the first run's points")
        second = SyntheticRun(2, name="second", run=2).rounds()
        served.view = RunView(record for _ in range(4) for record in next(second))
        browser.until(lambda: browser.text("#name") == "second", "the second run did not show")
        browser.until(lambda: browser.length("loss", "loss-training", "ys") == 3, "the first run's points stayed")
        assert browser.run("return document.querySelectorAll('#worker-table tbody tr').length") == 2
    assert browser.console() == []


@pytest.mark.parametrize("finished", [False, True])
def test_on_a_phone_the_page_does_not_scroll_sideways(browser: Browser, finished: bool) -> None:
    run = SyntheticRun(6, name="a-run-with-a-name-that-is-much-too-long-for-a-phone" * 2, duration_s=30)
    view = RunView(record for records in run.rounds() for record in records)
    if not finished:
        view.ended = None
    browser.resize(360, 740, mobile=True)
    with Served(view) as served:
        browser.open_dashboard(served.url)
        browser.until(lambda: browser.length("loss", "loss-training", "ys") > 20, "no curve")
        assert browser.run("return document.documentElement.scrollWidth") == 360
        assert browser.run("return innerWidth") == 360, "nothing is wider than the screen"
        assert browser.run(
            "const box = document.querySelector('#workers .scroll'); return box.scrollWidth > box.clientWidth"
        ), "the table scrolls in its own box"


def contrast(first: str, second: str) -> float:
    """Of two colours ``rgb(r, g, b)``, as WCAG 2 defines it."""

    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_it_follows_the_preferred_scheme_and_is_readable_in_both(browser: Browser, live: Served) -> None:
    browser.open_dashboard(live.url)
    label = "return Bokeh.documents[0].get_model_by_name('loss').below[0].major_label_text_color"
    seen = set()
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.until(lambda: browser.run(label) not in seen, "the figures kept their colours")
        seen.add(browser.run(label))
        card = browser.run(RGB, ".card", "background-color")
        page = browser.run(RGB, "body", "background-color")
        browser.run("document.body.insertAdjacentHTML('beforeend', '<i id=probe></i>')")
        for name in ("text", "muted", "accent", "live", "waiting", "lost", "finished", "pending"):
            browser.run("document.getElementById('probe').style.color = `var(--${arguments[0]})`", name)
            ink = browser.run(RGB, "#probe", "color")
            assert contrast(ink, card) >= 4.5, f"{name} on a card, {scheme}"
            if name in ("text", "muted"):
                assert contrast(ink, page) >= 4.5, f"{name} on the page, {scheme}"
        for name in ("series-1", "series-2", "series-3", "series-4", "series-5", "waiting"):
            browser.run("document.getElementById('probe').style.color = `var(--${arguments[0]})`", name)
            assert contrast(browser.run(RGB, "#probe", "color"), card) >= 3, f"{name}, {scheme}"
        browser.run("document.getElementById('probe').remove()")
    assert len(seen) == 2


def test_the_keyboard_reaches_every_section_and_its_shortcuts_work(browser: Browser, live: Served) -> None:
    browser.open_dashboard(live.url)
    focus = "const e = document.activeElement; return e.hash || e.id || e.name || e.className || e.tagName"
    browser.run("document.body.focus()")
    reached = []
    for _ in range(45):
        browser.press("\ue004")
        reached.append(browser.run(focus))
        outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
        label = browser.run("return document.activeElement.closest('.switch') !== null")
        assert outline != "none" or label or reached[-1] == "BODY", reached[-1]
    assert reached[0] == "#training", "the link that skips the head comes first"
    for section in ("speed", "timeline", "workers", "weights", "network", "checkpoints", "events", "configuration"):
        assert f"#{section}" in reached
    assert {"help-button", "axis", "log", "window", "pause", "variable"} <= set(reached)
    sections = browser.run("return [...document.querySelectorAll('main section')].map((section) => section.id)")
    assert len(sections) == 9
    for number, section in enumerate(sections, 1):
        browser.press(str(number))
        assert browser.run(focus) == f"{section}-title"
    browser.press("x")
    assert browser.run("return document.querySelector('input[name=axis]:checked').value") == "seconds"
    browser.press("l")
    assert browser.run("return document.getElementById('log').checked")
    browser.press("p")
    assert browser.run("return document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    browser.press("?")
    assert browser.run("return document.getElementById('help').open")
    browser.press("\ue00c")
    assert not browser.run("return document.getElementById('help').open")
    assert browser.console() == []


def test_curves_are_drawn_over_time_with_the_logarithm_of_the_loss(browser: Browser) -> None:
    view = RunView(
        [SyntheticRun(1).began(), *(TrainingPoint(i * 2.0, i * 10, i, {"loss": 10.0**-i}) for i in range(4))]
    )
    view.apply(EpochEnded(5.0, 1, 25, {"loss": 0.5, "val_loss": 100.0}))
    with Served(view) as served:
        browser.open_dashboard(served.url)
        read = (
            "const plot = Bokeh.documents[0].get_model_by_name('loss');"
            "const of = (name) => plot.renderers.map((r) => r.data_source).find((s) => s.name === name).data;"
            "return [of('loss-training').xs[0], of('loss-training').ys[0], of('loss-dots').x, of('loss-dots').y]"
        )
        browser.until(lambda: browser.run(read)[2], "no dot")
        assert browser.run(read) == [[0, 10, 20, 30], [1, 0.1, 0.01, 0.001], [25], [100]]
        browser.press("x")
        browser.press("l")
        assert browser.run(read) == [[0, 2, 4, 6], [0, -1, -2, -3], [5], [2]]


def test_hostile_names_and_messages_are_shown_and_do_nothing(browser: Browser) -> None:
    hostile = "<img src=x onload='window.hit=1' onerror='window.hit=1'><script>window.hit=2</script>$$\\frac{1}{2}$$"
    run = SyntheticRun(2, name=hostile, host=hostile)
    records = [record for _, some in zip(range(9), run.rounds(), strict=False) for record in some]
    began = run.began(
        settings={hostile: hostile},
        tensors=(Tensor(hostile, (1,), "float32"),),
        spark_url="javascript:window.hit=3",
        job_group=hostile,
    )
    told = [
        replace(r, scalars={hostile: r.scalars["loss"]}) if isinstance(r, TrainingPoint) else r for r in records[1:]
    ]
    view = RunView([began, *told])
    view.apply(LogLine(1.0, 0, hostile, 40, hostile, hostile))
    view.apply(WorkerEvent(1.0, 0, hostile, hostile, 1, hostile))
    view.apply(EpochEnded(1.0, 1, 9, {hostile: 1.0, f"val_{hostile}": 1.0}))
    view.apply(RunEnded(300.0, "failed", hostile))
    with Served(view) as served:
        browser.open_dashboard(served.url)
        browser.until(lambda: browser.text("#name") == hostile, "the name is not shown as it is")
        assert hostile in browser.text("#failure")
        assert hostile in browser.text("#log-table")
        assert hostile in browser.text("#loss-legend")
        assert row_of(browser, 0)[2] == hostile
        assert hostile in hover(browser, "loss"), "what is under the pointer names it"
        assert browser.run("return window.hit ?? 0") == 0
        assert browser.run("return document.querySelectorAll('main img, main script, #about a').length") == 0
        assert browser.strangers(served.url) == []
    assert browser.console() == []


def hover(browser: Browser, figure: str) -> str:
    """Moves the pointer over a figure, on a grid of points, until something is said under it; what that is."""
    tips = """
        const inner = (e) => (e.shadowRoot ? all(e.shadowRoot) : []);
        const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...inner(e)]);
        const boxes = all(document).filter((e) => e.classList.contains("bk-Tooltip"));
        return boxes.map((e) => e.shadowRoot.textContent).join()"""
    box = browser.run(
        "const element = document.getElementById(`plot-${arguments[0]}`);"
        "element.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const r = element.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]",
        figure,
    )
    for x in range(20, 90, 10):
        for y in range(4, 80, 4):
            place = {"x": box[0] + box[2] * x / 100, "y": box[1] + box[3] * y / 100}
            browser.command("Input.dispatchMouseEvent", type="mouseMoved", **place)
            browser.driver.execute_async_script("requestAnimationFrame(() => arguments[0]())")
            if said := browser.run(tips):
                return str(said)
    return ""


def test_two_pages_are_told_the_same(browser: Browser, live: Served) -> None:
    browser.open_dashboard(live.url)
    first = browser.driver.current_window_handle
    browser.new_page()
    try:
        browser.open_dashboard(live.url)
        second = browser.length("loss", "loss-training", "ys")
        browser.until(lambda: browser.length("loss", "loss-training", "ys") > second, "the second page stood still")
        second = browser.length("loss", "loss-training", "ys")
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)
    browser.until(lambda: browser.length("loss", "loss-training", "ys") >= second, "the first page fell behind")
    assert browser.console() == []


def test_screenshots(browser: Browser, screenshots: Path) -> None:
    """What the documentation's look like, of a made-up run: none is empty or heavy."""
    run, view = SyntheticRun(lost_at=150, back_at=161), RunView()
    with Served(view) as served, Feeder(view, run.rounds(), until_s=164):
        browser.resize(1280, 1460)
        browser.open_dashboard(served.url)
        browser.until(lambda: browser.length("timeline", "timeline-compute", "left") > 30, "no timeline")
        for name, scheme in (("light", "light"), ("dark", "dark")):
            browser.prefer(scheme)
            _save(browser, screenshots / f"dashboard-{name}.png")
        browser.prefer("light")
        browser.resize(360, 780, mobile=True, scale=2)
        browser.run("document.getElementById('training').scrollIntoView({block: 'start', behavior: 'instant'})")
        _save(browser, screenshots / "dashboard-phone.png")
    for name in ("light", "dark", "phone"):
        size = (screenshots / f"dashboard-{name}.png").stat().st_size
        assert 20_000 < size < 250_000, f"{name}: {size} bytes"


def _save(browser: Browser, path: Path) -> None:
    """A screenshot after the next frame."""
    from PIL import Image

    frames = browser.run("return document.body.dataset.frames")
    browser.until(lambda: browser.run("return document.body.dataset.frames") != frames, "no frame came")
    browser.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 300))")
    image = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)
