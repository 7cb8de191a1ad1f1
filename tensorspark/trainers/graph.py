"""TensorFlow 1 graphs and sessions: captured on the driver, rebuilt and run on the executors.

What travels is the session's GraphDef and the values of all initialized variables that are not synchronized. The
driver's graph is only read, never added to, so a finalized one will do.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.batches import Column, Columns
from tensorspark.errors import FeedError, GraphError
from tensorspark.trainers.base import Trainer
from tensorspark.trainers.startup import quiet
from tensorspark.trainers.variables import GraphVariables, assign_op, variable_name
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

with quiet():
    import tensorflow.compat.v1 as tf
    from tensorflow.core.protobuf import config_pb2

logger = logging.getLogger(__name__)

# Prefixes of operations whose state or code stays in the driver's process.
_HOMEBOUND_OPS = ("PyFunc", "EagerPyFunc", "Iterator", "OneShotIterator", "QueueDequeue", "ReaderRead", "Mutable")


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


@dataclass(frozen=True)
class Captured:
    """A session as it is now: what to do with it, what to ship, and the weights to begin with."""

    spec: GraphSpec
    content: bytes = field(repr=False)
    weights: Buffer = field(repr=False)


def capture(
    session: tf.Session,
    fetches: Any,
    feed_names: Sequence[str],
    params: Iterable[Any],
    *,
    constants: Mapping[Any, Any] | None = None,
    config: tf.ConfigProto | None = None,
    options: tf.RunOptions | None = None,
    num_threads: int = 1,
) -> Captured:
    """Reads off the driver's session all that executors need.

    Args:
        fetches: an operation, tensor, variable or name, or a (nested) list, tuple or dict of them. Scalar numbers are
            averaged into the history, by dict key or else tensor name.
        feed_names: names of the fed tensors, in the order of a row's values.
        params: variables, or names of variables, to synchronize.
        constants: values fed with every batch, by tensor or name.
        config: of the workers' sessions; thread counts that it leaves open become `num_threads`.

    Raises:
        FeedError: a feed name that is not in the graph, stands twice, or cannot take a batch of any size.
        GraphError: a fetch or variable that is not in the graph, is uninitialized or not a number; a fetch that needs
            what cannot travel (Python functions, dataset iterators, queues, mutable tables); weights that are not
            finite.
    """
    graph = session.graph
    variables = GraphVariables(graph, session)
    names = [variable_name(graph, param) for param in params]
    if not names:
        raise GraphError("param_list is empty: name the variables to synchronize, such as [W, b]")
    weights = variables.read(names)
    layout = _layout(weights)
    local = variables.read_initialized(without=weights)
    content = _pack_content(graph, local)
    columns = _without_repeats([_column(graph, name) for name in feed_names])
    fed = {column.name for column in columns}
    scalars, targets = _split_fetches(graph, fetches, fed)
    constant_feeds = dict(_constant(graph, key, value, fed) for key, value in (constants or {}).items())
    _check_that_it_travels(graph, [*[name for _, name in scalars], *targets], fed | set(constant_feeds))
    spec = GraphSpec(
        layout=layout,
        columns=columns,
        table_initializers=tuple(op.name for op in graph.get_collection(tf.GraphKeys.TABLE_INITIALIZERS)),
        fetches=scalars,
        targets=targets,
        constants=constant_feeds,
        config=_worker_config(config, num_threads).SerializeToString(deterministic=True),
        options=None if options is None else options.SerializeToString(deterministic=True),
        content_hash=hashlib.sha256(content).hexdigest(),
    )
    buffer = layout.pack(weights)
    if (name := layout.find_non_finite(buffer)) is not None:
        raise GraphError(f"variable {name} holds NaN or infinity before training: initialize it anew, or leave it out")
    return Captured(spec, content, buffer)


def assign(session: tf.Session, layout: WeightLayout, weights: Buffer) -> None:
    """Sets the variables of the driver's session to `weights`, which may be reused at once."""
    GraphVariables(session.graph, session).load(layout.views(weights))


def difference(session: tf.Session, layout: WeightLayout) -> str:
    """Says which of the layout's tensors are not, as they stand there, variables of the session's graph."""
    variables = GraphVariables(session.graph, session)
    found = {spec: variables.spec(spec.name) for spec in layout.specs}
    return "; ".join(f"expected {spec}, got {have or 'none'}" for spec, have in found.items() if have != spec)


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

    def reset(self) -> None:
        self._variables.load(self._local)

    def load(self, weights: Buffer) -> None:
        views = self.layout.views(weights)
        self._load(*[views[name] for name in self._load_order])

    def read(self, out: Buffer) -> None:
        views = self.layout.views(out)
        for spec, value in zip(self.layout.specs, self._read(), strict=True):
            views[spec.name][...] = value

    def step(self, columns: Columns) -> tuple[float, ...]:
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
        targets = [_without_value(graph.as_graph_element(name)).name for name in spec.targets]
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


def _without_value(element: tf.Operation | tf.Tensor) -> tf.Operation:
    return element.op if isinstance(element, tf.Tensor) else element


def _layout(weights: Mapping[str, NDArray[Any]]) -> WeightLayout:
    try:
        layout = WeightLayout(TensorSpec(name, value.shape, value.dtype.name) for name, value in weights.items())
    except ValueError as error:
        raise GraphError(f"param_list cannot be synchronized: {error}") from error
    if not layout.num_bytes:
        raise GraphError(f"param_list cannot be synchronized: {', '.join(weights)} hold no number at all")
    return layout


def _tensor(graph: tf.Graph, key: Any) -> tf.Tensor:
    try:
        return graph.as_graph_element(key, allow_operation=False)
    except (KeyError, ValueError, TypeError) as error:
        raise FeedError(f"{key!r} is not a tensor of the session's graph: {error}") from error


def _constant(graph: tf.Graph, key: Any, value: Any, fed: set[str]) -> tuple[str, NDArray[Any]]:
    tensor = _tensor(graph, key)
    if tensor.name in fed:
        raise FeedError(f"{tensor.name} is in feed_dict and in feed_name_list: rows feed it, or a constant, not both")
    try:
        array = np.asarray(value, tensor.dtype.as_numpy_dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise FeedError(f"feed_dict's value for {tensor.name} is no {tensor.dtype.name}: {error}") from error
    if not tensor.shape.is_compatible_with(array.shape):
        raise FeedError(f"feed_dict's value for {tensor.name} has shape {array.shape}, expected {tensor.shape}")
    return tensor.name, array


def _without_repeats(columns: Sequence[Column]) -> tuple[Column, ...]:
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise FeedError(f"feed_name_list names {name} twice")
    return tuple(columns)


def _column(graph: tf.Graph, name: str) -> Column:
    try:
        tensor = graph.as_graph_element(name if ":" in str(name) else f"{name}:0", allow_operation=False)
    except (KeyError, ValueError, TypeError) as error:
        placeholders = ", ".join(op.outputs[0].name for op in graph.get_operations() if op.type == "Placeholder")
        raise FeedError(
            f"feed_name_list names {name!r}, which is not in the session's graph; its placeholders are {placeholders}"
        ) from error
    rank = tensor.shape.rank
    if rank == 0 or (rank is not None and tensor.shape[0] is not None and tensor.shape.as_list()[0] is not None):
        raise FeedError(
            f"{name} has shape {tensor.shape}; expected None as its first dimension, since the last batch of an epoch "
            f"can be smaller: declare it as tf.placeholder(..., [None, ...])"
        )
    shape = None if rank is None else tuple(tensor.shape.as_list()[1:])
    return Column(tensor.name, shape, np.dtype(tensor.dtype.as_numpy_dtype).name)


def _split_fetches(graph: tf.Graph, fetches: Any, fed: set[str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    scalars: dict[str, str] = {}
    targets: list[str] = []
    for key, fetch in _flatten(fetches):
        try:
            element = graph.as_graph_element(fetch, allow_tensor=True, allow_operation=True)
        except (KeyError, ValueError, TypeError) as error:
            raise GraphError(f"fetch {fetch!r} is not in the session's graph: {error}") from error
        if isinstance(element, tf.Tensor) and _is_scalar_number(element):
            scalars[key or element.name] = element.name
        elif element.name not in fed:  # a placeholder as a target would run, and miss its value
            targets.append(element.name)
    if not scalars and not targets:
        raise GraphError("fetches is empty: pass the training operation, and with it what to record, such as a loss")
    return tuple(scalars.items()), tuple(targets)


def _check_that_it_travels(graph: tf.Graph, fetches: Sequence[str], fed: set[str]) -> None:
    """Raises GraphError where a fetch depends on an operation that lives in the driver's process."""
    waiting = [_without_value(graph.as_graph_element(name)) for name in fetches]
    seen = set(waiting)
    while waiting:
        op = waiting.pop()
        if op.type.startswith(_HOMEBOUND_OPS):
            raise GraphError(
                f"operation {op.name} ({op.type}) has code or contents in the driver's process that cannot be rebuilt "
                f"on executors: feed what it makes through feed_rdd, or compute it with TensorFlow operations"
            )
        before = {tensor.op for tensor in op.inputs if tensor.name not in fed}.union(op.control_inputs) - seen
        seen |= before
        waiting += before


def _flatten(fetches: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(fetches, Mapping):
        return [
            leaf for name, fetch in fetches.items() for leaf in _flatten(fetch, f"{key}/{name}" if key else str(name))
        ]
    if isinstance(fetches, list | tuple):
        return [leaf for i, fetch in enumerate(fetches) for leaf in _flatten(fetch, f"{key}/{i}" if key else "")]
    return [(key, fetches)]


def _is_scalar_number(tensor: tf.Tensor) -> bool:
    dtype = tensor.dtype.base_dtype
    return tensor.shape.rank == 0 and bool(dtype.is_floating or dtype.is_integer or dtype.is_bool)


def _worker_config(config: tf.ConfigProto | None, num_threads: int) -> tf.ConfigProto:
    result = tf.ConfigProto()
    if config is not None:
        result.CopyFrom(config)
    result.intra_op_parallelism_threads = result.intra_op_parallelism_threads or num_threads
    result.inter_op_parallelism_threads = result.inter_op_parallelism_threads or num_threads
    return result


def _pack_content(graph: tf.Graph, local: Mapping[str, NDArray[Any]]) -> bytes:
    variables = []
    for name, value in local.items():
        if value.dtype.kind == "O":
            logger.warning("variable %s holds strings: workers start without a value for it", name)
            continue
        variables.append([name, value.dtype.name, value.shape, value.tobytes()])
    graph_def = graph.as_graph_def().SerializeToString(deterministic=True)
    packed: bytes = msgpack.packb({"graph": graph_def, "variables": variables})
    return packed


def _unpack_content(content: bytes) -> tuple[tf.GraphDef, dict[str, NDArray[Any]]]:
    unpacked = msgpack.unpackb(content)
    local = {
        name: np.frombuffer(data, np.dtype(dtype)).reshape(shape) for name, dtype, shape, data in unpacked["variables"]
    }
    return tf.GraphDef.FromString(unpacked["graph"]), local
