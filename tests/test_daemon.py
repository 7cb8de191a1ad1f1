"""Python workers that are forked from a daemon with TensorFlow: as it starts, and in a Spark application of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.measuring.processes import Peer, PeerError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession as SqlSession

REPOSITORY = Path(__file__).resolve().parent.parent
DEADLINE_S = 120.0
NUM_ROWS, NUM_FEATURES = 200, 6


def python(code: str) -> str:
    """What a new process prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Before the fork

PRELOAD = "from tensorspark import daemon\ndaemon.preload()\n"


def test_preloading_makes_no_eager_context_and_no_thread_that_a_fork_would_lose() -> None:
    seen = json.loads(
        python(
            f"{PRELOAD}daemon.require_forkable()\n"
            "import json, pathlib, sys, threading\n"
            "from tensorflow.python.eager import context\n"
            "names = [path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
            "print(json.dumps({'context': repr(context.context_safe()), 'threads': threading.active_count(),\n"
            "    'of TensorFlow': [name for name in names if name.startswith('tf_')],\n"
            "    'loaded': sorted({'tensorflow', 'keras', 'pyarrow', 'pyspark.worker'} & set(sys.modules))}))\n"
        )
    )
    assert seen == {
        "context": "None",
        "threads": 1,
        "of TensorFlow": [],
        "loaded": ["keras", "pyarrow", "pyspark.worker", "tensorflow"],
    }


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import tensorflow as tf; tf.constant(1)", "run an operation or asked for devices"),
        ("import tensorflow as tf; tf.config.list_physical_devices()", "run an operation or asked for devices"),
        ("import threading; threading.Timer(60, print).start()", r"\['Thread-1'\] run"),
    ],
)
def test_what_a_fork_would_lose_is_an_error(statement: str, expected: str) -> None:
    printed = python(
        f"import os, re\nfrom tensorspark import daemon, errors\n{statement}\n"
        f"try:\n    daemon.require_forkable()\nexcept errors.ConfigError as error:\n"
        f"    assert re.search({expected!r}, str(error)), error\n"
        f"    print('spark.python.daemon.module' in str(error), flush=True)\n    os._exit(0)\n"
    )
    assert printed.strip() == "True"


def test_forks_draw_different_random_numbers() -> None:
    printed = python(
        f"{PRELOAD}"
        "import os, sys, random\nimport numpy as np\nimport tensorflow as tf\n"
        "for _ in range(2):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        print(np.random.rand(), random.random(), float(tf.random.uniform(())), flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
    )
    first, second = (line.split() for line in printed.splitlines())
    assert len(first) == 3
    assert set(first).isdisjoint(second)


# Where it cannot work


@pytest.fixture
def noisy_tensorflow(tmp_path: Path) -> dict[str, str]:
    """An environment whose TensorFlow prints, in Python and natively, and then cannot be imported."""
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nprint('noise')\nos.write(1, b'more noise')\nraise ImportError('libfast.so.3: not found\\nat all')\n"
    )
    paths = [str(tmp_path), str(REPOSITORY)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHON_WORKER_FACTORY_SECRET": "secret"}


def test_without_tensorflow_sparks_own_daemon_forks_workers_and_one_line_says_why(
    noisy_tensorflow: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorspark.daemon", "pyspark.worker"],
            cwd=tmp_path, env=noisy_tensorflow, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        (port,) = struct.unpack("!i", process.stdout.read(4))
        with forked_worker(port) as worker:
            maps = Path(f"/proc/{worker}/maps").read_text()
            logged = log.read_text()
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        process.stdin.close()  # as Spark ends it
        process.wait(DEADLINE_S)
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()
    assert worker != process.pid
    assert "python" in maps
    assert "tensorflow" not in maps
    assert command[1:4] == [b"-m", b"pyspark.daemon", b"pyspark.worker"]
    assert [line for line in logged.splitlines() if "noise" not in line] == [
        "tensorspark.daemon: Python workers start without TensorFlow: ImportError: libfast.so.3: not found at all"
    ]


@contextlib.contextmanager
def forked_worker(port: int) -> Iterator[int]:
    """The process id of a worker that the daemon forks when somebody connects; it ends with the block."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        yield struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0]


# Under Spark


def data() -> tuple[Any, Any]:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    return x, (x.sum(axis=1) > 0).astype(np.int64)


def trained_bits(spark: SqlSession) -> list[bytes]:
    """The weights of a bulk-synchronous fit of two workers, from weights that are not zero."""
    import keras

    from tensorspark import SparkSession

    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((NUM_FEATURES,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(2, "softmax")]
    )
    model.compile(keras.optimizers.SGD(0.3), "sparse_categorical_crossentropy")
    initial = [weight.tobytes() for weight in model.get_weights()]
    rows = [(a.tolist(), int(b)) for a, b in zip(*data(), strict=True)]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), "x array<float>, y long")
    with SparkSession(spark, model, staleness=0, sync_interval=2, batch_size=10) as session:
        session.fit(df, features="x", label="y", epochs=2, seed=3, progress=False)
    trained = [weight.tobytes() for weight in model.get_weights()]
    assert trained != initial
    return trained


class Driver:
    """A driver whose application's workers are forked from `tensorspark.daemon`."""

    def __init__(self) -> None:
        from pyspark.sql import SparkSession

        settings = {
            "spark.python.daemon.module": "tensorspark.daemon",
            "spark.executorEnv.OMP_NUM_THREADS": "2",
            "spark.executorEnv.TF_NUM_INTRAOP_THREADS": "2",
            "spark.ui.enabled": "false",
            "spark.log.level": "OFF",
            "spark.driver.host": "127.0.0.1",
        }
        self._spark = SparkSession.builder.master("local[2,2]").config(map=settings).getOrCreate()  # type: ignore[arg-type]

    def fit(self) -> list[bytes]:
        return trained_bits(self._spark)

    def loaded(self) -> list[bool]:
        """Whether each of two tasks finds TensorFlow, Keras and the trainers at its first line."""

        def look(_: Any) -> Iterator[bool]:
            import sys

            yield {"tensorflow", "keras", "tensorspark.trainers.keras"} <= set(sys.modules)

        return list(self._spark.sparkContext.parallelize(range(2), 2).mapPartitions(look).collect())

    def squares(self) -> int:
        """Of a job without TensorFlow."""
        return int(self._spark.sparkContext.parallelize(range(10), 4).map(lambda x: x * x).sum())

    def doubled_in_arrow(self) -> list[int]:
        """Of a job with a DataFrame, which uses the threads of Arrow."""

        def double(batches: Iterator[Any]) -> Iterator[Any]:
            import pyarrow as pa
            from pyarrow import compute

            for batch in batches:
                table = pa.Table.from_batches([batch]).sort_by("id").group_by("id", use_threads=True).aggregate([])
                for part in table.to_batches():
                    yield pa.RecordBatch.from_arrays([compute.multiply(part.column("id"), 2)], names=["id"])

        return sorted(row.id for row in self._spark.range(0, 6, 1, 2).mapInArrow(double, "id long").collect())

    def product(self) -> tuple[list[str], int, float]:
        """A worker's settings of threads, its threads after a product of matrices, and the product's sum."""

        def multiply(_: Any) -> Iterator[tuple[list[str], int, float]]:
            import os

            import numpy as np

            a = np.arange(1.0, 512 * 512 + 1).reshape(512, 512) / 512**2
            total = float((a @ a).sum())
            settings = [os.environ[name] for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")]
            yield settings, len(os.listdir("/proc/self/task")), total

        (found,) = self._spark.sparkContext.parallelize([0], 1).mapPartitions(multiply).collect()
        return found

    def killed_and_replaced(self, marker: str) -> tuple[str, int, bool]:
        """Who was killed, who did the task again, and whether that one had TensorFlow at its first line."""

        def die_once(_: Any) -> Iterator[tuple[str, int, bool]]:
            import os
            import pathlib
            import sys

            is_loaded = "tensorflow" in sys.modules
            path = pathlib.Path(marker)
            if not path.exists():
                path.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield path.read_text(), os.getpid(), is_loaded

        (found,) = self._spark.sparkContext.parallelize([0], 1).mapPartitions(die_once).collect()
        return found

    def close(self) -> None:
        self._spark.stop()


@pytest.fixture(scope="module")
def driver() -> Iterator[Peer]:
    with Peer("driver", Driver, deadline_s=DEADLINE_S) as peer:
        yield peer


def ask(driver: Peer, method: str, *args: Any) -> Any:
    """Fails instead of waiting: a worker that hangs is what these tests are about."""
    try:
        return driver.call(method, *args, deadline_s=DEADLINE_S)
    except PeerError as error:
        pytest.fail(str(error))


@pytest.mark.slow
def test_workers_have_tensorflow_at_their_first_line(driver: Peer) -> None:
    assert ask(driver, "loaded") == [True, True]


@pytest.mark.slow
def test_fits_one_after_another_give_the_bits_that_they_give_under_sparks_own_daemon(
    driver: Peer, spark: SqlSession
) -> None:
    expected = trained_bits(spark)
    assert ask(driver, "fit") == expected
    assert ask(driver, "fit") == expected


@pytest.mark.slow
def test_jobs_without_tensorflow_work_before_and_after_a_fit(driver: Peer) -> None:
    for _ in range(2):
        assert ask(driver, "squares") == 285
        assert ask(driver, "doubled_in_arrow") == [0, 2, 4, 6, 8, 10]
        ask(driver, "fit")


@pytest.mark.slow
def test_the_threads_that_are_set_for_executors_run_in_workers(driver: Peer) -> None:
    settings, num_threads, total = ask(driver, "product")
    a = np.arange(1.0, 512 * 512 + 1).reshape(512, 512) / 512**2
    assert settings == ["2", "2"]
    assert num_threads >= 2
    assert total == pytest.approx(float(a.sum(axis=0) @ a.sum(axis=1)))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_by_one_with_tensorflow(driver: Peer, tmp_path: Path) -> None:
    killed, successor, is_loaded = ask(driver, "killed_and_replaced", str(tmp_path / "killed"))
    assert int(killed) != successor
    assert is_loaded
    assert ask(driver, "loaded") == [True, True]
