"""Looks after the members: starts their workers, listens to them, replaces those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from cluster.errors import WorkerLostError
from cluster.pools.heartbeat import listen_for
from cluster.pools.introduction import Introductions
from cluster.pools.member import Member, Roster
from cluster.worker_handle import LoadProgress
from workers.messages import Load, StepOutput

logger = logging.getLogger(__name__)

_RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
_STEADY_AFTER_S = 60.0


class Caretaker:
    """What keeps every place in the pools held.

    Args:
        roster: all members.
        introductions: of those that have started.
        on_output: takes every step's output.
        on_change: called when a worker became ready or was lost; for a lost one with its engine id.
        progress: told how far loading is.
        silence_s: a worker that says nothing for so long is lost; None: only one whose output ends.
    """

    def __init__(
        self,
        roster: Roster,
        introductions: Introductions,
        on_output: Callable[[StepOutput], None],
        on_change: Callable[[str | None], None],
        progress: LoadProgress,
        silence_s: float | None,
    ) -> None:
        self._roster = roster
        self._introductions = introductions
        self._on_output = on_output
        self._on_change = on_change
        self._progress = progress
        self._silence_s = silence_s

    async def start(self, member: Member) -> None:
        """Have a member's worker load, measure itself and meet its peers: then it takes requests.

        Raises:
            BatonError: it could not start.
        """
        member.info = await member.handle.start(self._progress)
        member.load = Load(member.info.num_blocks, member.info.num_blocks)
        self._roster.know(member)
        async with self._introductions.one_at_a_time:
            await self._introductions.introduce(member)
            member.state = "ready"
            member.ready_since = time.monotonic()
        self._on_change(None)

    async def look_after(self, member: Member, *, started: bool) -> None:
        """Pass on what a member's worker says, and replace it whenever it is lost, unless it was to leave anyway."""
        if not started and not await self._try_to_start(member):
            await self._replace(member)
        while True:
            await self._listen(member)
            if not await self._lose(member):
                return
            await self._replace(member)

    async def _listen(self, member: Member) -> None:
        """Until the worker is lost."""
        try:
            await listen_for(asyncio.ensure_future(self._pass_on(member)), lambda: member.num_heard, self._silence_s)
        except WorkerLostError as error:
            logger.warning("%s: %s", member.engine_id, error)
        except Exception:
            logger.exception("lost touch with %s", member.engine_id)

    async def _pass_on(self, member: Member) -> None:
        async for batch in member.handle.outputs():
            member.num_heard += 1
            for output in batch:
                member.load = output.load
                self._on_output(output)

    async def _lose(self, member: Member) -> bool:
        """Bury a worker; whether another one is wanted in its place."""
        lost, wanted = member.engine_id, member.state != "draining"
        member.state = "lost"
        if time.monotonic() - member.ready_since > _STEADY_AFTER_S:
            member.restarts = 0
        self._roster.forget(lost)
        self._on_change(lost)  # at once: its requests need not wait until it is buried
        self._introductions.part(member, await member.handle.stop())  # its peers are told when it has ended, if it can
        return wanted

    async def _replace(self, member: Member) -> None:
        while True:
            delay = _RESTART_DELAYS_S[min(member.restarts, len(_RESTART_DELAYS_S) - 1)]
            member.restarts += 1
            await asyncio.sleep(delay)
            member.renew()
            if await self._try_to_start(member):
                return

    async def _try_to_start(self, member: Member) -> bool:
        try:
            await self.start(member)
        except Exception as error:
            logger.warning("could not start %s: %s: %s", member.handle.name, type(error).__name__, error)
            self._roster.forget(member.engine_id)
            member.state = "lost"
            member.info = None
            with contextlib.suppress(Exception):
                await member.handle.stop()
            return False
        return True
