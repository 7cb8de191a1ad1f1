"""How two machines' monotonic clocks agree, from what they say to each other anyway."""

from __future__ import annotations

import math


class ClockBounds:
    """The offset of our clock to another's: ours is the other's plus `offset`.

    No message arrives before it was sent. One that left the other at w and came here at s says that the offset is s - w
    at most; one that left here at s and came there at w says that it is s - w at least. The middle of the tightest
    bounds is as good as half the quickest round trip (Cristian, "Probabilistic clock synchronization", 1989, takes one
    round trip; this takes the best of each way).

    >>> bounds = ClockBounds()
    >>> bounds.arrived(sent=100.0, received=1100.3)
    >>> bounds.departed(1099.9)
    >>> round(bounds.offset, 6)
    1000.1
    """

    def __init__(self) -> None:
        self._least = -math.inf
        self._most = math.inf

    def arrived(self, sent: float, received: float) -> None:
        """A message of the other's came: when it left by its clock, and when it arrived by ours."""
        self._most = min(self._most, received - sent)

    def departed(self, bound: float) -> None:
        """A message of ours arrived there: when it left by our clock, less when it arrived by the other's."""
        self._least = max(self._least, bound)

    @property
    def offset(self) -> float:
        """0 as long as nothing has come."""
        if math.isinf(self._most):
            return 0.0 if math.isinf(self._least) else self._least
        if math.isinf(self._least) or self._least > self._most:  # the other's clock runs at another pace
            return self._most
        return (self._least + self._most) / 2
