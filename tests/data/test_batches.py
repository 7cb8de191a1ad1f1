"""Batches of a partition: every row once an epoch, the same after a restart, and bad rows by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorspark.data.batches import Batch, Column, PartitionFeed, permutation
from tensorspark.data.spill import EpochCache
from tensorspark.errors import FeedError, StagingError

X = Column("x:0", (2,), "float32")
Y = Column("y:0", (), "int64")
NAME = Column("name:0", (), "object")

modes = pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])


class Rows(Iterator[Any]):
    """An iterator that knows whether it was read to its end."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = iter(rows)
        self.num_read = 0
        self.is_exhausted = False

    def __next__(self) -> Any:
        try:
            row = next(self._rows)
        except StopIteration:
            self.is_exhausted = True
            raise
        self.num_read += 1
        return row


def _rows(num_rows: int) -> list[tuple[list[float], int]]:
    return [([i + 0.5, -i], 1000 + i) for i in range(num_rows)]


def _feed(rows: Iterable[Any], columns: tuple[Column, ...] = (X, Y), **changes: Any) -> PartitionFeed:
    arguments: dict[str, Any] = {
        "partition": 3,
        "batch_size": 4,
        "num_epochs": 1,
        "shuffle": False,
        "seed": 11,
        "cache": EpochCache(2**20, "/nonexistent"),
    }
    return PartitionFeed(rows, columns, **(arguments | changes))


def _ids(batch: Batch) -> list[int]:
    return [int(value) - 1000 for value in batch.columns[-1]]


def _key(batch: Batch) -> tuple[Any, ...]:
    return (batch.epoch, batch.index, batch.is_last_of_epoch, *[column.tobytes() for column in batch.columns])


def _epochs(batches: Iterable[Batch]) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for batch in batches:
        epochs.setdefault(batch.epoch, []).extend(_ids(batch))
    return epochs


sizes = {
    "num_rows": st.integers(0, 30),
    "batch_size": st.integers(1, 12),
    "num_epochs": st.integers(1, 3),
    "shuffle": st.booleans(),
    "memory_bytes": st.sampled_from([0, 100, 2**20]),
}
with_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


@with_tmp_path
@given(**sizes)
def test_every_row_is_trained_exactly_once_an_epoch(
    tmp_path: Path, num_rows: int, batch_size: int, num_epochs: int, shuffle: bool, memory_bytes: int
) -> None:
    rows = Rows(_rows(num_rows))
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        feed = _feed(rows, batch_size=batch_size, num_epochs=num_epochs, shuffle=shuffle, cache=cache)
        batches = list(feed.batches())
    assert rows.is_exhausted
    per_epoch = math.ceil(num_rows / batch_size)
    assert [(batch.epoch, batch.index) for batch in batches] == [
        (epoch, index) for epoch in range(num_epochs) for index in range(per_epoch)
    ]
    for epoch in range(num_epochs):
        own = [batch for batch in batches if batch.epoch == epoch]
        assert Counter(i for batch in own for i in _ids(batch)) == Counter(range(num_rows))
        assert [batch.num_rows for batch in own[:-1]] == [batch_size] * (len(own) - 1)
        assert [batch.is_last_of_epoch for batch in own] == [False] * (per_epoch - 1) + [True] * (per_epoch > 0)
        assert {batch.num_batches for batch in own} <= {per_epoch, None}
    for batch in batches:
        x, y = batch.columns
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        # The columns of a row stay together.
        np.testing.assert_array_equal(x, np.array([[i + 0.5, -i] for i in _ids(batch)], np.float32))


@with_tmp_path
@given(**sizes, data=st.data())
def test_resuming_at_any_cursor_gives_the_batches_of_the_undisturbed_run_from_there(
    tmp_path: Path, num_rows: int, batch_size: int, num_epochs: int, shuffle: bool, memory_bytes: int, data: Any
) -> None:
    def run(epoch: int, index: int) -> list[tuple[Any, ...]]:
        rows = Rows(_rows(num_rows))
        with EpochCache(memory_bytes, str(tmp_path)) as cache:
            feed = _feed(rows, batch_size=batch_size, num_epochs=num_epochs, shuffle=shuffle, cache=cache)
            batches = [_key(batch) for batch in feed.batches(epoch, index)]
        assert rows.is_exhausted
        return batches

    epoch = data.draw(st.integers(0, num_epochs), "epoch")
    index = data.draw(st.integers(0, math.ceil(num_rows / batch_size)), "index")
    undisturbed = run(0, 0)
    assert run(epoch, index) == [batch for batch in undisturbed if batch[:2] >= (epoch, index)]


@modes
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_partition_smaller_than_a_batch_is_trained(shuffle: bool, num_rows: int) -> None:
    batches = list(_feed(_rows(num_rows), batch_size=100, num_epochs=2, shuffle=shuffle).batches())
    assert [(b.epoch, b.index, b.num_rows, b.is_last_of_epoch) for b in batches] == [
        (0, 0, num_rows, True),
        (1, 0, num_rows, True),
    ]


@modes
def test_an_empty_partition_has_no_batches(shuffle: bool) -> None:
    rows = Rows([])
    assert list(_feed(rows, num_epochs=3, shuffle=shuffle).batches()) == []
    assert rows.is_exhausted


def test_rows_come_in_their_own_order_without_shuffling() -> None:
    epochs = _epochs(_feed(_rows(10), num_epochs=2).batches())
    assert epochs == {0: list(range(10)), 1: list(range(10))}


def test_the_first_epoch_is_trained_while_the_rows_arrive() -> None:
    rows = Rows(_rows(100))
    batches = _feed(rows).batches()
    first = next(batches)
    assert (_ids(first), first.num_batches, first.is_last_of_epoch) == ([0, 1, 2, 3], None, False)
    assert rows.num_read <= 8


def test_one_epoch_in_order_keeps_no_rows() -> None:
    """Its cache would refuse: no memory and no directory."""
    feed = _feed(_rows(20), cache=EpochCache(0, "/nonexistent"))
    assert sum(batch.num_rows for batch in feed.batches()) == 20


def test_shuffles_differ_by_epoch_partition_and_seed_and_are_the_same_again() -> None:
    def orders(**changes: Any) -> dict[int, list[int]]:
        return _epochs(_feed(_rows(50), shuffle=True, num_epochs=2, **changes).batches())

    base = orders()
    assert orders() == base
    assert orders(batch_size=7) == base
    others = [orders(partition=4), orders(seed=12)]
    seen = [tuple(order) for run in (base, *others) for order in run.values()]
    assert len(set(seen)) == len(seen)
    assert tuple(range(50)) not in seen


def test_a_shuffle_is_the_permutation_of_seed_epoch_and_partition() -> None:
    epochs = _epochs(_feed(_rows(30), shuffle=True, num_epochs=2).batches())
    assert epochs == {epoch: permutation(11, epoch, 3, 30).tolist() for epoch in (0, 1)}


def test_a_permutation_is_the_same_on_every_machine() -> None:
    """Frozen: another order would make a resumed run train some rows twice."""
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([11, 1, 3]))).permutation(6).tolist()
    assert permutation(11, 1, 3, 6).tolist() == expected
    assert permutation(2**40, 0, 0, 0).tolist() == []


@given(num_rows=st.integers(0, 200), seed=st.integers(0, 2**64), epoch=st.integers(0, 9), partition=st.integers(0, 9))
def test_a_permutation_holds_every_row_once(num_rows: int, seed: int, epoch: int, partition: int) -> None:
    order = permutation(seed, epoch, partition, num_rows)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_rows))


@modes
def test_draining_reads_what_is_left(shuffle: bool) -> None:
    rows = Rows(_rows(40))
    feed = _feed(rows, shuffle=shuffle)
    next(feed.batches())
    feed.drain()
    assert rows.is_exhausted


def test_a_partition_that_outgrows_memory_without_a_directory_names_the_setting() -> None:
    feed = _feed(_rows(20), shuffle=True, cache=EpochCache(0, "/nonexistent"))
    with pytest.raises(StagingError, match=r"/nonexistent.*spark\.tmp\.dir"):
        list(feed.batches())


# What rows may be


class Example(NamedTuple):
    """As pyspark's Row: a tuple of its own class."""

    x: Any
    y: Any


@pytest.mark.parametrize(
    "row",
    [
        ([1.5, 2.0], 7),
        [[1.5, 2.0], 7],
        ((1.5, 2.0), 7),
        (np.array([1.5, 2.0]), np.int32(7)),
        (np.array([1.5, 2.0], np.float16), True + 6),
        Example([1.5, 2], 7),
        ([np.float64(1.5), 2], np.array(7)),
    ],
    ids=["lists", "a list", "tuples", "arrays", "float16", "named tuple", "numpy numbers"],
)
def test_rows_of_many_kinds_give_the_same_columns(row: Any) -> None:
    (batch,) = _feed([row, row]).batches()
    assert [column.dtype for column in batch.columns] == [np.float32, np.int64]
    assert batch.columns[0].tolist() == [[1.5, 2.0]] * 2
    assert batch.columns[1].tolist() == [7, 7]


@pytest.mark.parametrize("value", [[1.5, 2.0], np.array([1.5, 2.0])], ids=["list", "array"])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: (v,), lambda v: [v]], ids=["bare", "tuple", "list"])
def test_a_single_column_takes_bare_and_wrapped_values(value: Any, wrap: Any) -> None:
    (batch,) = _feed([wrap(value)] * 3, (X,)).batches()
    assert batch.columns[0].tolist() == [[1.5, 2.0]] * 3


def test_a_single_scalar_column_takes_bare_numbers() -> None:
    (batch,) = _feed([4, (5,), [6]], (Y,)).batches()
    assert batch.columns[0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("row", [[5.0], ([5.0],), [[5.0]], np.array([5.0])], ids=["bare", "tuple", "list", "array"])
def test_a_single_column_of_one_number_takes_bare_and_wrapped_lists(row: Any) -> None:
    (batch,) = _feed([row] * 2, (Column("x:0", (1,), "float32"),)).batches()
    assert batch.columns[0].tolist() == [[5.0]] * 2


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("uint8", [0, 255]),
        ("uint16", [0, 65535]),
        ("uint64", [0, 2**63 - 1]),
        ("int8", [-128, 127]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("float16", [0.5, -2.0]),
        ("float64", [1e300, 3]),
        ("float32", [True, 2]),
        ("bool", [True, False]),
        ("complex64", [1 + 2j, 3.0]),
    ],
)
def test_python_numbers_that_a_column_can_hold_are_taken(dtype: str, values: list[Any]) -> None:
    (batch,) = _feed([(value,) for value in values], (Column("v:0", (), dtype),)).batches()
    assert batch.columns[0].dtype == np.dtype(dtype)
    assert batch.columns[0].tolist() == values


@pytest.mark.parametrize("values", [["a", "b c"], [b"\x00raw", b""]], ids=["text", "bytes"])
@modes
def test_strings_come_as_they_are(shuffle: bool, values: list[Any], tmp_path: Path) -> None:
    rows = [(value, number) for number, value in enumerate(values, 1000)]
    with EpochCache(0, str(tmp_path)) as cache:
        batches = list(_feed(rows, (NAME, Y), shuffle=shuffle, num_epochs=2, cache=cache).batches())
    assert len(batches) == 2
    for batch in batches:
        names = batch.columns[0]
        assert names.shape == (2,)
        assert all(type(name) is type(values[0]) for name in names)
        assert names.tolist() == [values[i] for i in _ids(batch)]


def test_strings_may_have_a_shape() -> None:
    (batch,) = _feed([(["a", "b"],), (["c", "d"],)], (Column("words:0", (2,), "object"),)).batches()
    assert batch.columns[0].tolist() == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("shape", [(None,), (None, None), None], ids=str)
def test_a_free_size_takes_what_all_rows_have(shape: tuple[int | None, ...] | None) -> None:
    row = [1.0, 2.0, 3.0] if shape != (None, None) else [[1.0, 2.0, 3.0]]
    (batch,) = _feed([(row,)] * 2, (Column("x:0", shape, "float32"),)).batches()
    assert batch.columns[0].tolist() == [row] * 2


# What bad rows get


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "ragged": (([1.0, [2.0, 3.0]], 1), r"x:0"),
    "too long": (([1.0, 2.0, 3.0], 1), r"float32 of shape \[2\] for x:0, got shape \[3\]"),
    "too short": (([1.0], 1), r"float32 of shape \[2\] for x:0, got shape \[1\]"),
    "scalar for a vector": ((1.0, 1), r"float32 of shape \[2\] for x:0, got shape \[\]"),
    "nested": (([[1.0, 2.0]], 1), r"float32 of shape \[2\] for x:0, got shape \[1, 2\]"),
    "strings for floats": ((["1.0", "2.0"], 1), r"float32 of shape \[2\] for x:0.*<U3"),
    "none": ((None, 1), r"float32 of shape \[2\] for x:0"),
    "none inside": (([1.0, None], 1), r"float32 of shape \[2\] for x:0.*object"),
    "a dict": (({"a": 1.0}, 1), r"float32 of shape \[2\] for x:0"),
    "complex for float": (([1.0, 2j], 1), r"float32 of shape \[2\] for x:0.*complex"),
    "float for int": (([1.0, 2.0], 1.5), r"int64 of shape \[\] for y:0.*float64"),
    "vector for a scalar": (([1.0, 2.0], [1]), r"int64 of shape \[\] for y:0, got shape \[1\]"),
    "string for int": (([1.0, 2.0], "7"), r"int64 of shape \[\] for y:0"),
    "none for int": (([1.0, 2.0], None), r"int64 of shape \[\] for y:0"),
    "too many values": (([1.0, 2.0], 1, 2), r"tuple of 2 values \(x:0, y:0\), got a tuple of 3"),
    "too few values": (([1.0, 2.0],), r"tuple of 2 values \(x:0, y:0\), got a tuple of 1"),
    "no tuple": (5, r"tuple of 2 values \(x:0, y:0\), got a int"),
    "an array": (np.ones(2), r"tuple of 2 values \(x:0, y:0\), got a ndarray of 2"),
    "nothing": (None, r"tuple of 2 values \(x:0, y:0\), got a NoneType"),
}


@modes
@pytest.mark.parametrize("position", [0, 2, 9, 1500])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_a_bad_row_is_named_with_what_was_expected(row: Any, message: str, position: int, shuffle: bool) -> None:
    rows: list[Any] = list(_rows(1600))
    rows[position] = row
    with pytest.raises(FeedError, match=rf"partition 3, row {position}: expected .*{message}"):
        list(_feed(rows, shuffle=shuffle).batches())


def test_the_first_of_several_bad_rows_is_named() -> None:
    rows: list[Any] = list(_rows(12))
    rows[6] = rows[9] = ([1.0], 5)
    with pytest.raises(FeedError, match="row 6:"):
        list(_feed(rows).batches())


def test_good_batches_before_a_bad_row_are_given_out() -> None:
    rows: list[Any] = [*_rows(11), "bad"]
    given: list[int] = []
    with pytest.raises(FeedError, match="row 11:"):
        given.extend(i for batch in _feed(rows).batches() for i in _ids(batch))
    assert given == list(range(len(given)))
    assert len(given) >= 4


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int32", 2**40), ("int32", -(2**31) - 1), ("int8", 300), ("uint8", -1), ("uint8", 256), ("int64", 2**64)],
)
def test_an_integer_that_does_not_fit_is_refused_not_wrapped(dtype: str, value: int) -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*v:0"):
        list(_feed([(1,), (value,)], (Column("v:0", (), dtype),)).batches())


def test_a_float_that_does_not_fit_is_refused_not_made_infinite() -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*v:0"):
        list(_feed([(1.0,), (1e300,)], (Column("v:0", (), "float32"),)).batches())


def test_infinity_and_nan_in_rows_are_data() -> None:
    (batch,) = _feed([(math.inf,), (math.nan,)], (Column("v:0", (), "float32"),)).batches()
    np.testing.assert_array_equal(batch.columns[0], [np.inf, np.nan])


@pytest.mark.parametrize("value", [None, 5, 1.5, ["a"], {"a": 1}], ids=str)
def test_what_is_no_string_is_refused_in_a_column_of_strings(value: Any) -> None:
    with pytest.raises(FeedError, match=r"partition 3, row 1: expected .*name:0"):
        list(_feed([("a",), (value,)], (NAME,)).batches())


@modes
def test_rows_that_differ_within_a_free_size_are_named(shuffle: bool) -> None:
    rows = [([1.0] * (2 if i < 6 else 3), 0) for i in range(8)]
    feed = _feed(rows, (Column("x:0", (None,), "float32"), Y), shuffle=shuffle)
    with pytest.raises(FeedError, match=r"partition 3, row .*x:0 differ in shape"):
        list(feed.batches())


def test_a_free_size_may_change_from_batch_to_batch_in_a_single_epoch_in_order() -> None:
    rows = [([1.0] * (2 if i < 4 else 3), 0) for i in range(8)]
    batches = list(_feed(rows, (Column("x:0", (None,), "float32"), Y)).batches())
    assert [batch.columns[0].shape for batch in batches] == [(4, 2), (4, 3)]


def test_a_free_size_that_changes_between_batches_of_a_kept_epoch_is_named() -> None:
    rows = [([1.0] * (2 if i < 4 else 3), 0) for i in range(8)]
    with pytest.raises(FeedError, match=r"partition 3.*row 4.*\[3\].*\[2\]"):
        list(_feed(rows, (Column("x:0", (None,), "float32"), Y), num_epochs=2).batches())


def test_a_column_says_what_it_takes() -> None:
    assert str(X) == "float32 of shape [2]"
    assert str(Column("x", (None, 3), "int8")) == "int8 of shape [any, 3]"
    assert str(Column("x", None, "int8")) == "int8 of any shape"
    assert Column("x", (None, 3), "int8").fits((7, 3))
    assert not Column("x", (None, 3), "int8").fits((7, 4))
    assert not Column("x", (None, 3), "int8").fits((3,))
    assert Column("x", None, "int8").fits((7, 4, 1))


@pytest.mark.parametrize("num_epochs", [1, 2])
@modes
@pytest.mark.parametrize("num_rows", [0, 3, 4])
def test_rows_that_end_before_the_cursor_are_refused(num_rows: int, shuffle: bool, num_epochs: int) -> None:
    feed = _feed(_rows(num_rows), shuffle=shuffle, num_epochs=num_epochs)
    message = rf"partition 3: training goes on at batch 2 of 4 rows, but the feed gave {-(-num_rows // 4)} batches"
    with pytest.raises(FeedError, match=message):
        list(feed.batches(0, 2))
