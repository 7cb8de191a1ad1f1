"""What a real server tells of real workers: what they were at, what became of them, what they pushed and said."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorspark.driver import watching, weight_watching
from tensorspark.driver.watching import RunWatch
from tensorspark.driver.weight_watching import WeightWatch
from tensorspark.ps import headers, protocol
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Cursor, EpochPlan, OrderKind, Push, Registration, TimeSpent
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.sync import SyncPlan
from tensorspark.telemetry.files import RunFile, read_run
from tensorspark.telemetry.notes import Line, Notebook, Timing
from tensorspark.telemetry.records import (
    LogLine,
    Observation,
    Record,
    RunBegan,
    Sample,
    Span,
    TrainingPoint,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.traces import TraceFile
from tensorspark.telemetry.view import RunView
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.wire import Wire

SMALL = WeightLayout([TensorSpec("W:0", (4, 3), "float32"), TensorSpec("step:0", (), "int64")])
WIDE = WeightLayout([TensorSpec("W:0", (100, 1000), "float32")])
DEADLINE_S = 20.0


def filled(layout: WeightLayout, value: float) -> Buffer:
    return layout.pack({spec.name: np.full(spec.shape, value, spec.dtype) for spec in layout.specs})


def push_of(sequence: int, version: int = 0, **changes: Any) -> Push:
    push = Push(sequence, Cursor(0, sequence), 2, 10, version, {"loss": 5.0}, sequence / 10)
    return replace(push, **changes)


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls, since what another connection did is seen by asking only."""
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come about within {DEADLINE_S:g} s")
        pause.wait(0.01)


class Watched:
    """A server with a run that is watched: all that it has told so far."""

    def __init__(self, stack: ExitStack, layout: WeightLayout, partitions: int, **options: Any) -> None:
        self.layout = layout
        self.compression = options.get("compression", Compression())
        self.server = stack.enter_context(ParameterServer(layout, "127.0.0.1"))
        self._stack = stack
        options = {"keeps_spans": True, **options}
        self.run = self.server.begin_run(filled(layout, 2), DeltaWeightCombiner(), partitions, **options)
        self.sample: Sample | None = None
        self.spans: list[Span] = []
        self.events: list[WorkerEvent] = []
        self.points: list[TrainingPoint] = []
        self.logs: list[LogLine] = []
        self.traced: list[Span] = []
        self.workers: dict[int, WorkerSample] = {}

    def worker(self, partition: int = 0, attempt: int = 1, *, register: bool = True) -> ParameterClient:
        address = ServerAddress("127.0.0.1", self.server.port, self.server.token, 5.0, DEADLINE_S, DEADLINE_S)
        client = self._stack.enter_context(ParameterClient(address, self.layout, self.compression))
        if register:
            client.register(self.registration(partition, attempt))
        return client

    def registration(self, partition: int = 0, attempt: int = 1) -> Registration:
        return Registration(self.run, partition, attempt, self.layout.fingerprint, f"node-{attempt}")

    def wire(self) -> Wire:
        return self._stack.enter_context(Wire(self.server))

    def observe(self) -> Observation:
        observation = self.server.observe()
        self.spans += observation.spans
        self.events += observation.events
        self.points += observation.points
        self.logs += observation.logs
        self.traced += observation.traced
        self.sample = observation.sample
        self.workers |= {worker.partition: worker for worker in observation.sample.workers}
        return observation

    def until(self, condition: Callable[[Sample], bool]) -> Sample:
        """Asks until it is so: what a connection did is seen by asking only."""
        wait_until(lambda: condition(self.observe().sample))
        assert self.sample is not None
        return self.sample

    def until_event(self, what: str) -> WorkerEvent:
        self.until(lambda sample: any(event.what == what for event in self.events))
        return next(event for event in self.events if event.what == what)

    def told(self, partition: int = 0) -> list[tuple[str, int]]:
        """What became of a partition's workers, and which attempts."""
        return [(event.what, event.attempt) for event in self.events if event.partition == partition]


Watch = Callable[..., Watched]


@pytest.fixture
def watch() -> Iterator[Watch]:
    with ExitStack() as stack:
        yield lambda layout=SMALL, partitions=3, **options: Watched(stack, layout, partitions, **options)


def assert_add_up(watched: Watched, partition: int, until: float) -> None:
    """Spans lie one behind the other, are as long as the seconds told, and leave nothing out up to `until`."""
    spans = [span for span in watched.spans if span.partition == partition]
    busy_s = watched.workers[partition].busy_s
    for earlier, later in itertools.pairwise(spans):
        assert later.seconds == pytest.approx(earlier.seconds + earlier.duration_s, abs=1e-6)
    for activity, seconds in busy_s.items():
        assert seconds == pytest.approx(sum(s.duration_s for s in spans if s.activity == activity), abs=1e-6)
    assert sum(busy_s.values()) == pytest.approx(until - spans[0].seconds, abs=1e-6)


# What workers are at


def test_a_workers_time_is_told_without_gaps_from_its_registration_on(watch: Watch) -> None:
    watched = watch()
    assert watched.observe().sample.workers == ()  # nobody has come yet
    worker, buffer = watched.worker(1), watched.layout.allocate()
    for sequence in range(1, 6):
        version = worker.pull(buffer).version
        worker.push(filled(watched.layout, 1), push_of(sequence, version))
    worker.flush()
    sample = watched.observe().sample
    assert_add_up(watched, 1, sample.seconds)
    activities = [span.activity for span in watched.spans]
    assert activities[:2] == ["standby", "compute"]
    assert {"push", "wait", "pull", "compute"} <= set(activities)
    assert activities.index("pull") < activities.index("push")
    assert set(watched.workers) == {1}


def test_one_who_computes_and_one_who_waits_for_it_are_told_apart_second_by_second(watch: Watch) -> None:
    watched = watch(partitions=2, sync=SyncPlan(staleness=0, num_first=2))
    slow, fast, buffer = watched.worker(0), watched.worker(1), watched.layout.allocate()
    for worker in (slow, fast):
        worker.pull(buffer)
    fast.push(filled(watched.layout, 1), push_of(1))
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(fast.pull, watched.layout.allocate())
        began = watched.until(lambda sample: sample.num_waiting == 1)
        before = dict(watched.workers)
        assert (before[0].state, before[1].state) == ("live", "waiting")
        ended = watched.until(lambda sample: sample.seconds > began.seconds + 0.25)
        assert not pulled.done()
        elapsed_s = ended.seconds - began.seconds
        for partition, activity in ((0, "compute"), (1, "wait")):
            grown = {
                name: watched.workers[partition].busy_s[name] - before[partition].busy_s.get(name, 0.0)
                for name in watched.workers[partition].busy_s
            }
            assert grown.pop(activity) == pytest.approx(elapsed_s, abs=1e-6)
            assert set(grown.values()) == {0.0}
        slow.push(filled(watched.layout, 1), push_of(1))
        assert pulled.result(DEADLINE_S).version == 1
    sample = watched.until(lambda sample: sample.num_waiting == 0)
    assert watched.workers[1].state == "live"
    assert_add_up(watched, 0, sample.seconds)
    assert_add_up(watched, 1, sample.seconds)


def test_a_push_that_takes_long_to_arrive_counts_no_second_twice_however_often_one_asks(watch: Watch) -> None:
    watched = watch(WIDE)
    wire, whole = watched.wire(), filled(WIDE, 1).tobytes()
    wire.register(watched.server, watched.run)
    wire.pull(WIDE.allocate())
    wire.socket.sendall(protocol.encode(Kind.PUSH, headers.push_header(push_of(1)), len(whole)) + whole[:1000])
    told: list[Mapping[str, float]] = []
    began = watched.observe().sample.seconds
    while watched.observe().sample.seconds < began + 0.3:
        told.append(watched.workers[0].busy_s)
    wire.socket.sendall(whole[1000:])
    wire.receive(Kind.ACCEPTED)
    sample = watched.observe().sample
    told.append(watched.workers[0].busy_s)
    for before, after in itertools.pairwise(told):
        assert all(after[name] >= seconds for name, seconds in before.items())
    assert watched.workers[0].num_applied == 1
    assert watched.workers[0].busy_s["push"] > 0.3
    assert_add_up(watched, 0, sample.seconds)


def test_an_evaluation_and_a_rest_at_the_epochs_end_are_what_they_are(watch: Watch) -> None:
    watched = watch(partitions=1, epochs=EpochPlan(1, validates=True, num_totals=2), sync=SyncPlan(0))
    worker, buffer = watched.worker(), watched.layout.allocate()
    assert worker.pull(buffer).kind is OrderKind.TRAIN
    totals = np.array([4.0, 1.0]).tobytes()
    worker.push(filled(watched.layout, 1), push_of(1, cursor=Cursor(1), totals=totals))
    order = worker.pull(buffer)
    assert order.kind is OrderKind.EVALUATE
    began = watched.until(lambda sample: "evaluate" in watched.workers[0].busy_s)
    ended = watched.until(lambda sample: sample.seconds > began.seconds)
    assert watched.spans[-1].activity == "evaluate"
    worker.report_evaluation(order.epoch, totals, 7)
    with ThreadPoolExecutor(1) as threads:
        last = threads.submit(worker.pull, watched.layout.allocate())
        began = watched.until(lambda sample: watched.workers[0].state == "waiting")
        ended = watched.until(lambda sample: sample.seconds > began.seconds)
        assert watched.spans[-1].activity == "wait"
        assert began.num_waiting == ended.num_waiting == 0  # it rests: nobody holds it up
        end = watched.server.wait_epoch(DEADLINE_S)
        assert end is not None
        watched.server.release_epoch(end.epoch, {})
        assert last.result(DEADLINE_S).kind is OrderKind.FINISH
    assert_add_up(watched, 0, watched.observe().sample.seconds)


def test_one_who_is_finished_spends_no_more_time(watch: Watch) -> None:
    watched = watch()
    worker = watched.worker()
    worker.pull(watched.layout.allocate())
    worker.finish(TimeSpent())
    first = watched.until(lambda sample: sample.num_finished == 1)
    busy_s = watched.workers[0].busy_s
    watched.until(lambda sample: sample.seconds > first.seconds + 0.1)
    assert watched.workers[0].busy_s == busy_s
    assert watched.workers[0].state == "finished"
    assert watched.told() == [("granted", 1), ("finished", 1)]


def test_without_anybody_who_wants_spans_time_is_still_added_up(watch: Watch) -> None:
    watched = watch(keeps_spans=False)
    worker, buffer = watched.worker(), watched.layout.allocate()
    for sequence in range(1, 4):
        worker.push(filled(watched.layout, 1), push_of(sequence, worker.pull(buffer).version))
    worker.flush()
    watched.observe()
    assert watched.spans == []
    assert sum(watched.workers[0].busy_s.values()) > 0


# What becomes of workers


def test_a_worker_that_dies_is_lost_and_its_successor_is_told_of(watch: Watch) -> None:
    watched = watch()
    first = watched.worker(2, attempt=7)
    first.push(filled(watched.layout, 1), push_of(1))
    first.flush()
    first.close()
    lost = watched.until_event("lost")
    assert (lost.partition, lost.host, lost.attempt) == (2, "node-7", 7)
    sample = watched.until(lambda sample: sample.num_lost == 1)
    assert (watched.workers[2].state, sample.num_live) == ("lost", 0)
    watched.worker(2, attempt=9)
    watched.until(lambda sample: sample.num_live == 1)
    worker = watched.workers[2]
    assert (worker.state, worker.host, worker.attempt, worker.num_attempts) == ("live", "node-9", 9, 2)
    assert watched.told(2) == [("granted", 7), ("lost", 7), ("granted", 9)]
    assert [event.seconds for event in watched.events] == sorted(event.seconds for event in watched.events)


def test_a_connection_that_breaks_and_comes_back_is_told_as_such(watch: Watch) -> None:
    watched = watch()
    worker, buffer = watched.worker(), watched.layout.allocate()
    worker.pull(buffer)
    worker._link.close()
    watched.until_event("lost")
    worker.push(filled(watched.layout, 1), push_of(1))
    assert worker.pull(buffer).version == 1
    watched.until_event("reconnected")
    assert watched.told() == [("granted", 1), ("lost", 1), ("reconnected", 1), ("granted", 1)]
    assert watched.workers[0].num_reconnects == 1
    assert watched.workers[0].num_applied == 1


def test_a_standby_stands_by_until_the_holder_is_gone(watch: Watch) -> None:
    watched = watch()
    holder = watched.worker(attempt=1)
    standby = watched.worker(register=False)
    with ThreadPoolExecutor(1) as threads:
        granted = threads.submit(standby.register, watched.registration(attempt=2))
        began = watched.until(lambda sample: sample.num_standby == 1)
        before = watched.workers[0].busy_s
        ended = watched.until(lambda sample: sample.seconds > began.seconds + 0.1)
        after = watched.workers[0].busy_s
        for activity in ("standby", "compute"):
            assert after[activity] - before[activity] == pytest.approx(ended.seconds - began.seconds, abs=1e-6)
        assert watched.told() == [("granted", 1)]
        holder.close()
        granted.result(DEADLINE_S)
    watched.until(lambda sample: watched.told()[-1] == ("granted", 2))
    assert watched.told() == [("granted", 1), ("lost", 1), ("granted", 2)]


def test_a_standby_that_goes_or_says_that_it_is_done_is_nothing_that_happened_to_its_partition(watch: Watch) -> None:
    watched = watch()
    watched.worker(attempt=1)
    wire = watched.wire()
    wire.send(Kind.REGISTER, vars(watched.registration(attempt=2)))
    watched.until(lambda sample: sample.num_standby == 1)
    wire.send(Kind.FINISH, vars(TimeSpent()))
    wire.receive(Kind.REFUSED)
    wire.send(Kind.FAIL, {"message": "no", "traceback": "no"})
    wire.receive(Kind.REFUSED)
    wire.close()
    watched.until(lambda sample: sample.num_standby == 0)
    assert watched.told() == [("granted", 1)]
    assert watched.server.failure() is None


def test_a_finish_that_is_said_again_on_a_new_connection_is_one(watch: Watch) -> None:
    watched = watch()
    for is_resuming in (False, True):
        wire = watched.wire()
        wire.send(Kind.REGISTER, vars(replace(watched.registration(), is_resuming=is_resuming)))
        wire.receive(Kind.GRANTED)
        wire.send(Kind.FINISH, vars(TimeSpent()))
        wire.receive(Kind.ACCEPTED)
        wire.close()
    watched.until_event("reconnected")
    assert [what for what, _ in watched.told()] == ["granted", "finished", "reconnected", "granted"]


def test_the_worker_that_failed_is_told_of_and_not_those_that_the_end_of_the_run_took_along(watch: Watch) -> None:
    watched = watch()
    failing, other = watched.worker(0, 1), watched.worker(1, 5)
    failing.report("no more rows", "traceback")
    watched.until_event("failed")
    other.report("the run has ended", "traceback")
    for worker in (failing, other):
        worker.close()
    assert watched.server.failure() is not None
    watched.observe()
    assert (watched.told(0), watched.told(1)) == ([("granted", 1), ("failed", 1)], [("granted", 5)])


# What they push


def test_staleness_is_by_how_many_versions_a_push_came_late(watch: Watch) -> None:
    watched = watch(partitions=2)
    fast, slow, buffer = watched.worker(0), watched.worker(1), watched.layout.allocate()
    slow.pull(watched.layout.allocate())
    for sequence in range(1, 4):
        fast.push(filled(watched.layout, 1), push_of(sequence, fast.pull(buffer).version))
    fast.flush()
    slow.push(filled(watched.layout, 1), push_of(1, version=0))
    slow.flush()
    sample = watched.observe().sample
    assert {late: count for late, count in enumerate(sample.staleness) if count} == {0: 3, 3: 1}
    assert (sample.version, sample.num_steps, sample.num_samples) == (4, 8, 40)
    assert [watched.workers[partition].lag for partition in (0, 1)] == [0, 2]


def test_points_have_the_means_of_all_rows_since_the_one_before(watch: Watch) -> None:
    watched = watch(partitions=2)
    worker = watched.worker()
    worker.push(filled(watched.layout, 1), push_of(1, num_samples=10, sums={"loss": 5.0}))
    worker.flush()
    watched.observe()
    worker.push(filled(watched.layout, 1), push_of(2, version=1, num_samples=4, sums={"loss": 10.0, "a": math.nan}))
    worker.flush()
    watched.observe()
    first, second = watched.points
    assert (first.num_steps, first.num_samples, first.scalars) == (2, 10, {"loss": 0.5})
    assert (second.num_steps, second.num_samples, second.scalars) == (4, 14, {"loss": 2.5, "a": None})


def test_bytes_are_told_as_they_travelled_and_as_they_would_have(watch: Watch) -> None:
    watched = watch(WIDE, compression=Compression(push="bfloat16", pull="float16"))
    worker, buffer = watched.worker(), WIDE.allocate()
    for sequence in range(1, 4):
        worker.push(filled(WIDE, 1), push_of(sequence, worker.pull(buffer).version))
    worker.flush()
    sample = watched.observe().sample
    assert sample.num_raw_bytes_pushed == sample.num_raw_bytes_pulled == 3 * WIDE.num_bytes == 1_200_000
    assert sample.num_bytes_pushed == pytest.approx(600_000, rel=0.01)
    assert sample.num_bytes_pulled == pytest.approx(600_000, rel=0.01)
    worker.pull(buffer)
    held = worker.pull(buffer, holds=3)  # nothing has changed: nothing is sent
    assert held.version == 3
    again = watched.observe().sample
    assert again.num_raw_bytes_pulled == 4 * WIDE.num_bytes
    assert again.num_bytes_pulled < 0.7 * again.num_raw_bytes_pulled


def test_metrics_totals_count_on_both_sides(watch: Watch) -> None:
    watched = watch(partitions=1, epochs=EpochPlan(2, num_totals=1000))
    worker = watched.worker()
    worker.pull(watched.layout.allocate())
    worker.push(filled(watched.layout, 1), push_of(1, totals=np.ones(1000).tobytes()))
    worker.flush()
    sample = watched.observe().sample
    assert sample.num_bytes_pushed == sample.num_raw_bytes_pushed == watched.layout.num_bytes + 8000


def test_the_servers_own_arithmetic_is_told_for_the_trace(watch: Watch) -> None:
    watched = watch(WIDE, partitions=1, traces=True)
    worker = watched.worker()
    worker.push(filled(WIDE, 6), push_of(1))
    worker.flush()
    sample = watched.observe().sample
    assert watched.traced
    for span in watched.traced:
        assert span.partition == -1
        assert 0 <= span.seconds <= span.seconds + span.duration_s <= sample.seconds


# What they say


def test_a_workers_warnings_are_told_with_host_and_partition(watch: Watch) -> None:
    watched = watch()
    worker = watched.worker(2, attempt=4)
    with Notebook(worker.note) as notebook:
        notebook.write(Line(logging.WARNING, "fsspec", "100% of %s is slow"))
        notebook.write(Line(logging.ERROR, "my.code", "row 3 is broken"))
        watched.until(lambda sample: len(watched.logs) == 2)
    said = [(line.level, line.partition, line.host, line.logger, line.message) for line in watched.logs]
    assert said == [
        (logging.WARNING, 2, "node-4", "fsspec", "100% of %s is slow"),
        (logging.ERROR, 2, "node-4", "my.code", "row 3 is broken"),
    ]


def test_notes_come_between_the_frames_of_a_worker_that_waits_and_disturb_none(watch: Watch) -> None:
    watched = watch(partitions=2, sync=SyncPlan(staleness=0, num_first=2))
    waiting, other = watched.worker(0), watched.worker(1)
    waiting.push(filled(watched.layout, 1), push_of(1))
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(waiting.pull, watched.layout.allocate())
        watched.until(lambda sample: sample.num_waiting == 1)
        for number in range(50):
            assert waiting.note([Line(logging.WARNING, "a", str(number))], [])
        watched.until(lambda sample: len(watched.logs) == 50)
        assert watched.workers[0].state == "waiting"
        other.push(filled(watched.layout, 1), push_of(1))
        assert pulled.result(DEADLINE_S).version == 1
    assert [line.message for line in watched.logs] == [str(number) for number in range(50)]


def test_timings_of_a_worker_whose_clock_is_hours_off_are_when_they_were(watch: Watch) -> None:
    """Its clock is ours less four hours; that of the server is ours."""
    watched = watch()
    wire = watched.wire()

    def its_clock() -> float:
        return time.monotonic() - 14_400

    wire.send(Kind.REGISTER, vars(watched.registration(1)))
    bound = wire.receive(Kind.GRANTED)["clock"] - its_clock()
    timings = []
    for number in range(20):
        began = its_clock()
        timings.append(Timing(f"step {number}", began, 0.25))
        wire.send(Kind.NOTE, headers.note_header(its_clock(), bound, (), timings[-1:]))
    now = time.monotonic()
    sample = watched.until(lambda sample: len([s for s in watched.traced if s.partition == 1]) == 20)
    seconds_now = sample.seconds - (time.monotonic() - now)  # of `now`, or a little earlier
    own = [span for span in watched.traced if span.partition == 1]
    assert [span.activity for span in own] == [timing.name for timing in timings]
    for span, timing in zip(own, timings, strict=True):
        assert span.duration_s == 0.25
        assert span.seconds == pytest.approx(seconds_now - (now - (timing.began + 14_400)), abs=0.1)


def test_the_librarys_client_knows_how_its_clock_and_the_servers_agree(watch: Watch) -> None:
    watched = watch()
    worker = watched.worker()
    before = time.monotonic()
    with Notebook(worker.note, times=True) as notebook:
        with notebook.timing("train"):
            pass
        sample = watched.until(lambda sample: bool(watched.traced))
    after = time.monotonic()
    (span,) = watched.traced
    assert -0.1 <= sample.seconds - span.seconds <= after - before + 0.1


def test_one_that_has_not_registered_tells_nothing_of_the_run_and_may_register_still(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch()
    assert not watched.worker(register=False).note([Line(logging.ERROR, "a", "too early")], [])
    wire = watched.wire()
    timing = Timing("train", 1.0, 2.0)
    wire.send(Kind.NOTE, headers.note_header(1.0, None, [Line(logging.ERROR, "a", "too early")], [timing]))
    wire.register(watched.server, watched.run)
    wire.pull(watched.layout.allocate())
    watched.observe()
    assert (watched.logs, watched.traced) == ([], [])
    assert "too early" not in caplog.text


def test_a_note_after_the_connection_broke_does_not_leave(watch: Watch) -> None:
    watched = watch()
    worker = watched.worker()
    worker._link.close()
    assert not worker.note([Line(logging.ERROR, "a", "b")], [])


HOSTILE: dict[str, dict[str, object]] = {
    "nothing": {},
    "no numbers": {"clock": "now", "lines": [], "timings": []},
    "a clock that is no number": {"clock": math.nan, "lines": [], "timings": []},
    "lines that are none": {"clock": 1.0, "lines": [1, 2, 3], "timings": []},
    "a line of other fields": {"clock": 1.0, "lines": [["a", "b", "c"]], "timings": []},
    "endless timings": {"clock": 1.0, "lines": [], "timings": [["train", 1.0, math.inf]]},
    "time that runs backwards": {"clock": 1.0, "lines": [], "timings": [["train", 1.0, -1.0]]},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_note_ends_its_connection_and_touches_nothing_else(
    watch: Watch, header: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch()
    good = watched.worker(1)
    wire = watched.wire()
    wire.register(watched.server, watched.run)
    wire.send(Kind.NOTE, header)
    assert wire.socket.recv(1) == b""
    assert watched.until_event("lost").partition == 0
    assert good.pull(watched.layout.allocate()).version == 0
    assert watched.traced == watched.logs == []
    assert "connection" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_whatever_levels_and_texts_a_note_has_its_lines_are_lines(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch()
    wire = watched.wire()
    wire.register(watched.server, watched.run)
    lines = [Line(-(2**62), "", ""), Line(0, "%s", "%d %s %"), Line(2**62, "a", "\x00\x1b[31m\n"), Line(30, "b", "{}")]
    wire.send(Kind.NOTE, headers.note_header(1.0, -1e12, lines, ()))
    wire.pull(watched.layout.allocate())
    watched.observe()
    assert [(line.level, line.logger, line.message) for line in watched.logs] == [
        (line.level, line.logger, line.message) for line in lines
    ]


def test_more_notes_than_anybody_asks_for_are_not_kept(watch: Watch) -> None:
    watched = watch()
    wire = watched.wire()
    wire.register(watched.server, watched.run)
    header = headers.note_header(1.0, None, [Line(10, "a", "b")] * 100, [Timing("train", 1.0, 0.5)] * 400)
    for _ in range(300):
        wire.send(Kind.NOTE, header)
    wire.pull(watched.layout.allocate())
    watched.observe()
    assert len(watched.logs) == 501
    assert watched.logs[-1].message == "29500 more lines of all workers were dropped"
    assert 100_000 <= len(watched.traced) < 100_400


@pytest.mark.parametrize("progress", [math.nan, math.inf, -math.inf])
def test_a_progress_that_is_no_number_is_not_taken(watch: Watch, progress: float) -> None:
    """Else it would be the run's, whose status is JSON."""
    watched = watch()
    wire = watched.wire()
    wire.register(watched.server, watched.run)
    wire.send(Kind.PUSH, headers.push_header(push_of(1, progress=progress)), filled(watched.layout, 1))
    assert wire.socket.recv(1) == b""
    watched.until_event("lost")
    assert watched.server.status().progress is None
    assert watched.observe().sample.version == 0


# Who asks


def test_of_workers_of_whom_nothing_changed_nothing_is_said_again(watch: Watch) -> None:
    watched = watch()
    for partition in range(3):
        worker = watched.worker(partition)
        worker.finish(TimeSpent())
        worker.close()
    watched.until(lambda sample: [event.what for event in watched.events].count("finished") == 3)
    assert {worker.state for worker in watched.workers.values()} == {"finished"}
    watched.until(lambda sample: not sample.workers)


def test_a_server_that_has_forgotten_its_run_has_nothing_to_observe_and_takes_the_next(watch: Watch) -> None:
    watched = watch()
    watched.worker().pull(watched.layout.allocate())
    assert watched.server.has_run
    watched.server.retire()
    watched.server.retire()
    assert not watched.server.has_run
    with pytest.raises(RuntimeError, match="no run has begun"):
        watched.server.observe()
    watched.run = watched.server.begin_run(filled(watched.layout, 3), DeltaWeightCombiner(), 2)
    watched.worker(1).pull(watched.layout.allocate())
    sample = watched.observe().sample
    assert (sample.num_live, [worker.partition for worker in sample.workers]) == (1, [1])


def test_a_run_that_was_restored_counts_from_where_it_stood(watch: Watch) -> None:
    watched = watch(partitions=1)
    worker = watched.worker()
    worker.push(filled(watched.layout, 1), push_of(1))
    worker.flush()
    checkpoint = watched.server.capture()
    assert checkpoint is not None
    worker.close()
    resumed = replace(checkpoint, seconds=500.0)
    watched.run = watched.server.begin_run(
        checkpoint.weights, DeltaWeightCombiner(), 1, resume=resumed, keeps_spans=True
    )
    sample = watched.observe().sample
    assert sample.seconds >= 500
    assert (sample.num_steps, sample.num_samples, sample.version) == (2, 10, 1)


# Who watches it all along


BEGAN = RunBegan(0.0, 1, "digits", 1.7e9, "asynchronous", 2, 1, "DeltaWeightCombiner", {}, (), 56, "2.0.0")


def begin_watch(watched: Watched, view: RunView, *sinks: Any, wants_weights: bool = True) -> RunWatch:
    return RunWatch(
        watched.server,
        view,
        sinks,
        BEGAN,
        log_dir=None,
        trace=next((sink for sink in sinks if isinstance(sink, TraceFile)), None),
        wants_weights=lambda: wants_weights,
    )


def train(worker: ParameterClient, layout: WeightLayout, num_pushes: int) -> None:
    buffer = layout.allocate()
    for sequence in range(1, num_pushes + 1):
        worker.push(filled(layout, 1), push_of(sequence, worker.pull(buffer).version))
    worker.flush()


def test_a_run_that_is_read_from_its_file_looks_as_it_did_while_it_went_on(watch: Watch, tmp_path: Path) -> None:
    watched, live = watch(partitions=2), RunView()
    trace = TraceFile(str(tmp_path / "trace.json"))
    running = begin_watch(watched, live, RunFile(str(tmp_path)), trace)
    worker = watched.worker(1, attempt=4)
    with Notebook(worker.note, times=True) as notebook:
        with notebook.timing("train"):
            train(worker, watched.layout, 20)
        notebook.write(Line(logging.WARNING, "a", "slow"))
    with running.timed("save"):
        running.epoch_ended(1, {"loss": np.float64(0.5), "nan": math.nan, "name": "x"})
    running.checkpoint_written(20, "file:///checkpoints/20", 1000, 0.25)
    watched.worker(0, attempt=5).close()
    wait_until(lambda: bool(live.logs) and watched.server.status().num_lost == 1)
    running.end(None)
    running.end(ValueError("too late"))
    replayed = RunView(read_run(str(tmp_path)))
    assert live.began == replayed.began == BEGAN
    assert live.ended == replayed.ended
    assert live.ended is not None
    assert (live.ended.outcome, live.ended.num_steps, live.ended.num_samples) == ("finished", 40, 200)
    assert (live.sample, live.workers, live.epochs) == (replayed.sample, replayed.workers, replayed.epochs)
    assert live.epochs[0].logs == {"loss": 0.5, "nan": None}
    for name in ("points", "paces", "spans", "events", "logs", "checkpoints"):
        assert list(getattr(live, name)) == list(getattr(replayed, name)), name
    assert [line.message for line in live.logs] == ["slow"]
    assert {(event.what, event.attempt) for event in live.events} >= {("granted", 4), ("granted", 5), ("lost", 5)}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"train", "save", "compute"} <= {event["name"] for event in events if event["ph"] == "X"}


def test_the_end_of_a_failed_run_has_the_first_line_of_why(watch: Watch) -> None:
    view = RunView()
    begin_watch(watch(), view).end(ValueError("no rows\nand a long story"))
    assert view.ended is not None
    assert (view.ended.outcome, view.ended.message) == ("failed", "ValueError: no rows")
    stopped = RunView()
    begin_watch(watch(), stopped).end(None, was_stopped=True)
    assert stopped.ended is not None
    assert (stopped.ended.outcome, stopped.ended.message) == ("stopped", "")


def test_a_file_that_takes_no_more_is_said_once_and_ends_nothing_else(
    watch: Watch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched, view = watch(), RunView()
    full = tmp_path / "full" / "run-0000.jsonl"
    running = begin_watch(watched, view, RunFile(str(tmp_path / "good")), RunFile(str(full.parent)))
    full.unlink()
    os.symlink("/dev/full", full)
    train(watched.worker(), watched.layout, 3)
    running.end(None)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("RunFile writes no more of this run, which goes on: spark.tensorspark.log.dir: could not")
    assert view.ended is not None
    assert list(read_run(str(tmp_path / "good")))[-1] == view.ended


def test_a_server_that_is_gone_ends_a_watch_without_a_word(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watched, view = watch(), RunView()
    running = begin_watch(watched, view)
    train(watched.worker(), watched.layout, 3)
    watched.server.close()
    running.end(None)
    assert view.ended is not None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_weights_are_looked_at_now_and_then_and_their_change_is_since_the_last_look(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, worker = watch(WIDE), None
    looks = WeightWatch(watched.server, lambda: True)
    first = looks.stats(1.5, 7)
    assert first is not None
    (tensor,) = first.tensors
    assert (first.seconds, first.version, first.num_steps) == (1.5, 0, 7)
    assert (tensor.name, tensor.norm, tensor.update_norm) == ("W:0", pytest.approx(2 * math.sqrt(100_000)), None)
    worker = watched.worker()
    train(worker, WIDE, 3)
    assert looks.stats(2.0, 9) is None  # it is too early
    monkeypatch.setattr(weight_watching, "_LOOKS_AN_AGE", math.inf)
    monkeypatch.setattr(weight_watching, "_INTERVAL_S", 0.0)
    monkeypatch.setattr(weight_watching, "_SHARE", math.inf)
    looks = WeightWatch(watched.server, lambda: True)
    assert looks.stats(2.0, 9) is not None
    assert looks.stats(2.5, 9) is None  # nothing has changed
    worker.push(filled(WIDE, 0.5), push_of(4, 3))
    worker.flush()
    second = looks.stats(3.0, 12)
    assert second is not None
    (tensor,) = second.tensors
    assert second.version == 4
    assert tensor.norm == pytest.approx(5.5 * math.sqrt(100_000))
    assert tensor.update_norm == pytest.approx(0.5 * math.sqrt(100_000))
    looks.forget()
    worker.push(filled(WIDE, 0.5), push_of(5, 4))
    worker.flush()
    third = looks.stats(4.0, 14)
    assert third is not None
    assert third.tensors[0].update_norm is None


def test_weights_that_nobody_wants_to_see_are_not_looked_at(watch: Watch) -> None:
    assert WeightWatch(watch().server, lambda: False).stats(1.0, 1) is None


def test_weights_that_are_gone_end_no_watch(watch: Watch) -> None:
    """The run is forgotten, or the server is closed, between two looks."""
    watched = watch()
    watched.server.retire()
    assert WeightWatch(watched.server, lambda: True).stats(1.0, 1) is None
    watched.server.close()
    assert WeightWatch(watched.server, lambda: True).stats(1.0, 1) is None


class Hanging:
    """A sink whose filesystem does not answer, until it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.closed = threading.Event()

    def record(self, record: Record) -> None:
        pass

    def flush(self, *, at_once: bool = False) -> None:
        pass

    def close(self) -> None:
        assert self.released.wait(DEADLINE_S)
        self.closed.set()


def test_a_sink_that_hangs_holds_up_the_end_of_a_run_for_no_longer_than_it_may(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "_END_S", 0.2)
    watched, view, sink = watch(), RunView(), Hanging()
    followed = begin_watch(watched, view, sink)
    began = time.monotonic()
    followed.end(None)
    assert time.monotonic() - began < 5
    assert "the rest is left to itself" in caplog.text
    assert view.ended is not None  # who looks at the page is told all the same
    sink.released.set()
    assert sink.closed.wait(DEADLINE_S)
    followed._thread.join(DEADLINE_S)


def test_a_sink_that_raises_is_told_nothing_more_and_the_others_are(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(Hanging):
        num_records = 0

        def record(self, record: Record) -> None:
            self.num_records += 1
            if self.num_records > 1:
                raise OSError("no space left on device")

    watched, view, broken, told = watch(), RunView(), Raising(), Hanging()
    told.released.set()
    followed = begin_watch(watched, view, broken, told)
    followed.end(ValueError("row 3\nis bad"))
    assert broken.num_records == 2
    assert caplog.text.count("Raising writes no more of this run, which goes on: no space left on device") == 1
    assert told.closed.is_set()
    assert not broken.closed.is_set()
    assert view.ended is not None
    assert (view.ended.outcome, view.ended.message) == ("failed", "ValueError: row 3")
