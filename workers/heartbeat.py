"""What a worker says of itself while it has nothing to say of requests: that it lives, and how it gets on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life, given by another thread than the one that steps, which may hang.

    Attributes:
        num_steps: that have ended since the worker started; an idle worker takes some twenty a second.
        step_s: seconds that the one under way has taken so far; 0: the worker waits for something to do.
        silent_ranks: ranks of which nothing has been heard for long: their processes are frozen.
    """

    num_steps: int
    step_s: float = 0.0
    silent_ranks: tuple[int, ...] = ()
