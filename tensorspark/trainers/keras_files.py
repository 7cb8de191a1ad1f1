"""Keras models as values: copied, stripped for predictions, as a ``.keras`` file's bytes; what their outputs mean."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import tempfile
import threading
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from tensorspark.data.columns import Column
from tensorspark.errors import ModelError
from tensorspark.trainers.flat import batch_spec
from tensorspark.trainers.keras import Structure
from tensorspark.trainers.keras_columns import flat_names, input_columns, output_names
from tensorspark.trainers.keras_objects import built_model, custom_objects, pack_model, require_compiled, unpack_model
from tensorspark.trainers.keras_tables import has_lookups, is_built
from tensorspark.trainers.startup import importing

with importing():
    import keras
    import tensorflow as tf

Task = Literal["classification", "regression"]

_SOFT_LOSSES = ("categorical_crossentropy", "sparse_categorical_crossentropy", "categorical_focal_crossentropy")
_BINARY_LOSSES = ("binary_crossentropy", "binary_focal_crossentropy")
_EITHER_LOSSES = ("crossentropy", "ce")  # Keras chooses by the output
_OWN_PACKAGES = ("keras", "builtins")
_FUNCTIONS_ENTRY = "tensorspark_functions.json"
_seeding = threading.Lock()


# Copies ---------------------------------------------------------------------------------------------------------------


def clone(model_or_builder: keras.Model | Callable[[], Any], seed: int) -> keras.Model:
    """A compiled model of its own: the same architecture, the same weights, a new optimizer.

    Args:
        model_or_builder: a compiled model, or a function without arguments that makes one.
        seed: of weights that are not there yet. Equal seeds make equal ones.

    Raises:
        ModelError: a model that is not compiled, or does not become the same one when it is made from its config.
    """
    with _seeded(seed):
        if not isinstance(model_or_builder, keras.Model):
            return built_model(model_or_builder)
        require_compiled(model_or_builder)
        copy = unpack_model(pack_model(model_or_builder))
    if is_built(model_or_builder):
        _copy_weights(model_or_builder, copy)
    return copy


def for_predictions(model: keras.Model) -> keras.Model:
    """A copy of a built model without loss, metrics and optimizer slots: predictions need none of them shipped."""
    copy = clone(model, 0)
    copy.loss = copy._compile_loss = copy._compile_metrics = None  # `compile` replaces these, but only by others
    optimizer = keras.optimizers.SGD()
    keras.Model.compile(copy, optimizer, run_eagerly=model.run_eagerly, jit_compile=False, auto_scale_loss=False)
    return copy


def _copy_weights(source: keras.Model, target: keras.Model) -> None:
    if not is_built(target):
        target.build_from_config(source.get_build_config() or {})
    try:
        target.set_weights(source.get_weights())
    except ValueError as error:
        raise ModelError(
            f"model {source.name} becomes another one when it is made again: {error}; get_config() and from_config() "
            f"must keep all that the constructor was given"
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Keras draws the seeds of layers from Python's own generator, which afterwards goes on as if nothing had been."""
    with _seeding:
        before = random.getstate()
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


# Files ----------------------------------------------------------------------------------------------------------------


def to_keras_bytes(model: keras.Model) -> bytes:
    """The content of a ``.keras`` file. It has one entry more than Keras's: where custom functions are defined.

    Raises:
        ModelError: a model that Keras cannot save.
    """
    if model.optimizer is not None and not model.optimizer.built:
        model = clone(model, 0)  # whose optimizer is built, as the loaded model's will be
    with tempfile.TemporaryDirectory(prefix="tensorspark-keras-") as directory:
        path = Path(directory, "model.keras")
        try:
            with warnings.catch_warnings():
                # Keras 3.15 reads its variables in a way that numpy 2 is going to forbid.
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                model.save(path)
        except Exception as error:  # whatever a model's own code raises
            raise ModelError(f"model {model.name} cannot be saved: {error}") from error
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_FUNCTIONS_ENTRY, json.dumps(_functions(model)))
        return path.read_bytes()


def from_keras_bytes(content: bytes) -> keras.Model:
    """The model in a ``.keras`` file's content.

    Custom classes and functions are those that Keras knows (`keras.saving.register_keras_serializable`,
    `custom_object_scope`), else those of the modules that the file names. No code comes out of the file.

    Raises:
        ModelError: a class that cannot be found, or a file that Keras cannot read.
    """
    with tempfile.TemporaryDirectory(prefix="tensorspark-keras-") as directory:
        path = Path(directory, "model.keras")
        path.write_bytes(content)
        custom, missing = _importable(content)
        try:
            return keras.saving.load_model(path, custom_objects=custom)
        except Exception as error:  # Keras raises many kinds
            not_found = f" Not found here: {', '.join(missing)}." if missing else ""
            raise ModelError(
                f"the saved model cannot be loaded: {error}{not_found} Define or import its custom classes and "
                f"functions first, or register them with keras.saving.register_keras_serializable()"
            ) from error


def _importable(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Custom classes and functions of a ``.keras`` file by registered name, and which cannot be imported."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    with zipfile.ZipFile(BytesIO(content)) as archive:
        references = set(_references(json.loads(archive.read("config.json"))))
        if _FUNCTIONS_ENTRY in archive.namelist():
            references |= {tuple(reference) for reference in json.loads(archive.read(_FUNCTIONS_ENTRY))}
    for module, name, registered in sorted(references):
        if keras.saving.get_registered_object(registered) is not None:
            continue
        try:
            found[registered] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    return found, missing


def _functions(model: keras.Model) -> list[tuple[str, str, str]]:
    """Custom functions that the model uses, as `_references`: Keras's config has their names alone."""
    functions = [thing for thing in custom_objects(model) if isinstance(thing, types.FunctionType)]
    return [(thing.__module__, thing.__qualname__, keras.saving.get_registered_name(thing)) for thing in functions]


def _references(config: Any) -> Iterator[tuple[str, str, str]]:
    """Module, name and registered name of each class and function that is not Keras's own."""
    if isinstance(config, Mapping):
        module, name = config.get("module"), config.get("class_name")
        if name == "function":
            name = config.get("config")
        if isinstance(module, str) and isinstance(name, str) and module.partition(".")[0] not in _OWN_PACKAGES:
            yield module, name.rpartition(">")[2], str(config.get("registered_name") or name)
        for value in config.values():
            yield from _references(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _references(value)


# What a model takes and makes -----------------------------------------------------------------------------------------


def known_input_columns(model: keras.Model, names: Any = None) -> tuple[Column, ...]:
    """The model's inputs, with the shapes that a subclassed model was built for.

    Args:
        names: see `KerasDriverModel.structure`.

    Raises:
        ModelError: a model that was never built, and does not say its inputs.
    """
    columns = input_columns(model, names)
    if all(column.shape is not None for column in columns):
        return tuple(columns)
    known = _built_shapes(model, [column.name for column in columns])
    if known is None:
        raise ModelError(
            f"model {model.name} does not say what shape its inputs have: call it once on a batch, or make it of "
            f"keras.Input layers"
        )
    return tuple(replace(column, shape=shape) for column, shape in zip(columns, known, strict=True))


def _built_shapes(model: keras.Model, names: Sequence[str]) -> list[tuple[int | None, ...]] | None:
    config = model.get_build_config() or {}
    shapes = config.get("input_shape") or list((config.get("shapes_dict") or {}).values())
    if isinstance(shapes, Mapping):
        shapes = [shapes.get(name) for name in names]
    elif len(names) == 1 and _is_shape(shapes):
        shapes = [shapes]
    if len(shapes) != len(names) or not all(_is_shape(shape) for shape in shapes):
        return None
    return [tuple(shape[1:]) for shape in shapes]


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(v is None or isinstance(v, int) for v in value)


def output_columns(model: keras.Model, columns: Sequence[Column], structure: Structure) -> tuple[Column, ...]:
    """What `KerasTrainer.predict` makes: name, shape and dtype of each output.

    Args:
        columns, structure: what the model is fed; labels are not looked at.

    Raises:
        ModelError: the model does not take such columns.
    """
    made: list[tuple[tuple[int | None, ...] | None, str]]
    tensors = getattr(model, "outputs", None)  # of a graph of layers
    # Lookups may say another shape than they make.
    if tensors and type(model).predict_step is keras.Model.predict_step and not has_lookups(model):
        made = [(tuple(tensor.shape[1:]), keras.backend.standardize_dtype(tensor.dtype)) for tensor in tensors]
    else:
        made = _traced_outputs(model, columns, structure)
    names = flat_names(output_names(model))
    if len(names) != len(made):
        names = [f"output_{index}" for index in range(len(made))]
    columns_made = [Column(name, shape, dtype) for name, (shape, dtype) in zip(names, made, strict=True)]
    return tuple(replace(c, dtype="object") if c.dtype == "string" else c for c in columns_made)


def _traced_outputs(
    model: keras.Model, columns: Sequence[Column], structure: Structure
) -> list[tuple[tuple[int | None, ...] | None, str]]:
    def predict(*tensors: tf.Tensor) -> list[tf.Tensor]:
        outputs = model.predict_step(structure.data(tensors)[:1])
        return [tf.convert_to_tensor(output) for output in keras.tree.flatten(outputs)]

    specs = [batch_spec(column, None) for column in columns]
    try:
        outputs = tf.function(predict, autograph=False).get_concrete_function(*specs).structured_outputs
    except Exception as error:  # what a model's own code raises
        described = ", ".join(f"{column.name} ({column})" for column in columns)
        raise ModelError(f"model {model.name} predicts nothing for the columns {described}: {error}") from error
    return [
        (None if output.shape.rank is None else tuple(output.shape.as_list()[1:]), output.dtype.name)
        for output in outputs
    ]


# What its outputs mean ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meaning:
    """How a model's output is to be read.

    Attributes:
        is_logits: whether class scores are logits, not probabilities.
    """

    task: Task
    is_logits: bool = False


def meaning_of(model: keras.Model, output: Column, task: Task | None = None) -> Meaning:
    """Reads off the compiled loss what the model's single output means.

    Categorical cross-entropies over several units, and binary ones with one unit, stand for classification; whatever
    else (several sigmoid units, other and custom losses) for regression.

    Args:
        task: what the user says that it is.
    """
    name, is_logits = _loss_of(model)
    num_units = (output.shape or (1,))[-1]
    if task is None:
        is_soft = name in _SOFT_LOSSES and num_units != 1
        is_binary = name in _BINARY_LOSSES and num_units == 1
        task = "classification" if is_soft or is_binary or name in _EITHER_LOSSES else "regression"
    return Meaning(task, is_logits)


def _loss_of(model: keras.Model) -> tuple[str, bool]:
    """The name of the loss function, and whether it takes logits."""
    loss = model.loss
    if isinstance(loss, Mapping):
        loss = next(iter(loss.values()), None)
    elif isinstance(loss, list | tuple):
        loss = loss[0] if loss else None
    if isinstance(loss, str):
        if loss.lower() in _EITHER_LOSSES:
            return "crossentropy", False
        loss = keras.losses.get(loss)
    function = getattr(loss, "fn", loss)
    is_logits = getattr(loss, "from_logits", None)
    if is_logits is None:
        is_logits = getattr(loss, "_fn_kwargs", {}).get("from_logits", False)
    return str(getattr(function, "__name__", "")), bool(is_logits)
