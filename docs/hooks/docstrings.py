"""Makes Markdown of what docstrings say otherwise: a ``::`` that announces code, and examples for doctest."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ANNOUNCED = re.compile(r"(?P<text>[^\n]*)::\n\n(?P<code>(?:(?:    [^\n]*)?\n)*(?:    [^\n]+))", re.MULTILINE)
# griffe takes what follows a space for a type: "a, b: text" describes two names.
_NAMES = re.compile(r"^    \w+(?:, \w+)+: ", re.MULTILINE)
_EXAMPLES = re.compile(r"^>>> [^\n]*\n?(?:[^\n]+\n?)*", re.MULTILINE)
# Trees and algebra are no Python: only what reads like a statement is coloured.
_STATEMENT = re.compile(r"^\s*(?:with|import|from|[\w.]+ = |[\w.]+\()", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before mkdocstrings parses it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fences blocks of code and examples, and keeps names together that are described together."""
        if obj.docstring is not None:
            text = _NAMES.sub(lambda match: match[0].replace(", ", ",\N{NO-BREAK SPACE}"), obj.docstring.value)
            obj.docstring.value = fenced(text)


def fenced(text: str) -> str:
    """`text` with a fence around each indented block that a ``::`` announces, and around each paragraph of examples.

    >>> print(fenced("See::\\n\\n    x = 1"))
    See:
    <BLANKLINE>
    ```python
    x = 1
    ```
    """
    return _EXAMPLES.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", _ANNOUNCED.sub(_fence, text))


def _fence(match: re.Match[str]) -> str:
    text, code = match["text"], match["code"]
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    announced = f"{text}:\n\n" if text.strip() else ""
    language = "python" if _STATEMENT.search(code) else "text"
    return f"{announced}```{language}\n{lines}\n```"
