"""Spark in this process and its Python workers: as many slots as one asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pyspark.sql import SparkSession as Spark

QUIET = {"spark.log.level": "ERROR", "spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
"""Settings with which only what is measured runs, and only the report is printed."""


@contextmanager
def local_spark(num_slots: int, *, memory: str = "4g", settings: Mapping[str, str] | None = None) -> Iterator[Spark]:
    """A Spark of this machine, until the end of the block; its Python workers are new ones.

    Args:
        memory: of the JVM, as Spark writes it.
        settings: more entries of its configuration.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    entries: dict[str, bool | float | int | str | None] = {**QUIET, "spark.driver.memory": memory, **(settings or {})}
    spark = Spark.builder.master(f"local[{num_slots}]").appName("tensorspark benchmark").config(map=entries)
    session = spark.getOrCreate()
    try:
        yield session
    finally:
        session.stop()
