"""The end of workers: stopped, confirmed, and told to the peers that they could have written to."""

from __future__ import annotations

import asyncio

from cluster.pools.handshake import Handshakes
from cluster.pools.replica import Replica, Roster
from cluster.pools.tasks import BackgroundTasks
from cluster.worker_handle import WorkerHandle

ASK_AGAIN_S = 2.0
"""From the first question that was not answered to the next; each later one takes twice as long."""
_LONGEST_S, _LONGEST_IDLY_S = 60.0, 600.0


class Burials:
    """Stops members' workers, and goes on asking after those whose end nobody could confirm.

    Their machine may be out of reach or frozen and come back, with them on it: it is asked to end them. Until it says
    that it has, peers keep the blocks out that these might write to.

    Args:
        roster: all members.
        handshakes: through which peers are told.
        tasks: for what goes on in the background.
    """

    def __init__(self, roster: Roster, handshakes: Handshakes, tasks: BackgroundTasks) -> None:
        self._roster = roster
        self._handshakes = handshakes
        self._tasks = tasks

    async def bury(self, replica: Replica) -> None:
        """Stop a member's worker, and tell its peers when that is done, as far as it can be."""
        handle, gone = replica.handle, replica.engine_id
        confirmed = await handle.stop()
        self._handshakes.disconnect(replica, confirmed)
        if not confirmed:
            self._tasks.spawn(self._confirm(handle, gone))

    async def _confirm(self, handle: WorkerHandle, gone: str) -> None:
        delay_s = ASK_AGAIN_S
        while True:
            await asyncio.sleep(delay_s)
            if await handle.has_ended():
                self._handshakes.confirm_end(gone, handle.role)
                return
            awaited = any(peer.load.quarantined_blocks for peer in self._roster if peer.handle.role != handle.role)
            delay_s = min(2.0 * delay_s, _LONGEST_S if awaited else _LONGEST_IDLY_S)
