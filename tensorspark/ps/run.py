"""One run on the server's loop: carries out what `RunState` decides."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

from tornado.iostream import StreamClosedError

from tensorspark.errors import CombinerError, NonFiniteError, ProtocolError, RefusedError, TensorsparkError
from tensorspark.history import Point, WorkerReport
from tensorspark.ps import protocol
from tensorspark.ps.buffers import BufferPool, SnapshotStore
from tensorspark.ps.connection import Connection, Frame
from tensorspark.ps.protocol import Kind
from tensorspark.ps.state import (
    Accept,
    Cursor,
    Decision,
    Grant,
    Merge,
    Push,
    Refuse,
    Registration,
    RunState,
    SendSnapshot,
    Status,
)
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.weights.layout import Buffer, WeightLayout

logger = logging.getLogger(__name__)

# A larger merge, or one in a user's code, leaves the loop to another thread; for others the change costs more than it.
_MERGE_INLINE_BYTES = 2**20


class Run:
    """A run's state, weights and connections. All methods are called on the server's loop.

    Args:
        number: of the run on its server, from 1.
        weights: initial weights, copied.
        executor: runs large merges, one at a time.
    """

    def __init__(
        self,
        number: int,
        layout: WeightLayout,
        weights: Buffer,
        combiner: WeightCombiner,
        num_partitions: int,
        *,
        receive_buffer_bytes: int,
        executor: Executor,
    ) -> None:
        self.layout = layout
        self.pool = BufferPool(layout, receive_buffer_bytes)
        self.store = SnapshotStore(self.pool, weights)
        self.state = RunState(number, layout, num_partitions)
        self._combiner = combiner
        self._executor = executor
        self._merges_inline = combiner.is_elementwise and layout.num_bytes <= _MERGE_INLINE_BYTES
        self._connections: dict[int, Connection] = {}
        self._merges: deque[tuple[Merge, Buffer]] = deque()
        self._merging: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()

    async def serve(self, connection: Connection) -> None:
        """Answers a worker's frames until it goes, or sends what is not a frame."""
        self._connections[connection.number] = connection
        try:
            while True:
                self._handle(connection, await connection.read())
        except StreamClosedError:
            pass
        except (ProtocolError, TimeoutError) as error:
            logger.warning("connection %d closed: %s", connection.number, error or "a frame did not end in time")
        finally:
            connection.close()
            del self._connections[connection.number]
            self._execute(self.state.disconnect(connection.number))

    def status(self) -> Status:
        return self.state.status()

    def points(self) -> tuple[Point, ...]:
        return self.state.recorder.points()

    def reports(self) -> tuple[WorkerReport, ...]:
        return self.state.reports()

    def stop(self, failure: TensorsparkError | None = None) -> None:
        """Refuses whoever waits or comes later."""
        self._execute(self.state.stop(failure))

    def close(self) -> None:
        """Stops, and closes the connections."""
        self.stop()
        for connection in list(self._connections.values()):
            connection.close()

    def _handle(self, connection: Connection, frame: Frame) -> None:
        header, number = frame.header, connection.number
        if frame.kind is Kind.PULL:
            decisions = self.state.pull(number)
        elif frame.kind is Kind.PUSH:
            decisions = self._push(number, frame)
        elif frame.kind is Kind.REGISTER:
            decisions = self.state.register(number, _registration(header))
        elif frame.kind is Kind.FINISH:
            decisions = self.state.finish(
                number,
                epoch_samples=protocol.numbers(header, "epoch_samples", int),
                epoch_seconds=protocol.numbers(header, "epoch_seconds", float),
                step_s=protocol.field(header, "step_s", float),
                sync_s=protocol.field(header, "sync_s", float),
            )
        else:
            message, trace = protocol.field(header, "message", str), protocol.field(header, "traceback", str)
            decisions = self.state.fail(number, message, trace)
        self._execute(decisions)

    def _push(self, number: int, frame: Frame) -> list[Decision]:
        assert frame.payload is not None
        merges = False
        try:
            decisions = self.state.push(number, _push(frame.header))
            merges = any(isinstance(decision, Merge) for decision in decisions)
        finally:
            if not merges:
                self.pool.put_back(frame.payload)
        for decision in decisions:
            if isinstance(decision, Merge):
                self._merges.append((decision, frame.payload))
        return decisions

    def _execute(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Merge):
                self._pump()
                continue
            connection = self._connections.get(decision.connection)
            if connection is None:
                continue
            if isinstance(decision, SendSnapshot):
                self._send_snapshot(connection)
            elif isinstance(decision, Accept):
                connection.write(Kind.ACCEPTED, {"sequence": decision.sequence})
            elif isinstance(decision, Refuse):
                logger.info("connection %d refused: %s", connection.number, decision.error)
                connection.write(Kind.REFUSED, protocol.refusal_header(decision.error))
            else:
                connection.write(Kind.GRANTED, _granted_header(decision))

    def _send_snapshot(self, connection: Connection) -> None:
        snapshot = self.store.pin()
        header = {"version": snapshot.version}
        connection.write(Kind.SNAPSHOT, header, snapshot.buffer, lambda: self.store.unpin(snapshot))

    # Merges, one after the other

    def _pump(self) -> None:
        """Merges right here what is quickly merged, and leaves the rest to a task."""
        if self._merging is not None:
            return
        if not self._merges_inline:
            self._merging = asyncio.get_running_loop().create_task(self._merge_all())
            return
        while self._merges:
            merge, buffer = self._merges.popleft()
            self._conclude(merge, buffer, self._merge(merge, buffer))

    async def _merge_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._merges:
                merge, buffer = self._merges.popleft()
                error = await loop.run_in_executor(self._executor, self._merge, merge, buffer)
                self._conclude(merge, buffer, error)
        finally:
            self._merging = None

    def _merge(self, merge: Merge, buffer: Buffer) -> RefusedError | CombinerError | None:
        """Merges a push in place, and says what is wrong with it; then `buffer` holds nothing of use."""
        if not self.state.is_next(merge):
            return RefusedError("a push before this one was refused")
        try:
            finite = self._combiner.merge(self.layout, self.store.current.buffer, buffer, merge.partition)
        except CombinerError as error:
            return error
        except Exception as error:
            return CombinerError(f"{type(self._combiner).__name__}.merge raised {type(error).__name__}: {error}")
        if finite:
            return None
        name = self.layout.find_non_finite(buffer)
        return NonFiniteError(
            f"NaN or infinity in {name}, pushed by partition {merge.partition}: the push was refused and the server's "
            f"weights are as they were; look at the learning rate, and at the loss for log(0)"
        )

    def _conclude(self, merge: Merge, buffer: Buffer, error: RefusedError | CombinerError | None) -> None:
        if error is not None:
            self.pool.put_back(buffer)
            self._execute(self.state.not_merged(merge, error))
            return
        self.store.publish(buffer)
        self._execute(self.state.merged(merge, time.monotonic() - self._started_at))


def _registration(header: dict[str, object]) -> Registration:
    return Registration(
        run=protocol.count(header, "run"),
        partition=protocol.count(header, "partition"),
        attempt=protocol.count(header, "attempt"),
        fingerprint=protocol.field(header, "fingerprint", str),
        host=protocol.field(header, "host", str),
    )


def _push(header: dict[str, object]) -> Push:
    sums = protocol.field(header, "sums", dict)
    return Push(
        sequence=protocol.count(header, "sequence"),
        cursor=Cursor(protocol.count(header, "epoch"), protocol.count(header, "batch")),
        num_steps=protocol.count(header, "num_steps"),
        num_samples=protocol.count(header, "num_samples"),
        sums={str(name): protocol.field(sums, name, float) for name in sums},
        progress=None if header.get("progress") is None else protocol.field(header, "progress", float),
    )


def _granted_header(grant: Grant) -> dict[str, object]:
    return {
        "sequence": grant.sequence,
        "epoch": grant.cursor.epoch,
        "batch": grant.cursor.batch,
        "finished": grant.finished,
    }
