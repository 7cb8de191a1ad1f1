"""A shard's process that is stopped or killed while a session trains: the run ends soon and says which shard it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest

from tensorspark import SparkSession
from tensorspark.errors import ShardLostError

if TYPE_CHECKING:
    from pyspark import SparkContext

WITHIN_S = 15.0


class SignalShard(keras.callbacks.Callback):  # type: ignore[misc]
    """Sends a signal to the process of the second of two shards, at the end of the first epoch."""

    def __init__(self, session: SparkSession, number: int) -> None:
        super().__init__()
        self._session = session
        self._number = number
        self.at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.process is None:
            (self.process,) = self._session._server._fleet._hosts._processes  # type: ignore[union-attr]
            os.kill(self.process.pid, self._number)
            self.at = time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected", "settings"),
    [
        (signal.SIGSTOP, r"shard 1 \(process \d+ on \S+\) has given no sign of life for 10 s", {}),
        # Workers give up long before the driver does.
        (
            signal.SIGSTOP,
            r"shard 1 \(process \d+ on \S+\) has given no sign of life for 10 s",
            {"io_timeout_s": 7.0, "reconnect_timeout_s": 0.0},
        ),
        (signal.SIGKILL, r"shard 1 .*(is gone|exit status -9)", {"reconnect_timeout_s": 0.0}),
    ],
    ids=["stopped", "stopped, workers in a hurry", "killed, workers in a hurry"],
)
def test_a_run_whose_shard_is_lost_ends_soon_and_names_it(
    sc: SparkContext, number: int, expected: str, settings: dict[str, float]
) -> None:
    generator = np.random.default_rng(0)
    rows = [(row, float(row.sum())) for row in generator.normal(size=(200, 64)).astype("float32")]
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    options: dict[str, Any] = {"staleness": 0, "sync_interval": 1, "batch_size": 20, "num_shards": 2, **settings}
    with SparkSession(sc, model, **options) as session:
        signaller = SignalShard(session, number)
        with pytest.raises(ShardLostError, match=expected):
            session.fit(sc.parallelize(rows, 2), epochs=500, seed=1, progress=False, callbacks=[signaller])
        assert time.monotonic() - signaller.at < WITHIN_S
    assert signaller.process is not None
    assert signaller.process.returncode == -signal.SIGKILL
