"""One run on the server's loop: carries out what `RunState` decides."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from tornado.iostream import IOStream, StreamClosedError

from tensorspark.errors import ProtocolError, TensorsparkError
from tensorspark.history import Point, Recorder, WorkerReport
from tensorspark.ps import headers, protocol
from tensorspark.ps.buffers import BufferPool
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.connection import Connection, Frame
from tensorspark.ps.messages import (
    Accept,
    Close,
    Decision,
    EpochEnd,
    EpochPlan,
    Fold,
    Grant,
    Keep,
    Publish,
    Refuse,
    SendSnapshot,
    Status,
)
from tensorspark.ps.observing import Observer
from tensorspark.ps.protocol import Kind
from tensorspark.ps.rounds import Rounds
from tensorspark.ps.snapshots import SnapshotStore
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tensorspark.telemetry.records import Observation
from tensorspark.weights.combiners import CombinerState, WeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, WeightLayout

logger = logging.getLogger(__name__)

_TICK_S = 0.25
# So many frames of one worker are handled before the others have their turn.
_FRAMES_A_TURN = 16


class Run:
    """A run's state, weights and connections. All methods are called on the server's loop.

    Args:
        number: of the run on its server, from 1.
        weights: initial weights, copied.
        executor: does the arithmetic of large weights, one step at a time.
        io_timeout_s: deadline of one transfer.
        lease_timeout_s: a connection that says nothing for so long, while nobody has it wait, is closed.
        sync: how workers are kept in step.
        resume: where a restored run stood; `weights` are its weights.
        epochs: what is done between epochs; None: nothing.
        compression: how weights travel.
        follows: see `RunState`.
        keeps_spans, traces: see `Collector`.
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
        io_timeout_s: float = 120.0,
        lease_timeout_s: float = 60.0,
        sync: SyncPlan | None = None,
        resume: RunCheckpoint | None = None,
        epochs: EpochPlan | None = None,
        compression: Compression = NO_COMPRESSION,
        follows: bool = False,
        keeps_spans: bool = False,
        traces: bool = False,
    ) -> None:
        version = resume.version if resume else 0
        self.layout = layout
        self.pool = BufferPool(layout, receive_buffer_bytes)
        self.store = SnapshotStore(
            layout, self.pool, weights, version, codec=compression.pull_codec, by_row=compression.pulls_rows
        )
        self.state = RunState(
            number,
            layout,
            num_partitions,
            sync,
            partitions=resume.partitions if resume else (),
            version=version,
            recorder=Recorder(points=resume.points) if resume else None,
            epochs=epochs,
            epoch_progress=resume.epochs if resume else None,
            follows=follows,
        )
        self._totals_bytes = epochs.totals_bytes if epochs else 0
        self._combiner = combiner
        self._push_codec = compression.push_codec
        self._rounds = Rounds(layout, combiner, self.pool, self.store, executor, self, self._push_codec)
        self._io_timeout_s = io_timeout_s
        self._lease_timeout_s = lease_timeout_s
        self._connections: dict[int, Connection] = {}
        self._started_at = time.monotonic() - (resume.seconds if resume else 0.0)
        self._observer = Observer(
            self.state, self._started_at, num_partitions, layout.num_bytes, keeps_spans=keeps_spans, traces=traces
        )
        self._epoch_released_at = time.monotonic()
        self._epoch_end: EpochEnd | None = None
        self._epoch_news = asyncio.Event()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def serve(self, number: int, stream: IOStream) -> None:
        """Answers a worker's frames until it goes, or sends what is not a frame.

        Args:
            number: of the connection, never used twice on one server.
            stream: upgraded, nothing of its frames read yet.
        """
        connection = Connection(
            number,
            stream,
            self.layout,
            self.pool,
            self._io_timeout_s,
            may_take_last=lambda: self.state.may_take_last_buffer(number),
            totals_bytes=self._totals_bytes,
            is_encoded=self._push_codec is not None,
            on_push=lambda began_at: self._observer.arriving(number, began_at),
        )
        self._connections[number] = connection
        try:
            for num_frames in itertools.count(1):
                self._handle(connection, await connection.read())
                if num_frames % _FRAMES_A_TURN == 0:
                    await asyncio.sleep(0)  # what has arrived is read without a pause, for as long as more arrives
        except StreamClosedError:
            pass
        except (ProtocolError, TimeoutError) as error:
            logger.warning("connection %d closed: %.1000s", number, str(error) or "a frame did not end in time")
        finally:
            connection.close()
            del self._connections[number]
            now = time.monotonic()
            self._observer.disconnected(
                number, now, is_lost=not self.state.stopped and self.state.overview.is_needed(number)
            )
            self._execute(self.state.disconnect(number, now))

    def capture(self) -> asyncio.Future[RunCheckpoint]:
        """The run as it is between two rounds, which may take until the open one ends; weights are copied."""
        # The cut may be made on the thread of the arithmetic: what it reads changes on the loop only while a round goes
        # on, but for reports, which are replaced whole.
        return self._rounds.between_rounds(self._cut)

    def hold(self, at_version: int) -> asyncio.Future[int]:
        """Stops between two rounds, once the weights are of this version or newer, until `go_on`; tells theirs."""
        return self._rounds.between_rounds(lambda: self.store.current.version, at_version=at_version, holds=True)

    def go_on(self) -> None:
        """Ends what `hold` began."""
        self._rounds.go_on()

    def _cut(self) -> RunCheckpoint:
        partitions, epochs = self.state.export()
        state = self._combiner.state()
        slots = {name: slot.copy() for name, slot in state.slots.items()}
        return RunCheckpoint(
            layout=self.layout,
            weights=self.store.current.buffer.copy(),
            version=self.store.current.version,
            seconds=time.monotonic() - self._started_at,
            partitions=partitions,
            points=self.state.recorder.export(),
            plan={},
            combiner=type(self._combiner).__name__,
            combiner_settings=self._combiner.settings,
            combiner_state=CombinerState(slots, dict(state.values)),
            is_complete=all(progress.report.finished for progress in partitions),
            epochs=epochs,
        )

    async def epoch_ended(self) -> EpochEnd | None:
        """The epoch that waits for the driver, when there is one; None where there will be none."""
        while not self.state.stopped and not self.state.is_finishing:
            if self._epoch_end is not None:
                return self._epoch_end
            self._epoch_news.clear()
            await self._epoch_news.wait()
        return None

    def release_epoch(self, epoch: int, values: Mapping[str, float], *, finish: bool) -> None:
        """Lets the epoch after `epoch` begin, or has the run end."""
        decisions = self.state.release_epoch(epoch, values, finish=finish)
        self._epoch_end = None
        self._epoch_released_at = time.monotonic()
        self._execute(decisions)

    def request_stop(self) -> None:
        """Has every worker finish at its next pull."""
        self._execute(self.state.request_stop())

    @property
    def began_at(self) -> float:
        """When it began, on the monotonic clock; of a restored run, as if it had never been interrupted."""
        return self._started_at

    def status(self) -> Status:
        return replace(self.state.overview.status(), staleness=self._observer.collector.mean_staleness)

    def points(self) -> tuple[Point, ...]:
        return self.state.recorder.points()

    def reports(self) -> tuple[WorkerReport, ...]:
        return self.state.overview.reports()

    def observe(self) -> Observation:
        """What has happened since the last time; see `telemetry`."""
        return self._observer.observe(self.store.current.version, time.monotonic())

    def stop(self, failure: TensorsparkError | None = None) -> None:
        """Refuses whoever waits or comes later."""
        self._execute(self.state.stop(failure))

    def close(self) -> None:
        """Stops, and closes the connections."""
        self._watching.cancel()
        self.stop()
        for connection in list(self._connections.values()):
            connection.close()

    def _handle(self, connection: Connection, frame: Frame) -> None:
        header, number = frame.header, connection.number
        now = time.monotonic()
        if frame.kind is Kind.NOTE:
            self._observer.noted(number, frame, now)
            return
        self._observer.received(number, frame, now)
        if frame.kind is Kind.PULL:
            connection.held = protocol.count(header, "version") if "version" in header else None
            decisions = self.state.pull(number, headers.asked(header), headers.asked_epoch(header))
        elif frame.kind is Kind.PUSH:
            decisions = self._push(number, frame)
        elif frame.kind is Kind.REGISTER:
            registration = headers.registration(header)
            decisions = self.state.register(number, registration, now)
            if not any(isinstance(decision, Refuse) for decision in decisions):
                self._observer.registered(number, registration, now)
        elif frame.kind is Kind.FINISH:
            decisions = self.state.finish(number, headers.time_spent(header))
        elif frame.kind is Kind.SKIP:
            decisions = self.state.skip(number, protocol.count(header, "epoch"))
        elif frame.kind is Kind.EVALUATION:
            epoch, num_samples = (
                protocol.count(header, "epoch"),
                protocol.count(header, "num_samples", headers.COUNT_BITS),
            )
            decisions = self.state.evaluate(number, epoch, frame.totals, num_samples)
        elif frame.kind is Kind.ALIVE:
            return
        else:
            message, trace = protocol.field(header, "message", str), protocol.field(header, "traceback", str)
            decisions = self.state.fail(number, message, trace)
        self._execute(decisions)

    def _push(self, number: int, frame: Frame) -> list[Decision]:
        assert frame.payload is not None
        is_kept = False
        try:
            push = headers.push(frame)
            decisions = self.state.push(number, push)
            is_kept = Keep() in decisions
        finally:
            if not is_kept:
                self.pool.put_back(frame.payload)
        if is_kept:
            self._rounds.keep(number, push.sequence, frame.payload)
        return decisions

    def _execute(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Fold | Publish):
                self._rounds.submit(decision)
            elif not isinstance(decision, Keep) and decision.connection in self._connections:
                self._observer.decided(decision, time.monotonic())
                self._answer(self._connections[decision.connection], decision)
        if self.state.stopped:
            self._rounds.abandon()
        self._notice_epoch()
        self.pool.serve_waiters()  # whose turn it is may have changed, also where nothing was decided: by a tick, say

    def _notice_epoch(self) -> None:
        """Tells who waits for an epoch's end what has become of it."""
        if not self.state.is_epoch_ready:
            self._epoch_end = None  # of a shard that follows another, which had it go on
        elif self._epoch_end is None:
            self._epoch_end = self.state.epoch_end(time.monotonic() - self._epoch_released_at)
        if self._epoch_end is not None or self.state.stopped or self.state.is_finishing:
            self._epoch_news.set()

    def _answer(self, connection: Connection, decision: Grant | Refuse | SendSnapshot | Accept | Close) -> None:
        if isinstance(decision, SendSnapshot):
            self._send_snapshot(connection, decision)
        elif isinstance(decision, Accept):
            connection.write(Kind.ACCEPTED, {"sequence": decision.sequence})
        elif isinstance(decision, Refuse):
            logger.info("connection %d refused: %s", connection.number, decision.error)
            connection.write(Kind.REFUSED, protocol.refusal_header(decision.error))
        elif isinstance(decision, Grant):
            connection.write(Kind.GRANTED, headers.granted_header(decision, time.monotonic()))
        else:
            connection.close()

    def _send_snapshot(self, connection: Connection, decision: SendSnapshot) -> None:
        held = connection.held if decision.has_weights else self.store.current.version
        loan = self.store.lend(held)
        header = {**headers.order_header(self.state.order(decision, loan.version)), "form": loan.form.value}
        num_bytes = 0 if loan.buffer is None else loan.buffer.nbytes
        self.state.sent(connection.number, num_bytes)
        self._observer.sent(num_bytes)

        def on_written() -> None:
            self.store.give_back(loan)
            self._observer.delivered(connection.number, decision.order, time.monotonic())

        connection.write(Kind.SNAPSHOT, header, loan.buffer, on_written)

    # What came of folds and rounds

    def is_next(self, fold: Fold) -> bool:
        return self.state.is_next(fold)

    def on_folded(self, fold: Fold, error: TensorsparkError | None) -> None:
        now = time.monotonic()
        if error is None:
            self.state.folded(fold, now - self._started_at)
            self._observer.folded(fold, self.store.current.version - fold.push.version, now)
        else:
            self._execute(self.state.not_folded(fold, error, now))

    def on_timed(self, name: str, began_at: float, ended_at: float) -> None:
        self._observer.collector.timed(name, began_at, ended_at)

    def on_published(self, folds: list[Fold], error: TensorsparkError | None) -> None:
        if error is None:
            self._execute(self.state.published(folds, time.monotonic()))
        else:
            self.stop(error)

    # Time

    async def _watch(self) -> None:
        """Lets deadlines pass, closes silent connections, and tells those that wait that the server lives."""
        waits_told_at = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._execute(self.state.tick(now))
            self._close_silent(now)
            if now - waits_told_at >= self._io_timeout_s / 4:
                waits_told_at = now
                self._tell_waiting()

    def _close_silent(self, now: float) -> None:
        for connection in list(self._connections.values()):
            if connection.is_busy or self.state.is_waiting(connection.number):
                connection.heard_at = now  # the worker's silence begins when it has its answer
            elif now - connection.heard_at > self._lease_timeout_s:
                logger.warning(
                    "connection %d closed: its worker was silent for %g s (spark.tensorspark.lease.timeout)",
                    connection.number,
                    self._lease_timeout_s,
                )
                connection.close()

    def _tell_waiting(self) -> None:
        for connection in list(self._connections.values()):
            if connection.is_held_up or self.state.is_waiting(connection.number):
                connection.write(Kind.WAIT, {})
