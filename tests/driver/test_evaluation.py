"""Evaluation on Spark gives what Keras gives in this process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from tensorspark.data.decoders import BlockDecoder
from tensorspark.data.labels import CheckedDecoder
from tensorspark.driver.evaluation import evaluated
from tensorspark.errors import WorkerFailedError
from tensorspark.trainers.keras_model import as_keras_model
from tests.driver.models import ROWS, make_data, make_model


def _blocks(sc: Any, x: np.ndarray, y: np.ndarray, bounds: list[int]) -> Any:
    blocks = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(bounds)]
    return sc.parallelize(blocks, len(blocks))


def test_totals_over_partitions_are_keras_metrics(sc: Any) -> None:
    x, y = make_data()
    model = make_model()
    driver_model = as_keras_model(model)
    columns, structure = driver_model.expected_columns(), driver_model.structure()
    captured = driver_model.capture(columns, structure)
    totals, num_samples = evaluated(
        _blocks(sc, x, y, [0, 10, 10, 31, ROWS]), BlockDecoder(columns), captured, 8, name="digits"
    )
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert num_samples == ROWS
    assert driver_model.logs(totals) == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_after_other_weights_uses_its_own(sc: Any) -> None:
    x, y = make_data()
    model = make_model()
    driver_model = as_keras_model(model)
    columns, structure = driver_model.expected_columns(), driver_model.structure()
    rdd = _blocks(sc, x, y, [0, 20, ROWS])
    evaluated(rdd, BlockDecoder(columns), driver_model.capture(columns, structure), 8)
    model.set_weights([weight * -2.0 for weight in model.get_weights()])
    totals, _ = evaluated(rdd, BlockDecoder(columns), driver_model.capture(columns, structure), 8)
    assert driver_model.logs(totals)["loss"] == pytest.approx(model.evaluate(x, y, verbose=0)[0], rel=1e-5)


def test_nothing_to_evaluate_gives_no_totals(sc: Any) -> None:
    driver_model = as_keras_model(make_model())
    columns = driver_model.expected_columns()
    captured = driver_model.capture(columns, driver_model.structure())
    totals, num_samples = evaluated(sc.parallelize([], 2), BlockDecoder(columns), captured, 8)
    assert (totals.tolist(), num_samples) == ([], 0)


def test_a_row_that_fails_names_partition_and_host(sc: Any) -> None:
    x, y = make_data()
    y[35] = 3
    driver_model = as_keras_model(make_model())
    columns = driver_model.expected_columns()
    captured = driver_model.capture(columns, driver_model.structure())
    expected = r"partition 2 on .* failed: FeedError: partition 2, row 4: label .* is 3, but .* 3 classes"
    decoder = CheckedDecoder(BlockDecoder(columns), captured.labels)
    with pytest.raises(WorkerFailedError, match=expected) as info:
        evaluated(_blocks(sc, x, y, [0, 10, 31, ROWS]), decoder, captured, 8)
    assert info.value.partition == 2
    assert "Traceback" in info.value.worker_traceback


def test_rows_that_cannot_be_made_fail_the_evaluation(sc: Any) -> None:
    def broken(index: int) -> Any:
        raise RuntimeError(f"no data behind {index}")

    driver_model = as_keras_model(make_model())
    columns = driver_model.expected_columns()
    captured = driver_model.capture(columns, driver_model.structure())
    rdd = sc.parallelize([7], 1).map(broken)
    with pytest.raises(WorkerFailedError, match="no data behind 7"):
        evaluated(rdd, BlockDecoder(columns), captured, 8)
