"""When streams send: at once while the event loop keeps up, and several tokens in one message when it does not.

A message costs about as much as the token in it, so that a loop which has no time left carries more tokens when those
of a moment go together. Nothing is held while there is time.
"""

from __future__ import annotations

import asyncio
import time

_SAMPLE_S = 0.1
_BUSY, _QUIET = 0.8, 0.5
_SHORTEST_S, _LONGEST_S = 0.01, 0.1


class Pacer:
    """One for all streams of a server."""

    def __init__(self) -> None:
        self._interval_s = 0.0
        self._tick: asyncio.Event | None = None

    @property
    def interval_s(self) -> float:
        """How long tokens may wait for others now, seconds; 0: not at all."""
        return self._interval_s

    async def turn(self) -> None:
        """Wait until a stream that has sent may look for more: all that come meanwhile go in its next message."""
        if not self._interval_s:
            return
        if self._tick is None:
            self._tick = asyncio.Event()
            asyncio.get_running_loop().call_later(self._interval_s, self._release)
        await self._tick.wait()

    def sample(self, busy: float) -> None:
        """Take the share of the last moments in which the loop had work, 0 to 1 or more.

        Between two thresholds the interval stays, because waiting together is itself what lowers the share.
        """
        if busy > _BUSY:
            self._interval_s = min(_LONGEST_S, max(_SHORTEST_S, 2 * self._interval_s))
        elif busy < _QUIET:
            self._interval_s = self._interval_s / 2 if self._interval_s > _SHORTEST_S else 0.0

    async def run(self) -> None:
        """Look at the event loop, for ever: at the processor time that it takes, and at how late it is."""
        clock = asyncio.get_running_loop().time
        began, spent = clock(), time.thread_time()
        while True:
            await asyncio.sleep(_SAMPLE_S)
            ended, spent_then = clock(), time.thread_time()
            late_s = ended - began - _SAMPLE_S
            self.sample(max((spent_then - spent) / (ended - began), late_s / _SAMPLE_S))
            began, spent = ended, spent_then

    def _release(self) -> None:
        tick, self._tick = self._tick, None
        if tick is not None:
            tick.set()
