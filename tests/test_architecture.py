"""The library's shape: which room may import which, where the big dependencies live, how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tensorspark"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Arrows point left: a room may import rooms before it only. This is the order, then exactly what each may import.
ORDER = (
    *("errors", "config", "plain", "history", "weights", "data", "trainers", "telemetry", "dashboard"),
    *("ps", "shards", "steps"),
    *("exchange", "worker", "driver", "session"),
    *("ml", "core", "compat"),
    *("daemon", "cli", "__main__"),
)
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "plain": set(),
    "history": {"errors"},
    "weights": {"errors"},
    "data": {"errors", "config"},
    "trainers": {"errors", "weights", "data"},
    "telemetry": {"errors", "plain", "history", "data"},
    "dashboard": {"errors", "telemetry"},
    "ps": {"errors", "config", "plain", "history", "weights", "telemetry"},
    "shards": {"errors", "plain", "history", "weights", "telemetry", "ps"},
    "steps": {"data", "trainers", "ps"},
    "exchange": {"errors", "weights", "trainers", "telemetry", "ps", "shards", "steps"},
    "worker": {"errors", "config", "weights", "data", "trainers", "telemetry", "ps", "shards", "steps", "exchange"},
    # Of trainers, what is free of TensorFlow: a test below says so.
    "driver": {
        *("errors", "config", "history", "weights", "data", "trainers", "telemetry", "dashboard"),
        *("ps", "shards", "worker"),
    },
    "session": {"errors", "config", "history", "weights", "data", "trainers", "ps", "shards", "worker", "driver"},
    "ml": {"errors", "config", "history", "weights", "data", "trainers", "ps", "driver", "session"},
    "core": {"errors", "config", "weights", "ps", "session"},
    "compat": {"data"},
    "daemon": {"errors"},
    "cli": {"errors", "config", "weights", "telemetry", "dashboard", "ps", "driver"},
    "__main__": {"cli"},
}
# Dependencies that live in few places: rooms, rooms within a room, or modules.
HOMES: dict[str, set[str]] = {
    "tensorflow": {"trainers"},
    "keras": {"trainers"},
    "bokeh": {"dashboard"},
    "prometheus_client": {"telemetry.prometheus"},
    "tensorboard": {"telemetry.tensorboard", "telemetry.hyperparameters"},
    "pyspark": {
        *("session", "driver", "ml", "cli", "daemon", "compat", "trainers.keras_objects"),
        *("data.tfrecord.examples", "data.tfrecord.frames", "data.tfrecord.rdds", "data.tfrecord.source"),
    },
    # What a shard's process reads from its parent, or Spark hands to its task; nothing that comes over a network.
    "pickle": {"core.partitioner", "shards.host", "shards.processes"},
    "cloudpickle": set(),
    "dill": set(),
    "marshal": set(),
    "shelve": set(),
}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _dotted(path: Path) -> str:
    """`data.columns` for tensorspark/data/columns.py; empty for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a module imports, absolute and dotted (also inside functions and under TYPE_CHECKING)."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which room is meant"
            # "from tensorspark import config" names the room only in what follows.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _room(dotted: str) -> str:
    return dotted.partition(".")[0]


def _is_within(dotted: str, homes: set[str]) -> bool:
    return any(f"{dotted}.".startswith(f"{home}.") for home in homes)


def _imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in _imports(path):
        if name.startswith("tensorspark."):
            yield name.split(".")[1], line


def test_every_module_belongs_to_a_room() -> None:
    assert {_room(_dotted(path)) for path in MODULES} - {""} == set(ORDER)


def test_the_allowed_imports_follow_the_order_of_the_rooms() -> None:
    assert list(MAY_IMPORT) == list(ORDER)
    for position, room in enumerate(ORDER):
        assert MAY_IMPORT[room] <= set(ORDER[:position]), room


# The package's own __init__ may import anything, lazily: what that costs is tested apart, in a fresh process.
@pytest.mark.parametrize("path", [path for path in MODULES if _dotted(path)], ids=_dotted)
def test_no_import_points_up(path: Path) -> None:
    room = _room(_dotted(path))
    wrong = [(name, line) for name, line in _imported_rooms(path) if name not in MAY_IMPORT[room] | {room}]
    assert not wrong, f"{_dotted(path)} may import {sorted(MAY_IMPORT[room])}, but imports (room, line) {wrong}"


@pytest.mark.parametrize(("package", "homes"), HOMES.items(), ids=list(HOMES))
def test_a_dependency_stays_in_its_home(package: str, homes: set[str]) -> None:
    strays = [
        f"{_dotted(path)}:{line}"
        for path in MODULES
        for name, line in _imports(path)
        if _room(name) == package and not _is_within(_dotted(path), homes)
    ]
    assert not strays, f"{package} belongs in {sorted(homes) or 'no module'}"


def test_importing_the_package_and_its_rooms_without_spark_imports_neither_tensorflow_nor_pyspark() -> None:
    modules = [
        f"tensorspark.{_dotted(path)}"
        for path in MODULES
        if _room(_dotted(path)) not in ("", "trainers", "driver", "session", "ml", "core", "compat")
        # Spark's data source is made of Spark's classes.
        and not (_room(_dotted(path)) == "data" and _is_within(_dotted(path), HOMES["pyspark"]))
    ]
    code = (
        "import importlib, sys\n"
        "import tensorspark\n"
        "tensorspark.DeltaWeightCombiner, tensorspark.History\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'tensorflow', 'keras', 'pyspark'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_drivers_rooms_do_not_import_tensorflow_by_being_imported() -> None:
    rooms = ("driver", "session", "ml", "core")
    modules = [f"tensorspark.{_dotted(path)}" for path in MODULES if _room(_dotted(path)) in rooms]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("path", MODULES, ids=_dotted)
def test_a_module_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=_dotted)
def test_a_function_has_at_most_60_lines_of_code(path: Path) -> None:
    """Docstrings do not count: an interface with many arguments has a long one."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                assert docstring.end_lineno is not None
                num_lines -= docstring.end_lineno - docstring.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=_dotted)
def test_the_library_never_prints(path: Path) -> None:
    """Nor does it write to stdout by another way, but for the command line, whose results go there."""
    nodes = list(ast.walk(_tree(path)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    if _room(_dotted(path)) != "cli":
        assert not [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr == "stdout"]
