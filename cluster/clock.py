"""What time it is for the gateway: the running event loop's. A simulation brings a loop with a time of its own."""

from __future__ import annotations

import asyncio


def now() -> float:
    """Seconds; on an ordinary loop those of `time.monotonic`.

    Raises:
        RuntimeError: no event loop is running.
    """
    return asyncio.get_running_loop().time()
