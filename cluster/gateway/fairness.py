"""Fair shares among users: who has had the least so far goes first.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588): every
user has a counter of the tokens that were served, a generated one counting twice. Nobody saves up by being idle: who
comes back starts no lower than where service is now.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver

_OUTPUT_WEIGHT = 2
_FORGET_ABOVE = 4096


class TokenCounters:
    """One counter a user. Those that say no more than what a new user would start with are forgotten in time."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._now = 0

    def __getitem__(self, user: str) -> int:
        """A user's counter; of two who wait, the one with the lower counter is next."""
        return max(self._now, self._counters.get(user, 0))

    def begin(self, user: str, prompt_tokens: int) -> None:
        """A request of this user is being served."""
        self._now = self[user]
        self._counters[user] = self._now + prompt_tokens
        if len(self._counters) > _FORGET_ABOVE:
            self._counters = {name: count for name, count in self._counters.items() if count > self._now}

    def charge(self, user: str, output_tokens: int) -> None:
        """So many tokens were generated for a user."""
        self._counters[user] = self[user] + _OUTPUT_WEIGHT * output_tokens


class TokenCharges(EngineObserver):
    """Charges users for the tokens that were generated for them.

    Args:
        charge: takes a user and how many.
    """

    def __init__(self, charge: Callable[[str, int], None]) -> None:
        self._charge = charge

    def tokens_received(self, attempt: Attempt, num_tokens: int, seconds: float | None) -> None:
        """See `EngineObserver.tokens_received`."""
        self._charge(attempt.user, num_tokens)
