"""All combiners against one contract for rounds of pushes, and against rules worked out number by number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tensorspark
from tensorspark.weights.averaging import MeanDeltaCombiner, StalenessScaledCombiner
from tensorspark.weights.combiners import (
    CombinerState,
    Contribution,
    DeltaWeightCombiner,
    MeanWeightCombiner,
    UpdateMeanWeightCombiner,
    WeightCombiner,
)
from tensorspark.weights.elastic import ElasticAveragingCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tensorspark.weights.server_optimizers import ServerAdagrad, ServerAdam, ServerSGD

Array = NDArray[Any]


@dataclass(frozen=True)
class Sent:
    """One number of a push: the reference rules see a tensor's numbers one by one."""

    value: float
    num_samples: int
    staleness: int


@dataclass(frozen=True)
class Turn:
    """A round: of each push, what the server knows; and how many workers there are."""

    contributions: tuple[Contribution, ...]
    num_workers: int


# A rule is a coroutine: it is sent a number's share of a round, (pushes, workers, whether the tensor is of integers),
# and gives what the number becomes. Integers stay Python's, floats are of 64 bits.
Round = tuple[Sequence[Sent], int, bool]
Rule = Callable[[Any], Iterator[Any]]


def _sum_rule(scale: Callable[[Sent], float]) -> Rule:
    def rule(w: Any) -> Any:
        while True:
            pushes, _, is_integer = yield w
            for sent in pushes:
                w += sent.value if is_integer else scale(sent) * sent.value

    return rule


def _mean_rule(num: int) -> Rule:
    def rule(w: Any) -> Any:
        while True:
            pushes, _, is_integer = yield w
            for sent in pushes:
                w = ((num - 1) * w + sent.value) / num
                w = math.trunc(w) if is_integer else w

    return rule


def _update_mean_rule(w: Any) -> Any:
    is_first = True
    while True:
        pushes, _, is_integer = yield w
        for sent in pushes:
            w = sent.value if is_first else (w + sent.value) / 2
            w = math.trunc(w) if is_integer else w
            is_first = False


def _half_way_rule(w: Any) -> Any:
    while True:
        pushes, _, _ = yield w
        for sent in pushes:
            w = (w + sent.value) // 2


def _mean_of_integers(pushes: Sequence[Sent]) -> int:
    return math.trunc(sum(int(sent.value) for sent in pushes) / len(pushes))


def _fed_avg_rule(w: Any) -> Any:
    samples: list[int] = []
    while True:
        pushes, num_workers, is_integer = yield w
        samples.extend(sent.num_samples for sent in pushes)
        if is_integer:
            w += _mean_of_integers(pushes)
        elif len(pushes) == num_workers:
            total = sum(sent.num_samples for sent in pushes)
            w += sum(sent.num_samples * sent.value for sent in pushes) / total if total else 0.0
        else:
            usual = sum(samples) / len(samples)
            w += sum(sent.num_samples * sent.value for sent in pushes) / (num_workers * usual) if usual else 0.0


def _optimizer_rule(step: Callable[[], Callable[[float], float]]) -> Rule:
    """`step` makes what turns one pseudo-gradient after the other into what is added."""

    def rule(w: Any) -> Any:
        one = step()
        while True:
            pushes, num_workers, is_integer = yield w
            delta = sum(sent.value for sent in pushes) / num_workers
            w += _mean_of_integers(pushes) if is_integer else one(delta)

    return rule


def _sgd(rate: float, beta: float, nesterov: bool) -> Callable[[], Callable[[float], float]]:
    def make() -> Callable[[float], float]:
        past: list[float] = []

        def one(delta: float) -> float:
            past.append(delta)
            velocity = sum(d * beta**age for age, d in enumerate(reversed(past)))
            return rate * (delta + beta * velocity if nesterov else velocity)

        return one

    return make


def _adaptive(rate: float, beta_1: float, tau: float, beta_2: float | None) -> Callable[[], Callable[[float], float]]:
    def make() -> Callable[[float], float]:
        past: list[float] = []

        def one(delta: float) -> float:
            past.append(delta)
            aged = list(enumerate(reversed(past)))
            m = sum((1 - beta_1) * beta_1**age * d for age, d in aged)
            if beta_2 is None:
                v = tau**2 + sum(d**2 for d in past)
            else:
                v = beta_2 ** len(past) * tau**2 + sum((1 - beta_2) * beta_2**age * d**2 for age, d in aged)
            return rate * m / (math.sqrt(v) + tau)

        return one

    return make


class HalfWay(WeightCombiner):
    """A user's own."""

    def compute(
        self, origin_weight: Array, new_weight: Array, worker_id: int | str = -1, name: str | None = None
    ) -> Array:
        return (origin_weight + new_weight) // origin_weight.dtype.type(2)


@dataclass(frozen=True)
class Case:
    make: Callable[[], WeightCombiner]
    pushes: str
    rule: Rule
    is_elementwise: bool = True


CASES = {
    "delta": Case(DeltaWeightCombiner, "delta", _sum_rule(lambda sent: 1)),
    "mean": Case(lambda: MeanWeightCombiner(3), "weights", _mean_rule(3)),
    "update_mean": Case(UpdateMeanWeightCombiner, "weights", _update_mean_rule),
    "own": Case(HalfWay, "weights", _half_way_rule, is_elementwise=False),
    "mean_delta": Case(MeanDeltaCombiner, "delta", _optimizer_rule(lambda: lambda delta: delta)),
    "fed_avg": Case(lambda: MeanDeltaCombiner(weighted=True), "delta", _fed_avg_rule),
    "staleness": Case(StalenessScaledCombiner, "delta", _sum_rule(lambda sent: 1 / (1 + sent.staleness))),
    "elastic": Case(lambda: ElasticAveragingCombiner(0.3), "elastic", _sum_rule(lambda sent: 1)),
    "sgd": Case(lambda: ServerSGD(0.5), "delta", _optimizer_rule(_sgd(0.5, 0.0, False))),
    "momentum": Case(lambda: ServerSGD(0.5, 0.75), "delta", _optimizer_rule(_sgd(0.5, 0.75, False))),
    "diloco": Case(lambda: ServerSGD(0.7, 0.9, True), "delta", _optimizer_rule(_sgd(0.7, 0.9, True))),
    "adagrad": Case(lambda: ServerAdagrad(2.0), "delta", _optimizer_rule(_adaptive(2.0, 0.0, 1e-3, None))),
    "adagrad_m": Case(lambda: ServerAdagrad(2.0, 0.5, 0.25), "delta", _optimizer_rule(_adaptive(2.0, 0.5, 0.25, None))),
    "adam": Case(lambda: ServerAdam(2.0), "delta", _optimizer_rule(_adaptive(2.0, 0.9, 1e-3, 0.99))),
    "adam_without_m": Case(
        lambda: ServerAdam(2, 0, 0.75, 0.5), "delta", _optimizer_rule(_adaptive(2.0, 0.0, 0.5, 0.75))
    ),
}
every_combiner = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def _turns(num_rounds: int, num_pushes: int, num_workers: int, first_samples: int = 30) -> tuple[Turn, ...]:
    """Rounds of workers with different samples (some with none) and staleness."""
    turns = []
    for index in range(num_rounds):
        contributions = tuple(
            Contribution(worker, (first_samples, 10, 0, 64, 25)[(index + worker) % 5], (index * 2 + worker) % 4)
            for worker in range(num_pushes)
        )
        turns.append(Turn(contributions, num_workers))
    return tuple(turns)


TURNS = {
    "alone": _turns(4, 1, 1),
    "asynchronous": _turns(6, 1, 3),
    "synchronous": _turns(4, 3, 3),
    "incomplete": _turns(4, 2, 3),
}
every_turns = pytest.mark.parametrize("turns", TURNS.values(), ids=list(TURNS))

LAYOUT = WeightLayout(
    [
        TensorSpec("W", (5, 3), "float32"),
        TensorSpec("step", (), "int64"),
        TensorSpec("d", (4,), "float64"),
        TensorSpec("half", (9,), "bfloat16"),
        TensorSpec("f16", (3,), "float16"),
        TensorSpec("none", (0, 2), "float32"),
        TensorSpec("counts", (6,), "int32"),
        TensorSpec("b", (3,), "float32"),
    ]
)
FLOATS = ("W", "d", "half", "f16", "b")


def _numbers(generator: np.random.Generator, layout: WeightLayout, low: int) -> Buffer:
    """Small whole numbers from `low` to 39: every dtype here holds them exactly."""
    return layout.pack({s.name: np.asarray(generator.integers(low, 40, s.shape)).astype(s.dtype) for s in layout.specs})


def _feed(case: Case, turns: Sequence[Turn], layout: WeightLayout = LAYOUT, seed: int = 7) -> list[list[Buffer]]:
    generator = np.random.default_rng(seed)
    low = 1 if case.pushes == "weights" else -39
    return [[_numbers(generator, layout, low) for _ in turn.contributions] for turn in turns]


def _start(layout: WeightLayout = LAYOUT) -> Buffer:
    return _numbers(np.random.default_rng(1), layout, 1)


def _copy(layout: WeightLayout, buffer: Buffer) -> Buffer:
    copy = layout.allocate()
    copy[:] = buffer
    return copy


def _play(
    combiner: WeightCombiner, turn: Turn, current: Buffer, pushes: Sequence[Buffer], layout: WeightLayout = LAYOUT
) -> Buffer:
    """A round as the server plays it; returns the new weights."""
    partial: Buffer | None = None
    for pushed, contribution in zip(pushes, turn.contributions, strict=True):
        payload = _copy(layout, pushed)
        assert combiner.fold(layout, current, partial, payload, contribution) is True
        partial = payload
    assert partial is not None
    assert combiner.finish(layout, current, partial, len(pushes), turn.num_workers) is True
    return partial


def _expected(
    rule: Rule, name: str, turns: Sequence[Turn], start: Buffer, feed: Sequence[Sequence[Buffer]]
) -> list[list[float]]:
    """By round, the tensor's numbers as the rule has them."""

    def numbers(buffer: Buffer) -> list[Any]:
        view = LAYOUT.views(buffer)[name].reshape(-1)
        return (view if view.dtype.kind == "i" else view.astype("f8")).tolist()

    is_integer = np.dtype(LAYOUT.views(start)[name].dtype).kind == "i"
    rules: list[Any] = [rule(w) for w in numbers(start)]
    for one in rules:
        next(one)
    rounds = []
    for turn, pushes in zip(turns, feed, strict=True):
        columns = zip(*(numbers(pushed) for pushed in pushes), strict=True)
        rounds.append(
            [
                one.send(
                    (
                        [Sent(v, c.num_samples, c.staleness) for v, c in zip(values, turn.contributions, strict=True)],
                        turn.num_workers,
                        is_integer,
                    )
                )
                for one, values in zip(rules, columns, strict=True)
            ]
        )
    return rounds


@every_turns
@every_combiner
def test_rounds_agree_with_arithmetic_number_by_number(case: Case, turns: tuple[Turn, ...]) -> None:
    combiner, current, feed = case.make(), _start(), _feed(case, turns)
    expected = {spec.name: _expected(case.rule, spec.name, turns, current, feed) for spec in LAYOUT.specs}
    for index, (turn, pushes) in enumerate(zip(turns, feed, strict=True)):
        current = _play(combiner, turn, current, pushes)
        for name, got in LAYOUT.views(current).items():
            exact = expected[name][index]
            if got.dtype.kind == "i":
                assert got.reshape(-1).tolist() == exact, (name, index)
                continue
            # Every fold and finish rounds numbers of up to 150 or so a few times, and later rounds build on them.
            tolerance = 200 * (index + 1) * len(pushes) * float(ml_dtypes.finfo(got.dtype).eps)
            if got.dtype.itemsize >= 4:
                np.testing.assert_allclose(got.reshape(-1), exact, rtol=0, atol=tolerance, err_msg=name)
            elif case.make is not HalfWay:  # whose floor division makes a step of a rounding
                np.testing.assert_allclose(got.reshape(-1).astype("f8"), exact, rtol=0, atol=tolerance, err_msg=name)


@every_combiner
def test_neither_weights_nor_the_round_so_far_change_when_a_push_is_folded(case: Case) -> None:
    turn = TURNS["synchronous"][0]
    combiner, current, pushes = case.make(), _start(), _feed(case, [turn])[0]
    current.flags.writeable = False
    before, partial = current.tobytes(), None
    for pushed, contribution in zip(pushes, turn.contributions, strict=True):
        kept = None if partial is None else partial.tobytes()
        if partial is not None:
            partial.flags.writeable = False
        combiner.fold(LAYOUT, current, partial, pushed, contribution)
        assert current.tobytes() == before
        assert kept is None or partial.tobytes() == kept
        partial = pushed
    assert partial is not None
    combiner.finish(LAYOUT, current, partial, 3, 3)
    assert current.tobytes() == before


@every_turns
@every_combiner
@pytest.mark.parametrize("cut", [1, 3])
def test_an_instance_restored_from_the_state_goes_on_bit_for_bit(case: Case, turns: tuple[Turn, ...], cut: int) -> None:
    combiner, current, feed = case.make(), _start(), _feed(case, turns)
    for turn, pushes in zip(turns[:cut], feed, strict=False):
        current = _play(combiner, turn, current, pushes)
    state = combiner.state()
    copied = CombinerState({n: LAYOUT.pack(LAYOUT.views(s)) for n, s in state.slots.items()}, dict(state.values))
    restored, theirs = case.make(), current
    assert restored.settings == combiner.settings
    restored.restore_state(LAYOUT, copied)
    for turn, pushes in zip(turns[cut:], feed[cut:], strict=True):
        current, theirs = _play(combiner, turn, current, pushes), _play(restored, turn, theirs, pushes)
        assert theirs.tobytes() == current.tobytes()
    again = restored.state()
    assert again.values == combiner.state().values
    assert {n: s.tobytes() for n, s in again.slots.items()} == {
        n: s.tobytes() for n, s in combiner.state().slots.items()
    }


@every_combiner
def test_a_state_restored_before_the_first_round_is_a_new_instances(case: Case) -> None:
    turn = TURNS["synchronous"][1]
    used, pushes = case.make(), _feed(case, [turn])[0]
    first = _play(used, turn, _start(), pushes)
    _play(used, turn, first, pushes)
    used.restore_state(LAYOUT, case.make().state())
    assert _play(used, turn, _start(), pushes).tobytes() == first.tobytes()


@every_turns
@every_combiner
def test_reset_value_makes_an_instance_as_new(case: Case, turns: tuple[Turn, ...]) -> None:
    combiner, feed, ends = case.make(), _feed(case, turns), []
    for _ in range(2):
        current = _start()
        for turn, pushes in zip(turns, feed, strict=True):
            current = _play(combiner, turn, current, pushes)
        ends.append(current.tobytes())
        combiner.reset_value()
    assert ends[0] == ends[1]


@every_turns
@every_combiner
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_push_with_nan_or_infinity_leaves_no_trace(case: Case, turns: tuple[Turn, ...], value: float) -> None:
    disturbed, quiet, current, feed = case.make(), case.make(), _start(), _feed(case, turns)
    for name, turn, pushes in zip(itertools.cycle(FLOATS), turns, feed, strict=False):
        partial: Buffer | None = None
        for pushed, contribution in zip(pushes, turn.contributions, strict=True):
            bad = _copy(LAYOUT, pushed)
            LAYOUT.views(bad)[name].reshape(-1)[-1] = value
            kept = None if partial is None else partial.tobytes()
            refused = Contribution(contribution.worker_id, 999, 5)
            assert disturbed.fold(LAYOUT, current, partial, bad, refused) is False
            assert LAYOUT.find_non_finite(bad) == name
            assert kept is None or partial.tobytes() == kept
            payload = _copy(LAYOUT, pushed)
            assert disturbed.fold(LAYOUT, current, partial, payload, contribution) is True
            partial = payload
        assert partial is not None
        assert disturbed.finish(LAYOUT, current, partial, len(pushes), turn.num_workers) is True
        current = _play(quiet, turn, current, pushes)
        assert partial.tobytes() == current.tobytes()
        assert disturbed.state().values == quiet.state().values


@every_combiner
def test_a_round_that_is_given_up_leaves_no_trace(case: Case) -> None:
    turn = TURNS["synchronous"][0]
    combiner, quiet, current = case.make(), case.make(), _start()
    given_up, first, second = _feed(case, [turn, turn, turn])
    for _ in range(2):
        partial = None
        for pushed in given_up[:2]:
            payload = _copy(LAYOUT, pushed)
            assert combiner.fold(LAYOUT, current, partial, payload, Contribution(0, 500, 1)) is True
            partial = payload
        assert combiner.state().values == quiet.state().values
        for pushes in (first, second):
            theirs = _play(combiner, turn, current, pushes)
            current = _play(quiet, turn, current, pushes)
            assert theirs.tobytes() == current.tobytes()


LARGE = WeightLayout(
    [TensorSpec("a", (200_001,), "float32"), TensorSpec("b", (40_000,), "float64"), TensorSpec("n", (70_000,), "int32")]
)


@every_combiner
def test_many_blocks_are_merged_like_few(case: Case) -> None:
    """Each number of a large tensor comes out as it does in a tensor of its own block."""
    turns = TURNS["synchronous"][:2]
    feed, current, combiner = _feed(case, turns, LARGE), _start(LARGE), case.make()
    small = WeightLayout([TensorSpec(s.name, (1_000,), s.dtype) for s in LARGE.specs])

    def cut(buffer: Buffer, start: dict[str, int]) -> Buffer:
        return small.pack({n: v[start[n] : start[n] + 1_000].copy() for n, v in LARGE.views(buffer).items()})

    places = [  # over the borders of blocks of 2^18 bytes, and at both ends
        {"a": 0, "b": 0, "n": 0},
        {"a": 65_000, "b": 32_300, "n": 65_100},
        {"a": 131_000, "b": 39_000, "n": 69_000},
        {"a": 199_001, "b": 20_000, "n": 30_000},
    ]
    parts = [(case.make(), cut(current, place)) for place in places]
    for turn, pushes in zip(turns, feed, strict=True):
        current = _play(combiner, turn, current, pushes, LARGE)
        parts = [
            (own, _play(own, turn, mine, [cut(pushed, place) for pushed in pushes], small))
            for (own, mine), place in zip(parts, places, strict=True)
        ]
        for (_, mine), place in zip(parts, places, strict=True):
            assert mine.tobytes() == cut(current, place).tobytes()


@every_combiner
def test_gaps_between_tensors_stay_zero_in_weights_and_slots(case: Case) -> None:
    combiner, current, turns = case.make(), _start(), TURNS["synchronous"]
    for turn, pushes in zip(turns, _feed(case, turns), strict=True):
        current = _play(combiner, turn, current, pushes)
    for buffer in (current, *combiner.state().slots.values()):
        assert LAYOUT.pack(LAYOUT.views(buffer)).tobytes() == buffer.tobytes()


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.is_elementwise])
def test_complex_tensors_are_merged_as_pairs_of_real_numbers(case: Case) -> None:
    turn = TURNS["synchronous"][0]
    layout = WeightLayout([TensorSpec("z", (40,), "complex64")])
    pairs = WeightLayout([TensorSpec("z", (80,), "float32")])
    generator = np.random.default_rng(5)
    current, *pushes = (pairs.pack({"z": generator.normal(size=80).astype("f4")}) for _ in range(4))
    as_complex, as_pairs = case.make(), case.make()
    for _ in range(2):
        got, expected = (
            _play(as_complex, turn, current, pushes, layout),
            _play(as_pairs, turn, current, pushes, pairs),
        )
        assert got.tobytes() == expected.tobytes()
        current = got


@every_combiner
def test_a_combiner_says_what_it_wants_pushed_and_whether_it_is_quick(case: Case) -> None:
    assert (case.make().pushes, case.make().is_elementwise) == (case.pushes, case.is_elementwise)


@every_combiner
def test_settings_and_state_are_plain(case: Case) -> None:
    combiner = case.make()
    _play(combiner, TURNS["alone"][0], _start(), _feed(case, TURNS["alone"])[0])
    plain = (bool, int, float, str)
    assert all(type(value) in plain for value in combiner.settings.values())
    assert all(type(value) in plain for value in combiner.state().values.values())


def test_the_table_has_every_combiner_that_the_package_exports() -> None:
    exported = {kind for kind in vars(tensorspark).values() if isinstance(kind, type)}
    combiners = {kind for kind in exported if issubclass(kind, WeightCombiner)} - {WeightCombiner}
    assert combiners == {type(case.make()) for case in CASES.values()} - {HalfWay}
    assert {kind.__name__ for kind in combiners} <= set(tensorspark.__all__)
