"""The command line: ``python -m tensorspark``, or ``tensorspark`` where the package is installed.

Results go to stdout, one line each; everything else goes to stderr. This is the only room that writes for people.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import tensorspark
from tensorspark.cli import dashboard, doctor
from tensorspark.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UsageError
from tensorspark.errors import TensorsparkError

_DESCRIPTION = """\
Trains TensorFlow models on Spark executors, kept in step by a parameter server on the driver. Training is done from a
program or a shell (see the documentation's first page); these commands help before and after:"""
_EPILOG = """\
examples:

  tensorspark doctor --master 'local[2]'
  tensorspark dashboard --replay hdfs://namenode:8020/logs/mnist-20261121-104500-1a2b3c-1

`tensorspark COMMAND --help` says more of each. `python -m tensorspark` is the same program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: without the program's name; None takes the process's.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except UsageError as error:
        sys.stderr.write(f"tensorspark {options.command}: {error}\n")
        return EXIT_USAGE
    except TensorsparkError as error:
        sys.stderr.write(f"tensorspark {options.command}: {error}\n")
        return EXIT_FAILED
    except (KeyboardInterrupt, Exception) as error:
        if not _was_interrupted(error):
            raise
        sys.stderr.write(f"tensorspark {options.command}: interrupted\n")
        return EXIT_INTERRUPTED


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: in the middle of a call to Spark, py4j makes an error of its own of that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tensorspark",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tensorspark {tensorspark.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor.add_parser(commands)
    dashboard.add_parser(commands)
    return parser
