"""Who holds which partition: one lease each, and the attempts that wait for it; pure, a part of `ps.state`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from tensorspark.errors import LeaseLostError, ProtocolError
from tensorspark.ps.messages import Close, Grant, Registration
from tensorspark.ps.partition import Partition
from tensorspark.ps.sync import Gate
from tensorspark.weights.layout import WeightLayout

logger = logging.getLogger(__name__)


class Leases:
    """A run's leases, by connection.

    Attributes:
        pulls: connections of holders whose pull waits, by partition.
    """

    def __init__(self, layout: WeightLayout, partitions: Sequence[Partition], gate: Gate) -> None:
        self.pulls: dict[int, int] = {}
        self._layout = layout
        self._partitions = partitions
        self._gate = gate
        self._partition_of: dict[int, Partition] = {}

    def of(self, connection: int) -> Partition | None:
        """The partition that the connection has registered for, whoever holds it."""
        return self._partition_of.get(connection)

    def ask(self, connection: int, registration: Registration, now: float) -> tuple[Partition, list[Close]]:
        """A connection asks for its partition: it waits as a standby from now.

        Returns:
            The partition, and what older connections of the same attempt are told.

        Raises:
            ProtocolError: there is no such partition, or the connection has one already.
            RefusedError: it may not have it.
        """
        if not 0 <= registration.partition < len(self._partitions):
            raise ProtocolError(f"expected a partition from 0 to {len(self._partitions) - 1}, got {registration}")
        if connection in self._partition_of:
            raise ProtocolError("this connection has registered already")
        partition = self._partitions[registration.partition]
        self._layout.require_same(registration.fingerprint)
        partition.require_own_lease(registration)
        replaced = self._replace(partition, registration.attempt, now)
        self._partition_of[connection] = partition
        if registration.is_resuming:
            partition.count("num_reconnects")
            partition.standbys.appendleft((connection, registration))  # the lease is still its own
        else:
            partition.standbys.append((connection, registration))
        return partition, replaced

    def held_by(self, connection: int) -> Partition | LeaseLostError:
        """The connection's partition, or why it has none; raises `ProtocolError` where it has not registered."""
        partition = self._partition_of.get(connection)
        if partition is None:
            raise ProtocolError("expected REGISTER as the first frame of a connection")
        return partition if partition.holder == connection else partition.lease_lost()

    def is_waiting(self, connection: int) -> bool:
        """Whether the server owes the connection an answer."""
        partition = self._partition_of.get(connection)
        if partition is None:
            return False
        is_holder = partition.holder == connection
        return not is_holder or partition.num_unpublished > 0 or self.pulls.get(partition.index) == connection

    def coming(self) -> set[int]:
        """Partitions whose successor is there, and waits for its predecessor's push to be published."""
        return {partition.index for partition in self._partitions if partition.holder is None and partition.standbys}

    def count(self, connection: int, name: str, number: int = 1) -> None:
        """Adds to a counter of the report of the connection's partition, if it has one."""
        partition = self._partition_of.get(connection)
        if partition is not None:
            partition.count(name, number)

    def release(self, connection: int, now: float) -> Partition | None:
        """Forgets a connection and what it held; returns its partition."""
        partition = self._partition_of.pop(connection, None)
        if partition is None:
            return None
        partition.standbys = deque(standby for standby in partition.standbys if standby[0] != connection)
        if partition.holder == connection:
            partition.holder = None
            self.pulls.pop(partition.index, None)
            self._gate.lose(partition.index, now)
        return partition

    def grant_next(self, partition: Partition, now: float) -> Grant | None:
        """Gives a free lease to whoever waits for it, if all its pushes are published."""
        if partition.holder is not None or partition.num_unpublished or not partition.standbys:
            return None
        connection, registration = partition.standbys.popleft()
        partition.holder = connection
        if partition.attempt != registration.attempt:
            partition.count("num_attempts")
        partition.attempt = registration.attempt
        partition.update(host=registration.host)
        logger.info("partition %d: attempt %d on %s", registration.partition, registration.attempt, registration.host)
        finished = partition.report.finished
        self._gate.join(partition.index, now, is_finished=finished)
        return Grant(connection, partition.folded, partition.cursor, finished)

    def _replace(self, partition: Partition, attempt: int, now: float) -> list[Close]:
        """Closes an older connection of the attempt, which the server has not seen break yet."""
        old = [connection for connection, standby in partition.standbys if standby.attempt == attempt]
        if partition.holder is not None and partition.attempt == attempt:
            old.append(partition.holder)
        for connection in old:
            self.release(connection, now)
        return [Close(connection) for connection in old]
