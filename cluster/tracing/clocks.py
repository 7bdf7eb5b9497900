"""A worker's times as the gateway's clock has them."""

from __future__ import annotations

import time

from cluster.clock import now


def unix_time_offset() -> float:
    """What to add to a time of the gateway's monotonic clock to have it as Unix time, seconds.

    Both clocks are read several times, and the reading counts in which least time passed between the two: a process can
    be held up between them. One offset for all times of a request keeps their differences what they were.
    """
    readings = []
    for _ in range(3):
        before = now()
        unix = time.time()
        readings.append((now() - before, unix - before))
    return min(readings)[1]


def shift_into(start: float, end: float, earliest: float, latest: float) -> float:
    """What to add to a worker's times so that they lie between what the gateway knows, seconds.

    Nothing, if they do already: then the two clocks agree, or nothing says otherwise. A worker cannot have had a
    request before it was sent, nor have sent a token after it came.
    """
    if earliest <= start and end <= latest:
        return 0.0
    spare = max(0.0, (latest - earliest) - (end - start))
    return earliest + spare / 2 - start


def nanoseconds(moment: float) -> int:
    """As OpenTelemetry counts time."""
    return int(moment * 1e9)
