"""`tf.data` datasets that workers make themselves and read their own part of the data from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorspark.data.columns import Column, Columns, convert, is_marker
from tensorspark.errors import FeedError
from tensorspark.trainers.startup import importing

with importing():
    import tensorflow as tf

_BLOCK_ROWS = 256
# Of an error of `tf.data`, what the op or the Python code within it said, without what TensorFlow puts around it.
_SAID = re.compile(r"(?:\{\{.*?\}\} )?(?:FeedError: )?(.*?)(?:\nTraceback |\n+\t \[\[| \[Op:|$)", re.DOTALL)


@dataclass(frozen=True)
class DatasetDecoder:
    """Reads the dataset that `dataset_fn` makes of each element of the feed, a `DatasetContext`.

    Attributes:
        columns: what the dataset's rows hold, flat, in order.
        dataset_fn: takes a `DatasetContext`, and returns a `tf.data.Dataset` of single rows.
    """

    columns: tuple[Column, ...]
    dataset_fn: Callable[[Any], Any]

    def blocks(self, rows: Iterator[Any], partition: int) -> Iterator[Columns | None]:
        """Blocks of rows of the datasets, one array ``[n, ...]`` for each column; None for a marker.

        Raises:
            FeedError: no dataset, rows that do not fit, or what the dataset itself raises.
        """
        for context in rows:
            if is_marker(context):
                yield None
                continue
            dataset = self.dataset_fn(context)
            _require_dataset(dataset)
            for block in _blocks(dataset, partition):
                values = [np.asarray(value) for value in tf.nest.flatten(block)]
                yield tuple(self._fitted(v, c, partition) for v, c in zip(values, self.columns, strict=True))

    def _fitted(self, values: Any, column: Column, partition: int) -> Any:
        if not column.fits(values.shape[1:]):
            raise FeedError(
                f"partition {partition}: expected {column} for {column.name} of the dataset's rows, got shape "
                f"{list(values.shape[1:])}: have dataset_fn make the rows equally large"
            )
        return convert(values, column.dtype)


def dataset_decoder(
    dataset_fn: Callable[[Any], Any], context: Any, inputs: tuple[Column, ...], outputs: tuple[Column, ...]
) -> tuple[DatasetDecoder, bool]:
    """The decoder of a dataset's rows `(x, y)` or `(x, y, sample_weight)`, and whether they have a weight.

    Args:
        context: a `DatasetContext`; `dataset_fn` is called with it here, on the driver, once.
        inputs, outputs: what the model expects; shapes and dtypes are the dataset's.

    Raises:
        FeedError: no dataset, or one whose rows the model does not take.
    """
    dataset = dataset_fn(context)
    _require_dataset(dataset)
    specs = tf.nest.flatten(dataset.element_spec)
    expected = [*inputs, *outputs]
    if len(specs) not in (len(expected), len(expected) + bool(outputs)):
        raise FeedError(
            f"expected dataset_fn to make a dataset of single rows with {len(inputs)} inputs and {len(outputs)} "
            f"labels, and maybe a weight; got rows of {dataset.element_spec}"
        )
    weighted = len(specs) > len(expected)
    names = [column.name for column in expected] + ["sample_weight"] * weighted
    columns = tuple(
        Column(name, None if spec.shape.rank is None else tuple(spec.shape.as_list()), _dtype(spec.dtype))
        for name, spec in zip(names, specs, strict=True)
    )
    for column, wanted in zip(columns, inputs, strict=False):
        if wanted.shape is not None and column.shape is not None and not _is_compatible(column.shape, wanted.shape):
            raise FeedError(
                f"expected {wanted} for {wanted.name} of the dataset's rows, got {column}: the dataset must have "
                f"single rows, not batches (leave batch() out)"
            )
    return DatasetDecoder(columns, dataset_fn), weighted


def _blocks(dataset: Any, partition: int) -> Iterator[Any]:
    try:
        yield from dataset.batch(_BLOCK_ROWS).as_numpy_iterator()
    except tf.errors.OpError as error:
        said = _SAID.match(error.message)
        raise FeedError(f"partition {partition}: {said[1] if said else error.message}") from error


def _require_dataset(dataset: Any) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        raise FeedError(f"expected dataset_fn to return a tf.data.Dataset, got {type(dataset).__name__}")


def _dtype(dtype: Any) -> str:
    return "object" if dtype == tf.string else str(np.dtype(dtype.as_numpy_dtype).name)


def _is_compatible(have: tuple[int | None, ...], want: tuple[int | None, ...]) -> bool:
    return len(have) == len(want) and all(a is None or b is None or a == b for a, b in zip(have, want, strict=True))
