"""What can be known to go wrong before training starts, found out in a second by one small Spark job.

`examine` looks at the driver and at every slot and says what it found, a `CheckResult` a check; `require_ready` raises
the first thing that is wrong. ``python -m tensorspark doctor`` prints the same results.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tensorspark
from tensorspark.data.staging import StagedFile, StagingDirectory
from tensorspark.driver import probe
from tensorspark.driver.jobs import SparkJob, count_slots, summary
from tensorspark.driver.probe import PACKAGES, REACHABLE, STAGING_ON_EXECUTORS, TMP_ON_EXECUTORS, Report
from tensorspark.errors import ConfigError, StagingError, TensorsparkError, WorkerFailedError
from tensorspark.ps.client import ServerAddress

logger = logging.getLogger(__name__)

_DESCRIPTION = "tensorspark: can the executors train?"
_SHARDS_REACHABLE = "shards reachable"
_TMP_ON_DRIVER, _STAGING_ON_DRIVER = "temporary directory on driver", "staging directory on driver"
_POINT = "install it there, or point spark.pyspark.python (PYSPARK_PYTHON) to a Python that has it"
_SHIP = (
    "install it there, ship it with --py-files (spark.submit.pyFiles) and the zip that `make dist` builds, or point "
    "spark.pyspark.python (PYSPARK_PYTHON) to a Python that has it"
)


class Status(enum.Enum):
    """How a check ended; the value is what `CheckResult` prints."""

    OK = "ok"
    WARNING = "warn"
    SKIPPED = "skip"
    FAILED = "FAIL"


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        detail: what was found; where the check failed, also which setting to change.
        error: what `require_ready` raises: `detail` is its text. None unless the check failed.

    >>> print(CheckResult("slots", "2 slots on 1 host"))
    ok   slots: 2 slots on 1 host
    """

    name: str
    detail: str
    status: Status = Status.OK
    error: TensorsparkError | None = None

    @classmethod
    def failed(cls, name: str, error: TensorsparkError) -> CheckResult:
        return cls(name, str(error), Status.FAILED, error)

    def __str__(self) -> str:
        """One line."""
        return f"{self.status.value:<4} {self.name}: {' '.join(self.detail.split())}"


class _JobFailedError(Exception):
    """The job came to no reports; `result` says why."""

    def __init__(self, result: CheckResult) -> None:
        super().__init__(result.detail)
        self.result = result


def require_ready(
    spark_context: Any,
    address: ServerAddress,
    *,
    hdfs_dir: str | None,
    tmp_dir: str,
    run_id: str,
    user: str = "",
    shards: Sequence[ServerAddress] = (),
) -> None:
    """Raises the first thing that keeps this cluster from training, and logs what may; see `examine`.

    Raises:
        ConfigError: no slots, or a Python, TensorFlow, tensorspark or package that is absent or another one.
        ServerUnreachableError: an executor cannot reach the server, or a shard; names the setting to change.
        StagingError: the staging or temporary directory cannot be used, on the driver or on an executor.
        TransportError: what an executor reached is not this run's server.
        WorkerFailedError: the job failed in another way.
    """
    results = examine(
        spark_context, address, hdfs_dir=hdfs_dir, tmp_dir=tmp_dir, run_id=run_id, user=user, shards=shards
    )
    for result in results:
        if result.status is Status.WARNING:
            logger.warning("%s: %s", result.name, result.detail)
    for result in results:
        if result.error is not None:
            raise result.error


def examine(
    spark_context: Any,
    address: ServerAddress | None,
    *,
    hdfs_dir: str | None,
    tmp_dir: str,
    run_id: str,
    user: str = "",
    timeout_s: float | None = None,
    shards: Sequence[ServerAddress] = (),
) -> list[CheckResult]:
    """Checks driver and executors. Never raises what a check finds; leaves no file behind.

    Args:
        address: of a `ParameterServer` that serves a run; None where there is none to reach.
        hdfs_dir, user: the staging directory, and who to write to HDFS as; None where the graph travels as a broadcast.
        run_id: names the job group, the files and the directories.
        timeout_s: how long slots and tasks may take altogether; None takes the address's `io_timeout_s`.
        shards: addresses of the servers beside the first, where the weights are in several shards.
    """
    if timeout_s is None:
        timeout_s = 120.0 if address is None else address.io_timeout_s
    unique = f"{run_id}-check-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        staging, staged = _check_staging(stack, hdfs_dir, unique, user)
        on_driver = [_check_tmp_dir(tmp_dir, unique), staging]
        request = {
            "version": tensorspark.__version__,
            "address": None if address is None else asdict(address),
            "shards": [asdict(shard) for shard in shards],
            "staged": None if staged is None else asdict(staged),
            "tmp_dir": tmp_dir,
            "run_id": unique,
        }
        try:
            num_slots, reports = _ask_executors(spark_context, request, timeout_s)
        except _JobFailedError as failure:
            return [failure.result, *on_driver]
    hosts = {report["host"] for report in reports}
    return [
        CheckResult("slots", f"{_counted(num_slots, 'slot')} on {_counted(len(hosts), 'host')}"),
        *_compare(probe.make_inventory()(), reports),
        *on_driver,
        *_gather(reports, request),
    ]


# The driver's own


def _check_tmp_dir(tmp_dir: str, run_id: str) -> CheckResult:
    error = probe.problem_of(lambda: probe.use_tmp_dir(tmp_dir, run_id))
    if error is not None:
        return CheckResult.failed(_TMP_ON_DRIVER, error)
    return CheckResult(_TMP_ON_DRIVER, f"{tmp_dir} is writable")


def _check_staging(
    stack: contextlib.ExitStack, hdfs_dir: str | None, run_id: str, user: str
) -> tuple[CheckResult, StagedFile | None]:
    """Publishes a file for the executors to read; `stack` removes it."""
    if hdfs_dir is None:
        detail = "spark.hdfs.dir is not set: the graph travels as a Spark broadcast"
        return CheckResult(_STAGING_ON_DRIVER, detail, Status.SKIPPED), None
    try:
        directory = StagingDirectory(hdfs_dir, run_id, user=user)
        stack.callback(_remove, directory)
        staged = directory.publish("probe", probe.PROBE)
    except StagingError as error:
        return CheckResult.failed(_STAGING_ON_DRIVER, error), None
    return CheckResult(_STAGING_ON_DRIVER, f"{hdfs_dir} is writable"), staged


def _remove(directory: StagingDirectory) -> None:
    try:
        directory.remove()
    except StagingError as error:
        logger.warning("%s was left behind: %s", directory.url, error)


# The job


def _ask_executors(spark_context: Any, request: Mapping[str, Any], timeout_s: float) -> tuple[int, list[Report]]:
    """What every slot says of itself, and how many slots there are.

    Where there is no slot yet, the first task waits for one, which also makes dynamic allocation start executors. Slots
    that came meanwhile are asked in a second job.
    """
    deadline = time.monotonic() + timeout_s
    reports: list[Report] = []
    while len(reports) < (num_tasks := max(1, count_slots(spark_context))):
        answer = _run_tasks(spark_context, request, num_tasks, max(0.0, deadline - time.monotonic()))
        if answer is None:
            raise _JobFailedError(CheckResult.failed("slots", _explain_wait(spark_context, timeout_s)))
        reports = answer
    return len(reports), reports


def _run_tasks(spark_context: Any, request: Mapping[str, Any], num_tasks: int, timeout_s: float) -> list[Report] | None:
    """A report of each task; None where they did not end in time."""
    task = _make_task(request)

    def ask() -> list[Report]:
        reports: list[Report] = spark_context.parallelize(range(num_tasks), num_tasks).mapPartitions(task).collect()
        return reports

    group = f"tensorspark-{request['run_id']}-{num_tasks}"
    with SparkJob(spark_context, ask, group=group, description=_DESCRIPTION) as job:
        if not job.wait(timeout_s):
            return None
    if job.error is not None:
        raise _JobFailedError(_translate(job.error, spark_context.master)) from job.error
    reports: list[Report] = job.result
    return reports


def _make_task(request: Mapping[str, Any]) -> Callable[[Iterable[Any]], Iterator[Report]]:
    """As `probe.make_probe`, and pickled by value as well; who has tensorspark then looks for the shards, too."""
    task, name, addresses = probe.make_probe(request), _SHARDS_REACHABLE, request["shards"]
    if not addresses:
        return task

    def probe_shards(partition: Iterable[Any]) -> Iterator[Report]:
        for report in task(partition):
            if report["checks"]:  # it has this tensorspark
                from tensorspark.ps.link import ServerAddress
                from tensorspark.shards.places import problem_here

                report["checks"][name] = problem_here([ServerAddress(**address) for address in addresses])
            yield report

    return probe_shards


def _explain_wait(spark_context: Any, timeout_s: float) -> TensorsparkError:
    if count_slots(spark_context) == 0:
        return ConfigError(
            f"expected at least one slot, got none within {timeout_s:g} s; set spark.executor.instances (on a "
            f"standalone cluster spark.cores.max), spark.executor.cores and spark.executor.memory to what the cluster "
            f"at {spark_context.master} has free"
        )
    return WorkerFailedError(
        f"the check of the executors did not end within {timeout_s:g} s: other jobs hold the slots, or the executors "
        f"hang; free slots, or set spark.tensorspark.io.timeout, which is how long it may take"
    )


def _translate(error: BaseException, master: str) -> CheckResult:
    """The result of a job that failed before its tasks could report."""
    text = str(error)
    where = re.search(r"\(TID \d+\) \((\S+) executor", text)
    executors = f"the executors (on {where[1]}, for one)" if where else "the executors"
    point = "set spark.pyspark.python (PYSPARK_PYTHON)"
    if versions := re.search(r"different (?:minor )?version:? (\S+) than that in driver:? ([\d.]+\d)", text):
        problem = f"{executors} run Python {versions[1]}, the driver {versions[2]}; {point} to the driver's version"
        return CheckResult.failed("Python", ConfigError(problem))
    if program := re.search(r'Cannot run program "([^"]+)"', text):
        problem = f"{executors} cannot start Python as {program[1]!r}; {point} to a Python that all hosts have there"
        return CheckResult.failed("Python", ConfigError(problem))
    if missing := re.search(r"No module named '(\w+)", text):
        problem = f"the Python of {executors} has no {missing[1]}; {_POINT}"
        return CheckResult.failed("packages", ConfigError(problem))
    if re.search(r"stopped SparkContext|SparkContext was shut ?down", text):
        problem = f"Spark ended this application: {master} did not answer or did not want it; set spark.master"
        return CheckResult.failed("slots", ConfigError(problem))
    problem = f"the check of the executors failed: {summary(error)}"
    return CheckResult.failed("executors", WorkerFailedError(problem, host=where[1] if where else None))


# What the reports mean


def _compare(driver: Report, reports: list[Report]) -> Iterator[CheckResult]:
    pythons = sorted({report["python"] for report in reports})  # Spark itself refuses another minor version
    yield CheckResult("Python", f"{driver['python']} on the driver, {', '.join(pythons)} on the executors")
    details: dict[str, tuple[str, Callable[[Report], CheckResult | None]]] = {
        "packages": (f"executors have {', '.join(PACKAGES)}", _judge_packages),
        "tensorspark": (f"{tensorspark.__version__} everywhere", _judge_tensorspark),
        "TensorFlow": (f"{driver['tensorflow']} everywhere", lambda report: _judge_tensorflow(driver, report)),
    }
    for name, (detail, judge) in details.items():
        yield from _by_host(name, detail, ((report["host"], judge(report)) for report in reports))


def _by_host(name: str, detail: str, found: Iterable[tuple[str, CheckResult | None]]) -> list[CheckResult]:
    """The first problem of each host: its other slots say the same. `detail` where there is none."""
    problems: dict[str, CheckResult] = {}
    for host, problem in found:
        if problem is not None:
            problems.setdefault(host, problem)
    return list(problems.values()) or [CheckResult(name, detail)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _executor(report: Report) -> str:
    return f"the executor on {report['host']} ({report['executable']})"


def _judge_packages(report: Report) -> CheckResult | None:
    if not report["missing"]:
        return None
    return CheckResult.failed(
        "packages", ConfigError(f"{_executor(report)} has no {', '.join(report['missing'])}; {_POINT}")
    )


def _judge_tensorspark(report: Report) -> CheckResult | None:
    version = report["tensorspark"]
    if version is None and report["missing"]:
        return CheckResult("tensorspark", f"{_executor(report)} lacks what it needs", Status.SKIPPED)
    if version is None:
        problem = f"{_executor(report)} cannot import tensorspark ({report['problem']}); {_SHIP}"
    elif version != tensorspark.__version__:
        problem = f"{_executor(report)} has tensorspark {version}, the driver {tensorspark.__version__}; {_SHIP}"
    elif report["problem"]:
        problem = f"{_executor(report)} has a tensorspark that is not the driver's ({report['problem']}); {_SHIP}"
    else:
        return None
    return CheckResult.failed("tensorspark", ConfigError(problem))


def _judge_tensorflow(driver: Report, report: Report) -> CheckResult | None:
    ours, theirs = driver["tensorflow"], report["tensorflow"]
    if ours is None:
        problem = f"the driver's Python ({driver['executable']}) has no TensorFlow; install it, or set "
        return CheckResult.failed("TensorFlow", ConfigError(f"{problem}PYSPARK_DRIVER_PYTHON to a Python that has it"))
    if theirs is None:
        return CheckResult.failed("TensorFlow", ConfigError(f"{_executor(report)} has no TensorFlow; {_POINT}"))
    if ours == theirs:
        return None
    problem = f"{_executor(report)} has TensorFlow {theirs}, the driver {ours}"
    if ours.split(".")[:2] == theirs.split(".")[:2]:
        return CheckResult("TensorFlow", f"{problem}; the same version on all hosts is safer", Status.WARNING)
    return CheckResult.failed("TensorFlow", ConfigError(f"{problem}; install the driver's version there, or {_POINT}"))


def _gather(reports: list[Report], request: Mapping[str, Any]) -> Iterator[CheckResult]:
    """The results of `check_here`."""
    address = request["address"]
    details = {
        REACHABLE: f"executors reach {address['host']}:{address['port']} and its token is known" if address else "",
        **({_SHARDS_REACHABLE: f"executors reach {_places(request['shards'])}"} if request["shards"] else {}),
        TMP_ON_EXECUTORS: f"{request['tmp_dir']} is writable",
        STAGING_ON_EXECUTORS: "readable and writable",
    }
    for name, detail in details.items():
        asked = [(report["host"], report["checks"][name]) for report in reports if name in report["checks"]]
        if asked:
            found = ((host, CheckResult.failed(name, error) if error else None) for host, error in asked)
            yield from _by_host(name, detail, found)
        else:
            yield CheckResult(name, _why_unchecked(name, request), Status.SKIPPED)


def _places(addresses: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{address['host']}:{address['port']}" for address in addresses)


def _why_unchecked(name: str, request: Mapping[str, Any]) -> str:
    if name == REACHABLE and request["address"] is None:
        return "there is no server to reach"
    if name == STAGING_ON_EXECUTORS and request["staged"] is None:
        return "there is none to check"
    return "the executors could not get so far"
