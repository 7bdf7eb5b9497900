"""Those for whom there will be no room on a worker: blocks that they would need are in quarantine, and may stay there.

Whoever waits gets its blocks when those before it have ended, as long as the worker has enough at all: nobody is
admitted who needs more. Blocks in quarantine come back from nobody here, so that while they are out a worker has fewer,
and who needs more than these would wait for as long as the quarantine lasts, with everybody behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, TypeVar

from workers.errors import RoomLostError
from workers.kv_cache.groups import Hashes
from workers.kv_cache.manager import KVCacheManager

ROOM_PATIENCE_S = 10.0
"""Longer than a quarantine lasts whose peer answers, or is seen to end."""

W = TypeVar("W")


@dataclass(frozen=True)
class Need(Generic[W]):
    """What somebody waits for.

    Attributes:
        whose: who it is; told apart by identity.
        blocks: that it needs at once, by cache group.
        hashes: of its blocks that it would take from the cache; who may be in quarantine with them does not matter.
    """

    whose: W
    blocks: Sequence[int]
    hashes: Hashes = ()


class LostRoom(Generic[W]):
    """Finds those who have been without a prospect for a while.

    Args:
        cache: the worker's.
        clock: the worker's.
        patience_s: how long.
    """

    def __init__(self, cache: KVCacheManager, clock: Callable[[], float], patience_s: float = ROOM_PATIENCE_S) -> None:
        self._cache = cache
        self._clock = clock
        self._patience_s = patience_s
        self._since: dict[int, float] = {}

    def find(self, quarantined: Sequence[AbstractSet[int]], waiting: Callable[[], Iterable[Need[W]]]) -> list[W]:
        """Who is to go elsewhere.

        Args:
            quarantined: the blocks of each cache group that nobody here can give back.
            waiting: what is waited for; asked only where there is a quarantine.
        """
        if not any(quarantined):
            self._since.clear()
            return []
        now, before = self._clock(), self._since
        self._since, lost = {}, []
        for need in waiting():
            if self._cache.has_enough(need.blocks, need.hashes, quarantined):
                continue
            since = self._since[id(need.whose)] = before.get(id(need.whose), now)
            if now - since >= self._patience_s:
                lost.append(need.whose)
        return lost


def no_room(quarantined: AbstractSet[int], num_blocks: int) -> RoomLostError:
    """Why somebody has to go elsewhere; blocks of the worker's primary cache group."""
    return RoomLostError(
        f"the worker has no room for the request any more: {len(quarantined)} of its {num_blocks} KV blocks may still "
        "be written to or read by a worker that was lost"
    )
