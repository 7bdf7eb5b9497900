"""The learning rate over a training: it warms up, stays, and falls to zero over the last steps."""

from __future__ import annotations

from collections import deque

_UNMEASURED_STEPS = 20
"""The first ones, which are slow."""
_MEASURED_STEPS = 200
"""The last ones, which tell what a step takes; it depends on how long lists are."""


class Schedule:
    """When the learning rate falls: once the model is good, or when steps or minutes are just enough for it."""

    def __init__(self, warmup: int, cooldown: int, steps: int, minutes: float) -> None:
        """Plan for at most ``steps`` steps and ``minutes`` minutes, ``cooldown`` steps of them at a falling rate."""
        self.warmup, self.cooldown = warmup, cooldown
        self.cooldown_at = max(0, steps - cooldown)
        self.seconds = 60 * minutes
        self._ends: deque[float] = deque(maxlen=_MEASURED_STEPS + 1)

    @property
    def end(self) -> int:
        """Return the number of steps as far as it is known."""
        return self.cooldown_at + self.cooldown

    def share(self, step: int) -> float:
        """Return the share of the highest rate that step ``step`` is made at."""
        return min(1.0, (step + 1) / self.warmup, (self.end - step) / self.cooldown)

    def observe(self, step: int, elapsed: float) -> bool:
        """Take note that ``step`` steps took ``elapsed`` seconds; return whether the rate falls for lack of time."""
        if step < _UNMEASURED_STEPS:
            return False
        self._ends.append(elapsed)
        seconds = self.cooldown * (elapsed - self._ends[0]) / max(1, len(self._ends) - 1)
        return elapsed + 1.05 * seconds > self.seconds and self.begin_cooldown(step)

    def begin_cooldown(self, step: int) -> bool:
        """Let the rate fall from here; return whether that is new."""
        if step >= self.cooldown_at:
            return False
        self.cooldown_at = step
        return True
