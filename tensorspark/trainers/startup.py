"""Starts TensorFlow, without its chatter, which no environment variable turns off, and in less time."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator

_TALKATIVE_LEVELS = ("0", "1")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For the imports of TensorFlow and Keras: the first of a process is silent, and takes a fifth less of a processor.

    What native code writes to stderr inside the block is kept, and shown only if the block fails.
    ``TF_CPP_MIN_LOG_LEVEL`` of 0 or 1 lets it through; unset, it becomes 2 (errors only).
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "tensorflow" in sys.modules:
        yield
        return
    with contextlib.nullcontext() if level in _TALKATIVE_LEVELS else _silence(), _without_collector():
        yield


def start(num_threads: int) -> None:
    """Has TensorFlow, once imported, use so many threads and look for its devices, unless it has started before.

    Where there is no GPU, it would say so on stderr at its first operation, as if that were an error.
    """
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    except RuntimeError:  # its threads are as they are
        return
    with contextlib.nullcontext() if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in _TALKATIVE_LEVELS else _silence():
        tf.config.list_logical_devices()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps Python's garbage collector from looking through the objects of an import, which are no garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what native code writes to stderr, and shows it only where the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        try:
            os.dup2(kept.fileno(), 2)
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
