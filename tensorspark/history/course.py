"""What happened in a run: `History`, which `SparkSession.run` and `fit` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.history import frames, notebook, plots, text
from tensorspark.history.reports import Point, WorkerReport


@dataclass(frozen=True, repr=False)
class History:
    """What a run did.

    Its repr is a summary of a few lines, and in a notebook a table. `plot` draws its curves, `to_pandas` and its kin
    give its numbers as DataFrames.

    Attributes:
        name: the session's name.
        num_steps: local steps, over all workers.
        num_samples: rows trained on, over all workers and epochs.
        seconds: from the start of the Spark job to its end.
        seed: of the shuffles: with it the same batches come again.
        points: the run's course, at most 2,000 points; a longer run's neighbours are merged.
        workers: one report a partition.
        history: of `SparkSession.fit`: each metric's values by epoch, as `keras.callbacks.History` has them; metrics of
            held-out rows begin with ``val_``. Those of training are over the epoch's steps of all workers, by samples.
        epoch: the epochs' numbers, from 0.
        dashboard_url: of the run's page, its token included; None where there was none. The repr leaves the token out,
            the notebook's table links to the whole URL.
        log_dir: where the run's TensorBoard event files are; None where none were asked for.
        trace: URL of the run's trace file; None where none was asked for.
        mode: who waited for whom: ``bulk-synchronous``, ``stale-synchronous`` or ``asynchronous``; empty: not said.

    Example:
        >>> from tensorspark import History, Point, WorkerReport
        >>> points = (Point(1.0, 100, 3_200, {"loss": 2.25}), Point(2.0, 200, 6_400, {"loss": 0.5}))
        >>> worker = WorkerReport(0, "node-1", num_steps=200, num_bytes_pushed=814_080, num_bytes_pulled=407_040)
        >>> history = History("mnist", 200, 6_400, 2.0, seed=7, points=points, workers=(worker,), mode="asynchronous")
        >>> history
        History of mnist, asynchronous, seed 7
          trained    200 steps, 6,400 samples in 2.0 s: 3,200 samples/s
          at the end loss 0.5
          workers    1 partition on 1 host
          traffic    814.1 kB pushed, 407.0 kB pulled
        >>> history.scalars["loss"].tolist()
        [2.25, 0.5]
    """

    name: str
    num_steps: int
    num_samples: int
    seconds: float
    seed: int
    points: tuple[Point, ...]
    workers: tuple[WorkerReport, ...]
    history: Mapping[str, list[Any]] = field(default_factory=dict)
    epoch: tuple[int, ...] = ()
    dashboard_url: str | None = None
    log_dir: str | None = None
    trace: str | None = None
    mode: str = ""

    @property
    def samples_per_s(self) -> float:
        """Rows trained on in a second, start-up of the workers included."""
        return self.num_samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def scalars(self) -> dict[str, NDArray[np.float64]]:
        """The fetched scalars, one `[len(points)] float64` a fetch; NaN where a point has no value."""
        names = dict.fromkeys(name for point in self.points for name in point.scalars)
        return {name: np.array([point.scalars.get(name, np.nan) for point in self.points]) for name in names}

    @property
    def steps(self) -> NDArray[np.int64]:
        """The points' steps, `[len(points)] int64`: the x axis to `scalars`."""
        return np.array([point.num_steps for point in self.points], np.int64)

    def __repr__(self) -> str:
        return text.summary(self)

    def _repr_html_(self) -> str:
        return notebook.summary(self)

    def to_pandas(self) -> Any:
        """The run's course as a `pandas.DataFrame`, one row a point.

        Columns: ``seconds`` (float64), ``num_steps`` and ``num_samples`` (int64), then each scalar (float64, NaN where
        a point has no value). A scalar of one of the first three names is in ``scalars.`` and that name.

        Example:
            >>> from tensorspark import History, Point
            >>> points = (Point(1.5, 100, 3_200, {"loss": 2.25}), Point(2.0, 200, 6_400, {"loss": 0.5}))
            >>> History("mnist", 200, 6_400, 2.0, seed=7, points=points, workers=()).to_pandas()
               seconds  num_steps  num_samples  loss
            0      1.5        100         3200  2.25
            1      2.0        200         6400  0.50

        Raises:
            ConfigError: pandas is not installed.
        """
        return frames.of_points(self)

    def workers_to_pandas(self) -> Any:
        """The workers' reports as a `pandas.DataFrame`: one row a partition, by which it is indexed, and one column for
        each other attribute of `WorkerReport`; durations in seconds, sizes in bytes.

        Example:
            >>> from tensorspark import History, WorkerReport
            >>> workers = (WorkerReport(0, "node-1", num_steps=120), WorkerReport(1, "node-2", num_steps=80))
            >>> frame = History("mnist", 200, 6_400, 2.0, seed=7, points=(), workers=workers).workers_to_pandas()
            >>> frame["num_steps"].to_dict()
            {0: 120, 1: 80}

        Raises:
            ConfigError: pandas is not installed.
        """
        return frames.of_workers(self)

    def epochs_to_pandas(self) -> Any:
        """The metrics of `SparkSession.fit` as a `pandas.DataFrame`: one row an epoch, by whose number (from 0) it is
        indexed, and one column a metric. Empty after `SparkSession.run`, which has no epochs' ends.

        Raises:
            ConfigError: pandas is not installed.
        """
        return frames.of_epochs(self)

    def plot(self, metrics: str | Sequence[str] | None = None, *, x: plots.X = "steps", ax: Any = None) -> Any:
        """Draws metrics over the run with matplotlib, one below the other; does not call ``show``.

        The course of training is a line; epochs' means, which `fit` has, are dots where the epochs end. The ``val_``
        metrics are in the axes of the metric that they belong to.

        Args:
            metrics: names without ``val_``, of `scalars` or `history`; None draws all.
            x: ``"steps"`` (local steps of all workers), ``"seconds"`` or ``"samples"``.
            ax: matplotlib `Axes` to draw on, as many as metrics; one for one, or a sequence of them. None makes a
                figure with pyplot, which notebooks display by themselves.

        Returns:
            The `Axes` of a single metric, or an array of them, `[len(metrics)] object`.

        Example:
            >>> from matplotlib.figure import Figure
            >>> from tensorspark import History, Point
            >>> points = (Point(1.0, 100, 3_200, {"loss": 2.25}), Point(2.0, 200, 6_400, {"loss": 0.5}))
            >>> history = History("mnist", 200, 6_400, 2.0, seed=7, points=points, workers=())
            >>> axes = history.plot("loss", x="seconds", ax=Figure().subplots())
            >>> axes.get_xlabel()
            'time since the start (s)'

        Raises:
            ConfigError: matplotlib is not installed; a metric or an `x` that there is not (the message lists those that
                there are); more or fewer `ax` than metrics; a run without points.
        """
        return plots.plot(self, metrics, x=x, ax=ax)
