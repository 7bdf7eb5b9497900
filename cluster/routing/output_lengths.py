"""How long answers turn out to be, and so how much of a decode worker's cache its requests will need.

A request holds its prompt's blocks from the start and one token more with every step, until it ends and gives all of
them back. So what a worker will need is neither what it holds now nor the sum of everybody's longest answer: it is the
peak of what is held over the coming steps, with those who will have ended by then left out. It is reckoned from the
lengths of past answers, as in Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025,
arXiv:2507.10150), but as expected values over a few spans of the future that add up over a worker's requests, so that a
change of one request costs the same however many there are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

HORIZONS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Decode steps, the ends of the spans (0, 16], (16, 32] … By the last one the books know much more than now."""

_REMEMBERED, _ENOUGH, _RELEARN_AFTER = 256, 32, 16
_LONGEST_GUESS = 1024
_GRAIN = 16
_MOST_OUTLOOKS = 4096
_HEADROOM_SIGMAS = 2.0
"""Standard deviations above the mean: about one peak in fifty comes out higher, and then somebody is preempted."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OutputLengthForecast:
    """What a request with so many output tokens will still do, for each span between `HORIZONS`.

    Attributes:
        alive: the probability that it has not ended when the span begins.
        growth: tokens that it will have added by the span's end (or its own), times that probability.
        spread: variance of what it holds, over the square of its mean.
    """

    alive: _Floats
    growth: _Floats
    spread: _Floats
    _peaks: tuple[tuple[float, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        above = 1.0 + _HEADROOM_SIGMAS * np.sqrt(self.spread)
        lines = zip((above * self.alive).tolist(), (above * self.growth).tolist(), strict=True)
        object.__setattr__(self, "_peaks", tuple(lines))

    def held(self, num_tokens: float, most: float = math.inf, num_samples: int = 1) -> _Floats:
        """(2, spans): mean and variance of the tokens that it holds in each span, given those that it holds now.

        Args:
            num_tokens: that it has now.
            most: that it holds at once, however many it has.
            num_samples: sequences that grow.
        """
        held = np.empty((2, len(HORIZONS)))
        mean, variance = held
        np.multiply(self.alive, num_tokens, out=mean)
        mean += self.growth if num_samples == 1 else self.growth * num_samples
        if most < math.inf:
            np.minimum(mean, self.alive * most, out=mean)
        np.multiply(mean, mean, out=variance)
        variance *= self.spread
        return held

    def peak(self, num_tokens: float, num_samples: int = 1) -> float:
        """`likely_peak` of what it holds, given those that it holds now: on the highest of a few lines.

        Of several samples the prompt, which they share, counts once.
        """
        return max([slope * num_tokens + start * num_samples for slope, start in self._peaks])


def likely_peak(held: _Floats) -> float:
    """The most tokens that are held in any span, with head-room; `held` is (2, spans), see `OutputLengthForecast.held`.

    Peaks of two sets of requests add up to no less than the peak of both, so that a newcomer's may be added to a
    worker's: a comparison of two numbers a worker.
    """
    peaks = np.maximum(held[1], 0.0)
    np.sqrt(peaks, out=peaks)
    peaks *= _HEADROOM_SIGMAS
    peaks += held[0]
    return float(peaks[peaks.argmax()])


@dataclass
class _Lengths:
    """Of one class of requests: the last answers, in the order in which they ended, and sorted every now and then."""

    recent: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    known: list[int] = field(default_factory=list)
    unlearnt: int = 0
    outlooks: dict[tuple[int, int], OutputLengthForecast] = field(default_factory=dict)

    def add(self, length: int) -> None:
        """One more answer has ended."""
        self.recent.append(length)
        self.unlearnt += 1
        if self.unlearnt >= _RELEARN_AFTER and len(self.recent) >= _ENOUGH:
            self.known, self.unlearnt = sorted(self.recent), 0
            self.outlooks.clear()


class OutputLengths:
    """Learns from answers that have ended. Requests whose `max_tokens` have the same power of two are of one class.

    A class that has no 32 answers yet goes by those of all classes. While those are too few, too, every request is
    expected to go on to `max_tokens`, but no further than 1,024 tokens: who sets no limit is given the whole context
    window, and would find no room on a service that is new. Afterwards one imagined answer of `max_tokens` stands
    beside the last 256 real ones, so that a request that outlives all of those is expected to go on.
    """

    def __init__(self) -> None:
        self._all = _Lengths()
        self._classes: dict[int, _Lengths] = {}

    def observe(self, max_tokens: int, num_tokens: int) -> None:
        """An answer that might have had `max_tokens` has ended by itself after `num_tokens`."""
        self._all.add(num_tokens)
        self._classes.setdefault(max_tokens.bit_length(), _Lengths()).add(num_tokens)

    def outlook(self, max_tokens: int, num_tokens: int = 0) -> OutputLengthForecast:
        """Of a request that has generated `num_tokens` so far, rounded down to 16; its limit is rounded up.

        So there are few different ones, and hardly any has to be reckoned twice.
        """
        own = self._classes.get(max_tokens.bit_length())
        grain = 1 << max(0, max_tokens.bit_length() - 4)
        max_tokens = -(-max_tokens // grain) * grain
        lengths = own if own is not None and own.known else self._all
        so_far = num_tokens - num_tokens % _GRAIN
        key = (max_tokens, so_far)
        if (known := lengths.outlooks.get(key)) is None:
            longest = max_tokens if lengths.known else min(max_tokens, max(_LONGEST_GUESS, 2 * so_far))
            known = _outlook(lengths.known, longest, so_far)
            if len(lengths.outlooks) < _MOST_OUTLOOKS:
                lengths.outlooks[key] = known
        return known


def _outlook(lengths: list[int], longest: int, so_far: int) -> OutputLengthForecast:
    """From sorted lengths and the one that ends at `longest`, of those that are longer than `so_far`."""
    left = [length - so_far for length in lengths[bisect_right(lengths, so_far) :] if length < longest]
    left.append(max(1, longest - so_far))
    sums = (0, *accumulate(left))
    ended = [0, *(bisect_right(left, steps) for steps in HORIZONS)]
    alive = [1.0 - n / len(left) for n in ended[:-1]]
    growth = [
        (sums[after] - sums[before] + (len(left) - after) * steps) / len(left)
        for (before, after), steps in zip(pairwise(ended), HORIZONS, strict=True)
    ]
    spread = [1.0 / max(share, 1e-9) - 1.0 for share in alive]  # there, or not there
    return OutputLengthForecast(np.array(alive), np.array(growth), np.array(spread))
