"""Spark's Python daemon with TensorFlow loaded: ``spark.python.daemon.module tensorspark.daemon``.

Spark's own daemon forks a Python worker for each slot, and every worker that trains imports TensorFlow itself: seconds
of processor time and half a gigabyte each. This one imports it first, so its workers have it from their first line, in
memory that they share with the daemon. Everything else is done by the daemon of the pyspark that is installed.

It only imports. TensorFlow's threads and devices do not survive a fork: a worker forked after the first operation waits
for threads that it does not have. `require_forkable` looks for that, and whatever stands in the way, Spark's own daemon
runs instead; one line on stderr says why. See ``docs/startup.md``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator

from tensorspark.errors import ConfigError

PRELOADED = (
    "numpy",
    "pyspark.worker",
    "tensorspark.worker",
    "tensorspark.trainers.keras",
    "tensorspark.trainers.function",
    "tensorspark.trainers.graph",
)
"""Without these there is nothing to gain: Spark's own daemon runs. The trainers import TensorFlow and Keras."""

PRELOADED_WHERE_INSTALLED = (
    "pandas",
    "pyarrow",
    "tensorspark.data.arrow",
    "tensorspark.driver.probe",
    "tensorspark.driver.training",
)
"""What tasks import too, where it is there."""

_SPARKS_OWN = "pyspark.daemon"
_STDOUT, _STDERR = 1, 2


def main() -> None:
    """Runs the daemon until Spark ends it; never returns."""
    try:
        preload()
        require_forkable()
    # Whatever a broken installation raises, jobs without TensorFlow must run.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"tensorspark.daemon: Python workers start without TensorFlow: {reason}\n")
        sys.stderr.flush()
        _become_sparks_own()
    from pyspark.daemon import manager

    manager()


def preload() -> None:
    """Imports what workers need, for them to share.

    Raises:
        ImportError: TensorFlow, Keras, or something else of `PRELOADED` is not installed. An import may raise anything.
    """
    gc.disable()  # an import makes a million objects and no garbage
    try:
        with _stdout_kept_clean():
            for name in PRELOADED:
                importlib.import_module(name)
            for name in PRELOADED_WHERE_INSTALLED:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        import numpy as np

        # Python's own random numbers do so too. Otherwise all workers would draw the same ones.
        os.register_at_fork(after_in_child=np.random.seed)
        # Workers collect garbage after every task. It would write to each of these objects, and so copy their memory.
        gc.freeze()
    finally:
        gc.enable()


def require_forkable() -> None:
    """Checks that a fork of this process can use TensorFlow.

    Raises:
        ConfigError: TensorFlow has run an operation or looked for devices, or a thread runs that a fork would lose.
    """
    if _has_started_tensorflow():
        raise ConfigError(
            "spark.python.daemon.module: expected TensorFlow to be imported only, but something has run an operation "
            "or asked for devices before the workers are forked, and each of them would hang; look for what does so "
            "when it is imported (sitecustomize, a .pth file, a plug-in of TensorFlow), or take the setting out"
        )
    strangers = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if strangers:
        raise ConfigError(
            f"spark.python.daemon.module: expected no threads before the workers are forked, but {strangers} run, and "
            f"no worker would have them; look for what starts a thread when it is imported (sitecustomize, a .pth "
            f"file), or take the setting out"
        )


def _has_started_tensorflow() -> bool:
    """Whether the eager runtime has threads or devices. Where TensorFlow does not say, it counts as started."""
    module = sys.modules.get("tensorflow.python.eager.context")
    if module is None:
        return False
    context = module.context_safe()  # `context()` would make one
    if context is None:
        return False
    try:
        return bool(
            context._initialized or context._context_handle is not None or context._physical_devices is not None
        )
    except AttributeError:
        return True


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Sends to stderr what Python and native code print: Spark reads a port from this process's standard output."""
    kept = os.dup(_STDOUT)
    try:
        os.dup2(_STDERR, _STDOUT)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _become_sparks_own() -> None:
    """Starts over as pyspark's daemon, in the same process: nothing that was imported stays."""
    assert __spec__ is not None
    arguments = [_SPARKS_OWN if argument == __spec__.name else argument for argument in sys.orig_argv[1:]]
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
