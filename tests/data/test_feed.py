"""Stretches of a partition: every row once an epoch, the same after a restart, held-out rows apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorspark.data.columns import VALIDATION_MARKER, Column, Columns, permutation
from tensorspark.data.decoders import BlockDecoder, Decoder, RowDecoder
from tensorspark.data.feed import PartitionFeed, Stretch
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
    arguments |= changes
    decoder: Decoder = arguments.pop("decoder", None) or RowDecoder(columns, arguments["batch_size"])
    return PartitionFeed(rows, decoder, **arguments)


def _stretches(feed: PartitionFeed, max_batches: int = 1) -> Iterator[Stretch]:
    while (stretch := feed.take(max_batches)) is not None:
        yield stretch


def _ids(stretch: Stretch) -> list[int]:
    return [int(value) - 1000 for value in stretch.columns[-1]]


def _key(stretch: Stretch) -> tuple[Any, ...]:
    return (stretch.epoch, stretch.index, stretch.is_last_of_epoch, *[column.tobytes() for column in stretch.columns])


def _epochs(stretches: Iterable[Stretch]) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for stretch in stretches:
        epochs.setdefault(stretch.epoch, []).extend(_ids(stretch))
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
        batches = list(_stretches(feed))
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
        assert {batch.epoch_batches for batch in own} <= {per_epoch, None}
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
            feed.seek(epoch, index)
            batches = [_key(batch) for batch in _stretches(feed)]
        assert rows.is_exhausted
        return batches

    epoch = data.draw(st.integers(0, num_epochs), "epoch")
    index = data.draw(st.integers(0, math.ceil(num_rows / batch_size)), "index")
    undisturbed = run(0, 0)
    assert run(epoch, index) == [batch for batch in undisturbed if batch[:2] >= (epoch, index)]


@modes
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_partition_smaller_than_a_batch_is_trained(shuffle: bool, num_rows: int) -> None:
    batches = list(_stretches(_feed(_rows(num_rows), batch_size=100, num_epochs=2, shuffle=shuffle)))
    assert [(b.epoch, b.index, b.num_rows, b.is_last_of_epoch) for b in batches] == [
        (0, 0, num_rows, True),
        (1, 0, num_rows, True),
    ]


@modes
def test_an_empty_partition_has_no_batches(shuffle: bool) -> None:
    rows = Rows([])
    assert list(_stretches(_feed(rows, num_epochs=3, shuffle=shuffle))) == []
    assert rows.is_exhausted


def test_rows_come_in_their_own_order_without_shuffling() -> None:
    epochs = _epochs(_stretches(_feed(_rows(10), num_epochs=2)))
    assert epochs == {0: list(range(10)), 1: list(range(10))}


def test_the_first_epoch_is_trained_while_the_rows_arrive() -> None:
    rows = Rows(_rows(100))
    first = _feed(rows).take(1)
    assert first is not None
    assert (_ids(first), first.epoch_batches, first.is_last_of_epoch) == ([0, 1, 2, 3], None, False)
    assert rows.num_read <= 8


def test_one_epoch_in_order_keeps_no_rows() -> None:
    """Its cache would refuse: no memory and no directory."""
    feed = _feed(_rows(20), cache=EpochCache(0, "/nonexistent"))
    assert sum(batch.num_rows for batch in _stretches(feed)) == 20


def test_shuffles_differ_by_epoch_partition_and_seed_and_are_the_same_again() -> None:
    def orders(**changes: Any) -> dict[int, list[int]]:
        return _epochs(_stretches(_feed(_rows(50), shuffle=True, num_epochs=2, **changes)))

    base = orders()
    assert orders() == base
    assert orders(batch_size=7) == base
    others = [orders(partition=4), orders(seed=12)]
    seen = [tuple(order) for run in (base, *others) for order in run.values()]
    assert len(set(seen)) == len(seen)
    assert tuple(range(50)) not in seen


def test_a_shuffle_is_the_permutation_of_seed_epoch_and_partition() -> None:
    epochs = _epochs(_stretches(_feed(_rows(30), shuffle=True, num_epochs=2)))
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
    feed.take(1)
    feed.drain()
    assert rows.is_exhausted


def test_a_partition_that_outgrows_memory_without_a_directory_names_the_setting() -> None:
    feed = _feed(_rows(20), shuffle=True, cache=EpochCache(0, "/nonexistent"))
    with pytest.raises(StagingError, match=r"/nonexistent.*spark\.tmp\.dir"):
        list(_stretches(feed))


@pytest.mark.parametrize("values", [["a", "b c"], [b"\x00raw", b""]], ids=["text", "bytes"])
@modes
def test_strings_come_as_they_are(shuffle: bool, values: list[Any], tmp_path: Path) -> None:
    rows = [(value, number) for number, value in enumerate(values, 1000)]
    with EpochCache(0, str(tmp_path)) as cache:
        batches = list(_stretches(_feed(rows, (NAME, Y), shuffle=shuffle, num_epochs=2, cache=cache)))
    assert len(batches) == 2
    for batch in batches:
        names = batch.columns[0]
        assert names.shape == (2,)
        assert all(type(name) is type(values[0]) for name in names)
        assert names.tolist() == [values[i] for i in _ids(batch)]


def test_good_batches_before_a_bad_row_are_given_out() -> None:
    rows: list[Any] = [*_rows(11), "bad"]
    given: list[int] = []
    with pytest.raises(FeedError, match="row 11:"):
        given.extend(i for batch in _stretches(_feed(rows)) for i in _ids(batch))
    assert given == list(range(len(given)))
    assert len(given) >= 4


def test_a_free_size_may_change_from_batch_to_batch_in_a_single_epoch_in_order() -> None:
    rows = [([1.0] * (2 if i < 4 else 3), 0) for i in range(8)]
    batches = list(_stretches(_feed(rows, (Column("x:0", (None,), "float32"), Y))))
    assert [batch.columns[0].shape for batch in batches] == [(4, 2), (4, 3)]


def test_a_free_size_that_changes_between_batches_of_a_kept_epoch_is_named() -> None:
    rows = [([1.0] * (2 if i < 4 else 3), 0) for i in range(8)]
    with pytest.raises(FeedError, match=r"partition 3.*row 4.*\[3\].*\[2\]"):
        list(_stretches(_feed(rows, (Column("x:0", (None,), "float32"), Y), num_epochs=2)))


@pytest.mark.parametrize("num_epochs", [1, 2])
@modes
@pytest.mark.parametrize("num_rows", [0, 3, 4])
def test_rows_that_end_before_the_cursor_are_refused(num_rows: int, shuffle: bool, num_epochs: int) -> None:
    feed = _feed(_rows(num_rows), shuffle=shuffle, num_epochs=num_epochs)
    feed.seek(0, 2)
    message = rf"partition 3: training goes on at batch 2 of 4 rows, but the feed gave {-(-num_rows // 4)} batches"
    with pytest.raises(FeedError, match=message):
        feed.take(1)


@modes
def test_a_cursor_at_an_epochs_end_goes_on_with_the_next(shuffle: bool) -> None:
    feed = _feed(_rows(7), shuffle=shuffle, num_epochs=2)
    feed.seek(0, 2)
    stretch = feed.take(1)
    assert stretch is not None
    assert (stretch.epoch, stretch.index) == (1, 0)


# Stretches


class Recut:
    """A decoder of blocks of any size: of each it makes one of `(x, id)`, as the numbers in the feed say."""

    columns = (X, Y)

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        for ids in rows:
            yield None if ids == VALIDATION_MARKER else _block(ids)


def _block(ids: Iterable[int]) -> Columns:
    x, y = zip(*_rows(max(ids, default=0) + 1), strict=True)
    chosen = list(ids)
    return np.array(x, np.float32)[chosen], np.array(y)[chosen]


def _pieces(num_rows: int, sizes: list[int], first: int = 0) -> list[range]:
    """Rows `first` and following, in pieces of the sizes given, over and over."""
    pieces, end = [], first + num_rows
    while first < end:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(range(first, min(first + size, end)))
        first += size
    return pieces


def _reference(num_rows: int, batch_size: int, num_epochs: int, shuffle: bool) -> list[tuple[int, int, list[int]]]:
    """All batches as (epoch, index, ids)."""
    batches = []
    for epoch in range(num_epochs):
        order = permutation(11, epoch, 3, num_rows).tolist() if shuffle else list(range(num_rows))
        for index in range(-(-num_rows // batch_size)):
            batches.append((epoch, index, order[index * batch_size : (index + 1) * batch_size]))
    return batches


@with_tmp_path
@given(
    **sizes,
    piece_sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    max_batches=st.integers(1, 9),
    max_bytes=st.sampled_from([1, 100, 300, 2**25]),
    data=st.data(),
)
def test_stretches_from_any_cursor_are_the_batches_from_there_cut_as_promised(
    tmp_path: Path,
    num_rows: int,
    batch_size: int,
    num_epochs: int,
    shuffle: bool,
    memory_bytes: int,
    piece_sizes: list[int],
    max_batches: int,
    max_bytes: int,
    data: Any,
) -> None:
    epoch_batches = math.ceil(num_rows / batch_size)
    cursor = (data.draw(st.integers(0, num_epochs), "epoch"), data.draw(st.integers(0, epoch_batches), "batch"))
    pieces = Rows(_pieces(num_rows, piece_sizes))
    with EpochCache(memory_bytes, str(tmp_path)) as cache:
        feed = _feed(pieces, decoder=Recut(), batch_size=batch_size, num_epochs=num_epochs, shuffle=shuffle,
                     cache=cache, max_bytes=max_bytes)  # fmt: skip
        feed.seek(*cursor)
        stretches = list(_stretches(feed, max_batches))
        assert feed.take(max_batches) is None
    assert pieces.is_exhausted
    got = []
    for stretch in stretches:
        ids = _ids(stretch)
        assert stretch.num_batches == math.ceil(len(ids) / batch_size) <= max_batches
        assert stretch.num_rows == len(ids)
        assert stretch.batch_size == batch_size
        assert len(ids) % batch_size == 0 or stretch.num_batches == 1
        assert stretch.num_batches == 1 or sum(column.nbytes for column in stretch.columns) <= max_bytes
        assert stretch.is_last_of_epoch is (stretch.index + stretch.num_batches == epoch_batches)
        assert stretch.epoch_batches in (epoch_batches, *([None] if stretch.epoch == 0 and not shuffle else []))
        assert not stretch.is_last_of_epoch or stretch.epoch_batches == epoch_batches
        np.testing.assert_array_equal(stretch.columns[0], np.array([[i + 0.5, -i] for i in ids], np.float32))
        for index in range(stretch.num_batches):
            batch = ids[index * batch_size : (index + 1) * batch_size]
            got.append((stretch.epoch, stretch.index + index, batch))
    expected = _reference(num_rows, batch_size, num_epochs, shuffle)
    assert got == [batch for batch in expected if batch[:2] >= cursor]


@modes
@pytest.mark.parametrize(("max_batches", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 1, 1]), (99, [4, 1])])
def test_a_stretch_holds_as_many_batches_as_there_are(shuffle: bool, max_batches: int, expected: list[int]) -> None:
    stretches = list(_stretches(_feed(_rows(18), num_epochs=2, shuffle=shuffle), max_batches))
    for epoch in (0, 1):
        assert [stretch.num_batches for stretch in stretches if stretch.epoch == epoch] == expected


def test_a_stretch_reads_no_more_rows_than_tell_whether_it_is_the_last() -> None:
    """Here every block is a row."""
    rows = Rows([i] for i in range(100))
    feed = _feed(rows, decoder=Recut())
    first = feed.take(3)
    assert first is not None
    assert (first.num_rows, rows.num_read) == (12, 13)
    second = feed.take(2)
    assert second is not None
    assert (second.num_rows, rows.num_read) == (8, 21)


def test_a_limit_in_bytes_also_limits_what_is_read() -> None:
    rows = Rows([i] for i in range(100))
    stretch = _feed(rows, decoder=Recut(), max_bytes=2 * 4 * 16).take(50)
    assert stretch is not None
    assert (stretch.num_batches, rows.num_read) == (2, 9)


def test_strings_count_towards_the_limit_in_bytes() -> None:
    rows = [("x" * 1000, i) for i in range(40)]
    stretch = _feed(rows, (NAME, Y), max_bytes=10_000).take(50)
    assert stretch is not None
    assert stretch.num_batches == 2


def test_a_cached_stretch_in_order_is_a_view_and_a_shuffled_one_a_copy() -> None:
    with EpochCache(2**20, "/nonexistent") as cache:
        feed = _feed(_rows(40), cache=cache, num_epochs=2)
        stretches = [stretch for stretch in _stretches(feed, 3) if stretch.epoch == 1]
        whole = cache.rows(slice(None))
        assert [np.shares_memory(stretch.columns[0], whole[0]) for stretch in stretches] == [True] * 4
    with EpochCache(2**20, "/nonexistent") as cache:
        stretch = _feed(_rows(40), cache=cache, shuffle=True).take(3)
        assert stretch is not None
        assert not np.shares_memory(stretch.columns[0], cache.rows(slice(None))[0])


def test_a_streamed_stretch_within_a_block_is_a_view() -> None:
    block = _block(range(40))
    stretch = _feed([block], decoder=BlockDecoder((X, Y))).take(3)
    assert stretch is not None
    assert np.shares_memory(stretch.columns[0], block[0])


def test_a_free_size_that_changes_with_the_batches_ends_a_stretch() -> None:
    rows = [([1.0] * (2 if i < 8 else 3), 0) for i in range(16)]
    stretches = list(_stretches(_feed(rows, (Column("x:0", (None,), "float32"), Y)), 3))
    assert [stretch.columns[0].shape for stretch in stretches] == [(8, 2), (8, 3)]


def test_a_free_size_that_changes_within_a_batch_is_named() -> None:
    column = Column("x:0", (None,), "float32")
    blocks = [np.ones((8, 2)), np.ones((2, 2)), np.ones((6, 3))]
    feed = _feed(blocks, decoder=BlockDecoder((column,)))
    assert [stretch.num_rows for stretch in [feed.take(1), feed.take(1)] if stretch] == [4, 4]
    with pytest.raises(FeedError, match=r"partition 3, batch 2: .*x:0 differ in shape, \[2\] and \[3\]"):
        feed.take(1)


def test_a_cursor_is_set_before_the_first_take_only() -> None:
    feed = _feed(_rows(9))
    feed.take(1)
    with pytest.raises(ValueError, match="before the first take"):
        feed.seek(0, 0)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"validation_split": 1.0}, {"validation_split": -0.1}], ids=str)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch_size of 1 or more and a validation_split from 0 to below 1"):
        _feed([], **changes)


def test_no_batches_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="max_batches must be 1 or more"):
        _feed(_rows(9)).take(0)


# Held-out rows


def _held_out(feed: PartitionFeed) -> list[int]:
    return [int(value) - 1000 for columns in feed.validation() for value in columns[-1]]


@with_tmp_path
@given(
    **sizes,
    num_held_out=st.integers(0, 20),
    piece_sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    max_batches=st.integers(1, 9),
    max_bytes=st.sampled_from([1, 100, 2**25]),
    data=st.data(),
)
def test_rows_after_the_marker_are_held_out_in_every_epoch(
    tmp_path: Path,
    num_rows: int,
    batch_size: int,
    num_epochs: int,
    shuffle: bool,
    memory_bytes: int,
    num_held_out: int,
    piece_sizes: list[int],
    max_batches: int,
    max_bytes: int,
    data: Any,
) -> None:
    held_out = list(range(num_rows, num_rows + num_held_out))
    marker = [VALIDATION_MARKER] if num_held_out or data.draw(st.booleans(), "marker") else []
    elements = [*_pieces(num_rows, piece_sizes), *marker, *_pieces(num_held_out, piece_sizes, num_rows)]
    rows = Rows(elements)
    with EpochCache(memory_bytes, str(tmp_path)) as cache, EpochCache(memory_bytes, str(tmp_path)) as validation_cache:
        feed = _feed(rows, decoder=Recut(), batch_size=batch_size, num_epochs=num_epochs, shuffle=shuffle,
                     cache=cache, validation_cache=validation_cache, max_bytes=max_bytes)  # fmt: skip
        feed.seek(data.draw(st.integers(0, num_epochs), "epoch"), 0)
        trained: dict[int, list[int]] = {}
        for stretch in _stretches(feed, max_batches):
            trained.setdefault(stretch.epoch, []).extend(_ids(stretch))
            if stretch.is_last_of_epoch and data.draw(st.booleans(), "evaluates"):
                assert _held_out(feed) == held_out
        assert rows.is_exhausted
        assert _held_out(feed) == held_out
        sizes = [len(columns[0]) for columns in feed.validation()]
        assert all(size % batch_size == 0 for size in sizes[:-1])
    for ids in trained.values():
        assert sorted(ids) == list(range(num_rows))


@with_tmp_path
@given(
    **sizes,
    piece_sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    split=st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]),
)
def test_a_split_holds_out_the_rows_at_which_its_multiples_pass_a_whole_number(
    tmp_path: Path,
    num_rows: int,
    batch_size: int,
    num_epochs: int,
    shuffle: bool,
    memory_bytes: int,
    piece_sizes: list[int],
    split: float,
) -> None:
    held_out = [i for i in range(num_rows) if math.floor((i + 1) * split) > math.floor(i * split)]
    with EpochCache(memory_bytes, str(tmp_path)) as cache, EpochCache(memory_bytes, str(tmp_path)) as validation_cache:
        feed = _feed(_pieces(num_rows, piece_sizes), decoder=Recut(), batch_size=batch_size, num_epochs=num_epochs,
                     shuffle=shuffle, cache=cache, validation_cache=validation_cache,
                     validation_split=split)  # fmt: skip
        epochs = _epochs(_stretches(feed, 2))
        assert _held_out(feed) == held_out
    trained = [i for i in range(num_rows) if i not in held_out]
    assert {epoch: sorted(ids) for epoch, ids in epochs.items()} == (
        dict.fromkeys(range(num_epochs), trained) if trained else {}
    )
    if not shuffle:
        assert all(ids == trained for ids in epochs.values())


def test_a_tenth_is_every_tenth_row() -> None:
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed(_rows(35), validation_split=0.1, validation_cache=validation_cache)
        list(_stretches(feed))
        assert _held_out(feed) == [9, 19, 29]


def test_held_out_rows_come_in_whole_batches_within_the_limit() -> None:
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed([VALIDATION_MARKER, *_rows(21)], validation_cache=validation_cache, max_bytes=2 * 4 * 16 + 5)
        assert [len(columns[0]) for columns in feed.validation()] == [8, 8, 5]


def test_held_out_rows_are_read_after_those_to_train_on() -> None:
    rows = Rows([*_rows(8), VALIDATION_MARKER, *_rows(100)])
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed(rows, validation_cache=validation_cache)
        stretch = feed.take(9)
        assert stretch is not None
        assert (stretch.is_last_of_epoch, rows.num_read) == (True, 9)
        assert len(_held_out(feed)) == 100


def test_held_out_rows_before_the_first_epoch_was_taken_are_refused() -> None:
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed(_rows(9), validation_cache=validation_cache)
        feed.take(1)
        with pytest.raises(ValueError, match="after the first epoch"):
            list(feed.validation())


def test_held_out_rows_that_nobody_wants_are_read_and_forgotten() -> None:
    rows = Rows([*_rows(8), VALIDATION_MARKER, ("bad",), *_rows(9)])
    feed = _feed(rows, num_epochs=2)
    assert _epochs(_stretches(feed)) == {0: list(range(8)), 1: list(range(8))}
    assert rows.is_exhausted
    assert list(feed.validation()) == []


def test_a_bad_held_out_row_is_named() -> None:
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed([*_rows(8), VALIDATION_MARKER, *_rows(5), "bad"], validation_cache=validation_cache)
        feed.take(9)
        with pytest.raises(FeedError, match=r"partition 3, validation row 5: expected a tuple"):
            list(feed.validation())


def test_held_out_rows_of_a_changing_size_are_named() -> None:
    column = Column("x:0", (None,), "float32")
    blocks = [np.ones((8, 2)), VALIDATION_MARKER, np.ones((2, 2)), np.ones((6, 3))]
    with EpochCache(2**20, "/nonexistent") as validation_cache:
        feed = _feed(blocks, decoder=BlockDecoder((column,)), validation_cache=validation_cache)
        feed.take(9)
        with pytest.raises(FeedError, match=r"partition 3: validation: from row 2 on, .*\[3\].*\[2\]"):
            list(feed.validation())
