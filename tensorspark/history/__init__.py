"""What happened in a run: `History`, and the `Recorder` that builds its course."""

from tensorspark.history.course import History
from tensorspark.history.recorder import PointSums, Recorder, RecorderState
from tensorspark.history.reports import Point, WorkerReport

__all__ = ["History", "Point", "PointSums", "Recorder", "RecorderState", "WorkerReport"]
