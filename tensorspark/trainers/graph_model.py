"""A TensorFlow 1 session on the driver: captured for the executors, and given the weights that they trained.

What travels is the session's GraphDef and the values of all initialized variables that are not synchronized. The
driver's graph is only read, never added to, so a finalized one will do.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.columns import Column
from tensorspark.errors import FeedError, GraphError
from tensorspark.trainers.base import Captured
from tensorspark.trainers.graph import GraphSpec, without_value
from tensorspark.trainers.startup import importing
from tensorspark.trainers.variables import GraphVariables, variable_name
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

with importing():
    import tensorflow.compat.v1 as tf

logger = logging.getLogger(__name__)

# Prefixes of operations whose state or code stays in the driver's process.
_HOMEBOUND_OPS = ("PyFunc", "EagerPyFunc", "Iterator", "OneShotIterator", "QueueDequeue", "ReaderRead", "Mutable")


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
        # A table of eager code, made while no graph of its own was open, leaves a None here.
        table_initializers=tuple(
            op.name for op in graph.get_collection(tf.GraphKeys.TABLE_INITIALIZERS) if op is not None
        ),
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
    return Captured(spec, content, buffer, graph=lambda: bytes(graph.as_graph_def().SerializeToString()))


class GraphModel:
    """A session on the driver, to be trained: what `SparkSession` needs of it."""

    def __init__(self, session: tf.Session, config: tf.ConfigProto | None, num_threads: int) -> None:
        self.session = session
        self._config = config
        self._num_threads = num_threads

    @property
    def is_closed(self) -> bool:
        return bool(getattr(self.session, "_closed", False))

    def capture(
        self,
        fetches: Any,
        feed_names: Sequence[str],
        params: Iterable[Any],
        constants: Mapping[Any, Any] | None,
        options: tf.RunOptions | None,
    ) -> Captured:
        """See the function `capture`."""
        return capture(
            self.session,
            fetches,
            feed_names,
            params,
            constants=constants,
            config=self._config,
            options=options,
            num_threads=self._num_threads,
        )

    def assign(self, layout: WeightLayout, weights: Buffer) -> None:
        assign(self.session, layout, weights)

    def difference(self, layout: WeightLayout) -> str:
        return difference(self.session, layout)


def assign(session: tf.Session, layout: WeightLayout, weights: Buffer) -> None:
    """Sets the variables of the driver's session to `weights`, which may be reused at once."""
    GraphVariables(session.graph, session).load(layout.views(weights))


def difference(session: tf.Session, layout: WeightLayout) -> str:
    """Says which of the layout's tensors are not, as they stand there, variables of the session's graph."""
    variables = GraphVariables(session.graph, session)
    found = {spec: variables.spec(spec.name) for spec in layout.specs}
    return "; ".join(f"expected {spec}, got {have or 'none'}" for spec, have in found.items() if have != spec)


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
    waiting = [without_value(graph.as_graph_element(name)) for name in fetches]
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
