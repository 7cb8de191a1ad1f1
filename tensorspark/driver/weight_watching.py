"""Looks at the weights now and then, for who watches a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tensorspark.errors import TensorsparkError
from tensorspark.shards.sharded_server import AnyServer
from tensorspark.telemetry.records import WeightStats
from tensorspark.telemetry.tensors import tensor_stats
from tensorspark.weights.layout import Buffer

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_SHARE = 0.01  # of the time of one core
_MAX_BYTES = 2**31
_LOOKS_AN_AGE = 200


class WeightWatch:
    """Norms and histograms of the weights, and of their change since the last look.

    A look is taken every five seconds, less often where it would take more than a hundredth of the time, and the longer
    a run goes on: after ten hours every three minutes. It keeps two copies of the weights while somebody wants to know,
    so that none is taken of more than 2 GiB.

    Args:
        wants: whether somebody does.
    """

    def __init__(self, server: AnyServer, wants: Callable[[], bool]) -> None:
        self._server = server
        self._wants = wants
        self._now: Buffer | None = None
        self._before: Buffer | None = None
        self._version = -1
        self._next_at = time.monotonic()
        self._is_too_large = server.layout.num_bytes > _MAX_BYTES
        if self._is_too_large:
            logger.info("no norms and histograms of weights over %d bytes are made", _MAX_BYTES)

    def stats(self, seconds: float, num_steps: int) -> WeightStats | None:
        """What there is to tell now, if it is time to.

        Args:
            seconds: since the run began.
            num_steps: of all workers so far.
        """
        if self._is_too_large or time.monotonic() < self._next_at:
            return None
        if not self._wants():
            self.forget()
            return None
        began = time.monotonic()
        stats = self._look(seconds, num_steps)
        took_s = time.monotonic() - began
        self._next_at = time.monotonic() + max(_INTERVAL_S, took_s / _SHARE, seconds / _LOOKS_AN_AGE)
        return stats

    def forget(self) -> None:
        """Frees the copies."""
        self._now = self._before = None

    def _look(self, seconds: float, num_steps: int) -> WeightStats | None:
        layout = self._server.layout
        self._now, self._before = self._before, self._now
        if self._now is None:
            self._now = layout.allocate()
        try:
            version = self._server.read_weights(self._now)
        # It is closed, has forgotten the run, or a shard is lost: who trains finds out.
        except (TensorsparkError, RuntimeError, TimeoutError):
            self._now, self._before = self._before, None
            return None
        if version == self._version:
            self._now, self._before = self._before, self._now
            return None
        self._version = version
        before = None if self._before is None else layout.views(self._before)
        return WeightStats(seconds, version, num_steps, tensor_stats(layout.views(self._now), before))
