"""tensorspark next to elephas and to plain `model.fit`: the same model, rows, epochs and cores.

The model is 784-128-10, trained with SGD 0.1 in batches of 64 on MNIST (``MNIST_DATA_DIR``). Contenders are, each by
its name alone with ``--only``:

fit-1, fit-2
    `model.fit` in one process, with so many TensorFlow threads.
elephas-http-epoch, elephas-http-batch, elephas-socket-epoch, elephas-socket-batch, elephas-sync
    elephas with two Spark workers of one thread each: asynchronous, over its HTTP or socket server, exchanging weights
    each epoch or each batch; and synchronous. It runs in an environment of its own (`benchmarks.peers.environment`).
    Its socket server keeps a thread busy for each exchange that there ever was, so that it gets slower and slower:
    there batches are of 640 rows only, and accuracy is not told.
ours-S-I
    `SparkSession.fit` with two Spark workers of one thread each; S is the staleness, 0, 4 or async, and I the
    sync_interval: 1, 16, 100, or epoch for one synchronization in an epoch.

Each training is a program that begins anew. **Start-up is left out**: samples/s are each worker's rows from the end of
its first epoch to the end of its last, divided by that time, and added up. So Spark's start, TensorFlow's import, the
compilation of the step, the first reading of rows and the first exchange are in no figure; all that happens between
epochs is. Seconds to 97 % are the epochs that the test accuracy takes to reach it (between two ends of epochs on a
straight line), at that rate. Of elephas, exchanges are timed by a client around its own. Test accuracy is computed from
the server's weights at the ends of epochs. Bytes are those of the weights that workers and server exchange, in both
directions, without headers. Memory is anonymous memory of all processes, JVM included.

Contenders run in turns in each round: figures are medians over the rounds, ratios the medians of the rounds' ratios. On
a machine with other work only the ratios mean something.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.report import Report, argument_parser, say
from benchmarks.peers.contenders import CONTENDERS, QUICK, Contender
from benchmarks.peers.environment import EnvironmentFailedError, default_directory, elephas_python
from benchmarks.peers.figures import Rounds, add_rows
from benchmarks.peers.training import Trained, TrainingFailedError, train
from benchmarks.workloads import digits

_BATCH_SIZE = 64
_NUM_EPOCHS, _NUM_QUICK_EPOCHS = 10, 2
_NUM_ROUNDS = 3
_DEADLINE_S = 280.0
_FAILED = 2
_PACKAGES = ("numpy", "tornado", "tensorflow", "keras", "pyspark")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="measure only these")
    parser.add_argument("--rounds", type=int, help=f"default: {_NUM_ROUNDS}; 1 with --quick")
    parser.add_argument("--epochs", type=int, help=f"default: {_NUM_EPOCHS}; {_NUM_QUICK_EPOCHS} with --quick")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="of elephas; default: in the user's cache")
    parsed = parser.parse_args(arguments)
    chosen = parsed.only or list(QUICK if parsed.quick else CONTENDERS)
    num_rounds = parsed.rounds or (1 if parsed.quick else _NUM_ROUNDS)
    num_epochs = parsed.epochs or (_NUM_QUICK_EPOCHS if parsed.quick else _NUM_EPOCHS)
    rows = digits.find()
    rounds = Rounds(rows.test())
    failure = ""
    try:
        # What is asked to end tells what it has, and ends the training that runs.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _measure(rounds, chosen, num_rounds, num_epochs, parsed.environment)
    except KeyboardInterrupt:
        failure = "interrupted"
    except (EnvironmentFailedError, TrainingFailedError) as error:
        failure = str(error)
    if failure:
        print(f"error: {failure}\nFigures are of the rounds that were finished.", file=sys.stderr)
        rounds.keep_whole()
    report = Report(f"Peers: 784-128-10, SGD 0.1, batches of 64, {num_epochs} epochs of {rows}", _PACKAGES)
    if not rounds.trained:
        return _FAILED
    add_rows(report, rounds)
    status = report.conclude(parsed.json, parsed.out)
    return _FAILED if failure else status


def _measure(rounds: Rounds, chosen: Sequence[str], num_rounds: int, num_epochs: int, environment: Path | None) -> None:
    python: Path | None = None
    if any(CONTENDERS[name].is_elephas for name in chosen):
        python = elephas_python(environment or default_directory())
    for index in range(num_rounds):
        for name in chosen:
            say(f"round {index + 1} of {num_rounds}: {name}")
            rounds.add(name, _train(CONTENDERS[name], num_epochs, index + 1, python))


def _train(contender: Contender, num_epochs: int, seed: int, python: Path | None) -> Trained:
    arguments = [*contender.arguments, "--epochs", str(num_epochs), "--batch-size", str(_BATCH_SIZE)]
    return train(
        contender.module,
        [*arguments, "--seed", str(seed)],
        python=python if contender.is_elephas else None,
        deadline_s=_DEADLINE_S,
    )


if __name__ == "__main__":
    sys.exit(main())
