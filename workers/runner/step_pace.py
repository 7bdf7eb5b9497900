"""How the steps that a worker serves compare with what it measured of itself when it started."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

_WINDOW = 16
"""Steps whose median counts once: what slows one of them down is no matter, and half of them would have to be."""
_MOST_CHANGE = 1.5
"""Of the pace, from one window to the next."""
_LIMIT = 64.0
_GOOD_FOR_S = 60.0
_DIGITS = 3


class StepPace:
    """A ratio: 2 for a worker whose steps take twice as long as it had measured. Costs a step two looks at the clock.

    It follows the median of every 16 steps, by a factor of 1.5 at most each time, so that neither a few slow steps nor
    a short disturbance carry it away. What is a minute old counts for nothing: a worker that was slow, and got no
    requests for it, is not avoided for ever.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._launches: deque[tuple[float, float]] = deque()
        self._ratios: list[float] = []
        self._pace = 1.0
        self._landed_at = self._counted_at = -math.inf

    @property
    def ratio(self) -> float:
        """The pace now; 0: there is nothing to say."""
        if self._clock() - self._counted_at > _GOOD_FOR_S:
            return 0.0
        return float(f"{self._pace:.{_DIGITS}g}")

    def launched(self, predicted_s: float) -> None:
        """A step begins, or waits for those before it; by the measurements it takes so long. 0: it is not compared."""
        self._launches.append((self._clock(), predicted_s))

    def landed(self) -> None:
        """The oldest step that was launched has ended."""
        now = self._clock()
        began, predicted_s = self._launches.popleft()
        measured_s = now - max(began, self._landed_at)
        self._landed_at = now
        if predicted_s <= 0 or measured_s <= 0:
            return
        self._ratios.append(measured_s / predicted_s)
        if len(self._ratios) == _WINDOW:
            found = median(self._ratios)
            self._pace = min(max(found, self._pace / _MOST_CHANGE, 1 / _LIMIT), self._pace * _MOST_CHANGE, _LIMIT)
            self._ratios.clear()
            self._counted_at = now
