"""The `hdfs` fixture; a conftest takes it in with ``pytest_plugins = ["tests.hadoop.fixtures"]`` or an import."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hadoop.cluster import HdfsCluster, unavailable_reason


@pytest.fixture(scope="session")
def hdfs() -> Iterator[HdfsCluster]:
    """One HDFS for all tests, so each takes a directory of its own. Skips where none can be started."""
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(f"no HDFS: {reason}")
    with HdfsCluster() as cluster:
        yield cluster
