"""What pages are given when the site is built: the lists of settings and of TFRecord options.

What their comments tell the tests is left out.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from tensorspark.config import SETTINGS, Setting, parse_size_bytes, parse_time_s
from tensorspark.data.tfrecord.options import Options

SETTINGS_PLACE = "<!-- settings -->"
TFRECORD_OPTIONS_PLACE = "<!-- tfrecord options -->"
# An attribute of `Options` begins with the option's name: "codec: `codec`: none, gzip, ...".
_OPTION = re.compile(r"^    \w+: `(?P<name>\w+)`:? (?P<text>.*(?:\n {8}.*)*)", re.MULTILINE)
_FOR_TESTS = re.compile(r"^<!-- (?:setup|not run|in the tests|fmt)\b.*?-->\n", re.MULTILINE | re.DOTALL)
_SIZES = ((2**30, "g"), (2**20, "m"), (2**10, "k"))
# What stands for "not set" is no value: SETTINGS says in words what happens then.
_NOT_SET = "not set"
_WORDS_FOR_NONE = ("async", "auto")
_MACHINES_OWN = {"tmp_dir": "the system's, such as `/tmp`"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    shown = _FOR_TESTS.sub("", markdown).replace(SETTINGS_PLACE, settings_list())
    return shown.replace(TFRECORD_OPTIONS_PLACE, tfrecord_options())


def settings_list() -> str:
    """A Markdown heading and a paragraph for each setting; a heading's anchor is the setting's field."""
    return "\n\n".join(map(_entry, SETTINGS))


def tfrecord_options() -> str:
    """A table of the options of the TFRecord data source, from the docstring of `Options`.

    >>> print(tfrecord_options().splitlines()[2])
    | `recordType` | `Example` (default), `SequenceExample` or `ByteArray`. |
    """
    rows = ["| option | what it does |", "|---|---|"]
    for option in _OPTION.finditer(inspect.getdoc(Options) or ""):
        text = " ".join(option["text"].split()).replace("``", "`")
        rows.append(f"| `{option['name']}` | {text[0].upper()}{text[1:]} |")
    return "\n".join(rows)


def _entry(setting: Setting) -> str:
    return (
        f"### `{setting.key}` {{ #{setting.field} data-toc-label={setting.field} }}\n\n"
        f"Argument `{setting.field}`, default {default_text(setting)}.\n\n{setting.what}"
    )


def default_text(setting: Setting) -> str:
    """The default as one would write it in ``spark-defaults.conf``, as code; or in words, where it is none.

    >>> by_field = {setting.field: setting for setting in SETTINGS}
    >>> [default_text(by_field[name]) for name in ("staleness", "io_timeout_s", "cache_memory_bytes", "hdfs_dir")]
    ['`async`', '`120s`', '`256m`', 'not set']
    """
    if setting.field in _MACHINES_OWN:
        return _MACHINES_OWN[setting.field]
    if setting.default is None:
        word = next((word for word in _WORDS_FOR_NONE if _reads_as_none(setting, word)), None)
        return _NOT_SET if word is None else f"`{word}`"
    return f"`{_as_text(setting)}`"


def _reads_as_none(setting: Setting, word: str) -> bool:
    try:
        return setting.parse(word) is None
    except ValueError:
        return False


def _as_text(setting: Setting) -> str:
    if setting.parse is parse_time_s:
        return f"{setting.default:g}s"
    if setting.parse is parse_size_bytes:
        return next((f"{setting.default // size}{unit}" for size, unit in _SIZES if setting.default % size == 0
                     and setting.default), str(setting.default))  # fmt: skip
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    return str(setting.default)
