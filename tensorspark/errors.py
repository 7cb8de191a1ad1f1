"""The errors that tensorspark raises.

::

    TensorsparkError
    ├── ConfigError               (also ValueError)  a setting or argument that cannot work
    │   └── PortTakenError            a port that another program listens at
    ├── FeedError                 (also ValueError)  rows or feed names that do not fit the graph
    ├── FeedLostError             (also RuntimeError)  Spark stopped sending rows: it repeats the task
    ├── GraphError                (also ValueError)  a variable, tensor or graph that cannot be trained
    ├── ModelError                (also ValueError)  a Keras model or function that cannot be trained, or cannot travel
    ├── CheckpointError           (also ValueError)  a checkpoint that is absent, damaged or of another model or run
    ├── StagingError              (also OSError)     a staging or temporary directory that cannot be used
    ├── SessionClosedError        (also RuntimeError)  a session used after ``close()``
    ├── CombinerError             (also RuntimeError)  a weight combiner that raised or returned nonsense
    ├── WorkerFailedError         (also RuntimeError)  a worker raised, or Spark gave a task up
    ├── ShardLostError            (also RuntimeError)  the process of a shard died, or could not do its part
    └── TransportError            (also ConnectionError)
        ├── ServerUnreachableError    nobody answers at the server's address
        ├── AuthenticationError       the server answered 401: the token is not this run's
        ├── ProtocolError             bytes on the wire that are not a frame of this version
        ├── ConnectionLostError       the peer closed the connection, or a deadline passed
        └── RefusedError              the server refused what a worker asked for
            ├── LayoutMismatchError       worker and server hold different variables
            ├── LeaseLostError            another attempt now holds the partition
            ├── NonFiniteError            NaN or infinity in pushed weights
            └── RunStoppedError           the run has ended or failed: stop working

Misuse that no user can meet through the public interface raises plain ``ValueError`` or ``TypeError``.
Every error survives pickling, attributes included: executors send them to the driver.
"""

from __future__ import annotations

from typing import Any


class TensorsparkError(Exception):
    """Root of the tree; catch it to catch everything tensorspark raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[TensorsparkError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TensorsparkError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigError(TensorsparkError, ValueError):
    """A setting or argument that cannot work; the message names it and what to change."""


class PortTakenError(ConfigError):
    """A port that another program listens at."""


class FeedError(TensorsparkError, ValueError):
    """Rows or feed names that do not fit the graph."""


class FeedLostError(TensorsparkError, RuntimeError):
    """Spark stopped sending a partition's rows before their end: the task fails, and Spark repeats it."""


class GraphError(TensorsparkError, ValueError):
    """A variable, tensor or graph that cannot be trained."""


class ModelError(TensorsparkError, ValueError):
    """A Keras model or training function that cannot be trained, or that cannot be rebuilt in another process."""


class CheckpointError(TensorsparkError, ValueError):
    """A checkpoint that is absent, damaged, or of another model or run."""


class StagingError(TensorsparkError, OSError):
    """A staging or temporary directory that cannot be used."""


class SessionClosedError(TensorsparkError, RuntimeError):
    """A session used after ``close()``."""


class CombinerError(TensorsparkError, RuntimeError):
    """A weight combiner that raised, or returned weights of another shape or dtype."""


class WorkerFailedError(TensorsparkError, RuntimeError):
    """A worker raised, or Spark gave a task up.

    Attributes:
        partition: index of the partition that the worker was training; None where Spark did not say.
        host: name of the executor's host; None where Spark did not say.
        worker_traceback: the worker's own traceback, as text.
    """

    def __init__(
        self, message: str, *, partition: int | None = None, host: str | None = None, worker_traceback: str = ""
    ) -> None:
        super().__init__(message)
        self.partition = partition
        self.host = host
        self.worker_traceback = worker_traceback


class ShardLostError(TensorsparkError, RuntimeError):
    """The process that serves a part of the weights died, did not start, or could not do what it was to."""


class TransportError(TensorsparkError, ConnectionError):
    """The conversation between a worker and the parameter server failed."""


class ServerUnreachableError(TransportError):
    """Nobody answers at the server's address."""


class AuthenticationError(TransportError):
    """The server answered 401: the token is not this run's."""


class ProtocolError(TransportError):
    """Bytes on the wire that are not a frame of this version."""


class ConnectionLostError(TransportError):
    """The peer closed the connection, or a deadline passed."""


class RefusedError(TransportError):
    """The server refused what a worker asked for. `code` is the refusal's name on the wire."""

    code = "refused"


class LayoutMismatchError(RefusedError):
    """Worker and server hold different variables."""

    code = "layout_mismatch"


class LeaseLostError(RefusedError):
    """Another attempt now holds the partition."""

    code = "lease_lost"


class NonFiniteError(RefusedError):
    """NaN or infinity in pushed weights; the message names the tensor."""

    code = "non_finite"


class RunStoppedError(RefusedError):
    """The run has ended or failed: the worker should stop without a report of its own."""

    code = "run_stopped"
