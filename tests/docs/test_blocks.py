"""The blocks of code in README.md and docs/: Python runs, and what the shell is given exists."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from tests.docs.fences import REPOSITORY, Block, PageError, pages, parse, read
from tests.programs import execute

MAX_NOT_RUN = 5
# Once a page has switched TensorFlow 2 off, Keras does not run in the process any more: such pages come last, and
# first of them the README, which begins with Keras.
SWITCH = "disable_v2_behavior"
EXPECTED_LANGUAGES = {"python", "bash", "text", "properties"}


def blocks() -> list[Block]:
    return [block for path in pages() for block in read(path)]


def pages_with_python() -> list[str]:
    found: dict[str, str] = {}
    for block in blocks():
        if block.language == "python" and not block.why_not_run:
            found[block.page] = found.get(block.page, "") + block.code
    return sorted(found, key=lambda page: (SWITCH in found[page], page != "README.md", page))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each page; all run in one process, with one Spark."""
    results = tmp_path_factory.mktemp("pages") / "results.json"
    output = execute([sys.executable, "-m", "tests.docs.runner", str(results), *pages_with_python()], check=False)
    found: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    for page in pages_with_python():
        found.setdefault(page, {"problem": f"was not run; the process said:\n{output[-4000:]}", "seconds": 0.0})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs(page: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert not outcomes[page]["problem"], f"{page}\n{outcomes[page]['problem']}"


def test_few_blocks_of_python_are_not_run_and_each_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = [f"{block.where}: {block.why_not_run}" for block in blocks() if block.why_not_run]
    with capsys.disabled():
        print("\nnot run:", *(skipped or ["nothing"]), sep="\n  ")
    assert len(skipped) <= MAX_NOT_RUN
    assert all(block.language == "python" for block in blocks() if block.why_not_run)


def test_blocks_say_what_language_they_are() -> None:
    assert {block.language for block in blocks()} <= EXPECTED_LANGUAGES


# What the shell is given


def commands() -> list[tuple[str, str]]:
    """Each command line of the pages' bash blocks, with lines that end in a backslash joined, and where it stands."""
    found = []
    for block in blocks():
        if block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((block.where, line.split(" #")[0]))
    return found


def module_commands() -> dict[tuple[str, ...], set[str]]:
    """The options that pages give to modules of this repository, by module and subcommand."""
    found: dict[tuple[str, ...], set[str]] = {}
    for _, line in commands():
        for module, rest in re.findall(r"python3? -m ((?:tensorspark|examples|benchmarks)[\w.]*)([^|;&]*)", line):
            words = rest.split()
            subcommand = (words[0],) if module == "tensorspark" and words and not words[0].startswith("-") else ()
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            found.setdefault((module, *subcommand), set()).update(options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(module_commands()), ids=" ".join)
def test_options_on_the_pages_are_those_of_the_command(command: tuple[str, ...]) -> None:
    help_text = execute([sys.executable, "-m", *command, "--help"])
    known = set(re.findall(r"--[a-z][\w-]*", help_text))
    assert module_commands()[command] <= known | {"--help"}


def test_targets_of_make_on_the_pages_are_in_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {name for _, line in commands() for name in re.findall(r"\bmake ([a-z]+)", line)}
    assert named
    assert named <= targets


def test_files_that_commands_on_the_pages_name_exist() -> None:
    named = {
        name for _, line in commands() for name in re.findall(r"(?<![\w./-])((?:examples|conf|tools)/[\w./-]+)", line)
    }
    assert named
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


# The reader itself


def test_setup_comments_and_fences_are_read_with_their_lines() -> None:
    text = (
        "# A page\n\n<!-- setup:\nx = 1\ny = 2\n-->\n\n```python\nprint(x)\n```\n\n"
        "- item\n\n    ```bash\n    ls\n    ```\n"
    )
    found = [(block.line, block.language, block.code) for block in parse(text, "page.md")]
    assert found == [(4, "python", "x = 1\ny = 2\n"), (9, "python", "print(x)\n"), (15, "bash", "ls\n")]


def test_a_marker_without_a_reason_is_refused() -> None:
    with pytest.raises(PageError, match=r"page\.md:1: expected a reason"):
        parse("<!-- not run: -->\n```python\nx\n```\n", "page.md")


def test_a_marker_belongs_to_the_next_block_only() -> None:
    first, second = parse("<!-- not run: why -->\n```python\na\n```\n```python\nb\n```\n", "page.md")
    assert (first.why_not_run, second.why_not_run) == ("why", "")


def test_a_replacement_of_what_is_not_there_is_refused() -> None:
    assert parse("<!-- in the tests: 10080 -> 0 -->\n```python\nport = 10080\n```\n", "p.md")[0].code == "port = 0\n"
    with pytest.raises(PageError, match="'10081' is not in the block"):
        parse("<!-- in the tests: 10081 -> 0 -->\n```python\nport = 10080\n```\n", "p.md")


def test_a_failing_block_is_told_with_the_pages_line() -> None:
    from tests.docs.runner import run_page

    page = parse("text\n\n```python\nx = 2\n\nassert x == 3\n```\n", "docs/nowhere.md")
    assert 'nowhere.md", line 6' in run_page(page, {})
    doctested = parse("```python\n>>> 1 + 1\n3\n```\n", "docs/nowhere.md")
    assert run_page(doctested, {}) == "docs/nowhere.md:2: expected '3\\n', got '2\\n'"
    assert run_page(parse("```python\n>>> 1 + 1\n2\n```\n", "docs/nowhere.md"), {}) == ""
