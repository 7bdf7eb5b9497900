"""How workers of the two pools get to know each other, and what is remembered of those that do not fit.

Meeting is a worker's canary: before the first request is placed on it, it moves real data to every worker that it will
work with and has data moved to it, over the very path that handoffs take, and a message goes there and back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from cluster.errors import WorkerLostError
from cluster.pools.member import Member, Roster
from cluster.pools.tasks import BackgroundTasks
from kv_transfer.errors import KVTransferError, LayoutMismatchError
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

_RECONCILE_INTERVAL_S = 2.0


class Introductions:
    """Introduces new members to those of the other pool.

    Args:
        roster: all members.
        tasks: for what goes on in the background.
        on_change: called when two that could not reach each other can.
    """

    def __init__(self, roster: Roster, tasks: BackgroundTasks, on_change: Callable[[], None]) -> None:
        self._roster = roster
        self._tasks = tasks
        self._on_change = on_change
        self.one_at_a_time = asyncio.Lock()
        """Held from a member's introduction until its state says that it may be introduced to others."""

    async def introduce(self, member: Member) -> None:
        """Make a new worker and every serving one of the other pool known to each other."""
        member.refusals, member.estranged = {}, {}
        for peer in self._roster.peers(member):
            if not peer.serves:  # it has left while others were met
                continue
            try:
                await _meet(member, peer)
            except LayoutMismatchError as error:
                member.refusals[peer.engine_id] = str(error)
                logger.warning("%s", error)
            except (KVTransferError, WorkerLostError) as error:
                member.estranged[peer.engine_id] = str(error)
                logger.warning("%s and %s cannot meet: %s", member.engine_id, peer.engine_id, error)
                self._tasks.spawn(self._reconcile(member, peer))

    def part(self, member: Member) -> None:
        """A member's worker is gone, and writes nothing any more: its peers drop it."""
        gone = member.engine_id
        for peer in self._roster:
            peer.refusals.pop(gone, None)
            peer.estranged.pop(gone, None)
        for peer in self._roster.pool("decode" if member.handle.role == "prefill" else "prefill"):
            if peer.info is not None and peer.state != "lost":  # one that starts may be about to meet it, in vain
                peer.handle.disconnect(gone)

    def check_some_pair_works(self) -> None:
        """Refuse pools of which no two workers fit.

        Raises:
            ConfigError: with the first reason.
        """
        refusals = [why for member in self._roster for why in (member.refusals | member.estranged).values()]
        pairs = len(self._roster.pool("prefill")) * len(self._roster.pool("decode"))
        if refusals and len(refusals) == pairs:
            raise ConfigError("no prefill worker can hand over to any decode worker: " + refusals[0])

    async def _reconcile(self, one: Member, other: Member) -> None:
        """Introduce two workers again and again until they reach each other or one of them is gone."""
        names = (one.engine_id, other.engine_id)
        while True:
            await asyncio.sleep(_RECONCILE_INTERVAL_S)
            if any(self._roster.find(name) is None for name in names) or not (one.serves and other.serves):
                return
            with contextlib.suppress(KVTransferError, WorkerLostError):
                await _meet(one, other)
                one.estranged.pop(names[1], None)
                self._on_change()
                return


async def _meet(one: Member, other: Member) -> None:
    assert one.info is not None
    assert other.info is not None
    await one.handle.connect(other.info.engines)
    await other.handle.connect(one.info.engines)
    seconds = await one.handle.probe(other.engine_id)
    logger.info("%s and %s: round trip %.1f ms", one.engine_id, other.engine_id, seconds * 1e3)
