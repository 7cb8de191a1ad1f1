"""Dataclasses as plain values that msgpack can write, and back, with every value's type checked by its annotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

_PLAIN = frozenset({bool, int, float, str, type(None)})
_MAX_FLOAT = int(np.finfo(np.float64).max)


class WrongValueError(Exception):
    """A value that is not of the kind that its field asks for."""


def as_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists, numpy's scalars as Python's."""
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    names = _names(kind)
    if names is not None:
        return {name: as_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def build(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `as_plain`, where every value is checked.

    Args:
        kind: a dataclass, or a field's annotation: a plain type, a union of plain types or of one dataclass and None,
            ``tuple[X, ...]`` or ``Mapping[str, X]``.
        where: names `value` in the error.

    Raises:
        WrongValueError: a value of another kind; a field that is missing and has no default, or is not known.
    """
    if type(value) is kind:  # most values; what follows is slow
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _build_dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {build(str, key, where): build(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    kinds = arguments if origin in (Union, UnionType) else (kind,)
    if isinstance(value, dict) and is_dataclass(kinds[0]):
        return _build_dataclass(kinds[0], value, where)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int and abs(value) <= _MAX_FLOAT:
        return float(value)
    expected = " or ".join(getattr(each, "__name__", str(each)) for each in kinds)
    raise WrongValueError(f"{where} is {str(value)[:100]!r} ({type(value).__name__}), expected {expected}")


def _build_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, required = _fields(kind)
    if unknown := sorted(str(name) for name in value.keys() - hints.keys()):
        raise WrongValueError(f"{where} has a field {unknown[0][:100]!r} that this version does not know")
    if missing := sorted(required - value.keys()):
        raise WrongValueError(f"{where} has no field {missing[0]!r}")
    return kind(**{name: build(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@cache
def _names(kind: type) -> tuple[str, ...] | None:
    """Of a dataclass's fields; None of another type."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Annotations of all fields, and which must be there: one that came later has a default, for older files."""
    required = (field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING)
    return get_type_hints(kind), frozenset(required)
