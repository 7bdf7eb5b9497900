"""How long the lists of a batch are."""

from __future__ import annotations

import random

from recall_training.samples import MAX_ENTRIES


class Curriculum:
    """Starts with lists of up to 4 entries, or another limit, and doubles it as they are mastered."""

    def __init__(self, seed: int, limit: int = 4, master: float = 0.9) -> None:
        """Start with lists of up to ``limit`` entries."""
        self.rng = random.Random(seed)
        self.limit = limit
        self.master = master
        self.rate = 0.0

    def entries(self) -> int:
        """Return the list length of the next batch: the limit or any length up to it."""
        return self.limit if self.rng.random() < 0.4 else self.rng.randint(1, self.limit)

    def observe(self, exact: float) -> None:
        """Take note of the share of exact answers in a batch."""
        self.rate = 0.7 * self.rate + 0.3 * exact
        if self.rate >= self.master and self.limit < MAX_ENTRIES:
            self.limit *= 2
            self.rate = 0.0
