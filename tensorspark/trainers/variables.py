"""A TensorFlow 1 graph's variables: read and assigned through the operations that the graph already has."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import GraphError
from tensorspark.trainers.startup import importing
from tensorspark.weights.layout import TensorSpec

with importing():
    import tensorflow.compat.v1 as tf

logger = logging.getLogger(__name__)

_VARIABLE_OPS = ("VarHandleOp", "VariableV2", "Variable")


class GraphVariables:
    """The variables of `graph` in `session`, by tensor name such as ``"W:0"``; adds nothing to the graph."""

    def __init__(self, graph: tf.Graph, session: tf.Session) -> None:
        self._session = session
        self._by_name = {op.outputs[0].name: op for op in graph.get_operations() if op.type in _VARIABLE_OPS}

    def spec(self, name: str) -> TensorSpec | None:
        """A variable's name, shape (None sizes as -1) and dtype; None where the graph has no such variable."""
        op = self._by_name.get(name)
        if op is None:
            return None
        shape = tuple(tf.TensorShape(op.get_attr("shape")).as_list())
        return TensorSpec(name, tuple(-1 if size is None else size for size in shape), op.get_attr("dtype").name)

    def read_tensor(self, name: str) -> tf.Tensor:
        op = self._by_name[name]
        if op.type != "VarHandleOp":
            return op.outputs[0]
        reads = self._consumers(name, "ReadVariableOp")
        if not reads:
            raise GraphError(f"variable {name} has no read operation of its own in the graph: call its read_value()")
        return reads[0].outputs[0]

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Values of the named variables; raises GraphError for one that does not exist or is not initialized."""
        for name in names:
            if name not in self._by_name:
                known = ", ".join(sorted(self._by_name)[:20]) or "none"
                raise GraphError(
                    f"param_list names {name}, which is no variable of the session's graph; it has {known}"
                )
            if names.count(name) > 1:
                raise GraphError(f"param_list names {name} twice")
        values = {}
        for name in names:
            try:
                values[name] = np.array(self._session.run(self.read_tensor(name)))
            except tf.errors.FailedPreconditionError as error:
                raise GraphError(f"variable {name} is not initialized: run its initializer before training") from error
        return values

    def read_initialized(self, without: Container[str]) -> dict[str, NDArray[Any]]:
        """Values of all other variables that have one and can be given it again."""
        values = {}
        for name in self._by_name:
            if name in without:
                continue
            try:
                value = np.array(self._session.run(self.read_tensor(name)))
                initial = self._initializer(name).inputs[1]
            except (tf.errors.FailedPreconditionError, GraphError):
                logger.debug("variable %s is uninitialized or unused: not shipped", name)
                continue
            if initial.shape.is_compatible_with(value.shape):
                values[name] = value
            else:
                logger.warning("variable %s has outgrown its initial shape: workers start without a value", name)
        return values

    def load(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Assigns by feeding the variables' own initializers, with copies: see `GraphTrainer._make_load`."""
        left = {name: self._initializer(name) for name in values}
        while left:
            # Variables made from one tensor share what their initializers assign: fed once, it would set them all.
            now = {op.inputs[1].name: name for name, op in left.items()}
            feed = {tensor: np.array(values[name]) for tensor, name in now.items()}
            self._session.run([left.pop(name) for name in now.values()], feed)

    def _initializer(self, name: str) -> tf.Operation:
        assigns = self._consumers(name, "Assign", "AssignVariableOp")
        if not assigns:
            raise GraphError(f"variable {name} has no initializer in the graph, so it cannot be given a value")
        return assigns[0]

    def _consumers(self, name: str, *types: str) -> list[tf.Operation]:
        """Operations that take the variable and run nothing else first (a training step, say): its own come first.

        TensorFlow lists consumers in no order, and every `assign_add` that is read leaves a read that repeats it.
        """
        op = self._by_name[name]
        found = [
            consumer
            for consumer in op.outputs[0].consumers()
            if consumer.type in types and consumer.inputs[0] is op.outputs[0] and not consumer.control_inputs
        ]
        return sorted(found, key=lambda consumer: not consumer.name.startswith(f"{op.name}/"))


def assign_op(variable: tf.Operation, value: tf.Tensor) -> tf.Operation:
    """A new operation that assigns `value` to the variable that `variable` (an op of one of three kinds) holds."""
    target = variable.outputs[0]
    if variable.type == "VarHandleOp":
        return tf.raw_ops.AssignVariableOp(resource=target, value=value)
    return tf.raw_ops.Assign(ref=target, value=value, use_locking=False).op


def variable_name(graph: tf.Graph, param: Any) -> str:
    """The tensor name of a variable or of its name, checked to be of `graph`."""
    name = param if isinstance(param, str) else getattr(param, "name", None)
    if not isinstance(name, str):
        raise GraphError(f"param_list holds {param!r}; expected a variable such as tf.Variable makes, or its name")
    if getattr(param, "graph", graph) is not graph:
        raise GraphError(f"variable {name} belongs to another graph than the session's")
    return name if ":" in name else f"{name}:0"
