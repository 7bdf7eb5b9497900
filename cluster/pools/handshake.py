"""How workers of the two pools get to know each other, and what is remembered of those that do not fit.

Meeting is a worker's canary: before the first request is placed on it, it moves real data to every worker that it will
work with and has data moved to it, over the very path that handoffs take, and a message goes there and back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.errors import WorkerLostError
from cluster.pools.replica import Replica, Roster
from cluster.pools.tasks import BackgroundTasks
from kv_transfer.errors import KVTransferError, LayoutMismatchError
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

RECONCILE_INTERVAL_S = 2.0
"""From one attempt of two that cannot reach each other to the next."""
MEETING_PATIENCE_S = 60.0
"""How long a new member meets the others one by one while nobody else may; those that are left it meets by and by."""
START_PATIENCE_S = 60.0
"""How long a start waits until some pair has met; a meeting that fails takes up to 30 s."""
_LOOK_INTERVAL_S = 0.05


class Handshakes:
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

    async def handshake(self, replica: Replica) -> None:
        """Make a new worker and every serving one of the other pool known to each other."""
        replica.unsupported_reasons, replica.unreachable_peers, replica.links = {}, {}, {}
        replica.peer_endpoints = {}
        clock = asyncio.get_running_loop().time
        patience_ends = clock() + MEETING_PATIENCE_S
        for peer in self._roster.peers(replica):
            if not peer.serves:  # it has left while others were met
                continue
            if clock() >= patience_ends:  # those before it did not answer: others are not to wait for this one
                replica.unreachable_peers[peer.engine_id] = "they have not met yet"
                self._tasks.spawn(self._reconcile(replica, peer, delay_s=0.0))
                continue
            try:
                await _handshake(replica, peer)
            except LayoutMismatchError as error:
                replica.unsupported_reasons[peer.engine_id] = str(error)
                logger.warning("%s %s", replica.engine_id, error)
            except (KVTransferError, WorkerLostError) as error:
                replica.unreachable_peers[peer.engine_id] = str(error)
                logger.warning("%s and %s cannot meet: %s", replica.engine_id, peer.engine_id, error)
                self._tasks.spawn(self._reconcile(replica, peer))

    def disconnect(self, replica: Replica, confirmed_dead: bool) -> None:
        """A member's worker is gone, or as good as gone: its peers drop it, and know whether it can still write."""
        gone = replica.engine_id
        for peer in self._roster:
            peer.unsupported_reasons.pop(gone, None)
            peer.unreachable_peers.pop(gone, None)
            peer.links.pop(gone, None)
            peer.peer_endpoints.pop(gone, None)
        self._tell(gone, replica.handle.role, confirmed_dead)

    def confirm_end(self, gone: str, role: str) -> None:
        """It is known by now that a worker has ended whose peers were told that it is lost."""
        self._tell(gone, role, True)

    def _tell(self, gone: str, role: str, confirmed_dead: bool) -> None:
        for peer in self._roster:
            # One that starts may be about to meet it, in vain.
            if peer.handle.role != role and peer.info is not None and peer.state != "lost":
                peer.handle.disconnect(gone, confirmed_dead)

    def connections_broke(self, replica: Replica, peers: Mapping[str, str]) -> None:
        """A worker says whose connection to it is broken: no request goes there until the two have met anew.

        What it says of an endpoint other than the last is older than their handshake.
        """
        for engine_id, endpoint in peers.items():
            peer = self._roster.find(engine_id)
            if peer is None or not (peer.serves and replica.serves):
                continue
            if engine_id in replica.unreachable_peers or replica.engine_id in peer.unreachable_peers:
                continue
            if endpoint != replica.peer_endpoints.get(engine_id):
                continue
            replica.unreachable_peers[engine_id] = "the connection broke"
            logger.warning("the connection between %s and %s broke", replica.engine_id, engine_id)
            self._on_change()
            self._tasks.spawn(self._reconcile(replica, peer, delay_s=0.0))

    async def check_some_pair_works(self) -> None:
        """Refuse pools of which no two workers fit; those that only could not reach each other get time to.

        Raises:
            ConfigError: with the first reason.
        """
        clock = asyncio.get_running_loop().time
        patience_ends = clock() + START_PATIENCE_S
        pairs = len(self._roster.pool("prefill")) * len(self._roster.pool("decode"))
        while True:
            refused = [why for replica in self._roster for why in replica.unsupported_reasons.values()]
            unreachable_peers = [why for replica in self._roster for why in replica.unreachable_peers.values()]
            if not pairs or len(refused) + len(unreachable_peers) < pairs:
                return
            if not unreachable_peers or clock() >= patience_ends:
                raise ConfigError(
                    f"no prefill worker can hand over to any decode worker: {(unreachable_peers + refused)[0]}"
                )
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _reconcile(self, one: Replica, other: Replica, delay_s: float = RECONCILE_INTERVAL_S) -> None:
        """Introduce two workers again and again until they reach each other or one of them is gone."""
        names = (one.engine_id, other.engine_id)
        while True:
            await asyncio.sleep(delay_s)
            delay_s = RECONCILE_INTERVAL_S
            if any(self._roster.find(name) is None for name in names):
                return
            if "starting" in (one.state, other.state):  # it is still meeting others
                continue
            if not (one.serves and other.serves):
                return
            with contextlib.suppress(KVTransferError, WorkerLostError):
                await _handshake(one, other)
                one.unreachable_peers.pop(names[1], None)
                self._on_change()
                return


async def _handshake(one: Replica, other: Replica) -> None:
    assert one.info is not None
    assert other.info is not None
    mine = await one.handle.new_endpoint(other.info.engines)  # a connection that broke is of no more use
    theirs = await other.handle.new_endpoint(one.info.engines)
    one.peer_endpoints[other.engine_id], other.peer_endpoints[one.engine_id] = theirs[0].endpoint, mine[0].endpoint
    await one.handle.connect(theirs)
    await other.handle.connect(mine)
    seconds = await one.handle.probe(other.engine_id)
    prefill, decode = (one, other) if one.handle.role == "prefill" else (other, one)
    link = await prefill.handle.link_to(decode.engine_id)
    if link is not None:  # to the router its delay is posting a WRITE and half of the round trip
        prefill.links[decode.engine_id] = replace(link, write_s=link.write_s + seconds / 2)
    logger.info("%s and %s: round trip %.1f ms", one.engine_id, other.engine_id, seconds * 1e3)
