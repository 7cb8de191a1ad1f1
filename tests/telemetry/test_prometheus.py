"""What /metrics tells of a run, read by the client library's parser, by promtool and by a real Prometheus server; and
the Grafana dashboard, of which every expression is asked from that server."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from tensorspark.errors import ConfigError
from tensorspark.telemetry.prometheus import METRICS, RUN_LABEL, Metric, exposition, staleness_buckets
from tensorspark.telemetry.records import (
    CheckpointWritten,
    EpochEnded,
    LogLine,
    RunBegan,
    RunEnded,
    Sample,
    Tensor,
    TensorStats,
    TrainingPoint,
    WeightStats,
    WorkerSample,
)
from tensorspark.telemetry.view import RunView
from tests.telemetry.prometheus_server import (
    REPOSITORY,
    SCRAPE_INTERVAL_S,
    PrometheusServer,
    derived_config,
    require_binaries,
    scraping,
    wait_until,
)

DASHBOARD: dict[str, Any] = json.loads((REPOSITORY / "conf" / "grafana" / "tensorspark.json").read_text("utf-8"))
PAGE = (REPOSITORY / "docs" / "metrics.md").read_text("utf-8")
OPENMETRICS = "application/openmetrics-text;version=1.0.0"

# Grafana's own formula, for a graph of one point in two seconds.
RATE_INTERVAL_S = max(2.0 + SCRAPE_INTERVAL_S, 4 * SCRAPE_INTERVAL_S)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


# A run whose state at any moment is known: all that counts grows linearly, from values that are not zero.

AGE_S = 100.0  # of the run, when the tests begin
NUM_SAMPLES = 1_000_000
STALENESS_PER_S = {0: 800, 1: 800, 3: 400}


class Course:
    """A run's records; `seconds` count from when the tests begin."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.started_at = time.time() - AGE_S
        self.num_logged = {logging.WARNING: 0, logging.ERROR: 0}
        self.view = RunView([self.began(), *self.once()])

    def seconds(self) -> float:
        return time.monotonic() - self.began_at

    def began(self) -> RunBegan:
        tensors = (Tensor("dense/kernel", (4, 4), "float32"), Tensor("dense/bias", (4,), "float32"))
        began = RunBegan(0.0, 3, "digits", self.started_at, "stale-synchronous (2)", 5, 10, "MeanDeltaCombiner", {},
                         tensors, 80, "2.0.0", "app-7")  # fmt: skip
        return replace(began, resumed_steps=400)

    def once(self) -> list[Any]:
        kernel, bias = TensorStats("dense/kernel", 12.5, 0.25), TensorStats("dense/bias", 0.5, None)
        return [
            CheckpointWritten(20.0, 4, "file:///checkpoints/4", 500, 0.5),
            CheckpointWritten(40.0, 9, "file:///checkpoints/9", 600, 0.75),
            WeightStats(50.0, 9, 300, (kernel, bias)),
            EpochEnded(60.0, 1, 400, {"loss": 0.5, "val_loss": 0.625}),
        ]

    def advance(self, seconds: float) -> None:
        """Applies what is known then, as a driver would."""
        self.view.apply(TrainingPoint(AGE_S + seconds, 500, 9000, {"loss": 0.375, "accuracy": 0.9, "gradient": None}))
        for level, per_s in ((logging.WARNING, 4), (logging.ERROR, 2)):
            for _ in range(self.num_logged[level], 3 + int(per_s * seconds)):
                self.num_logged[level] += 1
                self.view.apply(LogLine(AGE_S + seconds, 0, "host-a", level, "fsspec", "slow"))
        self.view.apply(self.sample(seconds))

    def sample(self, seconds: float) -> Sample:
        def at(first: float, per_s: float) -> int:
            return int(first + per_s * seconds)

        return Sample(
            seconds=AGE_S + seconds, num_steps=at(500, 400), num_samples=at(200_000, 4000), num_live=2, num_lost=1,
            num_standby=1, num_waiting=1, num_finished=1, progress=at(200_000, 4000) / NUM_SAMPLES, epoch=2,
            version=at(100, 200), num_bytes_pushed=at(1e6, 50_000), num_bytes_pulled=at(2e6, 80_000),
            num_raw_bytes_pushed=at(4e6, 200_000), num_raw_bytes_pulled=at(4e6, 160_000),
            staleness=tuple(at(7, STALENESS_PER_S.get(age, 0)) for age in range(65)),
            workers=(
                self.worker(0, "live", "host-a", at(300, 250), at(60, 120), 0, at(2, 50), 0, 0.6, 0.4, seconds),
                self.worker(1, "waiting", "host-b", at(200, 150), at(40, 70), at(5, 10), 1, 2, 0.3, 0.7, seconds),
                self.worker(2, "lost", "host-b", 90, 9, 0, 0, 7, 0.0, 0.0, seconds),
                self.worker(3, "finished", "host-a", 80, 8, 0, 0, 0, 0.0, 0.0, seconds),
            ),
        )  # fmt: skip

    @staticmethod
    def worker(partition: int, state: str, host: str, num_steps: int, num_applied: int, num_refused: int,
               num_reconnects: int, lag: int, compute: float, wait: float, seconds: float) -> WorkerSample:  # fmt: skip
        busy_s = {"compute": 30 + compute * seconds, "wait": 20 + wait * seconds}
        return WorkerSample(partition, state, host, 11, 1, num_steps, 9, num_applied, num_refused, num_reconnects, 9, 9,
                            0.5, lag, busy_s)  # fmt: skip


def a_view(seconds: float = 0.0) -> RunView:
    course = Course()
    course.advance(seconds)
    return course.view


def series(view: RunView | None, accept: str | None = None) -> Series:
    """All series but histograms' parts by name and labels (without the run's)."""
    body, content_type = exposition(view, accept)
    read = read_openmetrics if "openmetrics" in content_type else read_text
    found: Series = {}
    for family in read(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop(RUN_LABEL) == "3"
            key = (sample.name, frozenset(labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(found: Series, name: str, **labels: str) -> float:
    return found[f"tensorspark_{name}", frozenset(labels.items())]


def by_label(found: Series, name: str, label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for (each, labels), value in found.items() if each == f"tensorspark_{name}"}


def names_of(metric: Metric) -> set[str]:
    parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    return {metric.name + part for part in parts}


# What a scrape tells


def test_a_scrape_has_the_runs_numbers_at_two_moments() -> None:
    course = Course()
    for seconds in (0.0, 2.0):
        course.advance(seconds)
        found = series(course.view)
        assert value(found, "steps_total") == 500 + 400 * seconds
        assert value(found, "samples_total") == 200_000 + 4000 * seconds
        assert value(found, "progress_ratio") == pytest.approx(0.2 + 0.004 * seconds)
        assert by_label(found, "pushes_total", "result") == {
            "applied": 117 + 190 * seconds,
            "refused": 5 + 10 * seconds,
        }
        assert by_label(found, "log_lines_total", "level") == {
            "warning": 3 + 4 * seconds, "error": 3 + 2 * seconds, "critical": 0}  # fmt: skip
        assert value(found, "reconnects_total") == 3 + 50 * seconds
        assert value(found, "run_duration_seconds") == 100 + seconds


def test_every_metric_of_the_table_is_in_the_scrape_of_a_run_and_no_other() -> None:
    course = Course()
    course.advance(0.0)
    course.advance(1.0)
    assert {name for name, _ in series(course.view)} == {name for metric in METRICS for name in names_of(metric)}


def test_the_labels_of_a_series_are_those_of_the_table() -> None:
    labels = {name: set(metric.labels) for metric in METRICS for name in names_of(metric)}
    labels |= {"tensorspark_staleness_sum": set(), "tensorspark_staleness_count": set()}
    assert all({label for label, _ in own} == labels[name] for name, own in series(a_view()))


def test_openmetrics_is_sent_to_who_asks_for_it_and_says_the_same() -> None:
    view = a_view()
    _, content_type = exposition(view, f"{OPENMETRICS},text/plain;version=0.0.4;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert exposition(view, "*/*")[1].startswith("text/plain; version=0.0.4")
    # NaN equals nothing.
    assert {k: str(v) for k, v in series(view, OPENMETRICS).items()} == {k: str(v) for k, v in series(view).items()}


@pytest.mark.parametrize("view", [None, RunView()], ids=["no run", "nothing told yet"])
def test_before_a_run_there_are_names_and_no_series(view: RunView | None) -> None:
    families = list(read_text(exposition(view)[0].decode()))
    assert len(families) == len(METRICS)
    assert not [family.name for family in families if family.samples]


def test_workers_are_counted_by_state_and_those_who_never_came_are_pending() -> None:
    assert by_label(series(a_view()), "workers", "state") == {
        "pending": 1, "live": 1, "waiting": 1, "lost": 1, "finished": 1, "standby": 1}  # fmt: skip


def test_what_is_not_finite_is_nan_and_what_is_unknown_has_no_series() -> None:
    found = series(a_view())
    assert math.isnan(value(found, "scalar", scalar="gradient"))
    assert by_label(found, "update_norm", "tensor") == {"dense/kernel": 0.25}
    view = a_view()
    view.apply(replace(Course().sample(1.0), progress=None, epoch=None, staleness=()))
    names = {name for name, _ in series(view)}
    assert not names & {f"tensorspark_{name}" for name in ("progress_ratio", "eta_seconds", "epoch", "staleness_count")}


def test_the_time_left_is_what_the_pace_needs_for_the_rows_that_are_left() -> None:
    course = Course()
    course.advance(0.0)
    assert "tensorspark_eta_seconds" not in {name for name, _ in series(course.view)}
    course.advance(2.0)
    assert value(series(course.view), "eta_seconds") == pytest.approx((NUM_SAMPLES - 208_000) / 4000)
    course.view.apply(RunEnded(103.0, "stopped"))
    assert "tensorspark_eta_seconds" not in {name for name, _ in series(course.view)}


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_an_ended_run_has_one_outcome(outcome: str) -> None:
    view = a_view()
    assert set(by_label(series(view), "run_ended", "outcome").values()) == {0.0}
    view.apply(RunEnded(130.0, outcome))
    found = series(view)
    assert [each for each, is_so in by_label(found, "run_ended", "outcome").items() if is_so] == [outcome]
    assert value(found, "run_duration_seconds") == 130


def test_staleness_is_a_histogram_of_which_the_last_bin_has_no_bound() -> None:
    bins = [0] * 65
    bins[0], bins[2], bins[17], bins[63], bins[64] = 5, 3, 2, 4, 6
    counts, total = staleness_buckets(bins)
    at_most = dict(counts)
    assert [at_most[le] for le in ("0.0", "1.0", "2.0", "16.0", "20.0", "56.0", "63.0", "+Inf")] == [
        5, 5, 8, 8, 10, 10, 14, 20]  # fmt: skip
    assert total == 3 * 2 + 2 * 17 + 4 * 63 + 6 * 64
    assert dict(staleness_buckets([5, 2, 1]).counts) == {"0.0": 5, "1.0": 7, "+Inf": 8}


def test_names_of_any_kind_arrive_as_they_are() -> None:
    hostile = 'a "name",\n} \\ {run="9"} ünï'
    view = a_view()
    view.apply(WeightStats(51.0, 9, 300, (TensorStats(hostile, 2.0, 1.0),)))
    view.apply(replace(Course().began(), name=hostile))
    for accept in (None, OPENMETRICS):
        found = series(view, accept)
        assert by_label(found, "weight_norm", "tensor") == {hostile: 2.0}
        assert by_label(found, "run_info", "name") == {hostile: 1.0}


# Bounds


def of_many(num_partitions: int, num_tensors: int) -> RunView:
    course = Course()
    workers = tuple(
        course.worker(partition, "live", f"host-{partition}", 7, 2, 1, 0, 0, 0.5, 0.5, 1.0)
        for partition in range(num_partitions)
    )
    view = RunView([replace(course.began(), num_partitions=num_partitions), *course.once()])
    view.apply(replace(course.sample(1.0), workers=workers))
    view.apply(WeightStats(1.0, 1, 1, tuple(TensorStats(f"layer-{i}", 1.0, 0.1) for i in range(num_tensors))))
    return view


def test_runs_of_up_to_200_partitions_have_series_by_partition() -> None:
    steps = by_label(series(of_many(200, 1)), "worker_steps_total", "partition")
    assert steps == {str(partition): 7 for partition in range(200)}


@pytest.mark.parametrize("num_partitions", [201, 1000])
def test_runs_of_more_have_sums_only(num_partitions: int) -> None:
    found = series(of_many(num_partitions, 1))
    assert not [name for name, labels in found if "partition" in dict(labels)]
    assert value(found, "pushes_total", result="applied") == 2 * num_partitions
    assert value(found, "activity_seconds_total", activity="compute") == pytest.approx(30.5 * num_partitions)
    assert len(found) < 100


def test_the_first_100_tensors_have_series() -> None:
    found = series(of_many(1, 130))
    for name in ("weight_norm", "update_norm"):
        assert set(by_label(found, name, "tensor")) == {f"layer-{i}" for i in range(100)}


# The package


def test_without_the_client_library_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'tensorspark\[prometheus\]'") as caught:
        exposition(None)
    assert "\n" not in str(caught.value)


def test_the_client_library_is_loaded_by_the_first_scrape_only() -> None:
    code = (
        "import sys; from tensorspark.telemetry.prometheus import exposition\n"
        "loaded = lambda: 'prometheus_client' in sys.modules\n"
        "before = loaded(); exposition(None); print(before, loaded())"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["False", "True"]


def test_the_page_of_metrics_has_the_table() -> None:
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in METRICS
    ]
    assert [line for line in PAGE.splitlines() if line.startswith("| `tensorspark_")] == rows


# The dashboard


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def targets() -> list[tuple[str, str, str]]:
    """Title, reference and expression of everything that is asked."""
    return [(p["title"], target["refId"], target["expr"]) for p in panels() for target in p["targets"]]


def variables() -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in DASHBOARD["templating"]["list"]}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert cells
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_all_data_comes_from_the_source_that_the_user_chose() -> None:
    assert variables()["datasource"]["type"] == "datasource"
    asking = [*panels(), *(target for panel in panels() for target in panel["targets"])]
    asking += [each for name, each in variables().items() if name != "datasource"]
    assert all(each["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for each in asking)
    assert json.dumps(DASHBOARD).count('"uid": "${datasource}"') == len(asking)


def test_panels_say_what_they_show() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    assert all(panel["description"].endswith(".") for panel in panels())


def test_the_dashboard_asks_for_every_metric_and_for_none_that_is_not_there() -> None:
    asked = set(re.findall(r"tensorspark_\w+", " ".join(expression for _, _, expression in targets())))
    known = {name: metric.name for metric in METRICS for name in names_of(metric)}
    assert asked <= set(known)
    assert {known[name] for name in asked} == {metric.name for metric in METRICS}
    asked_by_variables = re.findall(r"tensorspark_\w+", " ".join(str(each["query"]) for each in variables().values()))
    assert set(asked_by_variables) == {"tensorspark_run_info"}


# A real Prometheus server


@pytest.fixture(scope="module")
def course() -> Course:
    return Course()


@pytest.fixture(scope="module")
def prometheus(course: Course, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """Has scraped the course for as long as rates are taken over; each scrape moves the course on."""
    require_binaries()

    def page(accept: str | None) -> tuple[bytes, str]:
        course.advance(course.seconds())
        return exposition(course.view, accept)

    with scraping(page, tmp_path_factory.mktemp("prometheus")) as server:
        enough = RATE_INTERVAL_S / SCRAPE_INTERVAL_S - 1
        counted = f"count_over_time(tensorspark_steps_total[{RATE_INTERVAL_S * 1000:.0f}ms]) >= {enough:.0f}"
        wait_until("scraped often enough", lambda: bool(server.query(counted)), server.last_error)
        yield server


def substituted(expression: str, values: dict[str, str]) -> str:
    """As Grafana does with variables that have one value each."""
    values = {**values, "__rate_interval": f"{RATE_INTERVAL_S * 1000:.0f}ms"}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


@pytest.fixture(scope="module")
def chosen(prometheus: PrometheusServer) -> dict[str, str]:
    """The variables' values, each the first of what its query finds with those before it."""
    values: dict[str, str] = {}
    for name, variable in variables().items():
        if variable["type"] == "query":
            query = substituted(variable["query"]["query"], values)
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()  # type: ignore[union-attr]
            values[name] = prometheus.get(f"label/{label}/values", **{"match[]": metric})[0]
    return values


def about(number: float) -> Any:
    """Of a rate: the server's scrapes come late when the machine is busy."""
    return pytest.approx(number, rel=0.25)


def per_interval(per_s: float) -> Any:
    """Of an increase in whole numbers, one more or less."""
    return pytest.approx(per_s * RATE_INTERVAL_S, rel=0.25, abs=1.5)


HOSTS = {"0": "host-a", "1": "host-b", "2": "host-b", "3": "host-a"}


def on_hosts(values: dict[str, Any]) -> dict[str, Any]:
    return {f"host={HOSTS[partition]} partition={partition}": number for partition, number in values.items()}


def staleness_in_interval() -> dict[str, Any]:
    bounds = [le for le, _ in staleness_buckets([0] * 65).counts]
    rates = {le: sum(rate for age, rate in STALENESS_PER_S.items() if age <= float(le)) for le in bounds}
    return {f"le={'+Inf' if le == '+Inf' else f'{float(le):.1f}'}": per_interval(rate) for le, rate in rates.items()}


# What each expression must answer: by the labels that are left, without those that all have. A function is given the
# seconds since the course began.
EXPECTED: dict[tuple[str, str], Any] = {
    ("State", "A"): {"": 0},
    ("Progress", "A"): lambda now: {"": about(0.2 + 0.004 * now)},
    ("Time left", "A"): lambda now: {"": pytest.approx(200 - now, abs=2)},
    ("Duration", "A"): lambda now: {"": pytest.approx(AGE_S + now, abs=2)},
    ("Epoch", "A"): {"": 3},
    ("Epoch", "B"): {"": 10},
    ("Rows a second", "A"): {"": about(4000)},
    ("Partitions", "A"): {"": 5},
    ("Model", "A"): {"": 80},
    ("Run", "A"): {
        "app_id=app-7 combiner=MeanDeltaCombiner mode=stale-synchronous (2) name=digits version=2.0.0": 1},
    ("Began", "A"): lambda now: {"": pytest.approx((time.time() - now - AGE_S) * 1000, abs=1000)},
    ("Loss and metrics", "A"): {
        "scalar=loss": 0.375, "scalar=accuracy": 0.9, "scalar=gradient": pytest.approx(math.nan, nan_ok=True)},
    ("Metrics of epochs", "A"): {"scalar=loss": 0.5, "scalar=val_loss": 0.625},
    ("Throughput", "A"): {"": about(4000)},
    ("Throughput", "B"): {"": about(400)},
    ("Pushes and publications", "A"): {"result=applied": about(190), "result=refused": about(10)},
    ("Pushes and publications", "B"): {"": about(200)},
    ("Staleness", "A"): staleness_in_interval(),
    # Of 20 pushes 8 have no staleness and 8 have one: the 10th lies a quarter into the bucket from 0 to 1.
    ("Staleness: quantiles and mean", "A"): {"": pytest.approx(0.25, abs=0.1)},
    ("Staleness: quantiles and mean", "B"): {"": pytest.approx(2.75, abs=0.1)},
    ("Staleness: quantiles and mean", "C"): {"": pytest.approx(2.95, abs=0.1)},
    ("Staleness: quantiles and mean", "D"): {"": pytest.approx(1.0, abs=0.1)},
    ("Workers by state", "A"): {
        f"state={state}": 1 for state in ("pending", "live", "waiting", "lost", "finished", "standby")},
    ("What workers' time goes into", "A"): {
        "activity=compute": pytest.approx(0.45), "activity=wait": pytest.approx(0.55), "activity=pull": 0,
        "activity=push": 0, "activity=evaluate": 0, "activity=standby": 0},
    ("Share of time in steps, by worker", "A"): {
        "activity=compute " + key: number for key, number in on_hosts(
            {"0": about(0.6), "1": about(0.3), "2": 0, "3": 0}).items()},
    ("Steps a second, by worker", "A"): on_hosts({"0": about(250), "1": about(150), "2": 0, "3": 0}),
    ("Lag by worker", "A"): on_hosts({"0": 0, "1": 2, "2": 7, "3": 0}),
    ("Reconnects", "A"): {"": per_interval(50)},
    ("Weights on the wire", "A"): {"": about(50_000)},
    ("Weights on the wire", "B"): {"": about(80_000)},
    ("Compression", "A"): {"": pytest.approx(4, rel=0.01)},
    ("Compression", "B"): {"": pytest.approx(2, rel=0.01)},
    ("Norms of weights", "A"): {"tensor=dense/kernel": 12.5, "tensor=dense/bias": 0.5},
    ("Norms of updates", "A"): {"tensor=dense/kernel": 0.25},
    ("Updates relative to weights", "A"): {"tensor=dense/kernel": 0.02},
    ("Checkpoints", "A"): {"": 2},
    ("Newest checkpoint", "A"): lambda now: {"": pytest.approx(AGE_S - 40 + now, abs=2)},
    ("Size of a checkpoint", "A"): {"": 600},
    ("Duration of checkpoints", "A"): {"": 0.75},
    ("Executors' log lines", "A"): {
        "level=warning": per_interval(4), "level=error": per_interval(2), "level=critical": 0},
}  # fmt: skip


@pytest.mark.prometheus
@pytest.mark.parametrize(("title", "ref", "expression"), targets(), ids=[f"{t} {ref}" for t, ref, _ in targets()])
def test_an_expression_of_the_dashboard_finds_what_the_run_did(
    title: str, ref: str, expression: str, prometheus: PrometheusServer, chosen: dict[str, str], course: Course
) -> None:
    expected = EXPECTED[title, ref]
    found = {}
    for each in prometheus.query(substituted(expression, chosen)):
        common = {"__name__", "job", "instance", "run"}
        labels = sorted(f"{label}={text}" for label, text in each["metric"].items() if label not in common)
        found[" ".join(labels)] = float(each["value"][1])
    assert found == (expected(course.seconds()) if callable(expected) else expected)


@pytest.mark.prometheus
def test_the_dashboards_variables_choose_the_run(prometheus: PrometheusServer, chosen: dict[str, str]) -> None:
    assert chosen == {"name": "digits", "instance": prometheus.target, "run": "3"}


def alerts() -> dict[str, str]:
    """What the page of metrics proposes: expressions by what happened."""
    return dict(re.findall(r"^\| (\w[^|]*) \| `([^`]+)` \|$", PAGE.partition("## Alerts")[2], re.MULTILINE))


@pytest.mark.prometheus
def test_of_the_pages_alerts_that_of_a_lost_worker_fires(prometheus: PrometheusServer) -> None:
    assert len(alerts()) == PAGE.partition("## Alerts")[2].count("| `") == 5
    firing = [what for what, expression in alerts().items() if prometheus.query(expression)]
    assert firing == ["partitions have had no worker for two minutes"]


@pytest.mark.prometheus
@pytest.mark.parametrize("what", alerts())
def test_each_of_the_pages_alerts_fires_where_the_run_is_beyond_its_bound(
    what: str, prometheus: PrometheusServer
) -> None:
    expression = alerts()[what]
    # This run trains, has had a checkpoint lately, has not ended, and has another scalar that is not finite.
    for bound, other in (("[5m]) == 0", "[5m]) > 0"), ("> 600", "> 6"), ("} == 1", "} == 0"), ('"loss"', '"gradient"')):
        expression = expression.replace(bound, other)
    assert prometheus.query(expression)


@pytest.mark.prometheus
def test_the_pages_join_has_the_sessions_name(prometheus: PrometheusServer) -> None:
    (join,) = re.findall(r"```text\n(.+)\n```", PAGE)
    (found,) = prometheus.query(join)
    assert found["metric"]["name"] == "digits"


@pytest.mark.prometheus
def test_a_token_that_is_written_to_the_file_later_is_taken_without_a_restart(prometheus: PrometheusServer) -> None:
    assert "401" in prometheus.refusal
    assert prometheus.is_up()
    assert all(accept is not None and "openmetrics" in accept for accept in prometheus.accepted)


@pytest.mark.prometheus
@pytest.mark.parametrize("view", [None, a_view(), of_many(200, 100)], ids=["no run", "a run", "a large run"])
def test_promtool_has_no_complaint_about_a_scrape(view: RunView | None) -> None:
    require_binaries()
    body, _ = exposition(view)
    result = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, timeout=30, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.prometheus
def test_promtool_has_no_complaint_about_the_example_configuration(tmp_path: Path) -> None:
    require_binaries()
    (tmp_path / "token").write_text("secret")
    (tmp_path / "prometheus.yml").write_text(derived_config("driver.example.com:10081", tmp_path / "token"))
    checks = (["--syntax-only", "conf/prometheus.yml"], [str(tmp_path / "prometheus.yml")])
    for arguments in checks:
        command = ["promtool", "check", "config", *arguments]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert "SUCCESS" in result.stdout
