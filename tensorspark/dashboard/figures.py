"""The page's figures, as one Bokeh document without data: the page's scripts fill its sources, which they know by name.

Colours, the ranges of time and how numbers are written are the page's: they follow the reader's preferences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorspark.telemetry.records import Activity

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource, Range1d

# A figure's name, the element that it is drawn in, and its height in pixels.
HEIGHTS = {
    "loss": 290,
    "metrics": 290,
    "throughput": 220,
    "staleness": 220,
    "parallelism": 220,
    "timeline": 260,
    "shares": 260,
    "weight-norm": 200,
    "update-norm": 200,
    "values": 200,
    "updates": 200,
    "bytes": 240,
}
# Colours alone do not tell activities apart for everybody. The style sheet's legend has the same patterns.
PATTERNS = {
    Activity.COMPUTE: "blank",
    Activity.PULL: "vertical_line",
    Activity.PUSH: "horizontal_line",
    Activity.WAIT: "right_diagonal_line",
    Activity.EVALUATE: "dot",
    Activity.STANDBY: "cross",
}
_LINE = 2.2


def document() -> str:
    """The document as JSON, and in which element each of its roots goes.

    Returns:
        ``{"document": ..., "roots": {root: element}, "root_ids": [root]}``, as ``Bokeh.embed.embed_items`` takes them.
    """
    from bokeh.core.json_encoder import serialize_json
    from bokeh.document import Document

    made = {
        "loss": _curves("loss"),
        "metrics": _curves("metrics"),
        "throughput": _paces("throughput", {"samples_per_s": "series-1"}, "samples/s", fill=True),
        "parallelism": _paces("parallelism", {"num_live": "series-3", "num_waiting": "waiting"}, "workers"),
        "bytes": _paces("bytes", {"pulled_bytes_per_s": "series-1", "pushed_bytes_per_s": "series-2"}, "bytes/s"),
        "staleness": _staleness(),
        "timeline": _timeline(),
        "shares": _shares(),
        "weight-norm": _norms("weight-norm"),
        "update-norm": _norms("update-norm"),
        "values": _histogram("values"),
        "updates": _histogram("updates"),
    }
    bokeh_document = Document()
    for plot in made.values():
        bokeh_document.add_root(plot)
    roots = {plot.id: f"plot-{name}" for name, plot in made.items()}
    return serialize_json({"document": bokeh_document.to_json(deferred=False), "roots": roots, "root_ids": list(roots)})


# Bokeh's annotations know figures without what they take by keyword: the figures are Any here.
def _figure(name: str, y_label: str, x_label: str = "", **options: Any) -> Any:
    from bokeh.models import BoxZoomTool, ResetTool
    from bokeh.plotting import figure

    plot: Any = figure(
        name=name,
        height=HEIGHTS[name],
        sizing_mode="stretch_width",
        min_border=4,
        min_border_left=56,
        min_border_right=14,
        toolbar_location=None,
        tools=[BoxZoomTool(), ResetTool()],
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        x_axis_label=x_label,
        y_axis_label=y_label,
        **options,
    )
    plot.toolbar.active_drag = None
    plot.axis.axis_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.major_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.xgrid.grid_line_color = None
    plot.yaxis.ticker.desired_num_ticks = 5
    return plot


def _source(name: str, *columns: str) -> ColumnDataSource:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(name=name, data={column: [] for column in columns})


def _hover(plot: Any, name: str, renderers: list[Any], **options: Any) -> None:
    """What is shown under the pointer is for the page's scripts to say, by the tool's name."""
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(name=name, renderers=renderers, tooltips=None, show_arrow=False, **options))


def _curves(name: str) -> Any:
    """Of training a line a metric, of held-out rows a dot an epoch, joined by a dashed line."""
    plot = _figure(name, "loss" if name == "loss" else "metric", "steps")
    training = plot.multi_line(
        "xs",
        "ys",
        color="color",
        line_width=_LINE,
        line_alpha="alpha",
        line_join="round",
        source=_source(f"{name}-training", "xs", "ys", "color", "alpha", "label", "seconds", "steps"),
    )
    plot.multi_line(
        "xs",
        "ys",
        color="color",
        line_width=1.4,
        line_dash=[5, 4],
        source=_source(f"{name}-epochs", "xs", "ys", "color", "label"),
    )
    dots = plot.scatter(
        "x",
        "y",
        color="color",
        marker="marker",
        size=8,
        source=_source(f"{name}-dots", "x", "y", "color", "marker", "label", "epoch", "seconds", "steps"),
    )
    _hover(plot, "epoch", [dots])
    _hover(plot, "training", [training], line_policy="nearest")
    return plot


def _paces(name: str, columns: dict[str, str], unit: str, *, fill: bool = False) -> Any:
    """Rates over time."""
    plot = _figure(name, unit, "time")
    plot.y_range.start = 0
    source = _source(f"{name}-paces", "x", *columns)
    for column, color in columns.items():
        if fill:
            plot.varea(x="x", y1=0, y2=column, fill_alpha=0.13, source=source, tags=[color])
        line = plot.line("x", column, line_width=_LINE, line_join="round", source=source, tags=[color])
    _hover(plot, "pace", [line], mode="vline", limit=1)
    return plot


def _staleness() -> Any:
    plot = _figure("staleness", "share of pushes", "versions behind", x_range=_range(-0.6, 4.6))
    plot.y_range.start = 0
    bars = plot.vbar(
        x="bin",
        top="share",
        width=0.78,
        source=_source("staleness-bars", "bin", "share", "count"),
        line_color=None,
        tags=["series-1"],
    )
    _hover(plot, "staleness", [bars])
    return plot


def _range(start: float, end: float) -> Range1d:
    from bokeh.models import Range1d

    return Range1d(start=start, end=end)


def _rows(plot: Any) -> None:
    """A row a partition; the first on top. The page says which."""
    from bokeh.models import FixedTicker

    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.ygrid.grid_line_color = None
    plot.xgrid.grid_line_color = "gray"


def _timeline() -> Any:
    plot = _figure("timeline", "partition", "time", x_range=_range(0, 30), y_range=_range(5.5, -0.5))
    _rows(plot)
    bars = _activities(plot, "left", "right", "row", "height", "index")
    plot.segment("x", "y0", "x", "y1", line_width=1.2, source=_source("timeline-waits", "x", "y0", "y1"), tags=["text"])
    plot.scatter(
        "x",
        "row",
        size=7,
        source=_source("timeline-releases", "x", "row"),
        tags=["text"],
    )
    events = plot.scatter(
        "x",
        "row",
        marker="marker",
        size=14,
        color="color",
        line_width=3,
        source=_source("timeline-events", "x", "row", "marker", "color", "index"),
    )
    _hover(plot, "event", [events])
    _hover(plot, "span", bars)
    return plot


def _activities(plot: Any, *columns: str) -> list[Any]:
    """Bars of each activity, in a colour and a pattern of its own.

    Each has a renderer of its own: where patterns are a column, Bokeh makes a canvas for every single bar.
    """
    return [
        plot.hbar(
            y="row",
            left="left",
            right="right",
            height="height",
            hatch_pattern=pattern,
            hatch_alpha=0.55,
            hatch_scale=7,
            hatch_weight=1.2,
            line_color=None,
            source=_source(f"{plot.name}-{activity}", *columns),
            tags=[f"activity-{activity}"],
        )
        for activity, pattern in PATTERNS.items()
    ]


def _shares() -> Any:
    plot = _figure("shares", "", "share of time", x_range=_range(0, 1), y_range=_range(5.5, -0.5))
    _rows(plot)
    bars = _activities(plot, "left", "right", "row", "height", "seconds")
    _hover(plot, "share", bars)
    return plot


def _norms(name: str) -> Any:
    plot = _figure(name, "norm", "steps")
    source = _source(f"{name}-line", "x", "y", "steps", "seconds")
    line = plot.line("x", "y", line_width=_LINE, line_join="round", source=source, tags=["series-1"])
    plot.scatter("x", "y", size=4, source=source, tags=["series-1"])
    _hover(plot, "norm", [line], mode="vline", limit=1)
    return plot


def _histogram(name: str) -> Any:
    plot = _figure(name, "count", "value" if name == "values" else "change")
    plot.y_range.start = 0
    color = "series-1" if name == "values" else "series-2"
    source = _source(f"{name}-bins", "left", "right", "top")
    bars = plot.quad(
        left="left", right="right", top="top", bottom=0, source=source, line_width=0.6, tags=[color, "outlined"]
    )
    _hover(plot, "bin", [bars])
    return plot
