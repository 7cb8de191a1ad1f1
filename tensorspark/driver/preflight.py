"""What can be known to go wrong before training starts, found out in a second by one small Spark job."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tensorspark.data.staging import make_local_run_dir
from tensorspark.driver.jobs import SparkJob, summary
from tensorspark.errors import ConfigError, TensorsparkError, WorkerFailedError
from tensorspark.ps.client import ParameterClient, ServerAddress

_DESCRIPTION = "tensorspark: can the executors train?"


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

    tasks = spark_context.parallelize(range(num_tasks), num_tasks).mapPartitions(check)
    with SparkJob(spark_context, tasks.collect, group=f"tensorspark-{run_id}-check", description=_DESCRIPTION) as job:
        if not job.wait(address.io_timeout_s):
            raise WorkerFailedError(
                f"the check of the executors did not end within {address.io_timeout_s:g} s: is the cluster out of "
                f"slots? (spark.tensorspark.io.timeout is how long it may take)"
            )
    if job.error is not None:
        raise _translate(job.error) from job.error
    if job.result:
        raise job.result[0]


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


def _translate(error: BaseException) -> TensorsparkError:
    missing = re.search(r"No module named '(\w+)", str(error))
    if missing and missing[1] == "tensorspark":
        return ConfigError(
            "the executors cannot import tensorspark: install it there, or ship it with --py-files and the zip that "
            "`make dist` builds"
        )
    if missing:
        return ConfigError(
            f"the executors' Python has no {missing[1]}: install it there (executors need numpy, msgpack, fsspec and "
            f"TensorFlow), or point spark.pyspark.python to a Python that has it"
        )
    return WorkerFailedError(f"the check of the executors failed: {summary(error)}")
