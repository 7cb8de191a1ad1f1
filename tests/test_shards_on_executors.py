"""Shards as Spark tasks, on a cluster of processes: the same weights, also when the executor of a shard is killed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import REPOSITORY
from benchmarks.clusters.standalone import BIN
from tests.programs import execute

PROGRAM = """
import contextlib, os, signal, sys, threading, time
sys.path.insert(0, {repository!r})
import numpy as np
import psutil
from pyspark.sql import SparkSession as SqlSession
import keras
from tensorspark import SparkSession

spark = SqlSession.builder.getOrCreate()
generator = np.random.default_rng(0)
x = generator.normal(size=(4000, 64)).astype("float32")
y = (x @ generator.normal(size=(64, 10))).argmax(axis=1)


class KillTheShard(keras.callbacks.Callback):
    '''Kills the executor whose Spark task serves the second shard, once, when a checkpoint can be gone back to.'''

    def __init__(self, session, num_epochs):
        super().__init__()
        self.session, self.killed_in = session, None

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2 and self.killed_in is None:
            self.killed_in = epoch
            deadline = time.monotonic() + 60
            while not [name for name in os.listdir(self.session.checkpoint_dir) if name.endswith(".msgpack")]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            port = self.session._server.places[1].address.port
            (process,) = [
                psutil.Process(c.pid)
                for c in psutil.net_connections("tcp")
                if c.status == psutil.CONN_LISTEN and c.laddr.port == port
            ]
            while "CoarseGrainedExecutorBackend" not in " ".join(process.cmdline()):
                process = process.parent()
            process.kill()


def train(name, kills=False, **settings):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")]
    model = keras.Sequential(layers)
    model.compile("sgd", "sparse_categorical_crossentropy")
    rows = spark.sparkContext.parallelize(list(zip(x, y.tolist())), 2)
    with SparkSession(spark, model, staleness=0, sync_interval=4, batch_size=20, **settings) as session:
        killer = KillTheShard(session, 5)
        history = session.fit(rows, epochs=5, seed=5, progress=False, callbacks=[killer] if kills else [])
    assert not kills or killer.killed_in == 2
    loss = history.history["loss"][-1]
    print("RESULT", name, history.num_samples, repr(loss), hash(tuple(w.tobytes() for w in model.get_weights())))


train("one")
train("executors", num_shards=3, shards_on="executors")
train(
    "killed", kills=True, num_shards=2, shards_on="executors", hdfs_dir={directory!r}, checkpoint_interval_s=0.2
)
spark.stop()
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_shards_on_executors_give_the_bits_of_one_server_also_when_one_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(repository=str(REPOSITORY), directory=str(tmp_path)))
    settings = ["--master", "local-cluster[4,1,1024]", "--conf", "spark.executor.memory=1g"]
    output = execute(
        [str(BIN / "spark-submit"), *settings, str(program)], PYTHONHASHSEED="0", PYTHONPATH=str(REPOSITORY)
    )
    results = {name: rest for name, *rest in re.findall(r"^RESULT (\w+) (\d+) (\S+) (\S+)$", output, re.MULTILINE)}
    assert results.keys() == {"one", "executors", "killed"}, output
    assert results["executors"] == results["one"] == results["killed"]
    assert int(results["one"][0]) == 5 * 4000
    assert "the run goes on from its checkpoint" in output
