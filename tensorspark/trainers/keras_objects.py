"""How a Keras model travels: as bytes, and back as a compiled model in another process.

The architecture and what `compile` was given travel as Keras's own configs. Classes and functions that Keras does not
know travel beside them: by value where the executors cannot import them (a program's or a notebook's own), else by
reference. A model that a builder function makes travels as that function. The values of variables are not here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from tensorspark.errors import ModelError
from tensorspark.trainers.keras_tables import set_tables, tables_of
from tensorspark.trainers.startup import importing

with importing():
    import keras

# Their objects lead nowhere that a config could name, and hold much.
_FOREIGN = ("builtins", "numpy", "tensorflow", "threading", "weakref", "inspect", "functools", "collections")
_BASE_OPTIONS = ("name", "dtype", "trainable")
_BY_CONFIG = "write get_config() for it, or pass a function without arguments that builds and compiles the model"


def pack_model(model: keras.Model) -> bytes:
    """The model's architecture, how it is compiled, and the custom classes and functions of both.

    Raises:
        ModelError: a model, layer, loss or metric that has no config, or custom objects that share a name.
    """
    _check_compile(model)
    found = custom_objects(model)
    try:
        with _named_lambdas(found):
            config = keras.saving.serialize_keras_object(model)
            known = _by_registered_name(found)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{_describe(model)} cannot travel to the executors: {_BY_CONFIG}; {error}") from error
    config.pop("build_config", None)  # the executor builds it from the columns, as the driver did
    compile_config = config.pop("compile_config", None)
    named = set(_names(config)) | set(_names(compile_config))
    custom = {name: candidates for name, candidates in known.items() if name in named}
    for name, candidates in custom.items():
        if len(candidates) > 1:
            raise ModelError(f"the model has {len(candidates)} custom objects named {name}: give them different names")
    objects = {name: candidates[0] for name, candidates in custom.items()}
    _keep_what_constructors_take(config, objects)
    recipe = {"config": config, "compile": compile_config, "custom": objects, "tables": tables_of(model)}
    # What was Keras's policy when the model was made, not what it is now: it decides on scaling the loss.
    return _pack(recipe, list(objects.values()), model.dtype_policy.name)


def pack_builder(builder: Callable[[], Any]) -> bytes:
    """A function that builds and compiles a model, or makes what else an executor needs."""
    return _pack({"builder": builder}, [builder], keras.config.dtype_policy().name)


def unpack_model(packed: bytes) -> keras.Model:
    """The model that `pack_model` or `pack_builder` packed: compiled, with variables of any value, maybe not built.

    Runs what the bytes hold as code: only what the driver staged may come here.

    Raises:
        ModelError: a class or function that this process lacks, or that does not make the model again.
    """
    recipe, settings = _unpack(packed)
    with _keras_settings(settings):
        if "builder" in recipe:
            return built_model(recipe["builder"])
        try:
            with keras.saving.custom_object_scope(recipe["custom"]):
                model = keras.saving.deserialize_keras_object(recipe["config"], safe_mode=False)
                if recipe["compile"]:
                    model.compile_from_config(recipe["compile"])
            set_tables(model, recipe["tables"])
        except Exception as error:  # whatever the constructors of custom classes raise
            raise ModelError(f"the model cannot be made again from its config: {_BY_CONFIG}; {error}") from error
    return model


def unpack_builder(packed: bytes) -> Callable[[], Any]:
    """What `pack_builder` packed, not called. The same care is due as with `unpack_model`."""
    builder: Callable[[], Any] = _unpack(packed)[0]["builder"]
    return builder


def built_model(builder: Callable[[], Any]) -> keras.Model:
    """What a builder function makes, checked to be a compiled model."""
    model = builder()
    if not isinstance(model, keras.Model):
        raise ModelError(f"{_name_of(builder)} returned a {type(model).__name__}; expected a compiled keras.Model")
    require_compiled(model)
    return model


def require_compiled(model: keras.Model) -> None:
    if not model.compiled:
        raise ModelError(f"{_describe(model)} is not compiled: call model.compile(optimizer, loss, ...) first")


def require_tensorflow() -> None:
    """Raises ModelError where Keras computes with something else than TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Keras runs on {keras.backend.backend()}; expected TensorFlow: set KERAS_BACKEND=tensorflow, on executors "
            f"too, before keras is imported"
        )


@dataclass(frozen=True)
class ModelVariables:
    """A built model's variables, each in one place, in an order that is the same in every process.

    Attributes:
        trainable: synchronized first.
        state: float state that training updates otherwise, such as BatchNorm's statistics: synchronized next.
        averages: of the trainable ones, which an optimizer with `use_ema` makes the weights in the end: synchronized
            next.
        slots: the optimizer's other float variables, but for the learning rate and the loss scale; and, as the last,
            its `iterations`, by which Adam corrects their bias.
        local: all others that have a value to begin from: frozen weights, counters, the learning rate.
        seeds: states of the random generators.
    """

    trainable: list[Any]
    state: list[Any]
    averages: list[Any]
    slots: list[Any]
    local: list[Any]
    seeds: list[Any]

    def synchronized(self, *, with_slots: bool) -> list[Any]:
        return [*self.trainable, *self.state, *self.averages, *(self.slots if with_slots else [])]

    def own(self, *, with_slots: bool) -> list[Any]:
        """What a worker keeps to itself."""
        return [*self.local, *([] if with_slots else self.slots)]


def variables_of(model: keras.Model) -> ModelVariables:
    """Sorts the variables of a model whose weights, metrics and optimizer are built."""
    trainable = _unique(model.trainable_variables)
    weights = _unique(model.non_trainable_weights)
    # A frozen layer's weights are non-trainable now, but were made trainable: nothing updates them.
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables if not v.trainable}
    seeds = [v for v in _unique(model.non_trainable_variables) if v.name == "seed_generator_state"]
    state = [v for v in weights if _is_float(v) and id(v) not in frozen]
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    count = getattr(inner, "_iterations", None)  # `iterations` is no variable where gradients are accumulated
    averages = [v for v in getattr(inner, "_model_variables_moving_average", []) if v is not None]
    averaged = {id(v) for v in averages}
    slots: list[Any] = []
    local = [v for v in weights if not _is_float(v) or id(v) in frozen]
    kept = {"learning_rate", "dynamic_scale"}
    for variable in _unique(model.optimizer.variables) if model.optimizer is not None else []:
        if id(variable) not in averaged and variable is not count:
            (slots if _is_float(variable) and variable.name not in kept else local).append(variable)
    if count is not None:
        slots.append(count)
    return ModelVariables(trainable, state, averages, slots, local, seeds)


def _is_float(variable: Any) -> bool:
    return bool(keras.backend.is_float_dtype(variable.dtype))


def _unique(variables: list[Any]) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def _check_compile(model: keras.Model) -> None:
    require_compiled(model)
    cls = type(model)
    if cls.compile is not keras.Model.compile and cls.compile_from_config is keras.Model.compile_from_config:
        raise ModelError(
            f"{cls.__name__} overrides compile(): write get_compile_config() and compile_from_config() for it too, or "
            f"pass a function without arguments that builds and compiles the model"
        )


# What the model refers to -------------------------------------------------------------------------------------------


def custom_objects(model: keras.Model) -> list[Any]:
    """Classes and functions of other modules than Keras's that the model leads to, each once."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        elif isinstance(thing, types.FunctionType | type):
            if _root(thing.__module__) not in ("keras", *_FOREIGN):
                found[id(thing)] = thing
        elif isinstance(thing, types.MethodType):
            waiting.append(thing.__self__)
        elif _root(type(thing).__module__) not in _FOREIGN and not isinstance(thing, keras.Variable | types.ModuleType):
            waiting += [type(thing), *getattr(thing, "__dict__", {}).values()]
    return list(found.values())


def _by_registered_name(found: list[Any]) -> dict[str, list[Any]]:
    known: dict[str, list[Any]] = {}
    for thing in found:
        known.setdefault(keras.saving.get_registered_name(thing), []).append(thing)
    return known


def _names(config: Any) -> Iterator[str]:
    """All names that a config could mean a class or function by."""
    if isinstance(config, Mapping):
        for value in config.values():
            yield from _names(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _names(value)
    elif isinstance(config, str):
        yield config


def _keep_what_constructors_take(config: Any, objects: Mapping[str, Any]) -> None:
    """Drops options that Keras adds to the configs it makes up for classes without `get_config`, but that their
    constructors do not take: `def __init__(self, units)` alone would fail on `trainable` and `dtype`."""
    if isinstance(config, list | tuple):
        for value in config:
            _keep_what_constructors_take(value, objects)
    if not isinstance(config, dict):
        return
    for value in config.values():
        _keep_what_constructors_take(value, objects)
    cls = objects.get(config.get("registered_name") or config.get("class_name") or "")
    if isinstance(cls, type) and getattr(getattr(cls, "get_config", None), "_is_default", False):
        parameters = dict(inspect.signature(cls).parameters)
        own = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n not in _BASE_OPTIONS]
        if issubclass(cls, keras.Model) and own:
            # Keras makes up a config for it too, but of the defaults, whatever the constructor was given.
            raise ModelError(
                f"{cls.__name__} takes {', '.join(own)}, which Keras does not remember for a model: {_BY_CONFIG}"
            )
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            config["config"] = {name: value for name, value in config["config"].items() if name in parameters}


@contextlib.contextmanager
def _named_lambdas(found: list[Any]) -> Iterator[None]:
    """Gives lambdas names, so that Keras refers to them by these: its own way of shipping them loses their globals."""
    lambdas = [thing for thing in found if isinstance(thing, types.FunctionType) and thing.__name__ == "<lambda>"]
    for index, function in enumerate(lambdas):
        function.__name__ = f"tensorspark_lambda_{index}"
    try:
        yield
    finally:
        for function in lambdas:
            function.__name__ = "<lambda>"


# As bytes -----------------------------------------------------------------------------------------------------------


def _cloudpickle() -> Any:
    """The cloudpickle that pyspark brings: an executor always has it, and the driver's very version, which a
    cloudpickle installed apart need not be on either side."""
    from pyspark import cloudpickle

    return cloudpickle


def _pack(recipe: dict[str, Any], objects: list[Any], policy: str) -> bytes:
    cloudpickle = _cloudpickle()
    by_value = {thing.__module__ for thing in objects if _lives_in_program(getattr(thing, "__module__", None))}
    modules = [sys.modules[name] for name in sorted(by_value) if name in sys.modules and name != "__main__"]
    references = [
        [thing.__module__, thing.__qualname__]
        for thing in objects
        if hasattr(thing, "__qualname__") and not _lives_in_program(thing.__module__)
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled = cloudpickle.dumps(recipe)
    except Exception as error:  # pickle raises what the objects raise
        names = ", ".join(_name_of(thing) for thing in objects) or "the model"
        raise ModelError(
            f"{names} cannot travel to the executors: {error}; make what cannot be pickled (sessions, locks, open "
            f"files, tensors) inside the function or class instead of outside"
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
    packed: bytes = msgpack.packb({"references": references, "settings": _settings(policy), "pickled": pickled})
    return packed


def _unpack(packed: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    unpacked = msgpack.unpackb(packed)
    for module, qualname in unpacked["references"]:
        _require_reference(module, qualname)
    try:
        recipe: dict[str, Any] = _cloudpickle().loads(unpacked["pickled"])
    except (ImportError, AttributeError) as error:
        raise ModelError(f"the model needs what this process lacks: {error}; {_how_to_bring('the module')}") from error
    return recipe, unpacked["settings"]


def _require_reference(module: str, qualname: str) -> None:
    try:
        thing: Any = importlib.import_module(module)
        for part in qualname.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the model uses {qualname} of module {module}, which cannot be imported here: {error}; "
            f"{_how_to_bring(module)}"
        ) from error


def _how_to_bring(module: str) -> str:
    return (
        f"ship {module} to the executors (spark-submit --py-files, or sc.addPyFile), install it there, or define the "
        f"class in the program itself"
    )


def _lives_in_program(module: str | None) -> bool:
    """Whether executors cannot be expected to import it: the program, a notebook's cells, a test."""
    if module is None or module in ("__main__", "__mp_main__"):
        return True
    last = module.rpartition(".")[2]
    if last.startswith("test_") or last.endswith("_test") or last == "conftest":
        return True
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        return True


def _settings(policy: Any) -> dict[str, Any]:
    return {
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "image_data_format": keras.config.image_data_format(),
        "dtype_policy": policy,
    }


@contextlib.contextmanager
def _keras_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """The driver's global settings of Keras, which layers and optimizers read while they are made."""
    before = _settings(keras.config.dtype_policy())
    _apply_settings(settings)
    try:
        yield
    finally:
        _apply_settings(before)


def _apply_settings(settings: Mapping[str, Any]) -> None:
    keras.config.set_floatx(settings["floatx"])
    keras.config.set_epsilon(settings["epsilon"])
    keras.config.set_image_data_format(settings["image_data_format"])
    keras.config.set_dtype_policy(settings["dtype_policy"])


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _describe(model: keras.Model) -> str:
    return f"model {model.name} ({type(model).__name__})"


def _name_of(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", None) or type(thing).__name__)
