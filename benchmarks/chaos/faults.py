"""What can go wrong while a program trains, and how it is made to: real signals to real processes.

`train_through` trains once and lets one fault happen on the way. A fault is a function of the `Scene`; it returns when
it was over, on `time.monotonic`: from then on the run can recover.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos.cutting_proxy import CuttingProxy, Direction
from benchmarks.chaos.driver import Application, Training
from benchmarks.chaos.driver_process import DriverError, DriverProcess, Event
from benchmarks.clusters.standalone import StandaloneCluster
from benchmarks.measuring.ports import free_port
from tensorspark.ps.checkpoint import MARK

DEADLINE_S = 120.0
_POLL_S = 0.05
# A fault stops the run at once, or never.
_STANDSTILL_BEGINS_S = 1.0


class Laboratory:
    """A cluster, and a driver on it that goes from training to training until it is killed.

    Args:
        directory: for what drivers write.
        spark: entries of the drivers' Spark configuration.
    """

    def __init__(self, cluster: StandaloneCluster, directory: Path, spark: Mapping[str, str] | None = None) -> None:
        self.cluster = cluster
        self.directory = directory
        self._application = Application(cluster.url, dict(spark or {}))
        self._drivers = ExitStack()
        self._numbers = itertools.count()
        self._driver: DriverProcess | None = None

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._drivers.close()

    def driver(self) -> DriverProcess:
        """One that can train: the one before, if it lives and is idle, else another in its place."""
        if self._driver is None or not self._driver.is_idle:
            self._drivers.close()
            self._driver = DriverProcess(self._application, self.directory / f"driver-{next(self._numbers)}.log")
            self._drivers.enter_context(self._driver)
        return self._driver

    def new_path(self, name: str) -> Path:
        """A path in the directory that nothing else has."""
        return self.directory / f"{name}-{next(self._numbers)}"


@dataclass
class Scene:
    """What a fault happens to.

    Attributes:
        driver: the one that trains; a fault that kills it puts another here.
        begun: what it told when it began.
        proxy: between workers and server; None where the fault did not ask for it.
        events: of drivers that were killed.
    """

    laboratory: Laboratory
    training: Training
    driver: DriverProcess
    random: Random
    begun: Event
    proxy: CuttingProxy | None = None
    events: list[Event] = field(default_factory=list)

    def executors(self) -> list[int]:
        return self.laboratory.cluster.executors(self.begun["application"])

    def python_workers(self, executor: int) -> list[int]:
        return self.laboratory.cluster.python_workers(executor)


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        inflict: does it, and returns when it was over.
        settings: of the session, beside the usual ones.
        needs_proxy: whether workers reach the server through a proxy.
        needs_checkpoints: whether the run writes checkpoints.
    """

    name: str
    inflict: Callable[[Scene], float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_proxy: bool = False
    needs_checkpoints: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        weights: the final ones, as bytes.
        done: the driver's last event.
        seconds: from the session's beginning to the end.
        recovery_s: from the fault's end to the next round that all workers took part in; None without a fault.
    """

    weights: bytes
    done: Event
    seconds: float
    recovery_s: float | None = None


def train_through(
    laboratory: Laboratory, training: Training, fault: Fault | None = None, *, after_steps: int = 0, seed: int = 0
) -> Outcome:
    """Trains; once the run has taken `after_steps` local steps, the fault happens.

    Raises:
        DriverError: the run did not survive it.
    """
    with _prepared(laboratory, training, fault) as (prepared, proxy):
        driver = laboratory.driver()
        driver.begin(prepared)
        begun = driver.wait_for("begin", _is("begun"), DEADLINE_S)
        scene = Scene(laboratory, prepared, driver, Random(seed), begun, proxy)
        recovery_s = None
        if fault is not None:
            driver.wait_for(f"step {after_steps}", _has_steps(after_steps), DEADLINE_S)
            over_at = fault.inflict(scene)
        done = scene.driver.wait_for_end(DEADLINE_S)
        if fault is not None:
            recovery_s = find_recovery_s([*scene.events, *scene.driver.events()], over_at)
    return Outcome(Path(training.weights_path).read_bytes(), done, done["at"] - begun["at"], recovery_s)


def find_recovery_s(events: Sequence[Event], over_at: float) -> float:
    """How long after the fault's end the run stood still.

    After a fault a few steps may still be counted: what was on its way, and the round's other workers'. So this is the
    end of the longest standstill among those that began before the fault's end, or right after it.

    >>> events = [{"event": "status", "at": at, "num_steps": steps} for at, steps in ((1, 10), (2, 12), (2.1, 13))]
    >>> find_recovery_s([*events, {"event": "status", "at": 6.0, "num_steps": 14}], over_at=2.05)
    3.95
    """
    told = [event for event in events if event["event"] == "status"]
    grown_at = [after["at"] for before, after in itertools.pairwise(told) if after["num_steps"] > before["num_steps"]]
    standstills = [
        (end - begin, end)
        for begin, end in itertools.pairwise(grown_at)
        if end > over_at and begin < over_at + _STANDSTILL_BEGINS_S
    ]
    if not standstills:
        raise DriverError("the run took no step after the fault: it came too late")
    return float(max(standstills)[1] - over_at)


@contextmanager
def _prepared(
    laboratory: Laboratory, training: Training, fault: Fault | None
) -> Iterator[tuple[Training, CuttingProxy | None]]:
    """The training as the fault needs it, and the proxy if it needs one."""
    with ExitStack() as stack:
        settings = {**training.settings, **(fault.settings if fault else {})}
        proxy = None
        if fault and fault.needs_proxy:
            settings["server_port"] = free_port()
            proxy = stack.enter_context(CuttingProxy(settings["server_port"]))
        if fault and fault.needs_checkpoints:
            directory = laboratory.new_path("checkpoints")
            directory.mkdir()
            settings |= {"hdfs_dir": directory.as_uri(), "checkpoint_interval_s": 0.5}
        yield replace(training, settings=settings, advertised_port=proxy.port if proxy else None), proxy


# The faults


def _kill_python_worker(scene: Scene) -> float:
    return _kill(scene.python_workers(scene.random.choice(scene.executors())))


def _kill_python_workers(scene: Scene) -> float:
    return _kill([pid for executor in scene.executors() for pid in scene.python_workers(executor)])


def _kill_executor(scene: Scene) -> float:
    return _kill([scene.random.choice(scene.executors())])


def _kill_executors(scene: Scene) -> float:
    return _kill(scene.executors())


def _cut_connection(scene: Scene) -> float:
    assert scene.proxy is not None
    return scene.proxy.cut(scene.random.choice(list(Direction)), DEADLINE_S)


def _stop_python_worker(scene: Scene) -> float:
    """Until the server has taken its partition away; then it goes on, and finds its connection closed."""
    pids = scene.python_workers(scene.random.choice(scene.executors()))
    begin = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        scene.driver.wait_for(
            "lost lease", lambda event: event["at"] > begin and event.get("num_lost", 0) > 0, DEADLINE_S
        )
    finally:
        over_at = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    return over_at


def _kill_driver(scene: Scene) -> float:
    """And restores it: another driver, with an application of its own, goes on from the newest checkpoint."""
    url = scene.begun["checkpoint_dir"]
    _wait_for_checkpoint(Path(url.removeprefix("file://")))
    over_at = scene.driver.kill()
    scene.events += scene.driver.events()
    scene.driver = scene.laboratory.driver()
    scene.driver.begin(replace(scene.training, restore_url=url))
    return over_at


def _wait_for_checkpoint(directory: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not list(directory.glob(f"checkpoint-*{MARK}")):
        if time.monotonic() > deadline:
            raise DriverError(f"no checkpoint in {directory} within {DEADLINE_S:g} s")
        time.sleep(_POLL_S)


def _kill(pids: Sequence[int]) -> float:
    if not pids:
        raise DriverError("nothing to kill: no such process")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def _is(kind: str) -> Callable[[Event], bool]:
    return lambda event: bool(event["event"] == kind)


def _has_steps(num_steps: int) -> Callable[[Event], bool]:
    return lambda event: bool(event["event"] == "status" and event["num_steps"] >= num_steps)


PYTHON_WORKER = Fault("Python worker killed", _kill_python_worker)
PYTHON_WORKERS = Fault("both Python workers killed", _kill_python_workers)
EXECUTOR = Fault("executor killed", _kill_executor)
EXECUTORS = Fault("both executors killed", _kill_executors)
CONNECTION = Fault("connection cut in a frame", _cut_connection, needs_proxy=True)
STOPPED = Fault("Python worker stopped beyond its lease", _stop_python_worker, {"lease_timeout_s": 1.0})
DRIVER = Fault("driver killed and restored", _kill_driver, needs_checkpoints=True)
FAULTS = (PYTHON_WORKER, PYTHON_WORKERS, EXECUTOR, EXECUTORS, CONNECTION, STOPPED, DRIVER)
