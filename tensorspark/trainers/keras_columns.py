"""Which columns a Keras model is fed: names, shapes and dtypes of its inputs and of its outputs' labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorspark.data.columns import Column
from tensorspark.data.labels import Labels
from tensorspark.trainers.keras import Structure
from tensorspark.trainers.startup import importing

with importing():
    import keras


def input_names(model: keras.Model, given: Any = None) -> Any:
    """The inputs' names in the structure that the model takes; `given`, where the model does not say."""
    if not _is_graph(model):
        return "x" if given is None else given
    return _names(_inputs(model), [tensor.name for tensor in model.inputs])


def output_names(model: keras.Model) -> Any:
    """The outputs' names in the structure that the model makes; `"y"`, where the model does not say."""
    if not _is_graph(model):
        return "y"
    names = getattr(model, "output_names", None) or [model.layers[-1].name]
    return _names(_outputs(model), names)


def input_columns(model: keras.Model, given: Any = None) -> list[Column]:
    names = flat_names(input_names(model, given))
    if not _is_graph(model):
        return [Column(name, None, keras.config.floatx()) for name in names]
    tensors = flat_names(_inputs(model))
    return [Column(n, tuple(t.shape[1:]), _column_dtype(t.dtype)) for n, t in zip(names, tensors, strict=True)]


def label_columns(model: keras.Model) -> list[Column]:
    """A column an output, as its loss takes it: class numbers for a sparse one, else numbers of the output's shape."""
    names = flat_names(output_names(model))
    losses = _losses(model, names)
    if not _is_graph(model):
        dtypes = ["int64" if _is_sparse(loss) else keras.config.floatx() for loss in losses]
        return [Column(name, (), dtype) for name, dtype in zip(names, dtypes, strict=True)]
    tensors = flat_names(_outputs(model))
    return [_label_column(*parts) for parts in zip(names, tensors, losses, strict=True)]


def checked_labels(model: keras.Model, structure: Structure) -> tuple[Labels, ...]:
    """The label columns that hold class numbers or their probabilities, and of how many classes."""
    if structure.y is None or not _is_graph(model):
        return ()
    names, positions = flat_names(output_names(model)), flat_names(structure.y)
    if len(positions) != len(names):
        return ()
    parts = zip(positions, flat_names(_outputs(model)), _losses(model, names), strict=True)
    return tuple(
        Labels(position, tensor.shape[-1] if _is_sparse(loss) else None, getattr(loss, "ignore_class", None))
        for position, tensor, loss in parts
        if position is not None and (_is_binary(loss) or (_is_sparse(loss) and tensor.shape[-1] is not None))
    )


def numbered(names: Any, start: int) -> tuple[Any, int]:
    """The structure with its leaves numbered in order from `start`, and the number after the last.

    >>> numbered({"image": "a", "size": ["b", "c"]}, 1)
    ({'image': 1, 'size': [2, 3]}, 4)
    """
    if isinstance(names, Mapping):
        parts: dict[Any, Any] = {}
        for key, value in names.items():
            parts[key], start = numbered(value, start)
        return parts, start
    if isinstance(names, list | tuple):
        leaves = []
        for value in names:
            leaf, start = numbered(value, start)
            leaves.append(leaf)
        return type(names)(leaves), start
    return start, start + 1


def flat_names(names: Any) -> list[Any]:
    """The leaves of a structure, in order."""
    if isinstance(names, Mapping):
        return [leaf for value in names.values() for leaf in flat_names(value)]
    if isinstance(names, list | tuple):
        return [leaf for value in names for leaf in flat_names(value)]
    return [names]


def _is_graph(model: keras.Model) -> bool:
    """Whether the model is a graph of layers with known inputs and outputs."""
    return bool(getattr(model, "inputs", None)) and bool(getattr(model, "outputs", None))


def _inputs(model: keras.Model) -> Any:
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _outputs(model: keras.Model) -> Any:
    return model.outputs[0] if isinstance(model, keras.Sequential) else model.output


def _names(structure: Any, names: Sequence[str]) -> Any:
    if isinstance(structure, Mapping):
        return {key: key for key in structure}
    return list(names) if isinstance(structure, list | tuple) else names[0]


def _losses(model: keras.Model, names: Sequence[str]) -> list[Any]:
    loss = model.loss
    if isinstance(loss, Mapping):
        return [loss.get(name) for name in names]
    if isinstance(loss, list | tuple):
        return list(loss) if len(loss) == len(names) else [None] * len(names)
    return [loss] * len(names)


def _label_column(name: str, output: Any, loss: Any) -> Column:
    shape = tuple(output.shape[1:])
    if _is_sparse(loss):
        return Column(name, shape[:-1], "int64")
    # One number a row comes as a scalar: Keras adds the dimension that the output has.
    return Column(name, shape[:-1] if shape[-1:] == (1,) else shape, keras.config.floatx())


def _is_sparse(loss: Any) -> bool:
    loss = _named_loss(loss)
    return loss is keras.losses.sparse_categorical_crossentropy or isinstance(
        loss, keras.losses.SparseCategoricalCrossentropy
    )


def _is_binary(loss: Any) -> bool:
    loss = _named_loss(loss)
    functions = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)
    return loss in functions or isinstance(loss, keras.losses.BinaryCrossentropy | keras.losses.BinaryFocalCrossentropy)


def _named_loss(loss: Any) -> Any:
    return keras.losses.get(loss) if isinstance(loss, str) and loss.lower() not in ("crossentropy", "ce") else loss


def _column_dtype(dtype: str) -> str:
    return "object" if dtype == "string" else dtype
