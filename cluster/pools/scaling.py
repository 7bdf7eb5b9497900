"""How a pool grows and shrinks while requests are served.

Growing adds members; each serves once it has started and met its peers. Shrinking takes nobody's work away: the members
with the fewest requests get no new ones (they drain), and leave when they have finished what they had. One that has
not after a while hands its requests on to others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.api import PoolTarget
from cluster.pools.burials import Burials
from cluster.pools.gpu_budget import GpuBudget
from cluster.pools.groups import Group
from cluster.pools.replica import Replica, Roster, Spawn
from cluster.pools.supervisor import Supervisor
from cluster.pools.tasks import BackgroundTasks
from workers.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 0.05
_HAND_ON_S = 5.0  # aborts reach a worker that is well within a step


@dataclass(frozen=True)
class Obligations:
    """What the pools must know of the requests that are under way.

    Attributes:
        count: how many still need this engine.
        migrate: have others take over those that still need this engine.
        needed_roles: the pools without whose workers no request can be served.
    """

    count: Callable[[str], int] = lambda engine_id: 0
    migrate: Callable[[str], None] = lambda engine_id: None
    needed_roles: Callable[[], Collection[str]] = lambda: ("prefill", "decode")


class Scaling:
    """Keeps each group of workers at its target.

    Args:
        groups: by key.
        roster: all members; those to begin with are added here.
        supervisor: looks after them.
        burials: of those that leave.
        tasks: for what goes on in the background.
        obligations: of the members.
        on_change: called when a member drains, serves again, or has left.
        gpus: what bounds the groups besides; None: nothing.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        roster: Roster,
        supervisor: Supervisor,
        burials: Burials,
        tasks: BackgroundTasks,
        obligations: Obligations,
        on_change: Callable[[], None],
        gpus: GpuBudget | None = None,
    ) -> None:
        self._groups = groups
        self._roster = roster
        self._supervisor = supervisor
        self._burials = burials
        self._tasks = tasks
        self._obligations = obligations
        self._on_change = on_change
        self._gpus = gpus
        self._targets = {
            key: len(group.places) if group.limits.target is None else group.limits.target
            for key, group in groups.items()
        }
        self._leaving: dict[Replica, asyncio.Task[None]] = {}
        for key, target in self._targets.items():
            for spawn in groups[key].places[:target]:
                roster.add(Replica(spawn, spawn(), groups[key].name))

    def targets(self) -> list[PoolTarget]:
        """What each group is to have, and may have, prefill first."""
        return [
            PoolTarget(group.role, self._targets[key], group.limits.minimum, self._most(key), group.name)
            for key, group in self._groups.items()
        ]

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """Give groups new targets; those that are not named keep theirs. Returns all; the pools follow by and by.

        Args:
            targets: by key, or by role where a pool has one group.

        Raises:
            InvalidRequestError: there is no such pool or group, it may not have so many workers, the GPUs do not
                suffice for them, or nobody would be left in a pool; nothing has changed then.
        """
        wanted: dict[str, int] = {}
        for name, target in targets.items():
            key = self._key_of(name)
            if key in wanted:
                raise InvalidRequestError(f"{key} is given twice")
            wanted[key] = target
        self._check(wanted)
        for key, target in wanted.items():
            if target != self._targets[key]:
                logger.info("%s goes from %d to %d workers", key, self._targets[key], target)
            self._targets[key] = target
            self._fit(key)
        return self.targets()

    def _key_of(self, name: str) -> str:
        """The group that is meant by its key, or by its pool's role if that has one group."""
        if name in self._groups:
            return name
        own = [key for key, group in self._groups.items() if group.role == name]
        if len(own) == 1:
            return own[0]
        if own:
            raise InvalidRequestError(f"the {name} pool has several groups: say which of {', '.join(own)}")
        raise InvalidRequestError(f"there is no pool {name!r}; the pools are {', '.join(self._groups)}")

    def _most(self, key: str) -> int:
        """Workers that a group may have at most; what it has, it may keep."""
        places, target = len(self._groups[key].places), self._targets[key]
        return max(target, self._gpus.most(key, self._targets, places)) if self._gpus is not None else places

    def _check(self, wanted: Mapping[str, int]) -> None:
        after = {**self._targets, **wanted}
        for key, target in wanted.items():
            least, most = self._groups[key].limits.minimum, len(self._groups[key].places)
            if not least <= target <= most:
                raise InvalidRequestError(
                    f"{key} is {target}, it must be in [{least}, {most}], its min_ and max_replicas"
                )
        for role in self._obligations.needed_roles():
            own = [key for key, group in self._groups.items() if group.role == role]
            if not wanted.keys().isdisjoint(own) and not any(after[key] for key in own):
                raise InvalidRequestError(f"nobody would be left in the {role} pool: one of {', '.join(own)} needs 1")
        if self._gpus is not None and any(after[key] > self._targets[key] for key in wanted):
            self._gpus.check(after)

    def _fit(self, key: str) -> None:
        """Add or take away members until as many stay as the target says."""
        group = self._groups[key]
        replicas = [replica for replica in self._roster.pool(group.role) if replica.group == group.name]
        staying = [replica for replica in replicas if replica not in self._leaving]
        missing = self._targets[key] - len(staying)
        if missing < 0:
            for replica in sorted(staying, key=self._worth)[: len(staying) - self._targets[key]]:
                self._let_go(replica)
        # Whoever drains still serves as well as a new one would, and is there already: the busiest first.
        returning = [replica for replica in replicas if replica in self._leaving and replica.state == "draining"]
        for replica in sorted(returning, key=self._worth, reverse=True)[: max(0, missing)]:
            self._leaving.pop(replica).cancel()
            replica.state = "ready"
            missing -= 1
        held = {replica.spawn for replica in replicas}
        free = [spawn for spawn in group.places if spawn not in held]
        for spawn in free[: max(0, missing)]:
            self._add(spawn, group)
        self._on_change()

    def _worth(self, replica: Replica) -> tuple[bool, int, float]:
        """Who goes last when the pool shrinks: who serves, who has the most requests, who has been there longest."""
        return replica.state == "ready", self._obligations.count(replica.engine_id), -replica.ready_since

    def _add(self, spawn: Spawn, group: Group) -> None:
        replica = Replica(spawn, spawn(), group.name)
        self._roster.add(replica)
        replica.life = self._tasks.spawn(self._supervisor.look_after(replica, started=False))

    def _let_go(self, replica: Replica) -> None:
        if replica.serves:
            replica.state = "draining"
        self._leaving[replica] = self._tasks.spawn(self._finish(replica))

    async def _finish(self, replica: Replica) -> None:
        """Let a member finish what it has, and stop it. Cancelled if it is wanted again before it has finished."""
        if replica.state == "draining":
            await self._drained(replica)
        replica.state = "lost"
        if replica.life is not None:
            replica.life.cancel()
            await asyncio.wait({replica.life})
        await self._burials.bury(replica)  # as when it is lost
        del self._leaving[replica]
        self._roster.remove(replica)
        logger.info("%s has left", replica.engine_id)
        self._fit(replica.group_key)  # its place is free, and may be wanted

    async def _drained(self, replica: Replica) -> None:
        """Until nothing needs a member, or it is lost, or its patience is at an end."""
        limit_s = self._groups[replica.group_key].limits.drain_timeout_s
        clock = asyncio.get_running_loop().time
        patience_ends, given_up = clock() + limit_s, False
        while replica.state == "draining" and not self._idle(replica):
            if clock() >= patience_ends:
                if given_up:
                    return
                logger.info("%s did not finish within %g s: its requests are handed on", replica.engine_id, limit_s)
                self._obligations.migrate(replica.engine_id)
                patience_ends, given_up = clock() + _HAND_ON_S, True
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def _idle(self, replica: Replica) -> bool:
        """Whether no request needs a member, and nothing is pinned there."""
        load = replica.load
        at_rest = not (
            load.running or load.waiting or load.preempted or load.reserved_blocks or load.quarantined_blocks
        )
        return at_rest and not self._obligations.count(replica.engine_id)
