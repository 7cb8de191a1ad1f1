"""A run's Chrome trace, read as JSON and held against the Trace Event Format."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.errors import StagingError
from tensorspark.ps import headers
from tensorspark.telemetry import traces
from tensorspark.telemetry.clocks import ClockBounds
from tensorspark.telemetry.collector import Collector, Timeline
from tensorspark.telemetry.records import Activity, EpochEnded, RunBegan, Span, Spans, WorkerEvent
from tensorspark.telemetry.traces import DRIVER, SERVER, TraceFile

BEGAN = RunBegan(
    0.0, 3, 'digits \u2028 "4"', 1.7e9, "bulk-synchronous", 2, 5, "MeanWeightCombiner", {}, (), 52, "2.0.0"
)


def read(path: Path) -> dict[str, Any]:
    """The file, as strict JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    check(trace)
    return trace


def check(trace: dict[str, Any]) -> None:
    """What the Trace Event Format asks of each event."""
    assert isinstance(trace["traceEvents"], list)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            assert set(event["args"]) <= {"name", "sort_index"}
            continue
        assert math.isfinite(event["ts"])
        if event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert (event["ph"], event["s"]) == ("i", "p")


def written(tmp_path: Path, *records: Any, own: tuple[Span, ...] = ()) -> dict[str, Any]:
    file = TraceFile(str(tmp_path / "trace.json"))
    file.check()
    for record in records:
        file.record(record)
    file.add(own)
    file.flush()
    assert not (tmp_path / "trace.json").exists()
    file.close()
    return read(tmp_path / "trace.json")


def spans_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def named(trace: dict[str, Any]) -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    """Names of processes, and of their threads."""
    meta = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in meta if event["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in meta if e["name"] == "thread_name"}
    return processes, threads


def test_a_span_is_a_complete_event_in_microseconds_where_its_worker_is(tmp_path: Path) -> None:
    trace = written(
        tmp_path,
        BEGAN,
        WorkerEvent(0.25, 1, "granted", "node-7", 4),
        Spans(2.0, (Span(0.5, 1, "compute", 0.25), Span(0.75, 1, "wait", 1.5, is_sum=True))),
        own=(Span(0.5, 1, "train", 0.2), Span(1.0, SERVER, "merge", 0.125), Span(0.0, DRIVER, "prepare", 0.5)),
    )
    processes, threads = named(trace)
    found = {
        (processes[e["pid"]], threads[e["pid"], e["tid"]], e["name"], e["ts"], e["dur"], e.get("args") is not None)
        for e in spans_of(trace)
    }
    assert found == {
        ("partition 1 on node-7", "as the server sees it", "compute", 500_000.0, 250_000.0, False),
        ("partition 1 on node-7", "as the server sees it", "wait", 750_000.0, 1_500_000.0, True),
        ("partition 1 on node-7", "the worker's own times", "train", 500_000.0, 200_000.0, False),
        ("parameter server", "weights", "merge", 1_000_000.0, 125_000.0, False),
        ("driver", "run", "prepare", 0.0, 500_000.0, False),
    }


def test_driver_server_and_partitions_are_listed_in_this_order(tmp_path: Path) -> None:
    trace = written(tmp_path, BEGAN, Spans(1.0, tuple(Span(0.5, index, "compute", 0.25) for index in (10, 2, 0))))
    meta = [event for event in trace["traceEvents"] if event["name"] in ("process_name", "process_sort_index")]
    by_process: dict[int, dict[str, Any]] = defaultdict(dict)
    for event in meta:
        by_process[event["pid"]].update(event["args"])
    ordered = [args["name"] for args in sorted(by_process.values(), key=lambda args: args["sort_index"])]
    assert ordered == ["driver", "parameter server", "partition 0", "partition 2", "partition 10"]


def test_comings_goings_and_epochs_are_marks(tmp_path: Path) -> None:
    trace = written(
        tmp_path,
        BEGAN,
        WorkerEvent(0.25, 0, "lost", "node-7", 4),
        EpochEnded(1.5, 2, 100, {"loss": 0.5}),
    )
    processes, _ = named(trace)
    marks = [
        (processes[event["pid"]], event["name"], event["ts"]) for event in trace["traceEvents"] if event["ph"] == "i"
    ]
    assert marks == [
        ("partition 0 on node-7", "lost, attempt 4", 250_000.0),
        ("driver", "epoch 2 has ended", 1_500_000.0),
    ]


def test_the_trace_says_of_which_run_it_is(tmp_path: Path) -> None:
    about = written(tmp_path, BEGAN)["otherData"]
    assert about == {"num_dropped_spans": 0, "run": BEGAN.name, "mode": "bulk-synchronous", "started_at": 1.7e9}


def test_a_run_of_which_nothing_was_told_has_a_trace_still(tmp_path: Path) -> None:
    assert spans_of(written(tmp_path)) == []


def test_more_spans_than_viewers_take_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_MAX_SPANS", 13)
    monkeypatch.setattr(traces, "_DRIVERS_SPANS", 3)
    spans = tuple(Span(float(index), 0, "compute", 0.5) for index in range(7))
    trace = written(tmp_path, BEGAN, Spans(9.0, spans), Spans(9.0, spans), own=spans)
    assert len(spans_of(trace)) == 10
    assert trace["otherData"]["num_dropped_spans"] == 11


def test_many_spans_are_one_file_of_valid_json(tmp_path: Path) -> None:
    spans = tuple(Span(index / 10, 0, "compute", 0.05) for index in range(20_000))
    assert len(spans_of(written(tmp_path, BEGAN, Spans(9.0, spans)))) == 20_000


def test_a_directory_that_takes_no_file_is_an_error_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StagingError, match=r"spark\.tensorspark\.trace\.dir: could not write to .*file/trace\.json"):
        TraceFile(str(tmp_path / "file" / "trace.json")).check()


def test_looking_whether_files_can_be_written_leaves_none(tmp_path: Path) -> None:
    TraceFile(f"file://{tmp_path}/new/trace.json").check()
    assert list((tmp_path / "new").iterdir()) == []


times = st.floats(-1e12, 1e12)


@given(
    began=st.floats(-1e9, 1e9),
    notes=st.lists(st.tuples(times, st.none() | times, times, st.floats(0, 1e12), st.text(max_size=5)), max_size=8),
)
def test_whatever_a_worker_says_of_its_times_the_trace_is_json(
    tmp_path_factory: pytest.TempPathFactory, began: float, notes: list[tuple[float, float | None, float, float, str]]
) -> None:
    gathered, clock = Collector(began, 2, keeps_spans=True), ClockBounds()
    for sent_at, bound, begun, duration_s, name in notes:
        note = headers.note(
            {"clock": sent_at, "clock_bound": bound, "lines": [], "timings": [[name, begun, duration_s]]}
        )
        clock.arrived(note.sent_at, began + 1)
        if note.clock_bound is not None:
            clock.departed(note.clock_bound)
        gathered.noted(began + 1, 1, "here", note, clock)
    path = tmp_path_factory.mktemp("traces")
    assert len(spans_of(written(path, BEGAN, own=gathered.take_traced()))) == len(notes)


activities = st.sampled_from([activity for activity in Activity if activity is not Activity.STANDBY])
events = st.lists(
    st.tuples(st.sampled_from(["first", "second", "observe"]), activities, st.integers(1, 500)), max_size=80
)


@given(events)
def test_spans_of_one_thread_overlap_only_where_one_is_within_the_other(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, Activity, int]]
) -> None:
    """Of two attempts for one partition, of which the second stands by until the first is gone."""
    gathered = Collector(100.0, 2, keeps_spans=True)
    first, second = Timeline(gathered), Timeline(gathered)
    now = 100.25
    first.begin(1, "node-1", 1, now)
    first.switch(Activity.COMPUTE, now)
    second.begin(1, "node-2", 2, now)
    file = TraceFile(str(tmp_path_factory.mktemp("traces") / "trace.json"))
    for what, activity, milliseconds in events:
        now += milliseconds / 1000
        if what == "observe":
            first.settle(now)
            second.settle(now)
            file.record(Spans(now - 100.0, gathered.take_spans()))
        elif what == "first" and second.activity is Activity.STANDBY:
            first.switch(activity, now)
        elif what == "second":
            first.switch(None, now)
            second.switch(activity, now)
    first.switch(None, now)
    second.switch(None, now)
    file.record(Spans(now - 100.0, gathered.take_spans()))
    file.close()
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in spans_of(read(Path(file.url))):
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        for (began, ended), (later_began, later_ended) in itertools.pairwise(sorted(spans)):
            assert later_began >= ended - 0.2 or later_ended <= ended + 0.2  # of a tenth of a microsecond each
            assert began <= later_began
