"""TensorFlow 1 graphs in an executor's process: rebuilt from what `trainers.graph_model` captured on the driver."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column, Columns
from tensorspark.trainers.base import Trainer
from tensorspark.trainers.startup import importing
from tensorspark.trainers.variables import GraphVariables, assign_op
from tensorspark.weights.layout import Buffer, WeightLayout

with importing():
    import tensorflow.compat.v1 as tf
    from tensorflow.core.protobuf import config_pb2


@dataclass(frozen=True)
class GraphSpec:
    """How an executor rebuilds the session and what it runs there. See `capture`.

    Attributes:
        table_initializers: operations that fill the graph's lookup tables, as `tf.tables_initializer` does.
        fetches: name in the history and tensor name of every scalar to average.
        targets: operations and other tensors to run with each step.
        constants: values fed with every batch, by tensor name.
        config: serialized ConfigProto of the worker's session.
        content_hash: of what `build` takes.
    """

    layout: WeightLayout
    columns: tuple[Column, ...]
    table_initializers: tuple[str, ...]
    fetches: tuple[tuple[str, str], ...]
    targets: tuple[str, ...]
    constants: Mapping[str, NDArray[Any]]
    config: bytes
    options: bytes | None
    content_hash: str
    num_totals: int = 0

    @cached_property
    def key(self) -> str:
        described = [
            self.content_hash,
            self.layout.fingerprint,
            [str((column.name, column.shape, column.dtype)) for column in self.columns],
            self.table_initializers,
            self.fetches,
            self.targets,
            # An array of strings holds pointers: its bytes say nothing of its values.
            [
                (name, value.dtype.str, value.shape, value.tolist() if value.dtype == object else value.tobytes())
                for name, value in self.constants.items()
            ],
            self.config,
            self.options,
        ]
        packed: bytes = msgpack.packb(described)
        return hashlib.sha256(packed).hexdigest()

    def build(self, content: bytes) -> GraphTrainer:
        return GraphTrainer(self, content)


class GraphTrainer(Trainer):
    """A session in an executor's process, rebuilt from `GraphSpec.build`'s content."""

    def __init__(self, spec: GraphSpec, content: bytes) -> None:
        self.layout = spec.layout
        self.columns = spec.columns
        self.scalar_names = tuple(name for name, _ in spec.fetches)
        graph_def, self._local = _unpack_content(content)
        config = tf.ConfigProto.FromString(spec.config)
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graph_def, name="")
            self._session = tf.Session(graph=graph, config=config)
            self._variables = GraphVariables(graph, self._session)
            self._load, self._load_order = self._make_load(graph)
            self._read = self._callable(fetches=[self._variables.read_tensor(s.name).name for s in self.layout.specs])
            self._step = self._make_step(graph, spec)
            # Not all operations that fill tables: a Saver's read a checkpoint.
            self._session.run([graph.get_operation_by_name(name) for name in spec.table_initializers])

    def reset(self, partition: int = 0, seed: int = 0) -> None:
        """The graph's own random operations go on as they are: their seeds are in the graph."""
        self._variables.load(self._local)

    def load(self, weights: Buffer) -> None:
        views = self.layout.views(weights)
        self._load(*[views[name] for name in self._load_order])

    def read(self, out: Buffer) -> None:
        views = self.layout.views(out)
        for spec, value in zip(self.layout.specs, self._read(), strict=True):
            views[spec.name][...] = value

    def read_blocks(self, wanted: Sequence[slice]) -> Iterator[Buffer]:
        values = dict(zip((spec.name for spec in self.layout.specs), self._read(), strict=True))
        specs = sorted(self.layout.specs, key=lambda spec: self.layout.offsets[spec.name])
        piece = np.empty(max((block.stop - block.start for block in wanted), default=0), np.uint8)
        first = 0  # of the tensors that end behind the block's begin
        for block in wanted:
            piece[:] = 0  # where no tensor is
            while first < len(specs) and self.layout.offsets[specs[first].name] + specs[first].num_bytes <= block.start:
                first += 1
            for spec in itertools.islice(specs, first, None):
                at = self.layout.offsets[spec.name]
                if at >= block.stop:
                    break
                start, stop = max(block.start, at), min(block.stop, at + spec.num_bytes)
                if start < stop:  # an empty tensor may lie where another begins
                    flat = np.ascontiguousarray(values[spec.name]).reshape(-1).view(np.uint8)
                    piece[start - block.start : stop - block.start] = flat[start - at : stop - at]
            yield piece[: block.stop - block.start]

    def train(self, columns: Columns, batch_size: int) -> NDArray[np.float64]:
        sums = np.zeros(len(self.scalar_names))
        num_rows = len(columns[0])
        for start in range(0, num_rows, batch_size):
            batch = tuple(column[start : start + batch_size] for column in columns)
            scalars = self.step(batch)
            if scalars:
                sums += np.multiply(scalars, min(batch_size, num_rows - start))
        return sums

    def step(self, columns: Columns) -> tuple[float, ...]:
        """Trains on one batch and returns the step's scalars, in the order of `scalar_names`."""
        values = self._step(*columns)
        return tuple(float(value) for value in values[: len(self.scalar_names)])

    def close(self) -> None:
        self._session.close()

    def _make_load(self, graph: tf.Graph) -> tuple[Any, list[str]]:
        placeholders, assigns = [], []
        for spec in self.layout.specs:
            placeholder = tf.placeholder(spec.dtype, spec.shape)
            # TensorFlow feeds an aligned array without a copy, and assigning a resource variable takes over what is
            # fed: without DeepCopy the variable would share the caller's memory, and change with it.
            value = tf.raw_ops.DeepCopy(x=placeholder)
            variable = graph.get_operation_by_name(spec.name.removesuffix(":0"))
            placeholders.append(placeholder)
            assigns.append(assign_op(variable, value))
        load = self._callable(feeds=[p.name for p in placeholders], targets=[tf.group(*assigns).name])
        return load, [spec.name for spec in self.layout.specs]

    def _make_step(self, graph: tf.Graph, spec: GraphSpec) -> Any:
        targets = [without_value(graph.as_graph_element(name)).name for name in spec.targets]
        feeds = [*[column.name for column in spec.columns], *spec.constants]
        constants = list(spec.constants.values())
        # A callable does not give back what it is fed: a constant among the fetches needs a copy of its own.
        fetches = [
            tf.identity(graph.get_tensor_by_name(name)).name if name in spec.constants else name
            for _, name in spec.fetches
        ]
        run = self._callable(feeds, fetches, targets, spec.options)
        if constants:
            return lambda *columns: run(*columns, *constants)
        return run

    def _callable(
        self,
        feeds: Sequence[str] = (),
        fetches: Sequence[str] = (),
        targets: Sequence[str] = (),
        options: bytes | None = None,
    ) -> Any:
        """What `Session.make_callable` is only where nothing is fed; with feeds that wraps `Session.run`, which takes
        longer than a small step. Arguments must be arrays of the feeds' own dtypes."""
        described = config_pb2.CallableOptions(feed=feeds, fetch=fetches, target=targets)
        if options is not None:
            described.run_options.ParseFromString(options)
        return self._session._make_callable_from_options(described)


def without_value(element: tf.Operation | tf.Tensor) -> tf.Operation:
    """The operation alone: what is run, its value not fetched."""
    return element.op if isinstance(element, tf.Tensor) else element


def _unpack_content(content: bytes) -> tuple[tf.GraphDef, dict[str, NDArray[Any]]]:
    unpacked = msgpack.unpackb(content)
    local = {
        name: np.frombuffer(data, np.dtype(dtype)).reshape(shape) for name, dtype, shape, data in unpacked["variables"]
    }
    return tf.GraphDef.FromString(unpacked["graph"]), local
