"""What a session keeps between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorspark.config import resolve
from tensorspark.driver.publishing import Publisher
from tensorspark.driver.resources import Resources
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])


class _Noting(ParameterServer):
    """A server that has no round's end in sight, and notes how long it is asked to look for one."""

    asked_s: float = 0.0

    def capture(self, timeout_s: float = 60.0) -> RunCheckpoint | None:
        self.asked_s = timeout_s
        return None


@pytest.mark.parametrize(("interval_s", "expected_s"), [(600.0, 600.0), (0.5, 60.0)])
def test_a_checkpoint_waits_for_a_rounds_end_until_the_next_one_is_due(
    tmp_path: Path, interval_s: float, expected_s: float
) -> None:
    config = resolve({"checkpoint_interval_s": interval_s, "hdfs_dir": str(tmp_path)}, {})
    publisher = Publisher(None, "run", str(tmp_path), str(tmp_path), "")
    resources = Resources(publisher, config, "127.0.0.1", "")
    with _Noting(LAYOUT, "127.0.0.1") as server, resources.checkpoints(server, str(tmp_path), dict) as checkpointer:
        assert checkpointer is not None
        checkpointer.write_last()
    assert server.asked_s == expected_s
