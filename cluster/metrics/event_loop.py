"""How late the event loop is: everything that the gateway does runs on it."""

from __future__ import annotations

import asyncio

from cluster.metrics.registry import MetricsRegistry

_INTERVAL_S = 0.1


async def watch_event_loop(registry: MetricsRegistry) -> None:
    """Measure how late a timer of the running loop is, ten times a second, for ever."""
    lag_s = registry.histogram("event_loop_lag_seconds")
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        lag_s.observe(max(0.0, loop.time() - due))
