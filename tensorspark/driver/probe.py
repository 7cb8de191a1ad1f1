"""What a task of the preflight does on an executor: says which Python this is and what a worker could do there.

Executors may lack tensorspark, what it needs, or have another version of it. So `make_probe` returns a function that
travels by value and uses nothing but Python's own modules; `check_here` follows where that found this package.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tensorspark.data.staging import StagedFile, StagingDirectory, fetch, make_local_run_dir, remove_local
from tensorspark.errors import ServerUnreachableError, StagingError, TensorsparkError, TransportError
from tensorspark.ps.client import ParameterClient, ServerAddress

# What a worker imports. tornado and safetensors are the driver's.
PACKAGES = ("numpy", "msgpack", "fsspec")
# The distributions that hold the package tensorflow; any of them will do.
_TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-macos", "intel-tensorflow", "tf-nightly")
PROBE = b"Written by tensorspark to see whether this directory can be used; it may be removed.\n"

# The names of the checks.
REACHABLE = "driver reachable"
TMP_ON_EXECUTORS = "temporary directory on executors"
STAGING_ON_EXECUTORS = "staging directory on executors"

# What one slot says of itself; plain values, and errors of `tensorspark.errors` under "checks".
Report = dict[str, Any]


def make_inventory() -> Callable[[], Report]:
    """What says which Python this is and what it has. Pickled by value, so all that it names is within it."""
    packages, distributions = PACKAGES, _TENSORFLOW

    def inventory() -> Report:
        import importlib.metadata
        import importlib.util
        import platform
        import socket
        import sys

        def is_installed(package: str) -> bool:
            try:
                return importlib.util.find_spec(package) is not None
            except (ImportError, ValueError):
                return False

        def find_version() -> str:
            for distribution in distributions:
                try:
                    return importlib.metadata.version(distribution)
                except importlib.metadata.PackageNotFoundError:
                    continue
            return "of unknown version"

        return {
            "host": socket.gethostname(),
            "executable": sys.executable,
            "python": platform.python_version(),
            "missing": [package for package in packages if not is_installed(package)],
            # Its metadata: importing TensorFlow takes seconds.
            "tensorflow": find_version() if is_installed("tensorflow") else None,
            "tensorspark": None,
            "problem": "",
            "checks": {},
        }

    return inventory


def make_probe(request: Mapping[str, Any]) -> Callable[[Iterable[Any]], Iterator[Report]]:
    """A task's function. Pickled by value too: `request` holds plain values."""
    inventory = make_inventory()

    def probe(partition: Iterable[Any]) -> Iterator[Report]:
        for _ in partition:
            report = inventory()
            check: Callable[[Mapping[str, Any]], dict[str, TensorsparkError | None]] | None = None
            try:
                if not report["missing"]:
                    import tensorspark

                    report["tensorspark"] = getattr(tensorspark, "__version__", "of unknown version")
                if report["tensorspark"] == request["version"]:
                    from tensorspark.driver.probe import check_here

                    check = check_here
            except Exception as error:  # whatever an unknown package raises that has our name
                report["problem"] = f"{type(error).__name__}: {error}"
            if check is not None:
                report["checks"] = check(request)
            yield report

    return probe


def check_here(request: Mapping[str, Any]) -> dict[str, TensorsparkError | None]:
    """Does in this process what every worker must be able to do: what keeps it from that, or None, by check."""
    run_id = f"{request['run_id']}-{secrets.token_hex(4)}"
    tmp_dir = request["tmp_dir"]
    found = {TMP_ON_EXECUTORS: problem_of(lambda: use_tmp_dir(tmp_dir, run_id))}
    if request["address"] is not None:
        found[REACHABLE] = problem_of(lambda: _reach(ServerAddress(**request["address"])))
    # A staged file is fetched into the temporary directory.
    if request["staged"] is not None and found[TMP_ON_EXECUTORS] is None:
        found[STAGING_ON_EXECUTORS] = problem_of(lambda: _use_staging(StagedFile(**request["staged"]), tmp_dir, run_id))
    return found


def problem_of(check: Callable[[], None]) -> TensorsparkError | None:
    try:
        check()
    except TensorsparkError as error:
        return error
    return None


def use_tmp_dir(tmp_dir: str, run_id: str) -> None:
    directory = make_local_run_dir(tmp_dir, run_id)
    try:
        (directory / "probe").write_bytes(PROBE)
    except OSError as error:
        raise StagingError(
            f"spark.tmp.dir: expected {tmp_dir!r} on {socket.gethostname()} to take a file, but {error}; make room "
            f"there, or set spark.tmp.dir to another local directory that all hosts have"
        ) from error
    finally:
        remove_local(tmp_dir, run_id)


def _reach(address: ServerAddress) -> None:
    try:
        ParameterClient(address).close()
    except ServerUnreachableError:
        raise  # names the settings already
    except TransportError as error:
        raise type(error)(
            f"host {socket.gethostname()} reached something else than this run's parameter server: {error}; set "
            f"spark.tensorspark.server.host and spark.tensorspark.server.port to where executors reach this driver"
        ) from error


def _use_staging(staged: StagedFile, tmp_dir: str, run_id: str) -> None:
    """Reads the driver's file, and writes one beside it; the driver removes what is left."""
    try:
        fetch(staged, tmp_dir, run_id)
        directory = StagingDirectory(staged.url.rpartition("/")[0], run_id, user=staged.user)
        directory.publish("probe", PROBE)
        directory.remove()
    except StagingError as error:
        raise StagingError(
            f"host {socket.gethostname()}: {error} Set spark.hdfs.dir to a directory that the driver and all executors "
            f"share and may write to."
        ) from error
    finally:
        remove_local(tmp_dir, run_id)
