"""How often requests come, lately."""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY_S = 30.0


class ArrivalRate:
    """A mean that forgets: what is older than half a minute counts for a third, and less and less.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._per_s, self._at = 0.0, clock()

    def count(self) -> None:
        """One has come."""
        self._per_s = self.per_s() + 1.0 / _MEMORY_S
        self._at = self._clock()

    def per_s(self) -> float:
        """Requests a second."""
        return self._per_s * math.exp((self._at - self._clock()) / _MEMORY_S)
