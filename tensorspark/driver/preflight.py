"""What can be known to go wrong before training starts, found out in a second by one small Spark job."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tensorspark.data.staging import make_local_run_dir
from tensorspark.errors import ConfigError, TensorsparkError, WorkerFailedError
from tensorspark.ps.client import ParameterClient, ServerAddress


def check_executors(
    spark_context: Any, address: ServerAddress, content: Callable[[], bytes], tmp_dir: str, run_id: str, num_tasks: int
) -> None:
    """Runs tasks that each do what every worker must be able to do first.

    Raises:
        ServerUnreachableError: an executor cannot reach the server; names the setting to change.
        StagingError: an executor cannot read the staged files or write to its temporary directory.
        ConfigError: tensorspark or TensorFlow is not installed on an executor.
        WorkerFailedError: the job failed in another way.
    """

    def check(partition: Iterable[Any]) -> Iterator[TensorsparkError]:
        for _ in partition:
            error = find_problem(address, content, tmp_dir, run_id)
            if error is not None:
                yield error

    try:
        problems = spark_context.parallelize(range(num_tasks), num_tasks).mapPartitions(check).collect()
    except Exception as error:
        raise _translate(error) from error
    if problems:
        raise problems[0]


def find_problem(
    address: ServerAddress, content: Callable[[], bytes], tmp_dir: str, run_id: str
) -> TensorsparkError | None:
    """What keeps a worker in this process from training, or None."""
    try:
        if importlib.util.find_spec("tensorflow") is None:
            return ConfigError(
                f"TensorFlow is not installed for the Python of the executor on {socket.gethostname()}: install it "
                f"there, or point spark.pyspark.python to a Python that has it"
            )
        ParameterClient(address).close()
        make_local_run_dir(tmp_dir, run_id)
        content()
    except TensorsparkError as error:
        return error
    return None


def _translate(error: Exception) -> TensorsparkError:
    if "No module named 'tensorspark'" in str(error):
        return ConfigError(
            "the executors cannot import tensorspark: install it there, or ship it with --py-files and the zip that "
            "`make dist` builds"
        )
    return WorkerFailedError(f"the check of the executors failed: {error}")
