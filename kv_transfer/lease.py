"""The right to write to others' memory, which runs out unless it is renewed.

A worker that is cut off or frozen cannot be stopped by anybody. So what it may do must end by itself (leases: Gray and
Cheriton, SOSP 1989): whoever has not been heard for a lease's length writes nothing. That is a fence and not the end:
the one whose silence it was may have been whoever renews, and then the worker goes on, with all that it has loaded.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

LEASE_S = 30.0
"""Longer than the network between a gateway and its workers is ever held up as a rule."""
_LOOK_INTERVAL_S = 0.5


def lease_clock() -> float:
    """Seconds; shared by all processes of a machine, and going on while they or the machine are stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """Begins with the first renewal, and holds for a while from the last word that was heard. Threads may share one.

    It may be renewed after it has run out: what counts is when the word was said that was heard, so that a renewal that
    was long under way brings nothing back.

    Args:
        duration_s: from a word that was heard.
        clock: see `lease_clock`.
    """

    def __init__(self, duration_s: float = LEASE_S, clock: Callable[[], float] = lease_clock) -> None:
        self._duration_s = duration_s
        self._clock = clock
        self._ends_at = math.inf
        self._renewed = threading.Condition()

    def renew(self, as_of: float) -> None:
        """Somebody heard of this worker what it said at `as_of`, by its own clock."""
        ends_at = as_of + self._duration_s
        with self._renewed:
            self._ends_at = ends_at if math.isinf(self._ends_at) else max(self._ends_at, ends_at)
            self._renewed.notify_all()

    def holds(self) -> bool:
        """Whether it has not run out."""
        return self._clock() < self._ends_at

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Wait until it holds, or so long; returns whether it does."""
        give_up_at = time.monotonic() + timeout_s
        while not self.holds() and (left := give_up_at - time.monotonic()) > 0:
            with self._renewed:
                self._renewed.wait(min(left, _LOOK_INTERVAL_S))
        return self.holds()


def lease_guard(lease: Lease) -> Callable[[], None]:
    """What a transport asks before every call into the network: it returns when the lease holds, and not before.

    Not only WRITEs are asked for: whatever makes the network progress also goes on with a WRITE that was posted before
    this process was frozen. The thread that asks stands still, so that what it was about to do is late and not lost.

    Args:
        lease: of this worker.
    """

    def guard() -> None:
        if lease.holds():
            return
        began = lease_clock()
        logger.warning("the lease is over: this worker writes nothing until it is heard again; its model stays loaded")
        lease.wait()
        logger.warning("the lease holds again, after %.1f s", lease_clock() - began)

    return guard
