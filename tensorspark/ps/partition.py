"""One partition in the server's state: who holds its lease, and how far its pushes have come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from tensorspark.errors import LeaseLostError, WorkerFailedError
from tensorspark.history import WorkerReport
from tensorspark.ps.messages import Cursor, PartitionProgress, Registration


@dataclass
class Partition:
    """What the server knows of a partition; `RunState` changes it.

    Attributes:
        holder: connection that holds the lease now.
        attempt: the Spark task that holds the lease, or held it last.
        received, folded: sequence numbers of the newest push that arrived, and of the newest that is in its round.
        num_unpublished: pushes that arrived and are in no published weights yet.
        standbys: connections that wait for the lease, and what they registered.
    """

    report: WorkerReport
    holder: int | None = None
    attempt: int | None = None
    received: int = 0
    folded: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    progress: float | None = None
    num_unpublished: int = 0
    standbys: deque[tuple[int, Registration]] = field(default_factory=deque)

    @property
    def index(self) -> int:
        return self.report.partition

    @property
    def is_folding(self) -> bool:
        return self.received > self.folded

    def update(self, **changes: object) -> None:
        self.report = replace(self.report, **changes)  # type: ignore[arg-type]

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter of the report."""
        self.update(**{name: getattr(self.report, name) + number})

    def restore(self, progress: PartitionProgress) -> None:
        """Goes on where a checkpoint's partition stood."""
        self.report = replace(progress.report, partition=self.index)
        self.received = self.folded = progress.sequence
        self.cursor = progress.cursor
        self.progress = progress.progress

    def require_own_lease(self, registration: Registration) -> None:
        """Raises `LeaseLostError` where an attempt comes back to a lease that is another's by now."""
        if registration.is_resuming and self.attempt != registration.attempt:
            raise self.lease_lost()

    def failed(self, message: str, worker_traceback: str) -> WorkerFailedError:
        return WorkerFailedError(
            f"the worker of partition {self.index} on {self.report.host} raised {message}\n\n{worker_traceback}",
            partition=self.index,
            host=self.report.host,
            worker_traceback=worker_traceback,
        )

    def lease_lost(self) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of partition {self.index} has passed to attempt {self.attempt} on {self.report.host}"
        )
