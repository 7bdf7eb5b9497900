"""The right to write to others' memory, which runs out unless it is renewed.

A worker that is cut off or frozen cannot be stopped by anybody. So what it may do must end by itself (leases: Gray and
Cheriton, SOSP 1989): whoever has not been heard for a lease's length writes nothing any more, and the blocks that were
granted to it can be used again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

LEASE_S = 30.0
"""Much longer than a busy gateway is ever held up, because who has lost its lease ends."""


def lease_clock() -> float:
    """Seconds; shared by all processes of a machine, and going on while they or the machine are stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """Begins with the first renewal; once it has run out, no renewal brings it back: it may be a late one.

    Args:
        duration_s: of a renewal.
        clock: see `lease_clock`.
    """

    def __init__(self, duration_s: float = LEASE_S, clock: Callable[[], float] = lease_clock) -> None:
        self._duration_s = duration_s
        self._clock = clock
        self._ends_at = math.inf
        self._ran_out = False

    def renew(self, as_of: float) -> None:
        """Somebody heard of this worker what it said at `as_of`, by its own clock."""
        if self.holds():
            ends_at = as_of + self._duration_s
            self._ends_at = ends_at if math.isinf(self._ends_at) else max(self._ends_at, ends_at)

    def holds(self) -> bool:
        """Whether it has not run out."""
        if self._clock() >= self._ends_at:
            self._ran_out = True
        return not self._ran_out
