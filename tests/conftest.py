"""Fixtures that the whole suite shares: one Spark context, and a check that no test leaves a thread behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession as SqlSession

    from tests.regression import Regression

pytest_plugins = ["tests.required", "tests.hadoop.fixtures"]

REPOSITORY = Path(__file__).resolve().parent.parent

# Executors run this Python, and find the package where the tests found it.
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A JVM lives for seconds: without the optimizing compiler, and with Spark's classes from the archive that `make test`
# writes (tools/class_archive.py), it takes half of the cores, which all tests share.
_BRIEF_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
_CLASSES = Path(sys.prefix) / "spark-classes.jsa"
if _CLASSES.exists():
    _BRIEF_JVM += f" -XX:SharedArchiveFile={_CLASSES} -Xlog:cds*=off"
_SUBMIT_OPTIONS = f"{_BRIEF_JVM} -Dspark.ui.enabled=false '-Dspark.executor.extraJavaOptions={_BRIEF_JVM}'"
os.environ.setdefault("SPARK_SUBMIT_OPTS", _SUBMIT_OPTIONS)
os.environ.setdefault("SPARK_DAEMON_JAVA_OPTS", _BRIEF_JVM)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=200)
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fails a test that leaves a thread of ours running."""
    before = set(threading.enumerate())
    yield
    leaked = [
        t for t in threading.enumerate() if t not in before and t.name.startswith("tensorspark-") and t.is_alive()
    ]
    for thread in leaked:
        thread.join(5)
    assert not [thread.name for thread in leaked if thread.is_alive()]


@pytest.fixture(scope="session")
def sc() -> Iterator[SparkContext]:
    """A context with two slots, in which a task that fails is tried again."""
    from pyspark import SparkConf, SparkContext

    conf = (
        SparkConf()
        .setMaster("local[2,2]")
        .setAppName("tensorspark tests")
        .set("spark.ui.enabled", "false")
        .set("spark.log.level", "OFF")
        .set("spark.python.daemon.module", "tensorspark.daemon")
        .set("spark.driver.host", "127.0.0.1")
        .set("spark.driver.bindAddress", "127.0.0.1")
    )
    context = SparkContext(conf=conf)
    yield context
    context.stop()


@pytest.fixture(scope="session")
def spark(sc: SparkContext) -> SqlSession:
    """The same context, for DataFrames."""
    from pyspark.sql import SparkSession

    return SparkSession(sc)


@pytest.fixture
def model() -> Iterator[Regression]:
    """A linear regression in a session of its own."""
    from tests.regression import build

    regression = build()
    yield regression
    regression.session.close()
