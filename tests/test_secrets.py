"""A run's secrets, on a real local Spark: what is encrypted, and where the token must not be seen."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorspark import SparkSession
from tests.regression import Regression, rows_of, run, sgd

if TYPE_CHECKING:
    from pyspark import SparkContext


def test_a_run_over_tls_trains_the_same(sc: SparkContext, model: Regression) -> None:
    rows = rows_of(40)
    with SparkSession(sc, model.session, tls_enabled=True, batch_size=4, sync_interval=2) as session:
        run(session, model, sc.parallelize(rows, 1), server_reusable=True)
        assert session._server is not None
        assert session._server.certificate is not None
    np.testing.assert_allclose(model.weights[0], sgd(rows, 4, 1)[0], rtol=1e-4)


def test_the_token_is_in_no_log_repr_process_argument_or_job_description(
    sc: SparkContext, model: Regression, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with SparkSession(sc, model.session, name="secret", batch_size=4) as session:
        run(session, model, sc.parallelize(rows_of(40), 2), server_reusable=True, progress=True)
        server = session._server
        assert server is not None
        token = server.token
        engine = session._engine
        seen = [repr(server), repr(session), repr(engine._checked), str(engine._checked), repr(engine.config)]
        seen += [path.read_text(errors="ignore") for path in Path("/proc").glob("[0-9]*/cmdline")]
        tracker = sc.statusTracker()
        seen += [str(tracker.getStageInfo(stage)) for stage in range(100)]
        seen += [thread.name for thread in threading.enumerate()]
    out, err = capfd.readouterr()
    assert len(token) >= 32
    assert not [text for text in [*seen, caplog.text, out, err] if token in text]
