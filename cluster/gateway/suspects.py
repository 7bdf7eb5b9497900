"""Requests that were on a worker when it crashed: which of them did it, found out one at a time.

A request that crashes what computes it would crash a worker with each attempt, and again with each of its client's, and
would spend the attempts of all requests beside it. So all that were on a crashed worker are suspects. They go on one
after the other, each until it is some tokens further than it was: a second crash then is the doing of the one whose
turn it is. It is tried no more, and for a while neither is any request of the same prompt and settings. The others lose
nothing but time.

What takes one worker along may take others, of which that is noticed later, and they would seem to have crashed in
somebody's turn. So a turn begins only when every worker that was there at the crash has been heard again or is lost.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.errors import CrashingRequestError

CLEARED_AFTER = 4
"""Tokens that a suspect must have generated since the crash: what crashed its worker would have come back by then."""
SETTLE_S = 0.25
"""Nobody's turn comes sooner after a crash: a node that is lost takes several workers along, noticed one by one."""
MOST_SETTLE_S = 10.0
"""Nobody waits longer for workers to be heard: those that stay silent are lost before."""
LOOK_S = 0.05
"""How often is looked whether all have been heard."""
REMEMBERED_S = 600.0
_MOST = 1024


class Turn:
    """A suspect's turn, until it is ended."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock: asyncio.Lock | None = lock

    def end(self) -> None:
        """It is somebody else's turn; again changes nothing."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None


class Suspects:
    """Who was on a worker that crashed.

    Args:
        clock: seconds.
        watch: called at a crash; what it returns says whether every worker that was there then has been heard since.
    """

    def __init__(self, clock: Callable[[], float] = now, watch: Callable[[], Callable[[], bool]] | None = None) -> None:
        self._clock = clock
        self._watch = watch or (lambda: lambda: True)
        self._all_heard = self._watch()
        self._crashes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._turn = asyncio.Lock()
        self._settled_at = 0.0

    def __len__(self) -> int:
        return len(self._crashes)

    def check(self, request: EngineRequest) -> None:
        """Refuse a request that is known to crash workers.

        Raises:
            CrashingRequestError: it is.
        """
        if self._crashes and self._count(key_of(request)) > 1:
            raise CrashingRequestError(
                "a request with this prompt and these settings has crashed two workers; "
                f"it is not tried again for {REMEMBERED_S / 60:.0f} minutes"
            )

    async def turn(self, request: EngineRequest) -> Turn | None:
        """Wait for a suspect's turn, in which no other suspect runs; None: it is no suspect, and needs none."""
        if not self._crashes or not self._count(key_of(request)):
            return None
        await self._turn.acquire()
        turn = Turn(self._turn)
        try:
            await asyncio.sleep(max(0.0, self._settled_at - self._clock()))
            while not self._all_heard() and self._clock() < self._settled_at + MOST_SETTLE_S:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
        except BaseException:
            turn.end()
            raise
        return turn

    def crashed(self, request: EngineRequest, in_its_turn: bool) -> None:
        """A worker crashed with this request on it, which is suspected, or guilty if it was in a suspect's turn.

        Only that convicts: a prompt that many ask is on one worker several times, and on others that are lost
        meanwhile for reasons of their own.
        """
        key = key_of(request)
        self._crashes[key] = (2 if in_its_turn else max(self._count(key), 1), self._clock())
        self._crashes.move_to_end(key)
        self._settled_at, self._all_heard = self._clock() + SETTLE_S, self._watch()
        while len(self._crashes) > _MOST:
            self._crashes.popitem(last=False)

    def cleared(self, request: EngineRequest) -> None:
        """It is further than when its worker crashed."""
        self._crashes.pop(key_of(request), None)

    def _count(self, key: bytes) -> int:
        count, at = self._crashes.get(key, (0, 0.0))
        if count and self._clock() - at > REMEMBERED_S:
            del self._crashes[key]
            return 0
        return count


def key_of(request: EngineRequest) -> bytes:
    """What a request computes: its prompt and how tokens are chosen, whatever the seed."""
    settings = repr(replace(request.sampling, seed=0))
    return hashlib.blake2b(request.prompt_token_ids.tobytes() + b"\0" + settings.encode(), digest_size=16).digest()
