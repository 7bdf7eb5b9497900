"""Looks after the members: starts their workers, notices when they fall silent, replaces those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from cluster.errors import WorkerLostError, WorkerSilentError
from cluster.pools.burials import Burials
from cluster.pools.handshake import Handshakes
from cluster.pools.listening import listen_for, look_at_progress
from cluster.pools.patience import Patience
from cluster.pools.pinned_identity import PinnedIdentity
from cluster.pools.replica import Loss, Replica, Roster
from cluster.pools.start_watch import StartWatch
from cluster.pools.streams import OutputStreams
from cluster.pools.tasks import BackgroundTasks
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
        burials: of those that are lost.
        tasks: for what goes on in the background.
        streams: what the workers say; the end of a stream, silence on it, or heartbeats that tell of a step which does
            not end, are the loss of its worker.
        on_change: called when a worker became ready, stalled, or was lost; for a lost one with its loss.
        progress: told how far loading is.
        patience: with all of them.
        pinned: whose KV cache they are to keep.
    """

    def __init__(
        self,
        roster: Roster,
        handshakes: Handshakes,
        burials: Burials,
        tasks: BackgroundTasks,
        streams: OutputStreams,
        on_change: Callable[[Loss | None], None],
        progress: LoadProgress,
        patience: Patience,
        pinned: PinnedIdentity,
    ) -> None:
        self._roster = roster
        self._handshakes = handshakes
        self._burials = burials
        self._tasks = tasks
        self._streams = streams
        self._on_change = on_change
        self._patience = patience
        self._starts = StartWatch(patience, progress)
        self._said: dict[str, str] = {}
        self._pinned_identity = pinned

    async def start(self, replica: Replica) -> None:
        """Have a member's worker load, measure itself and meet its peers: then it takes requests.

        Raises:
            BatonError: it could not start, or is not of the model that the others are of, or was lost meanwhile.
        """
        info = await self._starts.start(replica)
        self._pinned_identity.check(info)
        replica.info = info
        replica.load = Load(replica.info.num_blocks, replica.info.num_blocks)
        self._roster.know(replica)
        listening = replica.listening = self._tasks.spawn(self._listen(replica))
        meeting = asyncio.ensure_future(self._meet(replica))
        try:
            await asyncio.wait({meeting, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not meeting.done():  # a worker that freezes now would hold up everybody who is to meet it
                listening.result()
                raise WorkerLostError(f"{replica.engine_id} ended its output")
            meeting.result()
        except BaseException:
            for task in (meeting, listening):
                task.cancel()
            await asyncio.gather(meeting, listening, return_exceptions=True)
            raise
        self._on_change(None)

    async def _meet(self, replica: Replica) -> None:
        async with self._handshakes.one_at_a_time:
            await self._handshakes.handshake(replica)
            replica.state = "ready"
            replica.ready_since = time.monotonic()

    async def _listen(self, replica: Replica) -> None:
        """Until a worker's stream ends, or it is silent, or does not get on."""

        def look() -> None:
            if look_at_progress(replica, self._patience):
                if replica.state == "stalled":
                    logger.warning("%s gets no requests while its step takes so long", replica.engine_id)
                self._on_change(None)

        stream = self._streams.open(replica)
        await listen_for(stream.ended, lambda: stream.num_heard, self._patience.silence_s, look)

    async def look_after(self, replica: Replica, *, started: bool) -> None:
        """Have what a member's worker says read, and replace it whenever it is lost, unless it was to leave anyway."""
        if not started and not await self._try_to_start(replica):
            await self._replace(replica)
        while True:
            crashed = await self._until_lost(replica)
            if not await self._lose(replica, crashed):
                return
            await self._replace(replica)

    async def _until_lost(self, replica: Replica) -> bool:
        """Until the worker is lost; whether a request may be the cause, which makes no process fall silent."""
        assert replica.listening is not None
        try:
            await replica.listening
        except WorkerLostError as error:
            logger.warning("lost %s: %s", replica.engine_id, error)
            return not isinstance(error, WorkerSilentError)
        except Exception:
            logger.exception("lost touch with %s", replica.engine_id)
        return True

    async def _lose(self, replica: Replica, crashed: bool) -> bool:
        """Bury a worker; whether another one is wanted in its place."""
        lost, wanted = replica.engine_id, replica.state != "draining"
        replica.state = "lost"
        if time.monotonic() - replica.ready_since > _STEADY_AFTER_S:
            replica.restarts = 0
        self._roster.forget(lost)
        self._on_change(Loss(lost, crashed))  # at once: its requests need not wait until it is buried
        await self._burials.bury(replica)  # its peers are told when it has ended, if it can
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
            with contextlib.suppress(Exception):
                if replica.info is None:
                    await replica.handle.stop()
                else:  # some peers may have met it
                    await self._burials.bury(replica)
            replica.info = None
            return False
        return True
