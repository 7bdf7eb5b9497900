"""What a pair's failed handoffs cost it: a pair that fails at once is never busy, and would else be the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

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

    def __bool__(self) -> bool:
        return bool(self._counted)

    def count(self, prefill: str, decode: str) -> None:
        """A handoff between these two has failed."""
        self._counted[prefill, decode] = (self.seconds(prefill, decode) + FAILURE_S, self._clock())
        for pair in [pair for pair in self._counted if self.seconds(*pair) < _FORGOTTEN_S]:
            del self._counted[pair]

    def seconds(self, prefill: str, decode: str) -> float:
        """What the pair's failures cost now."""
        seconds, at = self._counted.get((prefill, decode), (0.0, 0.0))
        return float(seconds * 0.5 ** ((self._clock() - at) / HALF_LIFE_S)) if seconds else 0.0

    def matrix(self, prefill: Mapping[str, int], decode: Mapping[str, int], size: int) -> npt.NDArray[np.float64]:
        """(size, size) seconds by the workers' slots, of those that are here."""
        costs = np.zeros((size, size))
        for p, d in self._counted:
            if p in prefill and d in decode:
                costs[prefill[p], decode[d]] = self.seconds(p, d)
        return costs

    def forget(self, gone: Sequence[str]) -> None:
        """These workers are no more."""
        for pair in [pair for pair in self._counted if pair[0] in gone or pair[1] in gone]:
            del self._counted[pair]
