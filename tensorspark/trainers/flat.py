"""Weights of eager variables as one flat tensor per dtype: taken apart and put together inside compiled functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.trainers.base import Trainer
from tensorspark.trainers.startup import importing
from tensorspark.weights.blocks import BLOCK_BYTES, is_finite
from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer, Segment, WeightLayout

with importing():
    import tensorflow as tf


class FlatVariables:
    """Variables that hold a layout's tensors.

    Args:
        variables: `tf.Variable`s in the order of `layout.specs`, of the same shapes and dtypes.
    """

    def __init__(self, layout: WeightLayout, variables: Sequence[tf.Variable]) -> None:
        self._segments = layout.segments
        by_name = {spec.name: variable for spec, variable in zip(layout.specs, variables, strict=True)}
        names = sorted(by_name, key=layout.offsets.__getitem__)
        self._members = [
            [by_name[name] for name in names if segment.start <= layout.offsets[name] < segment.stop]
            for segment in layout.segments
        ]
        # Empty tensors share their offset with what follows, maybe in another segment: they have nothing to copy.
        self._members = [
            [variable for variable in members if variable.dtype.as_numpy_dtype == segment.dtype]
            for members, segment in zip(self._members, layout.segments, strict=True)
        ]
        load = tf.function(lambda *flat: self.assign(flat), autograph=False)
        self._load = load.get_concrete_function(*self.signature)
        self._read = tf.function(self.concat, autograph=False).get_concrete_function()

    @property
    def signature(self) -> list[tf.TensorSpec]:
        """Of what `assign` takes: a flat tensor a segment, gaps included."""
        return [tf.TensorSpec([None], tf.as_dtype(segment.dtype)) for segment in self._segments]

    def nothing(self) -> list[tf.Tensor]:
        """Tensors that fit the signature, to pass where nothing is to be assigned."""
        return [tf.zeros([0], tf.as_dtype(segment.dtype)) for segment in self._segments]

    def flat(self, weights: Buffer) -> list[tf.Tensor]:
        """Copies `weights` to a tensor a segment."""
        return [owned_tensor(segment.of(weights)) for segment in self._segments]

    def assign(self, flat: Sequence[tf.Tensor]) -> None:
        """Sets the variables; for use inside a compiled function."""
        for tensor, members, segment in zip(flat, self._members, self._segments, strict=True):
            sizes = [size for variable in members for size in _sizes(variable, segment)]
            # Split copies, where a slice would share the flat tensor's memory with the variable for good.
            pieces = tf.split(tensor, sizes)[::2]
            for variable, piece in zip(members, pieces, strict=True):
                variable.assign(tf.reshape(piece, variable.shape))

    def concat(self) -> list[tf.Tensor]:
        """The variables' values, as `assign` takes them; for use inside a compiled function."""
        return [
            tf.concat(
                [
                    part
                    for variable in members
                    for part in _padded(tf.reshape(variable, [-1]), _sizes(variable, segment)[1])
                ],
                axis=0,
            )
            for members, segment in zip(self._members, self._segments, strict=True)
        ]

    def load(self, weights: Buffer) -> None:
        """Sets the variables to `weights`, which may be reused at once."""
        self.load_flat(self.flat(weights))

    def load_flat(self, flat: Sequence[tf.Tensor]) -> None:
        """Sets the variables to what `flat` or `concat` made."""
        self._load(*flat)

    def read(self) -> Sequence[tf.Tensor]:
        """The variables' values, as `concat` makes them."""
        values: Sequence[tf.Tensor] = self._read()
        return values

    def copy(self, flat: Sequence[tf.Tensor], out: Buffer) -> None:
        """Writes what `concat` made to `out`."""
        for tensor, segment in zip(flat, self._segments, strict=True):
            segment.of(out)[...] = _array(tensor, segment)

    def blocks(self, flat: Sequence[tf.Tensor], wanted: Sequence[slice]) -> Iterator[Buffer]:
        """The bytes of what `concat` made that lie in these parts of a buffer, none of which is in two segments."""
        for tensor, segment in zip(flat, self._segments, strict=True):
            values = _array(tensor, segment).view(np.uint8)
            for block in wanted:
                if segment.start <= block.start < segment.stop:
                    yield values[block.start - segment.start : block.stop - segment.start]

    def are_finite(self, flat: Sequence[tf.Tensor]) -> bool:
        """Whether what `concat` made holds neither NaN nor infinity."""
        arrays = [_array(tensor, segment) for tensor, segment in zip(flat, self._segments, strict=True)]
        return all(
            is_finite(array[start : start + BLOCK_BYTES])
            for array in arrays
            for start in range(0, len(array), BLOCK_BYTES)
        )


class FlatTrainer(Trainer):
    """A trainer whose compiled call sets the weights, takes the steps and returns the weights, all at once.

    `load` only copies: the weights wait in `_pending` until that call, or `_settle`, sets the variables. What the call
    returned waits in `_trained` until `read`.
    """

    def _hold(self, flat: FlatVariables, *, reverts: bool) -> None:
        """
        Args:
            reverts: where steps made weights that are not finite, `read` gives those that were loaded before them: the
                server takes no others.
        """
        self._flat = flat
        self._reverts = reverts
        self._loaded: list[tf.Tensor] | None = None
        self._pending: list[tf.Tensor] | None = None
        self._trained: list[tf.Tensor] | None = None

    def load(self, weights: Buffer) -> None:
        self._pending, self._trained = self._flat.flat(weights), None
        self._loaded = self._pending if self._reverts else None

    def read(self, out: Buffer) -> None:
        self._flat.copy(self._weights(), out)

    def read_blocks(self, wanted: Sequence[slice]) -> Iterator[Buffer]:
        return self._flat.blocks(self._weights(), wanted)

    def _weights(self) -> Sequence[tf.Tensor]:
        at_hand = self._pending or self._trained or self._flat.read()
        if self._loaded is not None and not self._flat.are_finite(at_hand):
            at_hand = self._pending = self._loaded
            self._trained = None
            self._reset_own()
        return at_hand

    def _reset_own(self) -> None:
        """Sets what is not synchronized to the driver's values."""

    def _take_pending(self) -> list[tf.Tensor] | None:
        weights, self._pending = self._pending, None
        return weights

    def _settle(self) -> None:
        """Sets the variables, before a call that does not."""
        if self._pending is not None:
            self._flat.load_flat(self._pending)
            self._pending = None


def stacked_batches(columns: Columns, batch_size: int) -> list[list[NDArray[Any]]]:
    """The full batches as `[num_batches, batch_size, ...]`, then the smaller one that may be left as `[1, ...]`."""
    num_rows = len(columns[0])
    num_batches, num_left = divmod(num_rows, batch_size)
    parts = []
    if num_batches:
        stop = num_batches * batch_size
        parts.append([column[:stop].reshape(num_batches, batch_size, *column.shape[1:]) for column in columns])
    if num_left:
        parts.append([column[None, num_rows - num_left :] for column in columns])
    return parts


def batch_spec(column: Column, size: int | None) -> tf.TensorSpec:
    """Of a column of a batch of `size` rows; of any size, if None."""
    shape = None if column.shape is None else [size, *column.shape]
    dtype = np.dtype(column.dtype)
    return tf.TensorSpec(shape, tf.string if dtype.kind == "O" else tf.as_dtype(dtype))


def stacked_spec(column: Column, size: int | None) -> tf.TensorSpec:
    """Of a column of any number of such batches."""
    spec = batch_spec(column, size)
    return tf.TensorSpec(None if column.shape is None else [None, *spec.shape], spec.dtype)


def owned_tensor(array: NDArray[Any]) -> tf.Tensor:
    """A tensor with a copy of the array's values.

    `tf.constant` copies twice: once so that the tensor is not a view, once more as numpy's memory is not aligned. This
    copies once, to aligned memory that only the tensor has.
    """
    if array.dtype.kind not in "fiu" or not array.size:
        return tf.constant(array)
    memory = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    copied = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return tf.experimental.dlpack.from_dlpack(copied.__dlpack__())


def _sizes(variable: tf.Variable, segment: Segment) -> tuple[int, int]:
    """Elements of a variable, and of the gap after it."""
    num_elements = variable.shape.num_elements()
    per_line = ALIGNMENT_BYTES // segment.dtype.itemsize
    return num_elements, -num_elements % per_line


def _padded(values: tf.Tensor, num_zeros: int) -> list[tf.Tensor]:
    return [values, tf.zeros([num_zeros], values.dtype)] if num_zeros else [values]


def _array(tensor: tf.Tensor, segment: Segment) -> NDArray[Any]:
    # The buffer protocol spares a copy, but knows only numpy's own dtypes.
    if segment.dtype.kind == "V":
        return np.asarray(tensor.numpy())
    return np.frombuffer(memoryview(tensor), segment.dtype)


def pack_content(maker: bytes, values: Sequence[NDArray[Any]]) -> bytes:
    """What makes a model or a step, packed, and the values of the variables that workers keep to themselves."""
    arrays = [[value.dtype.name, value.shape, value.tobytes()] for value in values]
    packed: bytes = msgpack.packb({"maker": maker, "values": arrays})
    return packed


def unpack_content(content: bytes) -> tuple[bytes, list[NDArray[Any]]]:
    unpacked = msgpack.unpackb(content)
    values = [np.frombuffer(data, np.dtype(dtype)).reshape(shape) for dtype, shape, data in unpacked["values"]]
    return unpacked["maker"], values
