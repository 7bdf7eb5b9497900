"""How a pool grows and shrinks while requests are served.

Growing adds members; each serves once it has started and met its peers. Shrinking takes nobody's work away: the members
with the fewest requests get no new ones (they drain), and leave when they have finished what they had. One that has
not after a while hands its requests on to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.api import PoolTarget
from cluster.pools.introduction import Introductions
from cluster.pools.member import Member, Roster, Spawn
from cluster.pools.replacement import Caretaker
from cluster.pools.tasks import BackgroundTasks
from workers.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 0.05
_HAND_ON_S = 5.0  # aborts reach a worker that is well within a step


@dataclass(frozen=True)
class PoolLimits:
    """How large a pool may be; the most that it may have is the number of its places.

    Attributes:
        target: workers to begin with; None: one for each place.
        minimum: workers at least.
        drain_timeout_s: how long a worker that leaves may take to finish its requests before they are handed on.
    """

    target: int | None = None
    minimum: int = 1
    drain_timeout_s: float = 60.0


@dataclass(frozen=True)
class Obligations:
    """What the pools must know of the requests that are under way.

    Attributes:
        count: how many still need this engine.
        hand_on: have others take over those that still need this engine.
    """

    count: Callable[[str], int] = lambda engine_id: 0
    hand_on: Callable[[str], None] = lambda engine_id: None


class Scaling:
    """Keeps each pool at its target.

    Args:
        places: of each pool, by role: how to make a worker for each place.
        limits: of each pool, by role.
        roster: all members; those to begin with are added here.
        caretaker: looks after them.
        introductions: to part from those that leave.
        tasks: for what goes on in the background.
        obligations: of the members.
        on_change: called when a member drains, serves again, or has left.
    """

    def __init__(
        self,
        places: Mapping[str, Sequence[Spawn]],
        limits: Mapping[str, PoolLimits],
        roster: Roster,
        caretaker: Caretaker,
        introductions: Introductions,
        tasks: BackgroundTasks,
        obligations: Obligations,
        on_change: Callable[[], None],
    ) -> None:
        self._places = places
        self._limits = limits
        self._roster = roster
        self._caretaker = caretaker
        self._introductions = introductions
        self._tasks = tasks
        self._obligations = obligations
        self._on_change = on_change
        self._targets = {
            role: len(own) if limits[role].target is None else limits[role].target or 0 for role, own in places.items()
        }
        self._leaving: dict[Member, asyncio.Task[None]] = {}
        for role, target in self._targets.items():
            for spawn in places[role][:target]:
                roster.add(Member(spawn, spawn()))

    def targets(self) -> list[PoolTarget]:
        """What each pool is to have, and may have."""
        return [
            PoolTarget(role, target, self._limits[role].minimum, len(self._places[role]))
            for role, target in self._targets.items()
        ]

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """Give pools new targets; those that are not named keep theirs. Returns all; the pools follow by and by.

        Raises:
            InvalidRequestError: there is no such pool, or it may not have so many workers; nothing has changed then.
        """
        for role, target in targets.items():
            self._check(role, target)
        for role, target in targets.items():
            if target != self._targets[role]:
                logger.info("the %s pool goes from %d to %d workers", role, self._targets[role], target)
            self._targets[role] = target
            self._fit(role)
        return self.targets()

    def _check(self, role: str, target: int) -> None:
        if role not in self._places:
            raise InvalidRequestError(f"there is no pool {role!r}; the pools are {', '.join(self._places)}")
        least, most = self._limits[role].minimum, len(self._places[role])
        if not least <= target <= most:
            raise InvalidRequestError(f"{role} is {target}, it must be in [{least}, {most}], its min_ and max_replicas")

    def _fit(self, role: str) -> None:
        """Add or take away members until as many stay as the target says."""
        staying = [member for member in self._roster.pool(role) if member not in self._leaving]
        missing = self._targets[role] - len(staying)
        if missing < 0:
            for member in sorted(staying, key=self._worth)[: len(staying) - self._targets[role]]:
                self._let_go(member)
        # Whoever drains still serves as well as a new one would, and is there already: the busiest first.
        returning = [m for m in self._roster.pool(role) if m in self._leaving and m.state == "draining"]
        for member in sorted(returning, key=self._worth, reverse=True)[: max(0, missing)]:
            self._leaving.pop(member).cancel()
            member.state = "ready"
            missing -= 1
        held = {member.spawn for member in self._roster.pool(role)}
        free = [spawn for spawn in self._places[role] if spawn not in held]
        for spawn in free[: max(0, missing)]:
            self._add(spawn)
        self._on_change()

    def _worth(self, member: Member) -> tuple[bool, int, float]:
        """Who goes last when the pool shrinks: who serves, who has the most requests, who has been there longest."""
        return member.state == "ready", self._obligations.count(member.engine_id), -member.ready_since

    def _add(self, spawn: Spawn) -> None:
        member = Member(spawn, spawn())
        self._roster.add(member)
        member.life = self._tasks.spawn(self._caretaker.look_after(member, started=False))

    def _let_go(self, member: Member) -> None:
        if member.state == "ready":
            member.state = "draining"
        self._leaving[member] = self._tasks.spawn(self._see_off(member))

    async def _see_off(self, member: Member) -> None:
        """Let a member finish what it has, and stop it. Cancelled if it is wanted again before it has finished."""
        if member.state == "draining":
            await self._drained(member)
        member.state = "lost"
        if member.life is not None:
            member.life.cancel()
            await asyncio.wait({member.life})
        with contextlib.suppress(Exception):
            await member.handle.stop()  # before its peers are told, as when it is lost
        self._introductions.part(member)
        del self._leaving[member]
        self._roster.remove(member)
        logger.info("%s has left", member.engine_id)
        self._fit(member.handle.role)  # its place is free, and may be wanted

    async def _drained(self, member: Member) -> None:
        """Until nothing needs a member, or it is lost, or its patience is at an end."""
        limit_s = self._limits[member.handle.role].drain_timeout_s
        clock = asyncio.get_running_loop().time
        patience_ends, given_up = clock() + limit_s, False
        while member.state == "draining" and not self._idle(member):
            if clock() >= patience_ends:
                if given_up:
                    return
                logger.info("%s did not finish within %g s: its requests are handed on", member.engine_id, limit_s)
                self._obligations.hand_on(member.engine_id)
                patience_ends, given_up = clock() + _HAND_ON_S, True
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def _idle(self, member: Member) -> bool:
        """Whether no request needs a member, and nothing is pinned there."""
        load = member.load
        at_rest = not (
            load.running or load.waiting or load.preempted or load.reserved_blocks or load.quarantined_blocks
        )
        return at_rest and not self._obligations.count(member.engine_id)
