"""A model on its way to the executors: `ship` broadcasts it once, tasks make their trainer of it."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass

import numpy as np
from pyspark import Broadcast, SparkContext

from tensorspark.trainers.base import Captured, Trainer, TrainerSpec, obtain

# Which weights a trainer of this process holds, by their hash. Only predictions load weights into theirs: their specs
# have no labels, so that no trainer is theirs and a training run's.
_loaded: weakref.WeakKeyDictionary[Trainer, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shipped:
    """A model on its way to the executors, once, as one broadcast. Whoever holds it keeps the broadcast."""

    spec: TrainerSpec
    weights_hash: str
    broadcast: Broadcast[tuple[bytes, bytes]]

    def trainer(self) -> Trainer:
        """The process's trainer, holding the weights."""
        trainer = obtain(self.spec, lambda: self.broadcast.value[0])
        trainer.reset(0, 0)
        weights = self.spec.layout.allocate()
        weights[:] = np.frombuffer(self.broadcast.value[1], np.uint8)
        trainer.load(weights)
        return trainer

    def predictor(self) -> Trainer:
        """As `trainer`, for predictions: where it holds the weights already, it is left as it is."""
        trainer = obtain(self.spec, lambda: self.broadcast.value[0])
        if _loaded.get(trainer) != self.weights_hash:
            trainer = self.trainer()
            _loaded[trainer] = self.weights_hash
        return trainer


def ship(spark_context: SparkContext, captured: Captured) -> Shipped:
    weights = captured.weights.tobytes()
    broadcast = spark_context.broadcast((captured.content, weights))
    return Shipped(captured.spec, hashlib.blake2b(weights, digest_size=16).hexdigest(), broadcast)
