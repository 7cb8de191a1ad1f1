"""Reads pages: their fenced blocks, and what comments before a block say of it.

In front of a fence may stand, each an HTML comment that a reader does not see:

- ``<!-- setup: ... -->``: Python that is executed first, for names that the page takes for granted;
- ``<!-- not run: why -->``: the block cannot run here;
- ``<!-- in the tests: OLD -> NEW -->``: a text that is replaced, such as a port that may be taken. One for each text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
_COMMENT = re.compile(r"^<!-- (?P<kind>setup|not run|in the tests):?(?P<text>.*?)-->[ ]*$", re.M | re.S)


class PageError(ValueError):
    """A page that says something about its blocks that cannot be."""


@dataclass(frozen=True)
class Block:
    """A fenced block, or a setup comment.

    Attributes:
        line: of the file, counted from 1, on which the code begins.
        why_not_run: the marker's reason; empty where there is none.
    """

    page: str
    line: int
    language: str
    code: str
    why_not_run: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """All pages: the README's and those of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def read(path: Path) -> list[Block]:
    """The page's blocks of all languages, and its setups as blocks of Python, in the order in which they stand."""
    return parse(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).as_posix())


def parse(text: str, page: str) -> list[Block]:
    """As `read`, of a page's text.

    Raises:
        PageError: a marker without a reason, or in front of nothing; a replacement of what is not there.
    """
    blocks: list[Block] = []
    marks: list[tuple[str, str, int]] = []
    for start, found in sorted([*_found(_COMMENT, text, ()), *_found(_FENCE, text, _spans(_COMMENT, text))]):
        line = text.count("\n", 0, start) + 1
        if found.re is _FENCE:
            blocks.append(_marked(_block(found, page, line), marks))
            marks = []
        elif found["kind"] == "setup":
            skipped = len(found["text"]) - len(found["text"].lstrip("\n "))
            code_line = text.count("\n", 0, found.start("text") + skipped) + 1
            blocks.append(Block(page, code_line, "python", found["text"].strip() + "\n"))
        else:
            marks.append((found["kind"], " ".join(found["text"].split()), line))
    if marks:
        raise PageError(f"{page}:{marks[0][2]}: expected a block behind <!-- {marks[0][0]} -->")
    return blocks


def _found(pattern: re.Pattern[str], text: str, without: tuple[range, ...]) -> Iterator[tuple[int, re.Match[str]]]:
    for match in pattern.finditer(text):
        if not any(match.start() in span for span in without):
            yield match.start(), match


def _spans(pattern: re.Pattern[str], text: str) -> tuple[range, ...]:
    return tuple(range(*match.span()) for match in pattern.finditer(text))


def _block(found: re.Match[str], page: str, line: int) -> Block:
    indent = found["indent"]
    code = "".join(row.removeprefix(indent) for row in found["code"].splitlines(keepends=True))
    return Block(page, line + 1, found["language"], code)


def _marked(block: Block, marks: list[tuple[str, str, int]]) -> Block:
    code, why = block.code, ""
    for kind, text, line in marks:
        if not text:
            raise PageError(f"{block.page}:{line}: expected a reason in <!-- {kind}: ... -->")
        if kind == "not run":
            why = text
            continue
        old, _, new = text.partition(" -> ")
        if old not in code:
            raise PageError(f"{block.page}:{line}: {old!r} is not in the block")
        code = code.replace(old, new)
    return Block(block.page, block.line, block.language, code, why)
