"""The error tree: as printed, and the same after the way from an executor to the driver."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

from tensorspark import errors
from tensorspark.errors import RefusedError, StagingError, TensorsparkError, WorkerFailedError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
]
BUILT_IN = {
    "ValueError": ValueError,
    "OSError": OSError,
    "RuntimeError": RuntimeError,
    "ConnectionError": ConnectionError,
}


def _printed_tree() -> dict[str, tuple[str | None, str | None]]:
    """Class name to (parent's name, name of the built-in class beside it), read off the module's docstring."""
    assert errors.__doc__ is not None
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    (?P<stem>[│├└─ ]*)(?P<name>\w+Error)\b(?:\s+\(also (?P<also>\w+)\))?", line)
        if match is None:
            continue
        depth = len(match["stem"]) // 4
        path[depth:] = [match["name"]]
        tree[match["name"]] = (path[depth - 1] if depth else None, match["also"])
    return tree


def test_the_printed_tree_names_exactly_the_classes() -> None:
    assert sorted(_printed_tree()) == sorted(cls.__name__ for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_printed_tree_shows_each_class_under_its_bases(cls: type[BaseException]) -> None:
    parent, also = _printed_tree()[cls.__name__]
    expected = [parent or "Exception"] + ([also] if also else [])
    assert [base.__name__ for base in cls.__bases__] == expected
    assert also is None or issubclass(cls, BUILT_IN[also])


def _make(cls: type[TensorsparkError]) -> TensorsparkError:
    if cls is WorkerFailedError:
        return WorkerFailedError("worker 3 raised", partition=3, host="node-7", worker_traceback="Traceback ...")
    return cls("expected this, got that")


def _clones(error: TensorsparkError) -> list[Any]:
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    return [*pickled, copy.copy(error), copy.deepcopy(error)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling_with_its_attributes(cls: type[TensorsparkError]) -> None:
    error = _make(cls)
    error.added_later = {"rows": [1, 2]}  # type: ignore[attr-defined]
    error.add_note("seen on node-7")
    for clone in _clones(error):
        assert type(clone) is cls
        assert str(clone) == str(error)
        assert clone.args == error.args
        assert vars(clone) == vars(error)


def test_a_failed_worker_keeps_where_it_failed_after_pickling() -> None:
    for clone in _clones(_make(WorkerFailedError)):
        assert (clone.partition, clone.host, clone.worker_traceback) == (3, "node-7", "Traceback ...")


def test_a_failed_worker_without_details_says_so() -> None:
    for clone in _clones(WorkerFailedError("gave up")):
        assert (clone.partition, clone.host, clone.worker_traceback) == (None, None, "")


def test_an_error_of_the_file_system_keeps_its_number_after_pickling() -> None:
    for clone in _clones(StagingError(28, "no space left")):
        assert (clone.errno, clone.strerror) == (28, "no space left")


def test_every_refusal_has_a_code_of_its_own() -> None:
    refusals = [cls for cls in CLASSES if issubclass(cls, RefusedError)]
    assert len(refusals) >= 5
    codes = [cls.__dict__.get("code") for cls in refusals]
    assert all(isinstance(code, str) and code for code in codes)
    assert len(set(codes)) == len(codes)


def test_every_class_says_when_it_is_raised() -> None:
    assert [cls.__name__ for cls in CLASSES if not (cls.__dict__.get("__doc__") or "").strip()] == []
