"""When streams send: at once while the event loop keeps up, and several tokens in one message when it does not.

A message costs about as much as the token in it, so that a loop which has no time left carries more tokens when those
of a moment go together. Nothing is held while there is time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_SAMPLE_S, _SAMPLES, _LATE_S = 0.005, 20, 0.001
_BUSY, _QUIET = 0.8, 0.5
_SHORTEST_S, _LONGEST_S = 0.01, 0.1


class Pacer:
    """One for all streams of a server.

    Attributes:
        interval_s: how long tokens may wait for others now, seconds; 0: not at all.
        looks: whether it looks at the event loop now; who sends and finds that it does not, calls `wake`.
    """

    def __init__(self) -> None:
        self.interval_s = 0.0
        self.looks = False
        self._tick: asyncio.Event | None = None
        self._next: list[Callable[[], None]] = []
        self._sending = asyncio.Event()

    def wake(self) -> None:
        """A stream has sent."""
        self.looks = True
        self._sending.set()

    async def turn(self) -> None:
        """Wait until a stream that has sent may look for more: all that come meanwhile go in its next message."""
        self.wake()
        if self.interval_s:
            await self._next_tick().wait()

    def at_turn(self, callback: Callable[[], None]) -> None:
        """The same for who has no task, where `interval_s` is not 0: call this at the next turn."""
        self._next_tick()
        self._next.append(callback)

    def _next_tick(self) -> asyncio.Event:
        if self._tick is None:
            self._tick = asyncio.Event()
            asyncio.get_running_loop().call_later(self.interval_s, self._release)
        return self._tick

    def sample(self, busy: float) -> None:
        """Take the share of the last moments in which the loop had work, 0 to 1 or more.

        Between two thresholds the interval stays, because waiting together is itself what lowers the share.
        """
        if busy > _BUSY:
            self.interval_s = min(_LONGEST_S, max(_SHORTEST_S, 2 * self.interval_s))
        elif busy < _QUIET:
            self.interval_s = self.interval_s / 2 if self.interval_s > _SHORTEST_S else 0.0

    async def run(self) -> None:
        """Look at the event loop while streams send, for ever.

        A timer that is due while the loop has work comes late, and one that is due while it waits does not: the share
        of timers that are late is the share of time in which it has work. It counts, unlike processor time, what other
        programs take from it.
        """
        clock = asyncio.get_running_loop().time
        while True:
            await self._sending.wait()
            self._sending.clear()
            self.looks = False
            late = 0
            for _ in range(_SAMPLES):
                due = clock() + _SAMPLE_S
                await asyncio.sleep(_SAMPLE_S)
                late += clock() - due > _LATE_S
            self.sample(late / _SAMPLES)

    def _release(self) -> None:
        tick, self._tick = self._tick, None
        if tick is not None:
            tick.set()
        callbacks, self._next = self._next, []
        for callback in callbacks:
            callback()
