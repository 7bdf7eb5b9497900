"""Looks for the highest rate that a service bears, in a few tries that each take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_UP = 1.3
_DOWN = ((0.5, 0.8), (0.1, 0.65), (0.0, 0.5))
"""By the share, as a part of what is wanted, that a rate at least had: how far below it the next one is tried."""
_CLOSE = 1.06


@dataclass(frozen=True)
class Try:
    """A rate, requests a second, and the share of requests that met their objective at it."""

    rate: float
    share: float


@dataclass(frozen=True)
class Goodput:
    """What was found.

    Attributes:
        rate: the highest at which the share is met, interpolated between the two tries around it; else the last one
            on the side that was seen; None: nothing was tried.
        relation: "=", or "≥" where no rate was too high, or "<" where every rate was.
    """

    rate: float | None
    relation: str


def next_rate(tries: Sequence[Try], guess: float, wanted: float) -> float | None:
    """What to try next; None: the tries are close enough.

    Args:
        tries: so far.
        guess: for the first.
        wanted: share of requests.
    """
    low, high = _around(tries, wanted)
    if low is None and high is None:
        return guess
    if low is None:
        assert high is not None
        return high.rate * next(factor for least, factor in _DOWN if high.share >= least * wanted)
    if high is None:
        return low.rate * _UP
    return None if high.rate <= low.rate * _CLOSE else float((low.rate * high.rate) ** 0.5)


def found(tries: Sequence[Try], wanted: float) -> Goodput:
    """What the tries say."""
    low, high = _around(tries, wanted)
    if low is None:
        return Goodput(None if high is None else high.rate, "<")
    if high is None:
        return Goodput(low.rate, "≥")
    return Goodput(low.rate + (high.rate - low.rate) * (low.share - wanted) / (low.share - high.share), "=")


def _around(tries: Sequence[Try], wanted: float) -> tuple[Try | None, Try | None]:
    """The highest rate that was borne, and the lowest above it that was not. Chance may have one below fail."""
    borne = [entry for entry in tries if entry.share >= wanted]
    low = max(borne, key=lambda entry: entry.rate, default=None)
    above = [entry for entry in tries if entry.share < wanted and (low is None or entry.rate > low.rate)]
    return low, min(above, key=lambda entry: entry.rate, default=None)
