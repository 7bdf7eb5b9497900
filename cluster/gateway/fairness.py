"""Fair shares among tenants, and among the users of each: who has had the least so far goes first.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588): each
has a counter of the tokens that were served, a generated one counting twice. Nobody saves up by being idle: who comes
back starts no lower than where service is now. A tenant's counter is divided by its share, the weighted form in that
paper. So many users, or ever new ones, take from the others of their tenant and from nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cluster.gateway.observers import EngineObserver, Received

_OUTPUT_WEIGHT = 2
MAX_REMEMBERED = 4096
"""Tenants, and users of each, whose counters are kept; who is forgotten starts where service is, as a new one does."""
MAX_USERS = 16_384
"""Of all tenants together."""


class Counters:
    """One counter for each of a bounded number: of more, those that were charged longest ago are forgotten."""

    def __init__(self) -> None:
        self._counters: OrderedDict[str, float] = OrderedDict()
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._counters)

    def __getitem__(self, name: str) -> float:
        """Of two who wait, the one with the lower counter is next."""
        return max(self._now, self._counters.get(name, 0.0))

    def begin(self, name: str, tokens: float) -> None:
        """Something of theirs is being served, of so many tokens."""
        self._now = self[name]
        self.charge(name, tokens)

    def charge(self, name: str, tokens: float) -> None:
        """So many tokens more."""
        self._counters[name] = self[name] + tokens
        self._counters.move_to_end(name)
        if len(self._counters) > MAX_REMEMBERED:
            self._counters.popitem(last=False)


class TokenCounters:
    """A counter for each tenant, and one for each of its users."""

    def __init__(self) -> None:
        self._tenants = Counters()
        self._users: OrderedDict[str, Counters] = OrderedDict()
        self._num_users = 0

    def of(self, tenant: str, user: str) -> tuple[float, float]:
        """Both counters; of two who wait, the one with the lower pair is next."""
        users = self._users.get(tenant)
        return self._tenants[tenant], 0.0 if users is None else users[user]

    def begin(self, tenant: str, share: float, user: str, prompt_tokens: int) -> None:
        """A request of this user is being served; the tenant has this share."""
        self._tenants.begin(tenant, prompt_tokens / share)
        users = self._users.setdefault(tenant, Counters())
        self._num_users -= len(users)
        users.begin(user, prompt_tokens)
        self._bound(tenant, users)

    def charge(self, tenant: str, share: float, user: str, output_tokens: int) -> None:
        """So many tokens were generated for a user."""
        self._tenants.charge(tenant, _OUTPUT_WEIGHT * output_tokens / share)
        users = self._users.setdefault(tenant, Counters())
        self._num_users -= len(users)
        users.charge(user, _OUTPUT_WEIGHT * output_tokens)
        self._bound(tenant, users)

    @property
    def num_remembered(self) -> int:
        """Counters that are kept."""
        return len(self._tenants) + self._num_users

    def _bound(self, tenant: str, users: Counters) -> None:
        """Forget the users of the tenants that were charged longest ago, if all together are too many."""
        self._num_users += len(users)
        self._users.move_to_end(tenant)
        while len(self._users) > MAX_REMEMBERED or (self._num_users > MAX_USERS and len(self._users) > 1):
            _, forgotten = self._users.popitem(last=False)
            self._num_users -= len(forgotten)


class TokenCharges(EngineObserver):
    """Charges tenants and users for the tokens that were generated for them.

    Args:
        charge: takes a user, how many, the tenant and its share.
    """

    def __init__(self, charge: Callable[[str, int, str, float], None]) -> None:
        self._charge = charge

    def tokens_received(self, received: Sequence[Received]) -> None:
        """See `EngineObserver.tokens_received`; whoever has several streams is charged once for all of them."""
        totals: dict[tuple[str, str, float], int] = {}
        for attempt, num_tokens, _ in received:
            account = attempt.account
            totals[account] = totals.get(account, 0) + num_tokens
        for (user, tenant, share), num_tokens in totals.items():
            self._charge(user, num_tokens, tenant, share)
