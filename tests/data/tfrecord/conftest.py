"""A Spark that knows TFRecords."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession


@pytest.fixture(scope="session")
def session(spark: SqlSession) -> SqlSession:
    """A session that knows the format."""
    import tensorspark as ts

    ts.register_tfrecord(spark)
    return spark
