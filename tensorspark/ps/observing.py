"""What the server notes of a run's frames for whoever watches it; see `telemetry`."""

from __future__ import annotations

from tensorspark.ps import headers
from tensorspark.ps.connection import Frame
from tensorspark.ps.messages import Accept, Decision, Fold, Grant, OrderKind, Registration, SendSnapshot
from tensorspark.ps.protocol import Kind
from tensorspark.ps.state import RunState
from tensorspark.telemetry.collector import Collector, Timeline
from tensorspark.telemetry.records import Activity, Observation, Sample


class Observer:
    """Follows every connection's worker, from the frames that come and go. The server's loop owns it.

    Args:
        began_at: when the run began, on the monotonic clock.
        model_bytes: of the weights, raw.
        keeps_spans, traces: see `Collector`.
    """

    def __init__(
        self,
        state: RunState,
        began_at: float,
        num_partitions: int,
        model_bytes: int,
        *,
        keeps_spans: bool,
        traces: bool = False,
    ) -> None:
        self.collector = Collector(began_at, num_partitions, keeps_spans=keeps_spans, traces=traces)
        for report in state.overview.reports():  # of a restored run: what it saved before is not known
            self.collector.num_raw_bytes_pushed += report.num_bytes_pushed
            self.collector.num_raw_bytes_pulled += report.num_bytes_pulled
        self._state = state
        self._model_bytes = model_bytes
        self._timelines: dict[int, Timeline] = {}

    def registered(self, connection: int, registration: Registration, now: float) -> None:
        """A worker asks for its partition, which there is."""
        timeline = self._timelines[connection] = Timeline(self.collector)
        timeline.begin(registration.partition, registration.host, registration.attempt, now)
        if registration.is_resuming:
            self._event(timeline, now, "reconnected")

    def arriving(self, connection: int, now: float) -> None:
        """A push has begun to arrive."""
        timeline = self._timelines.get(connection)
        if timeline is not None and timeline.activity is not Activity.STANDBY:
            timeline.switch(Activity.PUSH, now)

    def received(self, connection: int, frame: Frame, now: float) -> None:
        """A frame has come, and is about to be handled."""
        timeline = self._timelines.get(connection)
        if timeline is None or timeline.activity is Activity.STANDBY:
            return
        if frame.kind is Kind.PUSH:
            # What was told since it began to arrive is told: no time is counted twice.
            timeline.switch(Activity.PUSH, max(frame.began_at, timeline.since))
            self.collector.num_raw_bytes_pushed += self._model_bytes + len(frame.totals)
        if frame.kind in (Kind.FINISH, Kind.FAIL):
            self._ends(connection, timeline, frame.kind, now)
        elif frame.kind is not Kind.ALIVE:
            timeline.switch(Activity.WAIT, now)

    def decided(self, decision: Decision, now: float) -> None:
        """The worker is told something."""
        timeline = self._timelines.get(getattr(decision, "connection", -1))
        if timeline is None:
            return
        if isinstance(decision, Grant):
            timeline.switch(Activity.COMPUTE, now)
            self._event(timeline, now, "granted")
        elif isinstance(decision, SendSnapshot):
            timeline.switch(Activity.PULL, now)
        elif isinstance(decision, Accept) and not self._state.is_waiting(decision.connection):
            timeline.switch(Activity.COMPUTE, now)

    def delivered(self, connection: int, order: OrderKind, now: float) -> None:
        """What was sent to the worker is on its way."""
        timeline = self._timelines.get(connection)
        if timeline is not None and timeline.activity is Activity.PULL:
            timeline.switch(Activity.EVALUATE if order is OrderKind.EVALUATE else Activity.COMPUTE, now)

    def sent(self, num_bytes: int) -> None:
        """A snapshot was sent, in so many bytes."""
        self.collector.num_raw_bytes_pulled += self._model_bytes if num_bytes else 0

    def disconnected(self, connection: int, now: float, *, is_lost: bool) -> None:
        """A connection has closed; `is_lost`: the worker had a partition, which it has not finished."""
        timeline = self._timelines.pop(connection, None)
        if timeline is None:
            return
        timeline.switch(None, now)
        if is_lost:
            self._event(timeline, now, "lost")

    def noted(self, connection: int, frame: Frame, now: float) -> None:
        """Takes note of what a worker tells; one that has not registered tells nothing of the run.

        Raises:
            ProtocolError: it is no note.
        """
        note = headers.note(frame.header)
        timeline = self._timelines.get(connection)
        if timeline is None:
            return
        timeline.clock.arrived(note.sent_at, frame.began_at)
        if note.clock_bound is not None:
            timeline.clock.departed(note.clock_bound)
        self.collector.noted(now, timeline.partition, timeline.host, note, timeline.clock)

    def folded(self, fold: Fold, staleness: int, now: float) -> None:
        """A push is in its round."""
        recorder, push = self._state.recorder, fold.push
        self.collector.dirty.add(fold.partition)
        self.collector.folded(now, recorder.num_steps, recorder.num_samples, push.num_samples, push.sums, staleness)

    def observe(self, version: int, now: float) -> Observation:
        """All that was gathered since the last time, and the run as it stands."""
        collector = self.collector
        for timeline in self._timelines.values():
            timeline.settle(now)
        overview = self._state.overview
        status, reports, fastest = overview.status(), overview.reports(), overview.fastest_round()
        sample = Sample(
            seconds=collector.since_began(now),
            num_steps=status.num_steps,
            num_samples=status.num_samples,
            num_live=status.num_live,
            num_lost=status.num_lost,
            num_standby=status.num_standby,
            num_waiting=status.num_waiting,
            num_finished=status.num_finished,
            progress=status.progress,
            epoch=status.epoch,
            version=version,
            num_bytes_pushed=sum(report.num_bytes_pushed for report in reports),
            num_bytes_pulled=sum(report.num_bytes_pulled for report in reports),
            num_raw_bytes_pushed=collector.num_raw_bytes_pushed,
            num_raw_bytes_pulled=collector.num_raw_bytes_pulled,
            staleness=tuple(collector.staleness),
            workers=tuple(
                overview.worker(index, collector.busy_s(index), fastest) for index in sorted(collector.take_dirty())
            ),
        )
        return Observation(
            sample=sample,
            points=collector.take_points(),
            spans=collector.take_spans(),
            events=collector.take_events(),
            logs=collector.take_logs(),
            traced=collector.take_traced(),
        )

    def _ends(self, connection: int, timeline: Timeline, kind: Kind, now: float) -> None:
        """The worker says that it is at nothing any more; of one that has lost its partition it says nothing."""
        timeline.switch(None, now)
        overview = self._state.overview
        if self._state.stopped:
            return
        if kind is Kind.FINISH and overview.is_needed(connection):
            self._event(timeline, now, "finished")
        elif kind is Kind.FAIL and overview.is_holder(connection):
            self._event(timeline, now, "failed")

    def _event(self, timeline: Timeline, now: float, what: str) -> None:
        self.collector.event(now, timeline.partition, what, timeline.host, timeline.attempt)
