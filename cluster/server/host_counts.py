"""A bounded number of something, of which no host has all."""

from __future__ import annotations

from collections import Counter


class HostCounts:
    """Counts what hosts hold.

    Args:
        most: in all.
        most_of_one: of one host.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self.most = most
        self.most_of_one = most_of_one
        self._held: Counter[str] = Counter()
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def take(self, host: str) -> bool:
        """One more for a host; False: there are too many, and it has none."""
        if self._num_held >= self.most or self._held[host] >= self.most_of_one:
            return False
        self._held[host] += 1
        self._num_held += 1
        return True

    def give_back(self, host: str) -> None:
        """One less for a host."""
        self._num_held -= 1
        self._held[host] -= 1
        if not self._held[host]:
            del self._held[host]
