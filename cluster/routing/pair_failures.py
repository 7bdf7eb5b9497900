"""What a pair's failed handoffs cost it: a pair that fails at once is never busy, and would else be the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Collection

FAILURE_S = 5.0
"""What one failure adds to a pair's cost when it happens."""
HALF_LIFE_S = 15.0
"""After so long it counts half."""
_FORGOTTEN_S = 0.01


class PairFailures:
    """Seconds that are added to the cost of each pair on which handoffs have failed, halved every `HALF_LIFE_S`.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counted: dict[tuple[str, str], tuple[float, float]] = {}

    def count(self, prefill: str, decode: str) -> None:
        """A handoff between these two has failed."""
        before_s = self.current().get((prefill, decode), 0.0)
        self._counted[prefill, decode] = (before_s + FAILURE_S, self._clock())

    def current(self) -> dict[tuple[str, str], float]:
        """Seconds that are added now, by pair; what has become next to nothing is forgotten."""
        if not self._counted:
            return {}
        now = self._clock()
        seconds = {pair: s * 0.5 ** ((now - at) / HALF_LIFE_S) for pair, (s, at) in self._counted.items()}
        self._counted = {pair: self._counted[pair] for pair, left in seconds.items() if left >= _FORGOTTEN_S}
        return {pair: seconds[pair] for pair in self._counted}

    def forget(self, gone: Collection[str]) -> None:
        """These workers are no more."""
        for pair in [pair for pair in self._counted if pair[0] in gone or pair[1] in gone]:
            del self._counted[pair]
