"""What a run tells while it goes on and when it is over: files, page, metrics, traces, logs, Spark's own page."""

from __future__ import annotations

import contextlib
import http.cookiejar
import io
import json
import logging
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tensorspark import DeltaWeightCombiner, MeanDeltaCombiner, SparkSession
from tensorspark.errors import ConfigError, StagingError, WorkerFailedError
from tensorspark.history import History
from tensorspark.telemetry.files import read_run
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    RunBegan,
    RunEnded,
    Sample,
    Spans,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
    WorkerSample,
)
from tensorspark.telemetry.view import RunView
from tensorspark.trainers.startup import importing
from tests.regression import W0, Regression, build, rows_of, run

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession as SqlSession

# Keras's TensorBoard callback reads the learning rate in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DEADLINE_S = 30.0
CLOCKS_S = 0.1  # how far times may be apart that two threads or processes took of one moment, on a busy machine
TOKEN = "a-token-of-32-characters-or-more"

NUM_ROWS, NUM_HELD_OUT, BATCH_SIZE, NUM_EPOCHS = 120, 12, 10, 3  # the first two of each of two partitions
STEPS_AN_EPOCH = 2 * 11
NUM_FLOOD = 1000
DROPPED = re.compile(r"(\d+) more lines of this worker were dropped")


@dataclass(frozen=True)
class Answer:
    """What a server said to a request; status 0: it did not listen."""

    status: int
    url: str = ""
    text: str = ""
    headers: Any = field(default_factory=dict)


def fetch(url: str, opener: urllib.request.OpenerDirector | None = None, bearer: str | None = None) -> Answer:
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with (opener or urllib.request.build_opener()).open(request, timeout=DEADLINE_S) as response:
            return Answer(response.status, response.url, response.read().decode(), response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, url, error.read().decode(), error.headers)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return Answer(0)
        raise


def browser() -> urllib.request.OpenerDirector:
    """Keeps cookies, and follows where it is sent."""
    return urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))


def base_of(url: str) -> str:
    return url.split("/dashboard")[0]


def token_of(url: str) -> str:
    return url.split("token=")[1]


def metrics(url: str) -> dict[tuple[str, ...], float]:
    """Values of ``/metrics`` by the series' name and labels, but for the run's."""
    answer = fetch(f"{base_of(url)}/metrics", bearer=token_of(url))
    assert answer.status == 200, answer
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "run")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def metrics_once(url: str, name: str, value: float) -> dict[tuple[str, ...], float]:
    """The metrics as soon as one of them has a value."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := metrics(url)).get((name,)) != value:
        assert time.monotonic() < deadline, f"{name} is {found.get((name,))}, not {value}"
    return found


@contextlib.contextmanager
def driver_log() -> Iterator[list[logging.LogRecord]]:
    """What this process logs meanwhile, from WARNING on."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger().removeHandler(handler)


def jobs(sc: SparkContext) -> list[tuple[str, str]]:
    """Group and description of all jobs so far, as Spark's web page has them."""
    found = sc._jsc.sc().statusStore().jobsList(None)
    told = [found.apply(index) for index in range(found.size())]
    return [(_text(job.jobGroup()), _text(job.description())) for job in told]


def _text(option: Any) -> str:
    """Of Scala's Option."""
    return str(option.get()) if option.isDefined() else ""


def of_kind(records: list[Any], kind: type) -> list[Any]:
    return [record for record in records if type(record) is kind]


def run_directory(parent: Path) -> Path:
    (directory,) = parent.iterdir()
    return directory


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tensorspark-watch")]


# One fit that is watched in all ways


@dataclass
class Watched:
    """One fit, and what was seen of it.

    Attributes:
        lines: what the driver logged.
        printed: on stderr.
        visits: of the page: while the run went on, after it, and when the session was closed.
        counters: of ``/metrics``, at the ends of the first epoch and the last.
        ended_at: UNIX times of the epochs' ends, by epoch.
        read_at: UNIX time at which a row of partition 1 was read on its worker.
    """

    directory: Path
    history: History
    records: list[Any]
    lines: list[logging.LogRecord]
    printed: str
    visits: dict[str, Answer]
    counters: list[dict[tuple[str, ...], float]]
    ended_at: list[float]
    read_at: float
    jobs: list[tuple[str, str]]
    threads: list[str]

    @property
    def trace(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(Path(str(self.history.trace)).read_text())
        return content

    def began(self) -> RunBegan:
        assert type(self.records[0]) is RunBegan
        return self.records[0]

    def ended(self) -> RunEnded:
        assert type(self.records[-1]) is RunEnded
        return self.records[-1]


def talkative(mark: Path) -> Callable[[int, Any], Iterator[Any]]:
    """Rows whose reader logs: a flood in partition 0, and in partition 1 a line of each kind."""
    num_flood = NUM_FLOOD

    def read(index: int, rows: Any) -> Iterator[Any]:
        user, flood = logging.getLogger("user"), logging.getLogger("flood")
        user.setLevel(logging.DEBUG)
        for number, row in enumerate(rows):
            if (index, number) == (1, 40):
                user.debug("nobody wants this")
                user.info("nor this")
                user.warning("row %d looks odd", number)
                try:
                    {}["colour"]
                except KeyError:
                    user.exception("no colour")
            if (index, number) == (0, 40):
                for count in range(num_flood):
                    flood.warning("line %d", count)
            if (index, number) == (1, 80):
                mark.write_text(str(time.time()))
            yield row

    return read


def visitor(stderr: io.StringIO, jar: Any, visits: dict[str, Answer], counters: list[Any]) -> Any:
    """A callback that looks at the run with the URL that was printed, at the ends of the first and the last epoch."""
    import keras

    class Visitor(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            url = url_in(stderr.getvalue())
            if epoch == 0:
                visits["during"] = fetch(url, jar)
                visits["stranger"] = fetch(f"{base_of(url)}/dashboard?token=wrong")
                visits["no token"] = fetch(f"{base_of(url)}/metrics")
            if epoch in (0, NUM_EPOCHS - 1):
                counters.append(metrics_once(url, "tensorspark_steps_total", STEPS_AN_EPOCH * (epoch + 1)))

    return Visitor()


def url_in(printed: str) -> str:
    found = re.search(r"dashboard at (http://\S+)", printed)
    assert found, printed
    return found[1]


def classifier() -> Any:
    with importing():
        import keras

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.SGD(0.2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def labelled_rows(num_rows: int) -> list[tuple[Any, int]]:
    """Six numbers each, and the largest of three sums of two."""
    x = np.random.default_rng(1).normal(size=(num_rows, 6)).astype(np.float32)
    return list(zip(x, x.reshape(num_rows, 3, 2).sum(axis=2).argmax(axis=1).tolist(), strict=True))


@pytest.fixture(scope="module")
def watched(spark: SqlSession, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    import keras

    directory = tmp_path_factory.mktemp("watched")
    feed = spark.sparkContext.parallelize(labelled_rows(2 * NUM_ROWS), 2)
    feed = feed.mapPartitionsWithIndex(talkative(directory / "mark"))
    stderr, jar = io.StringIO(), browser()
    visits: dict[str, Answer] = {}
    counters: list[Any] = []
    ended_at: list[float] = []
    callbacks = [
        visitor(stderr, jar, visits, counters),
        keras.callbacks.TensorBoard(str(directory / "keras")),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended_at.append(time.time())),
    ]
    (directory / "hdfs").mkdir()
    with contextlib.redirect_stderr(stderr), driver_log() as lines:
        session = SparkSession(
            spark, classifier(), name="a fit / seen", staleness=0, sync_interval=3, batch_size=BATCH_SIZE,
            log_dir=str(directory / "logs"), trace_dir=str(directory / "traces"), hdfs_dir=str(directory / "hdfs"),
            dashboard_token=TOKEN,
        )  # fmt: skip
        with session:
            history = session.fit(
                feed, epochs=NUM_EPOCHS, validation_split=0.1, callbacks=callbacks, seed=3, shuffle=False
            )
            visits["after"] = fetch(str(history.dashboard_url), jar)
            visits["metrics after"] = fetch(f"{base_of(str(history.dashboard_url))}/metrics", bearer=TOKEN)
        visits["closed"] = fetch(str(history.dashboard_url), jar)
    return Watched(
        directory=directory,
        history=history,
        records=list(read_run(str(history.log_dir))),
        lines=lines,
        printed=stderr.getvalue(),
        visits=visits,
        counters=counters,
        ended_at=ended_at,
        read_at=float((directory / "mark").read_text()),
        jobs=jobs(spark.sparkContext),
        threads=own_threads(),
    )


def test_the_run_file_tells_the_run_as_its_history_does(watched: Watched) -> None:
    history, began, ended = watched.history, watched.began(), watched.ended()
    assert history.num_steps == NUM_EPOCHS * STEPS_AN_EPOCH
    assert history.num_samples == NUM_EPOCHS * 2 * (NUM_ROWS - NUM_HELD_OUT)
    assert (ended.outcome, ended.message) == ("finished", "")
    assert (ended.num_steps, ended.num_samples) == (history.num_steps, history.num_samples)
    assert (began.name, began.mode) == ("a fit / seen", "bulk-synchronous") == (history.name, history.mode)
    assert (began.num_partitions, began.num_epochs, began.seconds) == (2, NUM_EPOCHS, 0.0)
    assert began.settings["spark.tensorspark.sync.interval"] == "3"
    assert Path(str(history.log_dir)).parent == watched.directory / "logs"
    seconds = [record.seconds for record in watched.records if not isinstance(record, Spans | WorkerEvent | LogLine)]
    assert 0 <= min(seconds) <= max(seconds) == ended.seconds


def test_the_run_files_points_add_up_to_the_historys(watched: Watched) -> None:
    history = watched.history
    points = of_kind(watched.records, TrainingPoint)
    assert (points[-1].num_steps, points[-1].num_samples) == (history.num_steps, history.num_samples)
    assert list(points[0].scalars) == list(history.points[0].scalars)

    def total(those: Any) -> float:
        samples = np.diff([0, *(point.num_samples for point in those)])
        return float(np.dot(samples, [point.scalars["loss"] for point in those]))

    assert total(points) == pytest.approx(total(history.points), rel=1e-6)
    rows = 2 * (NUM_ROWS - NUM_HELD_OUT)
    assert total(points) == pytest.approx(rows * sum(history.history["loss"]), rel=1e-4)
    final = of_kind(watched.records, Sample)[-1]
    assert (final.num_steps, final.num_finished, final.num_lost) == (history.num_steps, 2, 0)
    assert sum(final.staleness) == sum(worker.num_applied for worker in history.workers)


def test_epochs_in_the_run_file_have_their_metrics_steps_and_times(watched: Watched) -> None:
    epochs = of_kind(watched.records, EpochEnded)
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2] == list(watched.history.epoch)
    assert [epoch.num_steps for epoch in epochs] == [STEPS_AN_EPOCH * (index + 1) for index in range(NUM_EPOCHS)]
    names = ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert [list(epoch.logs) for epoch in epochs] == [names] * NUM_EPOCHS
    for name in names:
        assert [epoch.logs[name] for epoch in epochs] == pytest.approx(watched.history.history[name])
    # The driver's clock, as the user's own callback saw it.
    began_at = watched.began().started_at
    assert [epoch.seconds for epoch in epochs] == pytest.approx([t - began_at for t in watched.ended_at], abs=CLOCKS_S)


def test_workers_in_the_run_file_are_those_of_the_history_and_their_time_is_accounted_for(watched: Watched) -> None:
    newest: dict[int, WorkerSample] = {}
    for sample in of_kind(watched.records, Sample):
        newest.update({worker.partition: worker for worker in sample.workers})
    assert sorted(newest) == [0, 1]
    spans = [span for record in of_kind(watched.records, Spans) for span in record.spans]
    for report in watched.history.workers:
        worker = newest[report.partition]
        for name in ("host", "num_attempts", "num_steps", "num_samples", "num_applied", "num_bytes_pushed"):
            assert getattr(worker, name) == getattr(report, name), name
        assert (worker.state, worker.num_refused, worker.num_reconnects) == ("finished", 0, 0)
        assert worker.num_bytes_pulled == report.num_bytes_pulled > 0
        assert worker.busy_s["compute"] >= report.step_s - CLOCKS_S
        own = [span for span in spans if span.partition == report.partition]
        for activity, busy_s in worker.busy_s.items():
            told_s = sum(span.duration_s for span in own if span.activity == activity)
            assert told_s == pytest.approx(busy_s, abs=1e-6), activity
        # One thing after the other, without gaps, from its coming to its end.
        first, last = min(span.seconds for span in own), max(span.seconds + span.duration_s for span in own)
        assert sum(worker.busy_s.values()) == pytest.approx(last - first, abs=CLOCKS_S)
        assert 0 < first < last <= watched.ended().seconds + CLOCKS_S
    events = [(event.partition, event.what) for event in of_kind(watched.records, WorkerEvent)]
    assert sorted(events) == [(0, "finished"), (0, "granted"), (1, "finished"), (1, "granted")]


def test_no_pace_is_that_of_a_moment(watched: Watched) -> None:
    """The epochs' ends and the run's are looked at besides, at any time after the look before."""
    paces = list(RunView(watched.records).paces)
    assert min(pace.duration_s for pace in paces) >= 0.2
    one = of_kind(watched.records, Sample)[0]
    moments = [(1.0, 10), (2.0, 30), (2.01, 90), (3.0, 110)]
    view = RunView(replace(one, seconds=seconds, num_steps=num_steps) for seconds, num_steps in moments)
    assert [(pace.duration_s, pace.steps_per_s) for pace in view.paces] == [(1.0, 20.0), (1.0, 80.0)]


def test_checkpoints_in_the_run_file_are_where_they_are_said_to_be(watched: Watched) -> None:
    written = of_kind(watched.records, CheckpointWritten)
    assert written
    for checkpoint in written:
        assert checkpoint.url.startswith(str(watched.directory / "hdfs"))
        assert checkpoint.num_bytes > 0
        assert 0 < checkpoint.duration_s < checkpoint.seconds
    assert Path(written[-1].url).is_dir() or list(Path(written[-1].url).parent.glob(f"{Path(written[-1].url).name}*"))


def event_files(directory: Path) -> Any:
    """TensorBoard's own reader of a run, with all of its data."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    reader.Reload()
    return reader


def scalars(reader: Any, tag: str) -> list[tuple[int, float]]:
    from tensorboard.util import tensor_util

    return [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in reader.Tensors(tag)]


def test_tensorboards_reader_finds_curves_epochs_weights_text_and_the_graph(watched: Watched) -> None:
    reader = event_files(Path(str(watched.history.log_dir)))
    points = of_kind(watched.records, TrainingPoint)
    told = scalars(reader, "loss")
    assert [step for step, _ in told] == [point.num_steps for point in points]
    assert [value for _, value in told] == pytest.approx([point.scalars["loss"] for point in points], rel=1e-6)
    for name, values in watched.history.history.items():
        assert scalars(reader, f"epoch/{name}") == [
            (epoch, pytest.approx(value, rel=1e-6)) for epoch, value in enumerate(values)
        ]
    norms = of_kind(watched.records, WeightStats)
    assert [tensor.name for tensor in norms[0].tensors] == [tensor.name for tensor in watched.began().tensors]
    for tensor in norms[0].tensors:
        assert scalars(reader, f"norms/{tensor.name}")[0][1] == pytest.approx(tensor.norm, rel=1e-6)
        assert reader.Tensors(f"weights/{tensor.name}")
    assert reader.Tensors("configuration")[0].tensor_proto.string_val[0].startswith(b"| setting | value |")
    assert any("Softmax" in node.op for node in reader.Graph().node)


def test_keras_own_tensorboard_callback_writes_its_epochs(watched: Watched) -> None:
    history = watched.history.history
    for run_name, prefix in (("train", ""), ("validation", "val_")):
        reader = event_files(watched.directory / "keras" / run_name)
        for metric in ("loss", "accuracy"):
            values = [value for _, value in scalars(reader, f"epoch_{metric}")]
            assert values == pytest.approx(history[f"{prefix}{metric}"], rel=1e-6)


# The trace


def spans_of(trace: dict[str, Any], process: str, thread: str) -> list[dict[str, Any]]:
    """Events of the process whose name begins so, and its thread; times in seconds."""
    events = trace["traceEvents"]

    def named(kind: str) -> dict[Any, str]:
        return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == kind}

    processes = {pid: name for (pid, _), name in named("process_name").items()}
    threads = named("thread_name")
    return [
        {"name": event["name"], "begin": event["ts"] / 1e6, "end": (event["ts"] + event["dur"]) / 1e6}
        for event in events
        if event["ph"] == "X"
        and processes[event["pid"]].startswith(process)
        and threads[event["pid"], event["tid"]] == thread
    ]


def joined(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spans that follow each other and are of one name as one: the server cuts them whenever it is asked."""
    whole: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda span: span["begin"]):
        if whole and whole[-1]["name"] == span["name"] and span["begin"] - whole[-1]["end"] < 1e-5:
            whole[-1] = {**whole[-1], "end": span["end"]}
        else:
            whole.append(span)
    return whole


def is_within(inner: dict[str, Any], outer: list[dict[str, Any]]) -> bool:
    return any(span["begin"] - CLOCKS_S <= inner["begin"] and inner["end"] <= span["end"] + CLOCKS_S for span in outer)


def test_the_trace_has_driver_server_and_workers_within_the_runs_time(watched: Watched) -> None:
    trace = watched.trace
    driver = spans_of(trace, "driver", "run")
    assert {"preflight", "Spark job"} <= {span["name"] for span in driver}
    assert spans_of(trace, "parameter server", "weights")
    (job,) = [span for span in driver if span["name"] == "Spark job"]
    for partition in (0, 1):
        own = spans_of(trace, f"partition {partition} on {socket.gethostname()}", "the worker's own times")
        counts = Counter(span["name"] for span in own)
        # Eleven steps an epoch, three at a time, one pull and one push each; one pull more to evaluate an epoch.
        assert counts["push"] == NUM_EPOCHS * 4
        assert counts["evaluate"] == NUM_EPOCHS
        assert counts["steps"] >= NUM_EPOCHS * 4
        assert counts["make the model"] == 1
        assert all(is_within(span, [job]) for span in own)
    assert trace["otherData"]["num_dropped_spans"] == 0
    assert all(event["ts"] >= 0 for event in trace["traceEvents"] if "ts" in event)
    assert max(span["end"] for span in driver) <= watched.ended().seconds + CLOCKS_S


def test_workers_and_the_server_agree_in_the_trace_on_when_what_was_done(watched: Watched) -> None:
    trace = watched.trace
    for partition in (0, 1):
        own = spans_of(trace, f"partition {partition}", "the worker's own times")
        seen = joined(spans_of(trace, f"partition {partition}", "as the server sees it"))

        def named(spans: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
            found = [span for span in spans if span["name"] == name]
            assert found, name
            return found

        assert all(is_within(span, named(seen, "compute")) for span in named(own, "steps"))
        assert all(is_within(span, named(seen, "evaluate")) for span in named(own, "evaluate"))
        assert all(is_within(span, named(own, "pull")) for span in named(seen, "pull"))
        assert all(is_within(span, named(own, "push")) for span in named(seen, "push"))


def test_a_workers_own_times_are_on_the_clock_that_the_run_began_by(watched: Watched) -> None:
    trace = watched.trace
    assert trace["otherData"]["started_at"] == watched.began().started_at
    reading = [span for span in spans_of(trace, "partition 1", "the worker's own times") if span["name"] == "read rows"]
    read_at = watched.read_at - watched.began().started_at
    assert is_within({"begin": read_at, "end": read_at}, reading)


# Page and metrics


def test_the_url_that_is_printed_opens_the_page_until_the_session_is_closed(watched: Watched) -> None:
    url = url_in(watched.printed)
    assert url == watched.history.dashboard_url
    assert token_of(url) == TOKEN
    for when in ("during", "after"):
        page = watched.visits[when]
        assert (page.status, page.url) == (200, f"{base_of(url)}/dashboard"), when
        assert "<title>tensorspark</title>" in page.text
        links = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
        assert links
        assert all(link.startswith(("/", "#", "data:")) for link in links), links
    assert watched.visits["closed"].status == 0


def test_who_brings_a_wrong_token_is_told_where_the_right_one_is(watched: Watched) -> None:
    stranger = watched.visits["stranger"]
    assert stranger.status == 401
    assert stranger.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "driver" in stranger.text
    assert "dashboard?token=" in stranger.text
    assert TOKEN not in stranger.text
    assert watched.visits["no token"].status == 401


def test_metrics_move_while_the_run_goes_on_and_say_how_it_ended(watched: Watched) -> None:
    first, last = watched.counters
    for name in ("steps", "samples", "weight_publications", "pushed_bytes", "pulled_bytes"):
        key = (f"tensorspark_{name}_total",)
        assert 0 < first[key] < last[key], name
    assert last["tensorspark_samples_total",] == watched.history.num_samples
    assert first["tensorspark_run_ended", "finished"] == 0
    assert watched.visits["metrics after"].status == 200
    final = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(watched.visits["metrics after"].text)
        for sample in family.samples
    }
    assert final["tensorspark_run_ended", "finished"] == 1
    assert final["tensorspark_checkpoints_total", None] == len(of_kind(watched.records, CheckpointWritten))


def test_nothing_of_a_watched_run_is_left_when_its_session_is_closed(watched: Watched) -> None:
    assert watched.threads == []


def test_no_file_of_a_run_has_the_token(watched: Watched) -> None:
    files = [path for path in watched.directory.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


# Logs, and Spark's page


def test_warnings_of_executors_reach_the_drivers_log_with_host_and_partition(watched: Watched) -> None:
    where = f"partition 1 on {socket.gethostname()}: user: "
    lines = [(line.levelname, line.getMessage()) for line in watched.lines if ": user: " in line.getMessage()]
    assert lines == [
        ("WARNING", f"{where}row 40 looks odd"),
        ("ERROR", f"{where}no colour (KeyError: 'colour')"),
    ]
    told = [line for line in of_kind(watched.records, LogLine) if line.logger == "user"]
    assert [(line.partition, line.level) for line in told] == [(1, logging.WARNING), (1, logging.ERROR)]
    assert all(line.host == socket.gethostname() for line in told)


def test_a_flood_of_lines_is_passed_on_or_counted(watched: Watched) -> None:
    messages = [line.getMessage() for line in watched.lines]
    flood = [int(message.rpartition(" ")[2]) for message in messages if ": flood: line " in message]
    dropped = sum(int(found[1]) for message in messages if (found := DROPPED.search(message)))
    assert flood == sorted(set(flood))
    assert flood[0] == 0
    assert len(flood) + dropped == NUM_FLOOD


def test_sparks_page_names_the_run_its_epochs_and_mode(watched: Watched) -> None:
    descriptions = [description for group, description in watched.jobs if group == watched.began().job_group]
    assert descriptions == ["tensorspark: a fit / seen, 3 epochs, bulk-synchronous, 2 partition(s)"]
    assert watched.began().job_group.startswith("a fit / seen ")


# A run that fails, and the one that goes on from its checkpoint


ROWS = rows_of(400)
SLOW: dict[str, Any] = {"staleness": 0, "sync_interval": 2, "batch_size": 5}


def failing(mended: Path) -> Callable[[int, Any], Iterator[Any]]:
    """Rows that take 3 ms each; partition 1 fails at its row 150."""

    def read(index: int, rows: Any) -> Iterator[Any]:
        for number, row in enumerate(rows):
            if (index, number) == (1, 150) and not mended.exists():
                raise OSError("the disk is gone")
            time.sleep(0.003)
            yield row

    return read


@dataclass
class Failed:
    """A run that failed, and one that went on from its checkpoint.

    Attributes:
        taken: the port that its server was to have.
        restored: of the run that went on.
    """

    message: str
    records: list[Any]
    printed: str
    taken: int
    lines: list[logging.LogRecord]
    page: Answer
    metrics: dict[tuple[str, ...], float]
    restored: History
    restored_records: list[Any]


@pytest.fixture(scope="module")
def failed(sc: SparkContext, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    directory = tmp_path_factory.mktemp("failed")
    model, stderr = build(), io.StringIO()
    feed = sc.parallelize(ROWS, 2)
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        contextlib.redirect_stderr(stderr),
        driver_log() as lines,
        SparkSession(
            sc, model.session, name="unlucky", hdfs_dir=str(directory), checkpoint_interval_s=0.1,
            log_dir=f"{directory}/first", server_port=other.getsockname()[1], **SLOW,
        ) as session,
    ):  # fmt: skip
        taken = other.getsockname()[1]
        with pytest.raises(WorkerFailedError) as raised:
            run(
                session, model, feed.mapPartitionsWithIndex(failing(directory / "mended")), seed=3, progress=True,
                weight_combiner=MeanDeltaCombiner(),
            )  # fmt: skip
        url = url_in(stderr.getvalue())
        page, found = fetch(url, browser()), metrics(url)
    checkpoints = str(session.checkpoint_dir)
    with SparkSession.restore(sc, checkpoints, model.session, log_dir=f"{directory}/second") as session:
        restored = run(session, model, feed, weight_combiner=MeanDeltaCombiner())
    model.session.close()
    return Failed(
        message=str(raised.value),
        records=list(read_run(str(run_directory(directory / "first")))),
        printed=stderr.getvalue(),
        taken=taken,
        lines=lines,
        page=page,
        metrics=found,
        restored=restored,
        restored_records=list(read_run(str(restored.log_dir))),
    )


def test_a_run_that_fails_says_so_in_its_file_and_on_its_page_which_stays(failed: Failed) -> None:
    ended = failed.records[-1]
    assert type(ended) is RunEnded
    assert ended.outcome == "failed"
    assert "the disk is gone" in failed.message.partition("\n")[0]
    assert ended.message == f"WorkerFailedError: {failed.message.partition(chr(10))[0]}"
    assert 0 < ended.num_steps < 80
    assert "failed" in [event.what for event in of_kind(failed.records, WorkerEvent)]
    assert failed.page.status == 200
    assert failed.metrics["tensorspark_run_ended", "failed"] == 1
    assert failed.metrics["tensorspark_steps_total",] == ended.num_steps


def test_where_the_port_is_taken_the_next_one_is_said_and_printed(failed: Failed) -> None:
    said = [line.getMessage() for line in failed.lines if "spark.tensorspark.server.port" in line.getMessage()]
    (found,) = [re.fullmatch(r"port (\d+) \(\S+\) is taken: the server listens at (\d+)", line) for line in said]
    assert found
    assert int(found[1]) == failed.taken
    assert f"http://127.0.0.1:{found[2]}/dashboard?token=" in failed.printed


def test_a_restored_run_goes_on_with_the_seconds_and_steps_of_the_one_that_failed(failed: Failed) -> None:
    first, began = failed.records, failed.restored_records[0]
    checkpoints = of_kind(first, CheckpointWritten)
    assert checkpoints
    assert 0 < began.resumed_steps <= first[-1].num_steps
    assert 0 < began.seconds <= first[-1].seconds
    points = of_kind(failed.restored_records, TrainingPoint)
    assert points[0].num_steps > began.resumed_steps
    assert points[0].seconds >= began.seconds
    ended = failed.restored_records[-1]
    assert (ended.outcome, ended.num_steps, ended.num_samples) == ("finished", 80, 400)
    assert (failed.restored.num_steps, failed.restored.num_samples) == (80, 400)
    assert ended.seconds >= failed.restored.seconds > began.seconds
    samples = of_kind(failed.restored_records, Sample)
    assert all(sample.seconds >= began.seconds for sample in samples)
    assert failed.restored.points[0].seconds < began.seconds  # what a checkpoint has of the run before


# What is wrong with where it is to be written


@pytest.mark.parametrize("setting", ["log_dir", "trace_dir"])
def test_a_directory_that_cannot_be_written_is_named_before_a_job_starts(
    sc: SparkContext, model: Regression, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "file").write_text("no directory")
    before = Counter(jobs(sc))
    settings: Any = {setting: str(tmp_path / "file" / "runs")}
    with SparkSession(sc, model.session, **settings) as session:
        with pytest.raises(StagingError) as raised:
            run(session, model, sc.parallelize(ROWS, 2))
        assert f"spark.tensorspark.{setting.replace('_', '.')}" in str(raised.value)
        assert str(tmp_path / "file" / "runs") in str(raised.value)
        assert own_threads() == []
        assert Counter(jobs(sc)) == before
    np.testing.assert_array_equal(model.weights[0], W0)
    assert (tmp_path / "file").read_text() == "no directory"


class Breaking(DeltaWeightCombiner):
    """Replaces a directory by a file at the tenth push."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.num_calls = 0

    def merge(self, *args: Any) -> bool:
        self.num_calls += 1
        if self.num_calls == 10:
            shutil.rmtree(self.directory)
            self.directory.write_text("in the way")
        return super().merge(*args)


def test_a_log_directory_that_breaks_in_the_middle_is_said_once_and_the_run_goes_on(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    combiner = Breaking(tmp_path / "logs")
    with (
        driver_log() as lines,
        SparkSession(sc, model.session, log_dir=str(tmp_path / "logs"), sync_interval=2, batch_size=5) as session,
    ):
        history = run(session, model, sc.parallelize(ROWS, 2), weight_combiner=combiner)
    assert combiner.num_calls >= 10
    assert (tmp_path / "logs").read_text() == "in the way"
    assert (history.num_steps, history.num_samples) == (80, 400)
    assert not np.array_equal(model.weights[0], W0)
    said = [line.getMessage() for line in lines if "writes no more of this run, which goes on" in line.getMessage()]
    assert sorted(line.partition(" ")[0] for line in said) == ["EventFiles", "RunFile"]
    assert all("spark.tensorspark.log.dir" in line for line in said)


def test_a_dashboard_that_is_not_installed_is_said_in_a_line(
    sc: SparkContext, model: Regression, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)  # as Python itself has it for what cannot be imported
    with pytest.raises(ConfigError) as raised:
        SparkSession(sc, model.session, dashboard=True)
    assert "pip install 'tensorspark[dashboard]'" in str(raised.value)
    assert "\n" not in str(raised.value)
    with SparkSession(sc, model.session, batch_size=100) as session:
        for _ in range(2):
            assert run(session, model, sc.parallelize(ROWS, 2), progress=True).dashboard_url is None
    assert capsys.readouterr().err.count("pip install 'tensorspark[dashboard]'") == 1


def test_a_token_that_could_be_guessed_is_refused_and_not_repeated(sc: SparkContext, model: Regression) -> None:
    with pytest.raises(ConfigError, match=r"spark\.tensorspark\.dashboard\.token\) must be at least 16") as raised:
        SparkSession(sc, model.session, dashboard_token="too-short-one")
    assert "too-short-one" not in str(raised.value)


def test_runs_of_a_session_share_a_page_and_have_directories_of_their_own(
    sc: SparkContext, model: Regression, tmp_path: Path
) -> None:
    with SparkSession(sc, model.session, log_dir=str(tmp_path), batch_size=50) as session:
        histories = [run(session, model, sc.parallelize(ROWS, 2)) for _ in range(2)]
        url = histories[1].dashboard_url
        assert url is not None
        assert histories[0].dashboard_url == url
        answer = fetch(f"{base_of(url)}/metrics", bearer=token_of(url))
    assert 'run="2"' in answer.text
    assert 'run="1"' not in answer.text
    assert len({history.log_dir for history in histories}) == 2 == len(list(tmp_path.iterdir()))
    groups = [next(read_run(str(history.log_dir))).job_group for history in histories]
    assert len(set(groups)) == 2
    assert {group for group, _ in jobs(sc)} >= set(groups)
