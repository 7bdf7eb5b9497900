"""Looks after the members: starts their workers, notices when they fall silent, replaces those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from cluster.errors import WorkerLostError
from cluster.pools.handshake import Handshakes
from cluster.pools.heartbeat import listen_for
from cluster.pools.pinned_identity import PinnedIdentity
from cluster.pools.replica import Replica, Roster
from cluster.pools.streams import OutputStreams
from cluster.worker_handle import LoadProgress
from workers.messages import Load

logger = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
"""Before a worker's first replacement, the second, …; the last one from then on."""
_STEADY_AFTER_S = 60.0


class Supervisor:
    """What keeps every place in the pools held.

    Args:
        roster: all members.
        handshakes: of those that have started.
        streams: what the workers say; the end of a stream, or silence on it, is the loss of its worker.
        on_change: called when a worker became ready or was lost; for a lost one with its engine id.
        progress: told how far loading is.
        silence_s: a worker that says nothing for so long is lost; None: only one whose output ends.
    """

    def __init__(
        self,
        roster: Roster,
        handshakes: Handshakes,
        streams: OutputStreams,
        on_change: Callable[[str | None], None],
        progress: LoadProgress,
        silence_s: float | None,
    ) -> None:
        self._roster = roster
        self._handshakes = handshakes
        self._streams = streams
        self._on_change = on_change
        self._progress = progress
        self._silence_s = silence_s
        self._said: dict[str, str] = {}
        self._pinned_identity = PinnedIdentity()

    async def start(self, replica: Replica) -> None:
        """Have a member's worker load, measure itself and meet its peers: then it takes requests.

        Raises:
            BatonError: it could not start, or is not of the model that the others are of.
        """
        info = await replica.handle.start(self._progress)
        self._pinned_identity.check(info)
        replica.info = info
        replica.load = Load(replica.info.num_blocks, replica.info.num_blocks)
        self._roster.know(replica)
        async with self._handshakes.one_at_a_time:
            await self._handshakes.handshake(replica)
            replica.state = "ready"
            replica.ready_since = time.monotonic()
        self._on_change(None)

    async def look_after(self, replica: Replica, *, started: bool) -> None:
        """Have what a member's worker says read, and replace it whenever it is lost, unless it was to leave anyway."""
        if not started and not await self._try_to_start(replica):
            await self._replace(replica)
        while True:
            await self._until_lost(replica)
            if not await self._lose(replica):
                return
            await self._replace(replica)

    async def _until_lost(self, replica: Replica) -> None:
        """Until the worker's stream ends or falls silent."""
        stream = self._streams.open(replica)
        try:
            await listen_for(stream.ended, lambda: stream.num_heard, self._silence_s)
        except WorkerLostError as error:
            logger.warning("lost %s: %s", replica.engine_id, error)
        except Exception:
            logger.exception("lost touch with %s", replica.engine_id)

    async def _lose(self, replica: Replica) -> bool:
        """Bury a worker; whether another one is wanted in its place."""
        lost, wanted = replica.engine_id, replica.state != "draining"
        replica.state = "lost"
        if time.monotonic() - replica.ready_since > _STEADY_AFTER_S:
            replica.restarts = 0
        self._roster.forget(lost)
        self._on_change(lost)  # at once: its requests need not wait until it is buried
        self._handshakes.disconnect(
            replica, await replica.handle.stop()
        )  # its peers are told when it has ended, if it can
        return wanted

    def _say_once(self, name: str, reason: str) -> None:
        """That a worker could not start, unless it was said before and for the same reason."""
        if self._said.get(name) != reason:
            logger.warning("could not start %s: %s; it is tried again and again", name, reason)
        self._said[name] = reason

    async def _replace(self, replica: Replica) -> None:
        began = time.monotonic()
        while True:
            delay = RESTART_DELAYS_S[min(replica.restarts, len(RESTART_DELAYS_S) - 1)]
            replica.restarts += 1
            await asyncio.sleep(delay)
            replica.renew()
            if await self._try_to_start(replica):
                self._said.pop(replica.handle.name, None)
                seconds = time.monotonic() - began
                logger.warning(
                    "%s is back, %.1f s after it was lost: %s", replica.handle.name, seconds, replica.engine_id
                )
                return

    async def _try_to_start(self, replica: Replica) -> bool:
        try:
            await self.start(replica)
        except Exception as error:
            self._say_once(replica.handle.name, f"{type(error).__name__}: {error}")
            self._roster.forget(replica.engine_id)
            replica.state = "lost"
            replica.info = None
            with contextlib.suppress(Exception):
                await replica.handle.stop()
            return False
        return True
