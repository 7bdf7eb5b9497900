"""When a worker said what it said: for who is told later how much of it was heard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_APART_S = 0.2
_REMEMBERED = 256


class HeartbeatLog:
    """Counts what is said, and remembers when, a few times a second.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._number = 0
        self._remembered: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def note(self) -> None:
        """Something is about to be said."""
        self._number += 1
        now = self._clock()
        if not self._remembered or now - self._remembered[-1][1] >= _APART_S:
            self._remembered.append((self._number, now))

    def when(self, num_heard: int) -> float | None:
        """When the last thing that is remembered was said, of those that were heard; None: none is remembered."""
        while len(self._remembered) > 1 and self._remembered[1][0] <= num_heard:
            self._remembered.popleft()
        return self._remembered[0][1] if self._remembered and self._remembered[0][0] <= num_heard else None
