"""Event files, as TensorBoard's own loaders and server read them."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tensorspark.errors import StagingError
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    Record,
    RunBegan,
    RunEnded,
    Sample,
    Spans,
    Tensor,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerEvent,
)
from tensorspark.telemetry.tensorboard import EventFiles
from tests.hadoop.cluster import HdfsCluster

REPOSITORY = Path(__file__).resolve().parents[2]
STARTED_AT = 1_700_000_000.25
DEADLINE_S = 60.0

BEGAN = RunBegan(
    seconds=0.0,
    run=1,
    name="digits",
    started_at=STARTED_AT,
    mode="stale-synchronous (2)",
    num_partitions=3,
    num_epochs=4,
    combiner="DeltaWeightCombiner",
    settings={
        "spark.tensorspark.batch.size": "1000",
        "spark.tensorspark.sync.interval": "5",
        "spark.tensorspark.staleness": "2",
        "spark.tensorspark.overlap": "True",
        "spark.tensorspark.compression": "topk:0.01",
        "spark.tensorspark.pull.compression": "none",
        "spark.tensorspark.io.timeout": "120.0",
        "batch_size": "64",
        "spark.tmp.dir": "/a_b|c*d*`e`<b>f</b>[g](http://h)&amp;\\|\nnext",
    },
    tensors=(Tensor("kernel", (2, 3), "float32"),),
    model_bytes=12_345,
    tensorspark_version="2.0.0",
    spark_url="http://driver:4040",
)


def sample(seconds: float, num_steps: int, **fields: Any) -> Sample:
    """A sample in which all counts that are not named are as they were at the start."""
    plain = dict.fromkeys(Sample.__dataclass_fields__, 0)
    return Sample(**{**plain, "progress": None, "epoch": None, "staleness": (), "workers": (), **fields,
                     "seconds": seconds, "num_steps": num_steps})  # fmt: skip


def write(directory: str | Path, *records: Record, user: str = "", graph: bytes | None = None) -> None:
    files = EventFiles(str(directory), user=user, graph=graph)
    for record in records:
        files.record(record)
    files.close()


class Board:
    """What TensorBoard's Python loader reads of a directory: all of it, not a sample."""

    def __init__(self, directory: str | Path) -> None:
        from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.context import RequestContext

        plugins = ("scalars", "histograms", "text", "hparams", "graphs")
        self.multiplexer = EventMultiplexer(tensor_size_guidance=dict.fromkeys(plugins, 0))
        self.multiplexer.AddRunsFromDirectory(str(directory))
        self.multiplexer.Reload()
        self.provider = MultiplexerDataProvider(self.multiplexer, str(directory))
        self.context = RequestContext()

    def scalar_tags(self, run: str = ".") -> set[str]:
        listed = self.provider.list_scalars(self.context, experiment_id="", plugin_name="scalars")
        return set(listed.get(run, {}))

    def scalars(self, tag: str, run: str = ".") -> list[tuple[int, float]]:
        return [(datum.step, datum.value) for datum in self._scalars(tag, run)]

    def wall_times(self, tag: str) -> list[float]:
        return [datum.wall_time for datum in self._scalars(tag, ".")]

    def _scalars(self, tag: str, run: str) -> Any:
        from tensorboard.data.provider import RunTagFilter

        read = self.provider.read_scalars(
            self.context,
            experiment_id="",
            plugin_name="scalars",
            downsample=10_000,
            run_tag_filter=RunTagFilter(runs=[run], tags=[tag]),
        )
        return read[run][tag]

    def tensors(self, plugin: str, tag: str) -> list[tuple[int, Any]]:
        from tensorboard.data.provider import RunTagFilter

        read = self.provider.read_tensors(
            self.context,
            experiment_id="",
            plugin_name=plugin,
            downsample=10_000,
            run_tag_filter=RunTagFilter(runs=["."], tags=[tag]),
        )
        return [(datum.step, datum.numpy) for datum in read.get(".", {}).get(tag, [])]

    def texts(self, tag: str) -> list[tuple[int, str]]:
        return [(step, array.item().decode()) for step, array in self.tensors("text", tag)]

    def sessions(self) -> dict[str, Any]:
        """Of the HParams page, by run."""
        from tensorboard.plugins.base_plugin import TBContext
        from tensorboard.plugins.hparams import api_pb2
        from tensorboard.plugins.hparams.backend_context import Context
        from tensorboard.plugins.hparams.list_session_groups import Handler

        statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
        request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=statuses)
        context = Context(TBContext(data_provider=self.provider))
        response = Handler(self.context, context, "", request).run()
        return {group.name: group for group in response.session_groups}


def test_each_fetch_is_a_scalar_by_steps_with_the_time_at_which_it_was(tmp_path: Path) -> None:
    points = [
        TrainingPoint(1.5, 110, 7_040, {"loss": 2.125, "accuracy": 0.1}),
        TrainingPoint(3.25, 220, 14_080, {"loss": 1.0 / 3.0, "accuracy": 0.7}),
    ]

    write(tmp_path, BEGAN, *points)

    board = Board(tmp_path)
    assert board.scalars("loss") == [(110, 2.125), (220, pytest.approx(1 / 3, rel=2**-23))]
    assert board.scalars("accuracy") == [(110, pytest.approx(0.1, rel=2**-23)), (220, pytest.approx(0.7, rel=2**-23))]
    assert board.wall_times("loss") == [1_700_000_001.75, 1_700_000_003.5]


def test_what_is_not_finite_is_left_out_and_what_float32_cannot_hold_is_its_largest(tmp_path: Path) -> None:
    write(
        tmp_path,
        BEGAN,
        TrainingPoint(1, 10, 10, {"loss": 4.0, "other": None}),
        TrainingPoint(2, 20, 20, {"loss": None, "other": math.nan}),
        TrainingPoint(3, 30, 30, {"loss": -1e300, "other": math.inf}),
        WeightStats(3, 1, 30, (TensorStats("w", None, math.nan),)),
    )

    board = Board(tmp_path)
    assert board.scalars("loss") == [(10, 4.0), (30, -float(np.finfo(np.float32).max))]
    assert board.scalar_tags() == {"loss"}


def test_metrics_of_epochs_are_scalars_by_epoch(tmp_path: Path) -> None:
    write(
        tmp_path,
        BEGAN,
        EpochEnded(5, 0, 300, {"loss": 2.5, "val_loss": 3.5, "val_auc": None}),
        EpochEnded(9, 1, 600, {"loss": 1.5, "val_loss": 2.0}),
    )

    board = Board(tmp_path)
    assert board.scalar_tags() == {"epoch/loss", "epoch/val_loss"}
    assert board.scalars("epoch/loss") == [(0, 2.5), (1, 1.5)]
    assert board.scalars("epoch/val_loss") == [(0, 3.5), (1, 2.0)]


def test_rates_are_between_points_of_performance_of_which_there_is_one_in_two_seconds(tmp_path: Path) -> None:
    start = {"num_samples": 7_000, "num_bytes_pushed": 500, "num_bytes_pulled": 900, "num_live": 2}
    write(
        tmp_path,
        BEGAN,
        sample(1.0, 100, **start),
        sample(2.5, 130, **start),  # too soon
        sample(3.5, 150, num_samples=8_000, num_bytes_pushed=1_500, num_bytes_pulled=1_900, num_live=2, num_lost=1),
        sample(4.0, 160, num_samples=8_100, num_bytes_pushed=1_500, num_bytes_pulled=1_900, num_live=3),
        RunEnded(4.0, "finished"),
    )

    board = Board(tmp_path)
    assert board.scalars("performance/steps_per_s") == [(150, 50 / 2.5), (160, 10 / 0.5)]
    assert board.scalars("performance/samples_per_s") == [(150, 1_000 / 2.5), (160, 100 / 0.5)]
    assert board.scalars("performance/pushed_bytes_per_s") == [(150, 400.0), (160, 0.0)]
    assert board.scalars("performance/pulled_bytes_per_s") == [(150, 400.0), (160, 0.0)]
    assert board.scalars("workers/live") == [(100, 2.0), (150, 2.0), (160, 3.0)]
    assert board.scalars("workers/lost") == [(100, 0.0), (150, 1.0), (160, 0.0)]
    assert board.scalars("workers/waiting") == [(100, 0.0), (150, 0.0), (160, 0.0)]


def test_a_pause_shows_in_the_rate_after_it_and_no_rate_is_at_a_step_twice(tmp_path: Path) -> None:
    samples = [sample(1.0 + i / 2, 100 if i < 20 else 100 + 30, num_live=1) for i in range(21)]  # the last at 11 s

    write(tmp_path, BEGAN, *samples, RunEnded(12, "finished"))

    board = Board(tmp_path)
    assert board.scalars("performance/steps_per_s") == [(130, 3.0)]
    assert board.scalars("workers/live") == [(100, 1.0), (130, 1.0)]


def test_staleness_is_a_histogram_of_the_pushes_since_the_one_before(tmp_path: Path) -> None:
    write(
        tmp_path,
        BEGAN,
        sample(1.0, 10, staleness=(3, 0, 0, 0)),
        sample(4.0, 20, staleness=(5, 1, 4, 0)),
        sample(7.0, 30, staleness=(5, 4, 4, 0)),
        sample(10.0, 40, staleness=(5, 4, 4, 0)),  # no push
    )

    board = Board(tmp_path)
    (first_step, first), (second_step, second) = board.tensors("histograms", "staleness/distribution")
    assert (first_step, second_step) == (20, 30)
    np.testing.assert_array_equal(first, [[-0.5, 0.5, 5], [0.5, 1.5, 1], [1.5, 2.5, 4]])
    np.testing.assert_array_equal(second, [[-0.5, 0.5, 0], [0.5, 1.5, 3]])
    assert board.scalars("staleness/mean") == [(20, pytest.approx(9 / 10)), (30, 1.0)]


def test_variables_have_histograms_and_norms(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(2.0, 3.0, 1_000)
    counts, edges = np.histogram(values, 30)
    changes, change_edges = np.histogram(values * 0.125, 10)
    first = TensorStats("dense/kernel", 5.0, None, tuple(edges.tolist()), tuple(counts.tolist()))
    second = replace(
        first, update_norm=0.25, update_edges=tuple(change_edges.tolist()), update_counts=tuple(changes.tolist())
    )

    write(tmp_path, BEGAN, WeightStats(1, 1, 50, (first,)), WeightStats(2, 2, 90, (second,)))

    board = Board(tmp_path)
    (step, array), (later_step, _) = board.tensors("histograms", "weights/dense/kernel")
    assert (step, later_step) == (50, 90)
    np.testing.assert_array_equal(array[:, 0], edges[:-1])
    np.testing.assert_array_equal(array[:, 1], edges[1:])
    np.testing.assert_array_equal(array[:, 2], counts)
    assert array[:, 2].sum() == 1_000
    ((update_step, update),) = board.tensors("histograms", "updates/dense/kernel")
    assert update_step == 90
    np.testing.assert_array_equal(update[:, 2], changes)
    assert board.scalars("norms/dense/kernel") == [(50, 5.0), (90, 5.0)]
    assert board.scalars("update_norms/dense/kernel") == [(90, 0.25)]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")  # TensorBoard's own, as it is imported
def test_configuration_is_a_table_whose_cells_show_what_they_hold(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    write(tmp_path, BEGAN)

    ((step, markdown),) = Board(tmp_path).texts("configuration")
    shown = _cells(markdown_to_safe_html(markdown))
    assert step == 0
    assert shown["batch_size"] == "64"
    assert shown["mode"] == "stale-synchronous (2)"
    assert shown["began"] == "2023-11-14 22:13:20 UTC"
    assert shown["spark.tmp.dir"] == "/a_b|c*d*`e`<b>f</b>[g](http://h)&amp;\\| next"


def _cells(markup: str) -> dict[str, str]:
    """The table's rows as they are seen: tags read, entities resolved."""
    from html.parser import HTMLParser

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.cells: list[str] = []

        def handle_starttag(self, tag: str, attributes: object) -> None:
            assert tag in ("table", "thead", "tbody", "tr", "th", "td"), f"a cell became markup: {tag}"
            if tag == "td":
                self.cells.append("")

        def handle_data(self, data: str) -> None:
            if self.cells:
                self.cells[-1] += data

    parser = Parser()
    parser.feed(markup)
    cells = [cell.strip("\n") for cell in parser.cells]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def test_events_are_one_text_of_the_newest_written_at_most_every_ten_seconds(tmp_path: Path) -> None:
    write(
        tmp_path,
        BEGAN,
        TrainingPoint(1, 100, 100, {"loss": 1.0}),
        WorkerEvent(2.0, 1, "granted", "a-host", 0),
        WorkerEvent(3.0, 1, "lost", "a-host", 0, "no sign of life"),
        CheckpointWritten(8.0, 7, "hdfs://n/c-7", 5_000, 0.5),
        LogLine(14.0, 2, "b-host", logging.WARNING, "tensorflow", "slow\ninput"),
        Spans(20.0, ()),
        TrainingPoint(20, 200, 200, {"loss": 1.0}),
        WorkerEvent(21.0, 0, "failed", "c-host", 3, "ValueError"),
        RunEnded(22.0, "failed", "out of\nmemory"),
    )

    texts = Board(tmp_path).texts("events")
    assert [step for step, _ in texts] == [100, 200]
    first, last = (text.replace("\\", "").splitlines()[2:] for _, text in texts)
    assert first == [
        "| 14.0 s | 100 | partition 2 on b-host | WARNING tensorflow: slow input |",
        "| 8.0 s | 100 | driver | checkpoint 7, 5,000 bytes in 0.5 s: hdfs://n/c-7 |",
        "| 3.0 s | 100 | partition 1 on a-host | lost (attempt 0): no sign of life |",
    ]
    assert last == [
        "| 22.0 s | 200 | run | failed: out of memory |",
        "| 21.0 s | 200 | partition 0 on c-host | failed (attempt 3): ValueError |",
        *first,
    ]


def test_a_flood_of_log_lines_is_few_short_texts(tmp_path: Path) -> None:
    lines = [LogLine(1 + i / 100, 0, "h", logging.ERROR, "x", f"line {i} " + "y" * 10_000) for i in range(3_000)]

    write(tmp_path, BEGAN, *lines)

    texts = [text for _, text in Board(tmp_path).texts("events")]
    assert len(texts) == 3  # at 11 s, at 21 s and at the end
    assert [len(text.splitlines()) for text in texts] == [52, 52, 52]
    assert "line 2999 " in texts[-1]
    assert max(map(len, texts)) < 52 * 700


def test_a_run_is_a_session_of_hyperparameters_with_its_outcome(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    slower = replace(BEGAN, settings={**BEGAN.settings, "batch_size": "32", "spark.tensorspark.staleness": ""})
    write(tmp_path / "a", BEGAN, EpochEnded(5, 0, 300, {"val_loss": 3.5}), RunEnded(9.5, "stopped"))
    write(tmp_path / "b", slower, EpochEnded(5, 0, 300, {"val_loss": 2.5}), RunEnded(9.5, "failed", "it broke"))
    write(tmp_path / "c", BEGAN)

    sessions = Board(tmp_path).sessions()
    first = {name: value.WhichOneof("kind") for name, value in sessions["a"].hparams.items()}
    assert first == {
        "mode": "string_value", "combiner": "string_value", "num_partitions": "number_value",
        "num_epochs": "number_value", "batch_size": "number_value", "sync_interval": "number_value",
        "staleness": "string_value", "overlap": "bool_value", "compression": "string_value",
        "pull_compression": "string_value",
    }  # fmt: skip
    assert sessions["a"].hparams["batch_size"].number_value == 64
    assert sessions["a"].hparams["overlap"].bool_value is True
    assert sessions["a"].hparams["compression"].string_value == "topk:0.01"
    assert sessions["b"].hparams["batch_size"].number_value == 32
    assert sessions["b"].hparams["staleness"].string_value == "async"
    values = {
        name: [value.value for value in sessions[name].metric_values if value.name.tag == "epoch/val_loss"]
        for name in "ab"
    }
    assert values == {"a": [3.5], "b": [2.5]}
    statuses = [sessions[name].sessions[0].status for name in "abc"]
    assert statuses == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_UNKNOWN]
    assert sessions["a"].sessions[0].start_time_secs == STARTED_AT
    assert sessions["a"].sessions[0].end_time_secs == STARTED_AT + 9.5
    assert sessions["a"].sessions[0].monitor_url == "http://driver:4040"


def test_the_graph_is_what_was_given(tmp_path: Path) -> None:
    graph = _graph()

    write(tmp_path, BEGAN, graph=graph)

    board = Board(tmp_path)
    assert board.multiplexer.SerializedGraph(".") == graph
    assert [node.name for node in board.multiplexer.Graph(".").node] == ["x", "twice"]


def _graph() -> bytes:
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef

    nodes = [NodeDef(name="x", op="Placeholder"), NodeDef(name="twice", op="Add", input=["x", "x"])]
    serialized: bytes = GraphDef(node=nodes).SerializeToString()
    return serialized


def test_a_graph_that_is_too_large_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, BEGAN, TrainingPoint(1, 10, 10, {"loss": 4.0}), graph=bytes(2**24 + 1))

    assert Board(tmp_path).scalars("loss") == [(10, 4.0)]
    assert "the graph of 16 MiB is not written for TensorBoard" in caplog.text
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000


def test_odd_names_have_tags_of_their_own(tmp_path: Path) -> None:
    long = "n" * 1_000
    names = ["/a//b/", "loss 🎉 é", long, long + "x", "half \ud83c", "", "a\nb", "weights/w", "performance/steps_per_s"]
    values = {name: float(number) for number, name in enumerate(names, 1)}
    histogram = TensorStats("w", None, None, (0.0, 1.0), (3,))

    write(
        tmp_path,
        BEGAN,
        TrainingPoint(1, 10, 10, values),
        WeightStats(2, 1, 20, (histogram,)),
        sample(1, 10),
        sample(4, 40),
        TrainingPoint(5, 50, 50, values),
    )

    board = Board(tmp_path)
    tags = {
        tag: board.scalars(tag) for tag in board.scalar_tags() if not tag.startswith("workers/") and tag != "norms/w"
    }
    both = {value: [(10, value), (50, value)] for value in values.values()}
    assert tags["/a//b/"] == both[1.0]
    assert tags["loss 🎉 é"] == both[2.0]
    assert tags["n" * 249 + "…"] == both[3.0]
    assert tags["n" * 249 + "… (2)"] == both[4.0]
    assert tags["half ?"] == both[5.0]
    assert tags["unnamed"] == both[6.0]
    assert tags["a\nb"] == both[7.0]
    assert tags["weights/w"] == both[8.0]
    # One tag is the fetch's, as it came first; the rate has its own.
    assert tags["performance/steps_per_s"] == [(10, 9.0), (40, 10.0), (50, 9.0)]
    ((step, array),) = board.tensors("histograms", "weights/w (2)")
    assert (step, array.tolist()) == (20, [[0.0, 1.0, 3.0]])


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_local_file_grows_while_tensorboard_reads_it(tmp_path: Path) -> None:
    files = EventFiles(str(tmp_path))
    files.record(BEGAN)
    files.record(TrainingPoint(1, 10, 10, {"loss": 4.0}))
    files.flush()
    board = Board(tmp_path)
    assert board.scalars("loss") == [(10, 4.0)]

    files.record(TrainingPoint(2, 20, 20, {"loss": 3.0}))
    files.flush()
    board.multiplexer.Reload()

    assert board.scalars("loss") == [(10, 4.0), (20, 3.0)]
    files.close()
    (name,) = [path.name for path in tmp_path.iterdir()]
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}\.[\w.-]+\.\d+\.\d+\.0000", name)


def test_a_run_that_goes_on_in_the_same_directory_voids_the_steps_that_it_repeats(tmp_path: Path) -> None:
    first = [TrainingPoint(i, i * 100, i, {"loss": 10.0 - i}) for i in range(1, 6)]
    again = [TrainingPoint(i, 300 + i * 100, i, {"loss": 5.0 - i}) for i in range(1, 4)]

    write(tmp_path, BEGAN, *first)
    write(tmp_path, replace(BEGAN, started_at=STARTED_AT + 60, resumed_steps=300), *again, RunEnded(5, "finished"))

    board = Board(tmp_path)
    assert board.scalars("loss") == [(100, 9.0), (200, 8.0), (300, 7.0), (400, 4.0), (500, 3.0), (600, 2.0)]
    assert [step for step, _ in board.texts("configuration")] == [0, 300]


def test_another_run_in_the_same_directory_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, BEGAN, *[TrainingPoint(i, i * 100, i, {"loss": 10.0 - i}) for i in range(1, 6)])
    write(tmp_path, BEGAN, TrainingPoint(1, 50, 1, {"loss": 1.0}))

    assert Board(tmp_path).scalars("loss") == [(50, 1.0)]


@contextmanager
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every flush is a part, as if it came ten seconds after the one before."""
    with monkeypatch.context() as patch:
        patch.setattr("tensorspark.telemetry.growing._FIRST_PART_S", 0.0)
        patch.setattr("tensorspark.telemetry.growing._PARTS_AN_AGE", 1e9)
        yield


def _write_parts(url: str, user: str = "") -> None:
    files = EventFiles(url, user=user, graph=_graph())
    files.record(BEGAN)
    for i in range(1, 13):
        files.record(TrainingPoint(i, i * 100, i, {"loss": 20.0 - i}))
        files.flush()
    files.record(RunEnded(20, "finished"))
    files.close()


def _fetched(filesystem: fsspec.AbstractFileSystem, path: str, directory: Path) -> Path:
    for name in filesystem.ls(path, detail=False):
        (directory / name.rpartition("/")[2]).write_bytes(filesystem.cat_file(name))
    return directory


def _check_parts(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    assert [name[-5:] for name in names] == [f".{part:04d}" for part in range(13)]
    board = Board(directory)
    assert board.scalars("loss") == [(i * 100, 20.0 - i) for i in range(1, 13)]
    assert board.multiplexer.SerializedGraph(".") == _graph()
    assert board.sessions()["."].sessions[0].status == 1  # STATUS_SUCCESS, from the last part


def test_parts_on_another_filesystem_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/events-{uuid.uuid4().hex}"
    filesystem = fsspec.filesystem("memory")
    try:
        with _in_parts(monkeypatch):
            _write_parts(f"memory:/{path}")
        _fetched(filesystem, path, tmp_path)
    finally:
        filesystem.rm(path, recursive=True)

    _check_parts(tmp_path)


@pytest.mark.hdfs
def test_parts_on_hdfs_are_one_run(hdfs: HdfsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorspark.data.filesystem import open_filesystem

    path = f"/alice-{uuid.uuid4().hex}"
    hdfs.make_directory(path, owner="alice")
    with _in_parts(monkeypatch):
        _write_parts(f"{hdfs.url}{path}/run", user="alice")

    filesystem, run = open_filesystem(f"{hdfs.url}{path}/run", "alice")
    _check_parts(_fetched(filesystem, run, tmp_path))


def test_a_directory_that_cannot_be_made_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StagingError, match=r"spark\.tensorspark\.log\.dir: could not make .*file"):
        EventFiles(str(tmp_path / "file" / "run"))


# --- dependencies -----------------------------------------------------------------------------------------------------


def _python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_module_loads_no_tensorboard_and_writing_loads_no_tensorflow(tmp_path: Path) -> None:
    code = f"""
import sys
from tensorspark.telemetry.records import *
from tensorspark.telemetry.tensorboard import EventFiles
print(sorted({{"tensorboard", "tensorflow"}} & set(sys.modules)))
files = EventFiles({str(tmp_path)!r}, graph=b"")
files.record(RunBegan(0, 0, "run", 0, "asynchronous", 2, 3, "C", {{"batch_size": "64"}}, (), 0, "2"))
files.record(TrainingPoint(1, 1, 1, {{"loss": 1.0}}))
files.record(WeightStats(1, 1, 1, (TensorStats("w", 1.0, 1.0, (0.0, 1.0), (2,)),)))
files.record(RunEnded(1, "finished"))
files.close()
print(sorted({{"tensorboard", "tensorflow", "keras"}} & set(sys.modules)))
"""
    assert _python(code).splitlines() == ["[]", "['tensorboard']"]
    assert Board(tmp_path).scalars("loss") == [(1, 1.0)]


def test_without_the_package_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["tensorboard"] = None
from tensorspark.errors import ConfigError
from tensorspark.telemetry.tensorboard import EventFiles
try:
    EventFiles({str(tmp_path / "run")!r})
except ConfigError as error:
    print(error)
"""
    assert _python(code) == (
        "TensorBoard's event files need the package tensorboard: pip install 'tensorspark[tensorboard]'"
    )
    assert not (tmp_path / "run").exists()


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def _tensorboard(directory: Path, *arguments: str) -> Iterator[str]:
    """The real server, on a free port; gives its URL."""
    log = directory.parent / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", "0"]
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, "--host", "127.0.0.1", *arguments], stdout=output, stderr=output) as process,
    ):
        try:
            yield _eventually(lambda: re.search(r"at (http://127\.0\.0\.1:\d+)/", log.read_text()), log)[1]
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def _eventually(ask: Any, log: Path) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.1)
    pytest.fail(f"nothing within {DEADLINE_S:g} s:\n{log.read_text()}")


def _get(url: str, body: dict[str, Any] | None = None, **query: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}?{urllib.parse.urlencode(query)}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        return json.load(response)


def test_the_server_shows_runs_on_all_its_pages(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    odd = "/a//b 🎉/" + "n" * 1_000
    histogram = TensorStats("dense/kernel", 5.0, None, (0.0, 1.0, 2.0), (3, 4))
    write(
        logs / "first",
        BEGAN,
        TrainingPoint(1, 100, 100, {"loss": 4.0, odd: 6.0}),
        WeightStats(2, 1, 150, (histogram,)),
        *[TrainingPoint(i, i * 100, i, {"loss": 10.0 - i}) for i in range(2, 6)],
        EpochEnded(6, 0, 500, {"val_loss": 3.5}),
        WorkerEvent(7.0, 1, "lost", "a-host", 0),
        graph=_graph(),
    )
    resumed = replace(BEGAN, resumed_steps=300, settings={**BEGAN.settings, "batch_size": "32"})
    write(logs / "first", resumed, TrainingPoint(1, 400, 400, {"loss": 1.0}), RunEnded(2, "finished"))
    write(logs / "second", resumed, TrainingPoint(1, 400, 400, {"loss": 1.5}), RunEnded(2, "finished"))

    # The data server that it starts by default for local directories: another loader than the one of `Board`.
    with _tensorboard(logs, "--load_fast=true") as url:
        data = f"{url}/data/plugin"
        log = tmp_path / "tensorboard.log"
        scalars = _eventually(lambda: tags if len(tags := _get(f"{data}/scalars/tags")) == 2 else None, log)
        assert {"loss", "epoch/val_loss", "norms/dense/kernel", odd[:249] + "…"} <= scalars["first"].keys()
        points = _get(f"{data}/scalars/scalars", run="first", tag="loss")
        assert [point[1:] for point in points] == [[100, 4.0], [200, 8.0], [300, 7.0], [400, 1.0]]
        histograms = _get(f"{data}/histograms/histograms", run="first", tag="weights/dense/kernel")
        assert [entry[1:] for entry in histograms] == [[150, [[0.0, 1.0, 3.0], [1.0, 2.0, 4.0]]]]
        assert set(_get(f"{data}/text/tags")["first"]) == {"configuration", "events"}
        (event,) = _get(f"{data}/text/text", run="first", tag="events")
        assert "partition 1 on a-host" in event["text"]
        assert _get(f"{data}/graphs/info")["first"]["run_graph"] is True
        series = _get(f"{data}/timeseries/tags")
        assert "loss" in series["scalars"]["runTagInfo"]["first"]
        assert "weights/dense/kernel" in series["histograms"]["runTagInfo"]["first"]
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        body = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "allowedStatuses": statuses, "colParams": []}
        groups = _get(f"{data}/hparams/session_groups", body)["sessionGroups"]
        assert {group["name"]: group["hparams"]["batch_size"] for group in groups} == {"first": 64.0, "second": 32.0}
        hparams = _get(f"{data}/hparams/experiment", {"experimentName": "", "includeMetrics": True})["hparamInfos"]
        assert [info["name"] for info in hparams if info.get("differs")] == ["batch_size"]
