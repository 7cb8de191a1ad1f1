"""Executes the Python blocks of pages, as a process of its own: ``python -m tests.docs.runner RESULTS PAGE...``.

All pages share this process and one Spark; each has names of its own, with `spark` and `sc` there already. A page's
blocks run in their order, and what fails ends the page. Blocks with ``>>>`` are doctested.

The results, a JSON object by page, are written after each page: the seconds, and what failed, or nothing.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from pyspark import SparkConf
from pyspark.sql import SparkSession

from tests.docs.fences import REPOSITORY, Block, read


def main(results: str, *paths: str) -> None:
    """Runs the pages one after the other, in a directory that is empty for each; executors have it, too."""
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="docs-") as directory, contextlib.chdir(directory):
        spark = _start_spark()
        try:
            for page in paths:
                _forget_graph()
                began = time.monotonic()
                problem = run_page(read(REPOSITORY / page), {"spark": spark, "sc": spark.sparkContext})
                outcomes[page] = {"seconds": time.monotonic() - began, "problem": problem}
                Path(results).write_text(json.dumps(outcomes), encoding="utf-8")
                _empty(Path(directory))
        finally:
            spark.stop()


def run_page(blocks: list[Block], names: dict[str, Any]) -> str:
    """Runs a page's blocks; says what failed, with the page's own lines, or nothing.

    Args:
        names: what is there already; blocks add to it.
    """
    names["__name__"] = "__main__"  # functions travel to executors by value, as a program's own
    try:
        for block in blocks:
            if block.language == "python" and not block.why_not_run:
                _run_block(block, names)
    except doctest.DocTestFailure as failure:
        line = (failure.test.lineno or 0) + failure.example.lineno + 1
        return f"{blocks[0].page}:{line}: expected {failure.example.want!r}, got {failure.got!r}"
    except doctest.UnexpectedException as unexpected:
        return "".join(traceback.format_exception(*unexpected.exc_info))
    except BaseException as error:  # also SystemExit: a page must not end the process
        return "".join(traceback.format_exception(error))
    return ""


def _forget_graph() -> None:
    """Each page begins with an empty default graph of TensorFlow 1, as in a process of its own."""
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].compat.v1.reset_default_graph()


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _run_block(block: Block, names: dict[str, Any]) -> None:
    path = str(REPOSITORY / block.page)
    if ">>>" in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, names, block.where, path, block.line - 1)
        test.globs = names
        doctest.DebugRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, clear_globs=False)
        return
    # The lines before it are empty, so that a traceback names the page's own.
    exec(compile("\n" * (block.line - 1) + block.code, path, "exec"), names)


def _start_spark() -> SparkSession:
    conf = (
        SparkConf()
        .setMaster("local[2,2]")
        .setAppName("pages of the documentation")
        .set("spark.python.daemon.module", "tensorspark.daemon")
        .set("spark.ui.enabled", "false")
        .set("spark.log.level", "OFF")
        .set("spark.sql.shuffle.partitions", "2")
        .set("spark.ui.showConsoleProgress", "false")
        .set("spark.driver.host", "127.0.0.1")
        .set("spark.driver.bindAddress", "127.0.0.1")
    )
    return SparkSession.builder.config(conf=conf).getOrCreate()


if __name__ == "__main__":
    main(*sys.argv[1:])
