"""The course of a run, against sums over the plain list of pushes, and what people see of it."""

from __future__ import annotations

import doctest
import io
import math
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tensorspark.errors import ConfigError
from tensorspark.history import History, Point, Recorder, WorkerReport, course, text

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Pushed:
    seconds: float
    num_steps: int
    num_samples: int
    loss: float  # mean over the push's samples


def _pushes(sizes: list[tuple[int, int, float]]) -> list[Pushed]:
    return [Pushed(0.5 * (i + 1), steps, samples, loss) for i, (steps, samples, loss) in enumerate(sizes)]


def _record(recorder: Recorder, pushes: list[Pushed]) -> None:
    for push in pushes:
        sums = {"loss": push.loss * push.num_samples, "negative": -2 * push.loss * push.num_samples}
        recorder.record(push.seconds, push.num_steps, push.num_samples, sums)


def _check_against_plain_calculation(points: tuple[Point, ...], pushes: list[Pushed]) -> None:
    """Every point is the weighted mean of the pushes since the point before, and together they are all of them."""
    by_seconds = {push.seconds: index for index, push in enumerate(pushes)}
    begin = 0
    for point in points:
        end = by_seconds[point.seconds] + 1
        assert end > begin
        part = pushes[begin:end]
        samples = sum(push.num_samples for push in part)
        mean = sum(push.loss * push.num_samples for push in part) / samples
        assert point.num_steps == sum(push.num_steps for push in pushes[:end])
        assert point.num_samples == sum(push.num_samples for push in pushes[:end])
        assert point.scalars["loss"] == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert point.scalars["negative"] == pytest.approx(-2 * mean, rel=1e-9, abs=1e-9)
        begin = end
    assert begin == len(pushes)


SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=80)


@given(sizes=SIZES, max_points=st.integers(2, 12))
def test_points_are_weighted_means_of_the_pushes_between_them_however_often_merged(
    sizes: list[tuple[int, int, float]], max_points: int
) -> None:
    pushes = _pushes(sizes)
    recorder = Recorder(max_points)
    for number, push in enumerate(pushes, 1):
        _record(recorder, [push])
        assert len(recorder.points()) <= max_points
        assert recorder.num_samples == sum(earlier.num_samples for earlier in pushes[:number])
    assert recorder.num_steps == sum(push.num_steps for push in pushes)
    _check_against_plain_calculation(recorder.points(), pushes)
    assert recorder.last() == recorder.points()[-1]


@given(sizes=SIZES, max_points=st.integers(2, 12), cut=st.integers(0, 80))
def test_a_recorder_made_from_anothers_export_goes_on_bit_for_bit_as_that_one(
    sizes: list[tuple[int, int, float]], max_points: int, cut: int
) -> None:
    pushes = _pushes(sizes)
    undisturbed, first = Recorder(max_points), Recorder(max_points)
    _record(undisturbed, pushes)
    _record(first, pushes[:cut])
    second = Recorder(max_points, points=first.export())
    _record(second, pushes[cut:])
    assert second.points() == undisturbed.points()
    assert second.export() == undisturbed.export()
    assert (second.num_steps, second.num_samples) == (undisturbed.num_steps, undisturbed.num_samples)


def test_sums_that_no_mean_gives_back_survive_an_export() -> None:
    assert 0.1 / 11 * 11 != 0.1
    first = Recorder()
    first.record(1.0, 1, 11, {"loss": 0.1})
    (sums,) = Recorder(points=first.export()).export().points
    assert sums.sums == {"loss": 0.1}


def test_an_export_stays_as_it_is_while_recording_goes_on() -> None:
    recorder = Recorder()
    recorder.record(1.0, 2, 4, {"loss": 8.0})
    exported = recorder.export()
    resumed = Recorder(points=exported)
    for each in (recorder, resumed):
        each.record(2.0, 1, 4, {"loss": 4.0})
    assert exported == Recorder(points=exported).export()
    assert [dict(sums.sums) for sums in exported.points] == [{"loss": 8.0}]


def test_a_short_run_has_a_point_per_push() -> None:
    recorder = Recorder()
    pushes = _pushes([(100, 10_000, 2.0), (100, 9_950, 1.5), (1, 1, 7.0)])
    _record(recorder, pushes)
    assert [(p.seconds, p.num_steps, p.num_samples) for p in recorder.points()] == [
        (0.5, 100, 10_000),
        (1.0, 200, 19_950),
        (1.5, 201, 19_951),
    ]
    assert [p.scalars["loss"] for p in recorder.points()] == pytest.approx([2.0, 1.5, 7.0])


def test_a_long_run_has_between_half_of_and_2000_points() -> None:
    recorder = Recorder()
    pushes = _pushes([(1, 1 + i % 7, float(i)) for i in range(9_001)])
    _record(recorder, pushes)
    assert 1000 <= len(recorder.points()) <= 2000
    _check_against_plain_calculation(recorder.points(), pushes)


def test_a_nan_stays_at_its_point_and_spoils_no_other() -> None:
    recorder = Recorder()
    _record(recorder, _pushes([(1, 10, 1.0), (1, 10, math.nan), (1, 10, 3.0)]))
    losses = [point.scalars["loss"] for point in recorder.points()]
    assert math.isnan(losses[1])
    assert [losses[0], losses[2]] == [1.0, 3.0]
    assert recorder.num_samples == 30


def test_merging_with_a_nan_keeps_totals_and_the_other_scalars() -> None:
    recorder = Recorder(max_points=2)
    for seconds in (1.0, 2.0, 3.0):
        recorder.record(seconds, 1, 10, {"loss": math.nan if seconds == 1.0 else 20.0, "norm": 5.0 * 10})
    first, last = recorder.points()
    assert math.isnan(first.scalars["loss"])
    assert first.scalars["norm"] == 5.0
    assert last.scalars["loss"] == 2.0
    assert last.num_samples == 30


def test_pushes_without_scalars_or_samples_are_counted() -> None:
    recorder = Recorder()
    assert recorder.last() is None
    assert recorder.points() == ()
    recorder.record(1.0, 3, 30, {})
    recorder.record(2.0, 1, 0, {"loss": 0.0})
    assert [(p.num_steps, p.num_samples, dict(p.scalars)) for p in recorder.points()] == [(3, 30, {}), (4, 30, {})]


def test_the_recorder_keeps_its_own_sums() -> None:
    recorder, sums = Recorder(), {"loss": 8.0}
    recorder.record(1.0, 1, 4, sums)
    sums["loss"] = 100.0
    assert recorder.points()[0].scalars == {"loss": 2.0}


def _history(points: tuple[Point, ...], seconds: float = 4.0) -> History:
    return History("mnist", num_steps=7, num_samples=600, seconds=seconds, seed=1, points=points, workers=())


def test_the_history_gives_columns_with_nan_where_a_point_has_no_value() -> None:
    history = _history((Point(1.0, 2, 10, {"loss": 3.0}), Point(2.0, 7, 20, {"accuracy": 0.5, "loss": 1.0})))
    assert history.steps.tolist() == [2, 7]
    assert history.steps.dtype == np.int64
    assert list(history.scalars) == ["loss", "accuracy"]
    np.testing.assert_array_equal(history.scalars["loss"], [3.0, 1.0])
    np.testing.assert_array_equal(history.scalars["accuracy"], [np.nan, 0.5])


def test_the_rate_is_samples_over_seconds_and_zero_for_no_time() -> None:
    assert _history(()).samples_per_s == 150.0
    assert _history((), seconds=0.0).samples_per_s == 0.0
    assert _history(()).scalars == {}
    assert _history(()).steps.shape == (0,)


# For people: summary, notebook, DataFrames, plots


def _workers(num: int = 3) -> tuple[WorkerReport, ...]:
    return tuple(
        WorkerReport(
            partition=partition,
            host=f"node-{partition % 2}",
            num_attempts=1,
            num_steps=10 + partition,
            num_samples=200,
            num_bytes_pushed=1_500_000,
            num_bytes_pulled=700 if partition == 0 else 0,
            epoch_samples=(150, 50),
            step_s=1.5,
            finished=True,
        )
        for partition in range(num)
    )


POINTS = (
    Point(1.0, 5, 150, {"loss": 3.0, "accuracy": 0.25}),
    Point(2.0, 15, 450, {"loss": 1.5}),
    Point(6.0, 33, 600, {"loss": 0.12345678, "accuracy": 0.75}),
)
FITTED = History(
    "mnist",
    num_steps=33,
    num_samples=600,
    seconds=8.0,
    seed=11,
    points=POINTS,
    workers=_workers(),
    history={"loss": [2.5, 0.5], "val_loss": [2.0, 0.75], "val_auc": [0.5, 0.625]},
    epoch=(0, 1),
    mode="asynchronous",
)


def test_the_summary_says_in_a_few_lines_what_came_of_the_run() -> None:
    assert repr(FITTED).splitlines() == [
        "History of mnist, asynchronous, seed 11",
        "  trained    33 steps, 600 samples in 8.0 s: 75 samples/s",
        "  epoch 2    loss 0.5, val_loss 0.75, val_auc 0.625",
        "  workers    3 partitions on 2 hosts",
        "  traffic    4.5 MB pushed, 700 B pulled",
    ]
    assert str(FITTED) == repr(FITTED)


def test_the_summary_of_a_run_without_epochs_ends_with_the_last_scalars() -> None:
    history = replace(FITTED, history={}, epoch=())
    assert "  at the end loss 0.1235, accuracy 0.75" in repr(history).splitlines()


def test_the_summary_tells_of_troubles_only_where_there_were_any() -> None:
    assert "trouble" not in repr(FITTED)
    first, second, third = _workers()
    troubled = (
        replace(first, num_refused=2, num_repeated=1, num_reconnects=1),
        replace(second, num_attempts=3),
        replace(third, finished=False),
    )
    (line,) = [line for line in repr(replace(FITTED, workers=troubled)).splitlines() if "trouble" in line]
    expected = "2 refused pushes, 1 repeated push, 1 reconnect, 2 repeated tasks, 1 unfinished partition"
    assert line == f"  trouble    {expected}"


def test_the_summary_shows_where_to_look_without_what_lets_one_in() -> None:
    history = replace(
        FITTED,
        dashboard_url="http://me:pass@10.0.0.1:4040/dash?token=s3cret#s3cret",
        log_dir="s3://key:s3cret@bucket/logs",
        trace="/tmp/trace.json",
    )
    shown = repr(history)
    assert "s3cret" not in shown
    assert "pass" not in shown
    assert shown.splitlines()[-3:] == [
        "  dashboard  http://10.0.0.1:4040/dash",
        "  log_dir    s3://bucket/logs",
        "  trace      /tmp/trace.json",
    ]


@given(
    name=st.text(max_size=300),
    metrics=st.dictionaries(st.text(max_size=200), st.floats() | st.lists(st.floats()) | st.none(), max_size=40),
    url=st.none() | st.text(),
    points=st.sampled_from([(), POINTS, (Point(0.0, 0, 0, {}),)]),
)
def test_a_summary_is_short_whatever_the_run(
    name: str, metrics: dict[str, object], url: str | None, points: tuple[Point, ...]
) -> None:
    history = History(
        name, 0, 0, 0.0, 1, points, (), {key: [value] for key, value in metrics.items()}, (0,), url, url, url, name
    )
    lines = repr(history).split("\n")
    assert len(lines) <= 12
    assert all(len(line) <= 112 for line in lines)
    HTMLParser().feed(history._repr_html_())


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        *((0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")),
        *((7 * 10**9, "7.0 GB"), (3 * 10**15, "3.0 PB"), (4 * 10**18, "4,000.0 PB")),
    ],
)
def test_sizes_are_in_the_unit_that_keeps_them_short(num_bytes: int, expected: str) -> None:
    assert text.size(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.04, "0.0 s"), (119.9, "119.9 s"), (125.4, "2 min 5 s"), (11_520, "3 h 12 min")]
)
def test_durations_are_in_the_units_that_one_speaks_of(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, its text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_notebook_shows_the_summary_as_a_table_with_the_workers_folded() -> None:
    page = Page(FITTED._repr_html_())
    assert "History of mnist, asynchronous, seed 11" in page.text
    assert "600 samples" in " ".join(page.text)
    assert {row["scope"] for row in page.of("th")} == {"row", "col"}
    assert page.of("details") == [{}]  # closed
    rows = FITTED._repr_html_().split("<tbody>")[2].split("<tr>")[1:]
    assert [re.findall(r">([^<]+)</t", row)[:4] for row in rows] == [
        ["0", "node-0", "10", "200"],
        ["1", "node-1", "11", "200"],
        ["2", "node-0", "12", "200"],
    ]


def test_the_curve_in_a_notebook_is_the_first_scalar_and_is_said_in_words() -> None:
    page = Page(FITTED._repr_html_())
    (svg,), (path,) = page.of("svg"), page.of("path")
    assert svg["aria-label"] == "loss from 3 to 0.1235 over the run"
    assert path["stroke"] == "currentColor"
    x, y = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", path["d"] or ""), float).T
    # The loss of 1.5 is 0.4785 of the way from the lowest to the highest; y grows downwards within 2 to 46.
    np.testing.assert_allclose(x, [2, 120, 238], atol=0.06)
    np.testing.assert_allclose(y, [2, 2 + 44 * (1 - (1.5 - 0.12345678) / (3 - 0.12345678)), 46], atol=0.06)


def test_a_long_curve_with_gaps_keeps_its_end_and_stays_small() -> None:
    losses = [math.nan if 500 <= index < 600 else float(index) for index in range(1999)]
    points = tuple(Point(float(i), i, i, {"loss": loss}) for i, loss in enumerate(losses))
    (path,) = Page(replace(FITTED, points=points)._repr_html_()).of("path")
    drawn = path["d"] or ""
    assert drawn.count("M") == 2
    assert 200 < drawn.count("L") < 250
    assert drawn.endswith("L238.0 2.0")


@pytest.mark.parametrize("losses", [[], [2.0], [math.nan, math.inf, 1.0]])
def test_there_is_no_curve_of_fewer_than_two_numbers(losses: list[float]) -> None:
    points = tuple(Point(float(i), i, i, {"loss": loss}) for i, loss in enumerate(losses))
    assert Page(replace(FITTED, points=points)._repr_html_()).of("svg") == []


def test_a_notebook_links_to_the_dashboard_and_runs_nothing_that_a_name_holds() -> None:
    evil = "<script>alert('x')</script>\"&"
    workers = (WorkerReport(0, evil),)
    url = 'http://h:1/?token=a"b&c=d'
    history = replace(
        FITTED, name=evil, mode=evil, workers=workers, history={evil: [1]}, dashboard_url=url, log_dir=evil,
        points=(Point(0, 1, 1, {evil: 1.0}), Point(1, 2, 2, {evil: 2.0})),
    )  # fmt: skip
    page = Page(history._repr_html_())
    assert page.of("script") == []
    (link,) = page.of("a")
    assert link["href"] == url
    assert "token" not in "".join(page.text)
    assert Page(replace(FITTED, dashboard_url="javascript:alert(1)")._repr_html_()).of("a") == []


def test_a_notebook_lists_two_hundred_workers_and_says_how_many_more_there_are() -> None:
    html = replace(FITTED, workers=_workers(1203))._repr_html_()
    assert "1,003 more" in html
    assert html.count('<th scope="row">') == 200


def test_no_colour_is_fixed_so_that_a_dark_page_stays_readable() -> None:
    html = FITTED._repr_html_()
    assert "background" not in html
    assert not re.search(r"color:|#[0-9a-fA-F]{3}", html)
    assert set(re.findall(r'(?:fill|stroke)="(\w+)"', html)) == {"none", "currentColor"}


def test_the_points_as_a_dataframe_have_a_column_for_each_scalar() -> None:
    frame = FITTED.to_pandas()
    assert list(frame.columns) == ["seconds", "num_steps", "num_samples", "loss", "accuracy"]
    assert [str(dtype) for dtype in frame.dtypes] == ["float64", "int64", "int64", "float64", "float64"]
    np.testing.assert_array_equal(frame["accuracy"], [0.25, np.nan, 0.75])
    assert frame["num_samples"].tolist() == [150, 450, 600]
    assert frame["seconds"].tolist() == [1.0, 2.0, 6.0]


def test_a_scalar_called_as_another_column_has_its_own() -> None:
    frame = _history((Point(1.5, 2, 10, {"seconds": 99.0}),)).to_pandas()
    assert frame.to_dict("list") == {"seconds": [1.5], "num_steps": [2], "num_samples": [10], "scalars.seconds": [99.0]}


def test_a_history_without_points_or_workers_gives_empty_dataframes_of_the_same_columns() -> None:
    empty = _history(())
    assert [str(dtype) for dtype in empty.to_pandas().dtypes] == ["float64", "int64", "int64"]
    assert len(empty.to_pandas()) == len(empty.workers_to_pandas()) == len(empty.epochs_to_pandas()) == 0
    assert list(empty.workers_to_pandas().columns) == list(FITTED.workers_to_pandas().columns)


def test_the_workers_as_a_dataframe_are_a_row_each_with_all_that_they_report() -> None:
    frame = FITTED.workers_to_pandas()
    assert frame.index.name == "partition"
    assert frame.index.tolist() == [0, 1, 2]
    assert set(frame.columns) == set(vars(WorkerReport(0))) - {"partition"}
    assert frame["num_steps"].tolist() == [10, 11, 12]
    assert frame.loc[1, "host"] == "node-1"
    assert frame["epoch_samples"].tolist() == [(150, 50)] * 3
    assert str(frame["num_bytes_pushed"].dtype) == "int64"


def test_the_epochs_as_a_dataframe_are_a_row_each() -> None:
    frame = FITTED.epochs_to_pandas()
    assert frame.index.name == "epoch"
    assert frame.to_dict("index") == {
        0: {"loss": 2.5, "val_loss": 2.0, "val_auc": 0.5},
        1: {"loss": 0.5, "val_loss": 0.75, "val_auc": 0.625},
    }


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [("pandas", name, "spark") for name in ("to_pandas", "workers_to_pandas", "epochs_to_pandas")]
    + [("matplotlib", "plot", "plot")],
)
def test_where_an_optional_package_is_absent_one_line_says_how_to_get_it(
    package: str, call: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'tensorspark\[{extra}\]'") as caught:
        getattr(FITTED, call)()
    assert "\n" not in str(caught.value)


def _curves(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """The lines of an axes, by label."""
    return {
        line.get_label(): [(round(x, 6), round(y, 6)) for x, y in np.asarray(line.get_xydata())] for line in ax.lines
    }


def test_training_and_held_out_curves_of_a_metric_share_axes() -> None:
    axes = FITTED.plot(ax=Figure().subplots(3))
    assert [ax.get_title(loc="left") for ax in axes] == ["loss", "accuracy", "auc"]
    # 450 of 600 rows are of the first epoch: it ended at step 15.
    assert _curves(axes[0]) == {
        "training": [(5, 3.0), (15, 1.5), (33, 0.123457)],
        "training, mean of the epoch": [(15, 2.5), (33, 0.5)],
        "held-out rows": [(15, 2.0), (33, 0.75)],
    }
    assert _curves(axes[2]) == {"held-out rows": [(15, 0.5), (33, 0.625)]}
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == list(_curves(axes[0]))


@pytest.mark.parametrize(
    ("x", "ends", "label"),
    [
        ("steps", [15, 33], "local steps of all workers"),
        ("seconds", [2.0, 6.0], "time since the start (s)"),
        ("samples", [450, 600], "samples trained on"),
    ],
)
def test_the_x_axis_is_steps_seconds_or_samples(x: Any, ends: list[float], label: str) -> None:
    ax = FITTED.plot("loss", x=x, ax=Figure().subplots())
    assert [x for x, _ in _curves(ax)["held-out rows"]] == ends
    assert ax.get_xlabel() == label
    assert ax.get_ylabel() == "loss"


def test_epochs_end_in_equal_parts_where_a_repeated_task_forgot_its_own() -> None:
    first, *others = _workers()
    history = replace(FITTED, workers=(replace(first, epoch_samples=(50,)), *others))
    ax = history.plot("loss", x="samples", ax=[Figure().subplots()])
    assert [x for x, _ in _curves(ax)["held-out rows"]] == [300, 600]


def test_a_plot_of_its_own_is_a_figure_of_pyplot_with_a_title() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    axes = FITTED.plot()
    try:
        assert len(pyplot.get_fignums()) == len(before) + 1
        assert axes.shape == (3,)
        assert axes[0].figure.get_suptitle() == "mnist, asynchronous: 600 samples, 75 samples/s"
        assert [ax.get_xlabel() for ax in axes] == ["", "", "local steps of all workers"]
    finally:
        pyplot.close(axes[0].figure)
    assert pyplot.get_fignums() == before


def test_given_axes_leave_pyplot_alone() -> None:
    code = (
        "import sys\nfrom matplotlib.figure import Figure\nfrom tests.test_history import FITTED\n"
        "FITTED.plot('loss', ax=Figure().subplots())\nprint('matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "False\n", done.stderr


def test_names_with_dollars_are_no_mathematics() -> None:
    figure = Figure()
    history = _history((Point(1.0, 1, 1, {"$loss$^{": 1.0}), Point(2.0, 2, 2, {"$loss$^{": 0.5})))
    ax = history.plot(ax=figure.subplots())
    figure.savefig(io.BytesIO())
    assert ax.get_ylabel() == r"\$loss\$^{"


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({}, {"metrics": "los"}, "expected metrics of loss, accuracy, auc, got 'los'"),
        ({}, {"metrics": ["loss", "val_los"]}, "got 'val_los'"),
        ({}, {"metrics": []}, "got none"),
        ({}, {"x": "epochs"}, "expected x to be one of steps, seconds, samples, got 'epochs'"),
        ({}, {"ax": [object()]}, "expected 3 matplotlib Axes in ax, one for each of loss, accuracy, auc, got 1 of obj"),
        ({"points": ()}, {}, "no points"),
        ({"points": (Point(1.0, 1, 1, {}),), "history": {}}, {}, "no metrics"),
    ],
)
def test_what_cannot_be_drawn_is_said_with_what_can(
    changes: dict[str, Any], arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        replace(FITTED, **changes).plot(**arguments)


def test_a_history_survives_pickling_and_replacing() -> None:
    assert pickle.loads(pickle.dumps(FITTED)) == FITTED
    assert replace(FITTED, log_dir="/logs").log_dir == "/logs"


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(course)
    assert result.attempted > 10
    assert result.failed == 0
