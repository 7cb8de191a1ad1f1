"""Held-out rows become the columns that the training rows are, and their errors say that it is them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorspark.data.columns import VALIDATION_MARKER, Column
from tensorspark.data.decoders import BlockDecoder, RowDecoder
from tensorspark.driver.inputs import Feed, MarkedDecoder
from tensorspark.driver.rows import Rows, decoder_alike
from tensorspark.errors import FeedError

TRAINING = (Column("image", (2,), "float32"), Column("label", (), "int64"))


def held_out(dtype: str, shape: tuple[int, ...] = ()) -> Rows:
    columns = (Column("pixels", (2,), "float32"), Column("kind", shape, dtype))
    rdd: Any = None
    return Rows(Feed(rdd, BlockDecoder(columns)), columns, None, weighted=False)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_held_out_values_get_the_training_rows_dtype(dtype: str) -> None:
    decoder = MarkedDecoder(RowDecoder(TRAINING), decoder_alike(held_out(dtype), TRAINING))
    elements = [([1.0, 2.0], 1), VALIDATION_MARKER, (np.ones((3, 2), np.float64), np.array([0, 1, 2], dtype))]
    training, marker, validation = decoder.blocks(iter(elements), 0)
    assert marker is None
    assert training is not None
    assert validation is not None
    assert [c.dtype.name for c in training] == [c.dtype.name for c in validation] == ["float32", "int64"]
    assert validation[1].tolist() == [0, 1, 2]


def test_what_does_not_convert_to_the_training_rows_dtype_is_refused() -> None:
    with pytest.raises(FeedError, match=r"validation_data: kind is float32, .* to the training rows' int64: cast it"):
        decoder_alike(held_out("float32"), TRAINING)


def test_an_error_in_held_out_rows_says_so_in_its_column_s_name() -> None:
    decoder = MarkedDecoder(RowDecoder(TRAINING), decoder_alike(held_out("int64", (1,)), TRAINING))
    elements = [([1.0, 2.0], 1), VALIDATION_MARKER, (np.ones((3, 2)), np.zeros((3, 1), np.int64))]
    expected = r"^validation_data: partition 4, row 0 .* expected int64 of shape \[\] for kind, got shape \[1\]"
    with pytest.raises(FeedError, match=expected):
        list(decoder.blocks(iter(elements), 4))
