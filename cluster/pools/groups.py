"""The groups that the pools consist of: equal workers, each with a place of its own. A pool has one, or named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config.group_key import group_key
from cluster.pools.replica import Spawn

Places = Sequence[Spawn] | Mapping[str, Sequence[Spawn]]
"""How to make a worker for each place of a pool: by group, if it has named ones."""


@dataclass(frozen=True)
class PoolLimits:
    """How large a group may be; the most that it may have is the number of its places.

    Attributes:
        target: workers to begin with; None: one for each place.
        minimum: workers at least.
        drain_timeout_s: how long a worker that leaves may take to finish its requests before they are handed on.
    """

    target: int | None = None
    minimum: int = 1
    drain_timeout_s: float = 60.0


@dataclass(frozen=True)
class Group:
    """Equal workers of one pool.

    Attributes:
        role: the pool, prefill or decode.
        name: of the group; empty for the only one of a pool that names none.
        places: how to make a worker for each.
        limits: of its size.
    """

    role: str
    name: str
    places: Sequence[Spawn]
    limits: PoolLimits

    @property
    def key(self) -> str:
        """What it is scaled by: decode, or decode.h100."""
        return group_key(self.role, self.name)


def groups_of_pools(pools: Mapping[str, Places], limits: Mapping[str, PoolLimits]) -> dict[str, Group]:
    """All groups by key, each with the limits of its key, or with the defaults."""
    groups = [
        Group(role, name, spawns, limits.get(group_key(role, name), PoolLimits()))
        for role, places in pools.items()
        for name, spawns in (places if isinstance(places, Mapping) else {"": places}).items()
    ]
    return {group.key: group for group in groups}
