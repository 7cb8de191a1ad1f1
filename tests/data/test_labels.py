"""Labels that a loss takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorspark.data.columns import VALIDATION_MARKER, Column
from tensorspark.data.decoders import RowDecoder
from tensorspark.data.labels import CheckedDecoder, Labels
from tensorspark.errors import FeedError


def read(rows: list[Any], labels: Labels, dtype: str = "int64", shape: tuple[int, ...] = ()) -> list[Any]:
    """The labels that come through, a list a block, None where the marker stood."""
    columns = (Column("x", (), "float32"), Column("kind", shape, dtype))
    decoder = CheckedDecoder(RowDecoder(columns, block_rows=2), (labels,))
    assert decoder.columns == columns
    given = [row if isinstance(row, bytes) else (0.0, row) for row in rows]
    return [block and block[1].tolist() for block in decoder.blocks(iter(given), 5)]


def test_labels_of_the_classes_come_through() -> None:
    assert read([0, 2, 1, VALIDATION_MARKER, 2], Labels(1, 3)) == [[0, 2], [1], None, [2]]
    assert read([0.0, 2.0], Labels(1, 3), "float32") == [[0.0, 2.0]]
    assert read([-1, 2], Labels(1, 3, ignored=-1)) == [[-1, 2]]
    assert read([0.0, 0.4, 1.0], Labels(1, None), "float32") == [[0.0, pytest.approx(0.4)], [1.0]]


@pytest.mark.parametrize("bad", [-1, 3, 1.5, np.nan, np.inf])
def test_a_label_that_is_no_class_is_named_with_its_row(bad: float) -> None:
    dtype = "float32" if isinstance(bad, float) else "int64"
    with pytest.raises(FeedError, match=rf"^partition 5, row 3: label kind is {bad}, .* 3 classes: .* from 0 to 2;"):
        read([0, 1, 2, bad, bad], Labels(1, 3), dtype)
    with pytest.raises(FeedError, match=rf"^partition 5, validation row 1: label kind is {bad},"):
        read([0, 1, 2, VALIDATION_MARKER, 0, bad], Labels(1, 3), dtype)


def test_a_label_within_a_row_is_named_with_its_row() -> None:
    with pytest.raises(FeedError, match=r"row 1: label kind is 3,"):
        read([[0, 1], [1, 3]], Labels(1, 3), shape=(2,))


@pytest.mark.parametrize("bad", [-1.0, 2.0, np.nan])
def test_a_probability_is_between_0_and_1(bad: float) -> None:
    with pytest.raises(FeedError, match=rf"row 2: label kind is {bad}, but the loss takes 0, 1 and what is between"):
        read([0.0, 1.0, bad], Labels(1, None), "float32")
