"""``tensorspark dashboard``: the page of a run that is over, from the files that it has written."""

from __future__ import annotations

import argparse
import secrets
from typing import Any

from tensorspark.cli.output import EXIT_OK, say

_DESCRIPTION = """\
Shows a run that is over as its live page did: loss and metrics, throughput, staleness, who waited for whom, workers,
weights, checkpoints and configuration. It reads the files that the run has written to its directory under `log_dir`
(spark.tensorspark.log.dir), on any filesystem; `History.log_dir` names that directory, and so does the run's page.

A run that goes on has its live page already: training prints its URL when it begins."""
_EPILOG = """\
examples:

  tensorspark dashboard --replay /tmp/logs/mnist-20261121-104500-1a2b3c-1
  tensorspark dashboard --replay hdfs://namenode:8020/logs/mnist-20261121-104500-1a2b3c-1 --port 8787

Open the URL that it prints, token included; Ctrl-C ends it. It listens on this machine alone: from another one, forward
the port (ssh -L 8787:127.0.0.1:8787 HOST)."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of a parser."""
    parser = commands.add_parser(
        "dashboard",
        help="show the page of a run that is over",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replay", metavar="RUN_DIR", required=True, help="the run's directory, a path or a URL")
    parser.add_argument("--port", type=_as_port, default=8787, help="where to listen; the next free port where it is "
                        "taken; 0: any (default: %(default)s)")  # fmt: skip
    parser.add_argument("--user", default="", help="who to read HDFS as; default: HADOOP_USER_NAME, or who you are")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads the run, and serves its page until interrupted.

    Raises:
        ConfigError: the directory holds no run, or the dashboard is not installed.
        StagingError: it cannot be read.
    """
    from tensorspark.dashboard.replay import serve
    from tensorspark.errors import ConfigError
    from tensorspark.telemetry.files import read_run
    from tensorspark.telemetry.records import RunEnded
    from tensorspark.telemetry.view import RunView

    view = RunView(read_run(options.replay, user=options.user))
    if view.began is None:
        raise ConfigError(
            f"{options.replay} has a run's file, but no run in it: nothing was written, or its begin is lost"
        )
    if view.ended is None:
        seconds = view.sample.seconds if view.sample is not None else view.began.seconds
        view.apply(RunEnded(seconds, "unfinished", "its files end here: it goes on still, or its driver was killed"))
    serve(view, options.port, on_ready=say, token=secrets.token_urlsafe(16))
    return EXIT_OK


def _as_port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return port
