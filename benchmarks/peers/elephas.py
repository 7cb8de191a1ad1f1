"""Trains 784-128-10 with elephas, as its documentation has it, in an environment of its own; see `benchmarks.peers`.

What its workers exchange is timed and counted by a client around elephas's own, which writes a line for each exchange
to a file; of the synchronous mode, by what averages on the driver. Nothing of tensorspark is imported here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from elephas import spark_model  # type: ignore[import-not-found]
from elephas.parameter import BaseParameterClient  # type: ignore[import-not-found]
from elephas.utils.rdd_utils import to_simple_rdd  # type: ignore[import-not-found]
from numpy.typing import NDArray
from pyspark import SparkConf, SparkContext, TaskContext

from benchmarks.clusters.local import QUIET
from benchmarks.measuring.ports import free_port
from benchmarks.peers.course import Course, epochs_from_marks, flat
from benchmarks.workloads import digits
from benchmarks.workloads.perceptron import NUM_WEIGHTS, make_sgd_model

NUM_WORKERS = 2


class CountingClient(BaseParameterClient):  # type: ignore[misc]
    """elephas's client; writes down what each exchange of a worker moved and when it ended.

    Args:
        directory: where each worker has a file of lines ``kind end bytes``, and files of the weights that it was sent
            at the beginning of each epoch.
        num_per_epoch: exchanges, by partition.
    """

    def __init__(self, client: Any, directory: str, num_per_epoch: Sequence[int]) -> None:
        self._client = client
        self._directory = directory
        self._num_per_epoch = num_per_epoch
        self._num_pulls = 0

    def get_parameters(self) -> Any:
        began = time.monotonic()
        weights = self._client.get_parameters()
        if TaskContext.get() is not None:
            if self._num_pulls == 0:
                self._note("begin", began, 0)
            epoch, exchange = divmod(self._num_pulls, self._num_per_epoch[_partition()])
            if exchange == 0:
                np.save(f"{self._path()}-{epoch}.npy", flat(weights))
            self._note("pull", time.monotonic(), num_bytes(weights))
            self._num_pulls += 1
        return weights

    def update_parameters(self, delta: Any) -> Any:
        answer = self._client.update_parameters(delta)
        self._note("push", time.monotonic(), num_bytes(delta))
        return answer

    def _note(self, kind: str, moment: float, moved_bytes: int) -> None:
        with open(f"{self._path()}.log", "a") as file:
            file.write(f"{kind} {moment!r} {moved_bytes}\n")

    def _path(self) -> str:
        return f"{self._directory}/{_partition()}"


def _partition() -> int:
    context = TaskContext.get()
    assert context is not None
    return context.partitionId()


def num_bytes(weights: Any) -> int:
    return sum(array.nbytes for array in weights)


def main() -> None:
    arguments = _parser().parse_args()
    images, labels = (array[: arguments.rows] for array in digits.find().train())
    model = make_sgd_model(arguments.seed)
    settings = {**QUIET, "spark.driver.memory": "4g"}
    conf = SparkConf().setMaster(f"local[{NUM_WORKERS}]").setAppName("elephas").setAll(list(settings.items()))
    with SparkContext(conf=conf) as context:
        rdd = to_simple_rdd(context, images, labels)
        # Spark cuts between pickled batches of rows: partitions are not quite equal.
        num_rows = rdd.mapPartitions(lambda rows: [sum(1 for _ in rows)]).collect()
        if len(num_rows) != NUM_WORKERS or sum(num_rows) != len(images):
            raise ValueError(f"expected {len(images)} rows in {NUM_WORKERS} partitions, got {num_rows}")
        train = _synchronously if arguments.mode == "synchronous" else _asynchronously
        train(model, rdd, arguments, num_rows).save(arguments.result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=["synchronous", "http", "socket"])
    parser.add_argument("--frequency", choices=["epoch", "batch"], default="epoch")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser


def _synchronously(model: Any, rdd: Any, arguments: argparse.Namespace, num_rows: list[int]) -> Course:
    ends, weights, average = [time.monotonic()], [], spark_model.average_and_subtract

    def averaged(base: Any, deltas: Any) -> Any:
        result = average(base, deltas)
        ends.append(time.monotonic())
        weights.append(flat(result))
        return result

    spark_model.average_and_subtract = averaged
    spark_model.SparkModel(model).fit(rdd, epochs=arguments.epochs, batch_size=arguments.batch_size, verbose=0)
    seconds = np.tile(np.diff(ends), (NUM_WORKERS, 1))
    moved_bytes = 2 * num_bytes(model.get_weights()) * NUM_WORKERS * arguments.epochs  # there and back, each epoch
    return Course(_by_epoch(num_rows, arguments.epochs), seconds, np.array(weights), moved_bytes)


def _asynchronously(model: Any, rdd: Any, arguments: argparse.Namespace, num_rows: list[int]) -> Course:
    is_by_batch = arguments.frequency == "batch"
    num_per_epoch = [-(-count // arguments.batch_size) if is_by_batch else 1 for count in num_rows]
    with tempfile.TemporaryDirectory() as directory:
        spark = spark_model.AsynchronousSparkModel(
            model, frequency=arguments.frequency, parameter_server_mode=arguments.mode, port=free_port()
        )
        spark.client = CountingClient(spark.client, directory, num_per_epoch)
        spark.fit(rdd, epochs=arguments.epochs, batch_size=arguments.batch_size, verbose=0)
        seconds, moved_bytes = [], 0
        for index in range(NUM_WORKERS):
            began, marks, moved = _read_log(Path(directory, f"{index}.log"))
            seconds.append(epochs_from_marks(began, marks, num_per_epoch[index], arguments.epochs))
            moved_bytes += moved
        # What a worker gets at the beginning of an epoch the server had at the end of the one before.
        weights = [np.load(Path(directory, f"0-{epoch}.npy")) for epoch in range(1, arguments.epochs)]
    weights.append(flat(spark.master_network.get_weights()))
    samples = _by_epoch(num_rows, arguments.epochs)
    return Course(samples, np.array(seconds), np.array(weights).reshape(-1, NUM_WEIGHTS), moved_bytes)


def _by_epoch(num_rows: Sequence[int], num_epochs: int) -> NDArray[np.int64]:
    return np.repeat(np.array(num_rows, np.int64)[:, np.newaxis], num_epochs, axis=1)


def _read_log(path: Path) -> tuple[float, list[float], int]:
    """When the worker began, the ends of its pushes, and all bytes that it moved."""
    lines = [line.split() for line in path.read_text().splitlines()]
    began = next(float(moment) for kind, moment, _ in lines if kind == "begin")
    return began, [float(t) for kind, t, _ in lines if kind == "push"], sum(int(moved) for _, _, moved in lines)


if __name__ == "__main__":
    main()
    sys.exit(0)
