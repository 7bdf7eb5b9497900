"""The right to write to others' memory, which runs out unless it is renewed.

A worker that is cut off or frozen cannot be stopped by anybody. So what it may do must end by itself (leases: Gray and
Cheriton, SOSP 1989): whoever has not been heard for a lease's length writes nothing any more, and the blocks that were
granted to it can be used again.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable

from kv_transfer.errors import LeaseExpiredError

logger = logging.getLogger(__name__)

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


def end_process() -> None:
    """End this process at once, without a look at anything: what is closed in good order still uses the network."""
    logger.critical("the lease is over: nobody has heard of this worker for long, and it may have been replaced")
    os._exit(1)


def lease_guard(lease: Lease, on_lapse: Callable[[], None] = end_process) -> Callable[[], None]:
    """What a transport asks before every call into the network.

    Not only WRITEs are asked for: whatever makes the network progress also goes on with a WRITE that was posted before
    this process was frozen.

    Args:
        lease: of this worker.
        on_lapse: called when the lease is over.

    Returns:
        A function that raises `LeaseExpiredError` if `on_lapse` returns.
    """

    def guard() -> None:
        if not lease.holds():
            on_lapse()
            raise LeaseExpiredError("this worker's lease is over: others may use the memory that it was granted")

    return guard
