"""The built site: it builds without a warning, fetches nothing from elsewhere, and says what the code says."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from tensorspark import errors
from tensorspark.config import SETTINGS
from tests.docs.fences import REPOSITORY
from tests.programs import execute

DOCS = REPOSITORY / "docs"
# What a browser loads by itself; a link that somebody follows (<a href>) is none.
LOADED = {"src", "srcset", "data", "poster", "href", "action", "xlink:href"}
NOT_OURS = "## Messages of Spark and others"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning, a dangling link or anchor, or a docstring that does not parse, ends it."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    output = execute(command, NO_MKDOCS_2_WARNING="1", PYTHONWARNINGS="default")
    assert "WARNING" not in output, output
    return directory


class Loads(HTMLParser):
    """Collects what a page has a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if tag != "a" and name in LOADED and value]
        self.urls += [url for name, value in attrs if name == "style" for url in urls_of_css(value or "")]


def urls_of_css(text: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", text)


def loads(html: str) -> list[str]:
    parser = Loads()
    parser.feed(html)
    return parser.urls + [
        url for css in re.findall(r"<style[^>]*>(.*?)</style>", html, re.S) for url in urls_of_css(css)
    ]


def is_elsewhere(url: str) -> bool:
    return re.match(r"(?:[a-z]+:)?//", url, re.IGNORECASE) is not None


def test_what_a_page_loads_is_found_in_tags_and_styles() -> None:
    html = (
        '<link rel="stylesheet" href="//cdn.example/a.css"><script src="https://cdn.example/b.js"></script>'
        '<style>@import "https://cdn.example/c.css"; p { background: url(d.png) }</style><a href="https://e.example">e</a>'
    )
    assert [url for url in loads(html) if is_elsewhere(url)] == [
        *("//cdn.example/a.css", "https://cdn.example/b.js", "https://cdn.example/c.css")
    ]


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            urls = loads(text) if path.suffix == ".html" else urls_of_css(text)
            found += [f"{path.relative_to(site)}: {url}" for url in urls if is_elsewhere(url)]
    assert len(list(site.rglob("*.html"))) > len(list(DOCS.rglob("*.md")))  # the pages, and 404.html
    assert found == []


def test_every_page_has_its_place_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        assert f'href="{path.relative_to(DOCS).with_suffix(".html").as_posix()}"' in home, path


def test_the_settings_page_has_an_anchor_a_key_and_a_default_for_every_setting(site: Path) -> None:
    html = (site / "configuration.html").read_text(encoding="utf-8")
    for setting in SETTINGS:
        [section] = re.findall(rf'<h3 id="{setting.field}">(.*?)(?=<h[23] |</article>)', html, re.S)
        assert f"<code>{setting.key}</code>" in section
        assert f"<code>{setting.field}</code>, default" in section
    assert "<!-- settings -->" not in html


PUBLIC = {
    "session": [f"tensorspark.session.session.SparkSession.{name}" for name in ("fit", "run", "predict", "restore")],
    "history": ["tensorspark.history.History", "tensorspark.history.History.samples_per_s"],
    "combiners": ["tensorspark.weights.averaging.MeanDeltaCombiner", "tensorspark.weights.combiners.WeightCombiner"],
    "functions": ["tensorspark.trainers.function.FunctionTrainer", "tensorspark.driver.inputs.DatasetContext"],
    "tfrecord": [
        *(f"tensorspark.data.tfrecord.frames.{name}" for name in ("load_tfrecords", "save_tfrecords")),
        *("tensorspark.trainers.tfrecord_dataset.tfrecord_dataset", "tensorspark.compat.tensorflowonspark.dfutil"),
    ],
    "ml": ["tensorspark.ml.estimator.KerasEstimator", "tensorspark.ml.model.KerasModel"],
    "config": ["tensorspark.config.Config", "tensorspark.config.resolve"],
    "errors": [f"tensorspark.errors.{name}" for name in vars(errors) if name.endswith("Error")],
}


@pytest.mark.parametrize("page", PUBLIC)
def test_the_reference_has_what_is_public(site: Path, page: str) -> None:
    html = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
    assert [name for name in PUBLIC[page] if f'id="{name}"' not in html] == []


def test_comments_for_the_tests_are_on_no_page(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not re.search(r"<!-- (?:setup|not run|in the tests)", path.read_text(encoding="utf-8")), path


# Troubleshooting


def entries() -> list[str]:
    """The texts of ours that the page explains."""
    ours, _, _ = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition(NOT_OURS)
    return [text for line in re.findall(r"^#### (.*)$", ours, re.MULTILINE) for text in re.findall(r"`([^`]+)`", line)]


def messages() -> Iterator[str]:
    """All texts in the package, with … for what is filled in; of the logging's, for %s and its like."""
    for path in sorted((REPOSITORY / "tensorspark").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(?:\.\d+)?[sdgr]", "…", node.value)


def is_said(text: str, said: str) -> bool:
    """Whether `text` is of a message, or of messages that fill each other's gaps: they meet where a … is in one.

    Args:
        said: the messages, with a … before, between and after them.
    """
    ends = (end for end in range(1, len(text)) if f"{text[:end]}…" in said)
    return text in said or any(_goes_on(text[end:], said) for end in ends)


def _goes_on(rest: str, said: str) -> bool:
    ends = (end for end in range(1, len(rest)) if f"…{rest[:end]}…" in said)
    return f"…{rest}" in said or any(_goes_on(rest[end:], said) for end in ends)


def test_each_text_of_the_troubleshooting_page_is_one_that_the_package_says() -> None:
    said = "…".join(["", *messages(), ""])
    assert len(entries()) > 60
    missing = []
    for entry in entries():
        name, _, text = entry.partition(": ") if re.match(r"\w+Error: ", entry) else ("", "", entry)
        assert not name or hasattr(errors, name), entry
        assert re.search(r"\w{4}", text), entry
        missing += [f"{entry}\n  {part!r}" for part in text.split("…") if not is_said(part.strip(), said)]
    assert missing == []


def test_a_text_is_said_where_messages_fill_each_others_gaps() -> None:
    said = "…expected … of … slots: …none is free…; take fewer…"
    assert is_said("slots: none is free; take", said)
    assert is_said("one is fr", said)
    assert not is_said("slots: one is free; take", said)
    assert not is_said("slots: none is fee; take", said)


# What mkdocs runs


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_defaults_are_written_as_spark_defaults_have_them() -> None:
    default_text = hook("pages").default_text
    by_field = {setting.field: default_text(setting) for setting in SETTINGS}
    expected = {"staleness": "`async`", "io_timeout_s": "`120s`", "cache_memory_bytes": "`256m`", "hdfs_dir": "not set"}
    assert {field: by_field[field] for field in expected} == expected
    assert by_field["overlap"] == "`false`"
    for setting in SETTINGS:
        if (written := by_field[setting.field]).startswith("`"):
            assert setting.parse(written.strip("`")) == setting.default


def test_an_announced_block_of_a_docstring_becomes_a_fence() -> None:
    fenced = hook("docstrings").fenced
    assert (
        fenced("Like this::\n\n    x = 1\n\n    y = 2\n\nEnd.")
        == "Like this:\n\n```python\nx = 1\n\ny = 2\n```\n\nEnd."
    )
    assert fenced("::\n\n    Root\n    └── Leaf") == "```text\nRoot\n└── Leaf\n```"
    assert fenced("no::colon pair") == "no::colon pair"


def test_examples_of_a_docstring_become_a_fence() -> None:
    fenced = hook("docstrings").fenced
    assert fenced("So.\n\n>>> 1 + 1\n2\n\nEnd.") == "So.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nEnd."


def test_comments_for_the_tests_are_cut_out_of_a_page() -> None:
    text = "a\n\n<!-- setup:\nx = '-'\n-->\n<!-- not run: why -->\n```python\n```\n<!-- kept -->\n"
    assert hook("pages").on_page_markdown(text) == "a\n\n```python\n```\n<!-- kept -->\n"
