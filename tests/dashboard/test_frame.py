"""What the page is told, against numbers that are computed here from the same records."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tensorspark.dashboard.frame import ACTIVITIES, MAX_ROWS, MAX_TABLE_ROWS, MAX_TENSORS, Frames, empty
from tensorspark.telemetry.records import (
    EpochEnded,
    LogLine,
    RunEnded,
    Sample,
    Span,
    Spans,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.view import RunView
from tests.dashboard.synthetic import SyntheticRun


def worker(partition: int, **changes: Any) -> WorkerSample:
    fields: dict[str, Any] = {
        "partition": partition,
        "state": "live",
        "host": f"host-{partition}",
        "attempt": 3,
        "num_attempts": 1,
        "num_steps": 50,
        "num_samples": 800,
        "num_applied": 5,
        "num_refused": 0,
        "num_reconnects": 0,
        "num_bytes_pushed": 1000,
        "num_bytes_pulled": 3000,
        "progress": 0.5,
        "lag": 0,
        "busy_s": {"compute": 4.0, "wait": 1.0},
    }
    return WorkerSample(**(fields | changes))


def sample(seconds: float, workers: tuple[WorkerSample, ...] = (), **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "seconds": seconds,
        "num_steps": 100,
        "num_samples": 1600,
        "num_live": len(workers),
        "num_lost": 0,
        "num_standby": 0,
        "num_waiting": 0,
        "num_finished": 0,
        "progress": None,
        "epoch": None,
        "version": 7,
        "num_bytes_pushed": 1000,
        "num_bytes_pulled": 3000,
        "num_raw_bytes_pushed": 4000,
        "num_raw_bytes_pulled": 4000,
        "staleness": (5, 3, 2),
        "workers": workers,
    }
    return Sample(**(fields | changes))


def began(num_workers: int = 2, **changes: Any) -> Any:
    return SyntheticRun(num_workers).began(**changes)


def full(frames: Frames) -> dict[str, Any]:
    return dict(json.loads(frames.take(full=True)[1]))


def news(frames: Frames) -> dict[str, Any]:
    text, _ = frames.take()
    assert text is not None
    return dict(json.loads(text))


def test_before_the_first_run_the_page_is_told_that_there_is_none() -> None:
    assert json.loads(empty()) == {"full": True, "run": None}
    assert full(Frames(RunView()))["run"] is None


def test_a_full_frame_has_all_that_the_records_said() -> None:
    view = RunView(
        [
            began(2, name="digits"),
            TrainingPoint(1.0, 20, 320, {"loss": 2.5}),
            TrainingPoint(2.0, 40, 640, {"loss": 1.25, "accuracy": 0.5}),
            sample(2.0, (worker(0), worker(1))),
            sample(4.0, (worker(1, num_steps=60),), num_steps=140, num_samples=2240),
            EpochEnded(4.0, 1, 140, {"val_loss": 1.5, "loss": math.pi}),
        ]
    )
    frame = full(Frames(view))
    assert frame["full"] is True
    assert frame["run"]["name"] == "digits"
    assert frame["points"] == {
        "all": True,
        "seconds": [1.0, 2.0],
        "steps": [20, 40],
        "scalars": {"loss": [2.5, 1.25], "accuracy": [None, 0.5]},
    }
    assert frame["epochs"] == [{"epoch": 1, "seconds": 4.0, "steps": 140, "logs": {"val_loss": 1.5, "loss": 3.1416}}]
    # (2240 - 1600) samples and (140 - 100) steps in two seconds.
    assert (frame["paces"]["samples_per_s"], frame["paces"]["steps_per_s"]) == ([320.0], [20.0])
    state = frame["state"]
    assert (state["num_steps"], state["version"], state["staleness"]) == (140, 7, [5, 3, 2])
    # 8,000 bytes travelled as 4,000.
    assert state["compression"] == 2.0
    assert [row[:6] for row in frame["workers"]] == [
        [0, "live", "host-0", 3, 1, 50],
        [1, "live", "host-1", 3, 1, 60],
    ]
    assert frame["workers"][0][-1] == [4.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert ACTIVITIES == ("compute", "pull", "push", "wait", "evaluate", "standby")


def test_news_are_what_has_come_since_and_the_last_value_again() -> None:
    points = [TrainingPoint(0.5, 10, 160, {"loss": 3.0}), TrainingPoint(1.0, 20, 320, {"loss": 2.5})]
    view = RunView([began(), *points, sample(1.0, (worker(0), worker(1)))])
    frames = Frames(view)
    assert frames.take()[0] is None, "at first all is new, which is what a full frame is for"
    assert frames.take() == (None, ""), "nothing has come"
    view.apply(TrainingPoint(2.0, 40, 640, {"loss": 2.0}))
    view.apply(sample(2.0, (worker(1, num_steps=70),)))
    view.apply(WorkerEvent(2.0, 1, "lost", "host-1", 3))
    frame = news(frames)
    assert frame["points"] == {"all": False, "seconds": [1.0, 2.0], "steps": [20, 40], "scalars": {"loss": [2.5, 2.0]}}
    assert [row[0] for row in frame["workers"]] == [1], "the other has not changed"
    assert frame["events"] == [[2.0, 1, "lost", "host-1", 3, ""]]
    assert "logs" not in frame
    view.apply(LogLine(3.0, 0, "host-0", 30, "py.warnings", "look"))
    assert news(frames)["logs"] == [[3.0, 0, "host-0", 30, "py.warnings", "look"]]
    assert len(full(frames)["events"]) == 1


def test_news_added_to_a_full_frame_make_the_next_full_frame_also_when_neighbours_were_merged() -> None:
    view = RunView([began()])
    frames = Frames(view)
    known = full(frames)["points"]
    for step in range(1, 5003):
        view.apply(TrainingPoint(step / 10, step, step * 16, {"loss": 1000.0 - step}))
        if step % 7 == 0 or step == 5002:
            part = news(frames)["points"]
            for column in ("seconds", "steps"):
                kept = [] if part["all"] else known[column][:-1]
                known[column] = kept + part[column]
            kept = [] if part["all"] else known["scalars"]["loss"][:-1]
            known["scalars"] = {"loss": kept + part["scalars"]["loss"]}
    expected = full(frames)["points"]
    assert known["steps"] == expected["steps"]
    assert known["scalars"] == expected["scalars"]
    assert len(known["steps"]) <= 2000
    assert known["steps"][-1] == 5002


def test_numbers_that_are_not_finite_become_nothing() -> None:
    tensor = TensorStats("w", None, float("inf"), (0.0, 1.0), (4,))
    view = RunView([began(tensors=()), WeightStats(1.0, 2, 10, (tensor,)), TrainingPoint(1.0, 1, 1, {"loss": None})])
    frame = full(Frames(view))
    assert frame["weights"]["tensors"][0]["norm"] is None
    assert frame["norms"]["weights"] == [[None]]
    assert frame["norms"]["updates"] == [[None]]
    assert frame["points"]["scalars"]["loss"] == [None]


def test_hostile_text_arrives_as_it_is_and_ends_no_script() -> None:
    hostile = "</script><img src=x onerror=alert(1)>$$x$$ \u2028"
    view = RunView([began(name=hostile), LogLine(1.0, 0, hostile, 40, hostile, hostile)])
    frame = full(Frames(view))
    assert frame["run"]["name"] == hostile
    assert frame["logs"] == [[1.0, 0, hostile, 40, hostile, hostile]]


def test_of_many_partitions_the_most_telling_are_shown_and_the_number_of_all_is_said() -> None:
    workers = tuple(worker(i, state="lost" if i == 777 else "live", lag=5 if i == 900 else 0) for i in range(1000))
    frame = full(Frames(RunView([began(1000), sample(1.0, workers)])))
    assert len(frame["timeline"]["rows"]) == MAX_ROWS
    assert {777, 900} <= set(frame["timeline"]["rows"])
    assert {777, 900} <= set(frame["table"])
    assert len(frame["table"]) == len(frame["workers"]) == MAX_TABLE_ROWS
    assert frame["state"]["num_workers"] == 1000


def test_a_partition_that_is_shown_from_now_on_brings_its_earlier_spans() -> None:
    workers = tuple(worker(i, busy_s={"wait": float(i)}) for i in range(100))
    spans = tuple(Span(10.0 + i / 100, i, "compute", 0.5) for i in range(100))
    view = RunView([began(100), sample(11.0, workers), Spans(11.0, spans)])
    frames = Frames(view)
    quiet = next(i for i in range(100) if i not in full(frames)["timeline"]["rows"])
    view.apply(sample(20.0, (worker(quiet, state="lost"),), num_lost=1))
    timeline = news(frames)["timeline"]
    assert quiet in timeline["rows"]
    assert quiet in timeline["newcomers"]
    at = timeline["spans"]["partition"].index(quiet)
    assert timeline["spans"]["seconds"][at] == pytest.approx(10.0 + quiet / 100)


def test_spans_are_told_once() -> None:
    view = RunView([began(), sample(1.0, (worker(0), worker(1))), Spans(1.0, (Span(0.2, 0, "compute", 0.5),))])
    frames = Frames(view)
    assert full(frames)["timeline"]["spans"]["seconds"] == [0.2]
    view.apply(Spans(2.0, (Span(0.7, 0, "push", 0.1), Span(0.8, 1, "wait", 0.3))))
    spans = news(frames)["timeline"]["spans"]
    assert (spans["seconds"], spans["activity"]) == ([0.7, 0.8], [2, 3])
    assert full(frames)["timeline"]["spans"]["seconds"] == [0.2, 0.7, 0.8]


def test_of_many_variables_some_are_told_and_their_number_is_said() -> None:
    run = began(tensors=tuple(SyntheticRun().began().tensors) * 50)
    stats = tuple(TensorStats(f"t{i}", float(i), None) for i in range(300))
    frame = full(Frames(RunView([run, WeightStats(1.0, 1, 1, stats)])))
    assert frame["run"]["num_tensors"] == 300
    assert len(frame["run"]["tensors"]) == len(frame["weights"]["tensors"]) == MAX_TENSORS


def test_the_norms_of_many_variables_at_many_moments_stay_small_and_end_with_the_newest() -> None:
    view = RunView([began()])
    for step in range(1, 1001):
        view.apply(WeightStats(float(step), step, step, tuple(TensorStats(f"t{i}", 1.5, 0.5) for i in range(100))))
    norms = full(Frames(view))["norms"]
    assert norms["steps"][-1] == 1000
    assert 100 <= len(norms["steps"]) <= 300
    assert {len(values) for values in norms["weights"]} == {len(norms["steps"])}


@pytest.mark.parametrize(
    ("resumed_steps", "samples", "expected"),
    [
        # Half a minute for a fifth: two minutes for the rest.
        (0, [(30.0, 0.2)], 120.0),
        # What was done before the run began does not count: ten seconds for a tenth.
        (500, [(10.0, 0.5), (20.0, 0.6)], 40.0),
        (500, [(10.0, 0.5)], None),
        (0, [(10.0, None)], None),
    ],
)
def test_what_is_left_is_told_from_the_pace(
    resumed_steps: int, samples: list[tuple[float, float | None]], expected: float | None
) -> None:
    view = RunView([began(resumed_steps=resumed_steps)])
    frames = Frames(view)
    for seconds, progress in samples:
        view.apply(sample(seconds, progress=progress))
        state = full(frames)["state"]
    assert state["eta_s"] == expected


def test_the_end_of_a_run_is_told_with_what_failed_and_without_a_pace() -> None:
    view = RunView(
        [began(), sample(1.0), sample(2.0, num_samples=9999), RunEnded(3.5, "failed", "no <b>luck</b>", 120, 3)]
    )
    state = full(Frames(view))["state"]
    assert (state["outcome"], state["message"], state["seconds"]) == ("failed", "no <b>luck</b>", 3.5)
    assert (state["samples_per_s"], state["eta_s"], state["num_steps"]) == (0, None, 120)
