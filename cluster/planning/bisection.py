"""Finding where something stops to hold."""

from __future__ import annotations

from collections.abc import Callable

HALVINGS = 50


def highest(holds: Callable[[float], bool], most: float) -> float:
    """The highest value in [0, most) at which what holds below it still does, by bisection; 0 if it never does."""
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low > most * 1e-9 else 0.0
