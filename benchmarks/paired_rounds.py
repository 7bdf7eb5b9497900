"""Ways to do the same work, compared in one run on a machine that is not quiet.

Each round measures every way once, for a moment, in an order that is drawn anew: what else the machine does meets all
of them alike. Compared is what one way needs to what another one needs in the same round; of these ratios the median is
told, and the bounds that hold the true median in 95 of 100 runs, whatever the noise is like (order statistics by the
binomial distribution; Conover, Practical Nonparametric Statistics, 3.2).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """What a way needs, as a multiple of what another one needs.

    Attributes:
        median: of the rounds.
        low: the true median is between this
        high: and this; the extremes where there are too few rounds to say.
    """

    median: float
    low: float
    high: float

    def more(self) -> str:
        """In words: how much more, with its bounds."""
        return f"{self.median - 1:+.1%} ({self.low - 1:+.1%} … {self.high - 1:+.1%})"


def in_rounds(ways: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Measure every way in every round; returns the measurements of each, in order of the rounds.

    Args:
        ways: by name, each returns what it needed.
        rounds: how many.
        seed: of the orders.
    """
    order, rng = list(ways), random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            found[name].append(ways[name]())
    return found


def ratio(needs: Sequence[float], others: Sequence[float]) -> Ratio:
    """Compare two ways round by round."""
    ratios = sorted(one / other for one, other in zip(needs, others, strict=True))
    outside = _outside(len(ratios))
    return Ratio(statistics.median(ratios), ratios[outside], ratios[-1 - outside])


def _outside(count: int) -> int:
    """Of so many in order, how many on each side may be left out of the bounds: the k of P(B(count, 1/2) ≤ k)."""
    below = 0.0
    for outside in range((count + 1) // 2):
        below += math.comb(count, outside) / 2**count
        if below > (1 - _CONFIDENCE) / 2:
            return max(0, outside - 1)
    return max(0, (count - 1) // 2)
