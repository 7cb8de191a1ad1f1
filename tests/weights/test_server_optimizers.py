"""What is particular to the optimizers on the server."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensorspark.errors import CheckpointError, CombinerError
from tensorspark.weights.averaging import MeanDeltaCombiner
from tensorspark.weights.combiners import CombinerState, Contribution, WeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tensorspark.weights.server_optimizers import ServerAdagrad, ServerAdam, ServerSGD

LAYOUT = WeightLayout([TensorSpec("W", (3,), "float64")])
START = np.array([1.0, -2.0, 3.0])


def _step(combiner: WeightCombiner, current: Buffer, delta: Any, num_workers: int = 1) -> Buffer:
    pushed = LAYOUT.pack({"W": np.array(delta, np.float64)})
    assert combiner.fold(LAYOUT, current, None, pushed, Contribution(0)) is True
    assert combiner.finish(LAYOUT, current, pushed, 1, num_workers) is True
    return pushed


def _w(buffer: Buffer) -> list[float]:
    values: list[float] = LAYOUT.views(buffer)["W"].tolist()
    return values


def test_sgd_at_rate_1_is_the_mean_of_the_deltas_bit_for_bit() -> None:
    delta, current = np.array([0.1, 0.2, 0.7]), LAYOUT.pack({"W": START})
    plain, mean = _step(ServerSGD(), current, delta, 3), _step(MeanDeltaCombiner(), current, delta, 3)
    assert plain.tobytes() == mean.tobytes()


def test_dilocos_outer_step_by_hand() -> None:
    """PyTorch's SGD(lr=0.7, momentum=0.9, nesterov=True) on the gradient -delta, two steps written out."""
    combiner, current = ServerSGD(0.7, 0.9, True), LAYOUT.pack({"W": START})
    after_1 = _step(combiner, current, [1.0, 2.0, -4.0])
    # buffer 1 = d1; step 1 = 0.7 (d1 + 0.9 d1) = 1.33 d1
    assert _w(after_1) == pytest.approx([2.33, 0.66, -2.32])
    after_2 = _step(combiner, after_1, [2.0, 0.0, 1.0])
    # buffer 2 = 0.9 d1 + d2 = [2.9, 1.8, -2.6]; step 2 = 0.7 (d2 + 0.9 buffer 2)
    assert _w(after_2) == pytest.approx([2.33 + 3.227, 0.66 + 1.134, -2.32 - 0.938])


def test_fed_adam_by_hand() -> None:
    combiner, current = ServerAdam(0.1, 0.5, 0.75, 0.5), LAYOUT.pack({"W": START})
    after_1 = _step(combiner, current, [1.0, 2.0, 0.0])
    # v begins at 0.25: 0.75 * 0.25 + 0.25 d² = 0.4375, 1.1875, 0.1875; m = d / 2
    expected = [1 + 0.05 / (math.sqrt(0.4375) + 0.5), -2 + 0.1 / (math.sqrt(1.1875) + 0.5), 3.0]
    assert _w(after_1) == pytest.approx(expected)


def test_fed_adagrad_by_hand() -> None:
    combiner, current = ServerAdagrad(0.1, epsilon=2.0), LAYOUT.pack({"W": START})
    after_1 = _step(combiner, current, [1.0, 3.0, 0.0])
    assert _w(after_1) == pytest.approx([1 + 0.1 / (math.sqrt(5) + 2), -2 + 0.3 / (math.sqrt(13) + 2), 3.0])
    after_2 = _step(combiner, after_1, [2.0, 0.0, 0.0])
    assert _w(after_2)[0] == pytest.approx(1 + 0.1 / (math.sqrt(5) + 2) + 0.2 / (3 + 2))


def test_optimizers_learn_where_the_deltas_point() -> None:
    """A quadratic bowl: each worker goes a tenth of the way to the optimum, the server extrapolates."""
    optimum = np.array([4.0, 0.5, -1.0])
    for combiner in (ServerSGD(0.7, 0.9, True), ServerAdagrad(1.0), ServerAdam(0.1)):
        current = LAYOUT.pack({"W": START})
        for _ in range(300):
            current = _step(combiner, current, 0.1 * (optimum - LAYOUT.views(current)["W"]))
        np.testing.assert_allclose(_w(current), optimum, atol=0.02)


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda: ServerSGD(0.5), []),
        (lambda: ServerSGD(0.5, 0.9), ["momentum"]),
        (lambda: ServerAdagrad(0.5), ["second_moment"]),
        (lambda: ServerAdagrad(0.5, 0.9), ["first_moment", "second_moment"]),
        (lambda: ServerAdam(0.5), ["first_moment", "second_moment"]),
        (lambda: ServerAdam(0.5, 0.0), ["second_moment"]),
    ],
)
def test_only_the_slots_that_are_needed_are_kept(make: Callable[[], WeightCombiner], slots: list[str]) -> None:
    combiner = make()
    assert combiner.state() == CombinerState()
    _step(combiner, LAYOUT.pack({"W": START}), [1.0, 2.0, 3.0])
    assert sorted(combiner.state().slots) == slots


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_second_moment_beyond_its_dtype_fails_the_run_and_does_not_stop_training_silently(dtype: str) -> None:
    layout = WeightLayout([TensorSpec("W", (2,), dtype)])
    huge = 1e4 if dtype == "float16" else 1e30
    current, pushed = (layout.pack({"W": np.array([1.0, v]).astype(dtype)}) for v in (1.0, huge))
    with pytest.raises(CombinerError, match=f"ServerAdagrad's second_moment is beyond the range of {dtype}"):
        ServerAdagrad(0.1).finish(layout, current, pushed, 1, 1)


def test_a_step_that_overflows_the_weights_is_told() -> None:
    layout = WeightLayout([TensorSpec("W", (2,), "float32")])
    current, pushed = (layout.pack({"W": np.array([1.0, v], np.float32)}) for v in (2.0, 1e38))
    assert ServerSGD(10.0).finish(layout, current, pushed, 1, 1) is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_steps_are_rounded_once(dtype: str) -> None:
    layout = WeightLayout([TensorSpec("W", (300,), dtype)])
    generator = np.random.default_rng(11)
    w, delta = (generator.normal(size=300).astype(dtype) for _ in range(2))
    current, pushed = (layout.pack({"W": array}) for array in (w, delta))
    ServerSGD(0.3).finish(layout, current, pushed, 1, 3)
    exact = w.astype("f8") + 0.3 * delta.astype("f8") / 3
    assert layout.views(pushed)["W"].tobytes() == exact.astype(dtype).tobytes()


# Bad arguments and states


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, None, "1", True, 1j])
@pytest.mark.parametrize("kind", [ServerSGD, ServerAdagrad, ServerAdam])
def test_a_learning_rate_that_is_no_positive_number_is_refused(kind: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: learning_rate must be a finite number over 0, got"):
        kind(bad)


@pytest.mark.parametrize("bad", [-0.1, 1, 1.0, math.nan, None, "0.9", False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(ServerSGD, "momentum"), (ServerAdagrad, "beta_1"), (ServerAdam, "beta_1"), (ServerAdam, "beta_2")],
)
def test_a_decay_outside_0_to_1_is_refused(kind: Any, name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: {name} must be a finite number of at least 0 and under 1"):
        kind(0.1, **{name: bad})


@pytest.mark.parametrize("bad", [0, -1e-3, math.nan, math.inf, None])
@pytest.mark.parametrize("kind", [ServerAdagrad, ServerAdam])
def test_an_epsilon_that_is_no_positive_number_is_refused(kind: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: epsilon must be a finite number over 0, got"):
        kind(0.1, epsilon=bad)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, True), (0.9, 1), (0.9, None)])
def test_nesterov_needs_a_momentum_and_is_a_boolean(momentum: float, nesterov: Any) -> None:
    with pytest.raises(ValueError, match=r"ServerSGD: nesterov must be True or False, and True needs a momentum"):
        ServerSGD(1.0, momentum, nesterov)


def test_settings_hold_every_hyperparameter() -> None:
    assert ServerSGD(0.7, 0.9, True).settings == {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
    assert ServerAdagrad(1).settings == {"learning_rate": 1.0, "beta_1": 0.0, "epsilon": 1e-3}
    assert ServerAdam(1).settings == {"learning_rate": 1.0, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-3}


def test_slots_of_another_combiner_or_model_are_refused() -> None:
    wrong = [
        {"momentum": LAYOUT.allocate()},
        {"second_moment": LAYOUT.allocate()},
        {"second_moment": LAYOUT.allocate(), "first_moment": LAYOUT.allocate()[:-8]},
    ]
    for slots in wrong:
        with pytest.raises(CheckpointError, match=r"ServerAdam's state must hold the slots \{'first_moment': 64, "):
            ServerAdam(0.1).restore_state(LAYOUT, CombinerState(slots))


@pytest.mark.parametrize("shape", [(3,), (5,)])
def test_another_model_begins_without_the_former_ones_slots(shape: tuple[int, ...]) -> None:
    combiner = ServerSGD(momentum=0.5)
    _step(combiner, LAYOUT.pack({"W": START}), [1.0, 2.0, 4.0])
    layout = WeightLayout([TensorSpec("V", shape, "float64")])
    current, pushed = (layout.pack({"V": np.full(shape, value)}) for value in (3.0, 2.0))
    assert combiner.finish(layout, current, pushed, 1, 1) is True
    assert layout.views(pushed)["V"].tolist() == [5.0] * shape[0]
