"""Notices a start that will not end: the process does not answer any more, or takes far longer than its like did."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from cluster.errors import WorkerSilentError, WorkerStuckError
from cluster.pools.patience import Patience
from cluster.pools.replica import Replica
from cluster.worker_handle import LoadProgress, StartProgress
from workers.worker_host import WorkerInfo

ROUND_S = 1.0
_TO_BE_BORN = 3
"""So many times as long as a process that has answered may be silent may it take to come to its first answer."""


class StartWatch:
    """Watches starts, and learns how long they take.

    Until a worker's processes run, or are known to be on their way, nothing is counted: room may have to be waited for.
    From then on the handle tells how far it is several times a second, as long as all of its processes answer. Time is
    counted in rounds, so that a moment in which this process is held up costs no start.

    Args:
        patience: with them.
        progress: told how far loading is.
    """

    def __init__(self, patience: Patience, progress: LoadProgress) -> None:
        self._patience = patience
        self._progress = progress
        self._longest_s: dict[str, float] = {}

    async def start(self, replica: Replica) -> WorkerInfo:
        """Have a member's worker start.

        Raises:
            WorkerSilentError: a process of it has stopped answering.
            WorkerStuckError: it takes too long.
            Exception: what the start raises.
        """
        told = _Told(self._progress)
        starting = asyncio.ensure_future(replica.handle.start(told))
        limit_s = self._patience.start_s(self._longest_s.get(replica.group_key), replica.restarts)
        try:
            await self._watch(starting, told, limit_s)
            info = starting.result()
        finally:
            if not starting.done():
                starting.cancel()
                await asyncio.wait({starting})
        if told.began_at is not None:
            seconds = time.monotonic() - told.began_at
            self._longest_s[replica.group_key] = max(seconds, self._longest_s.get(replica.group_key, 0.0))
        return info

    async def _watch(self, starting: asyncio.Future[WorkerInfo], told: _Told, limit_s: float) -> None:
        silent = rounds = last = 0
        while not (await asyncio.wait({starting}, timeout=ROUND_S))[0]:
            if told.began_at is None:
                continue
            rounds += 1
            silent, last = (0, told.times) if told.times != last else (silent + 1, last)
            if silent * ROUND_S >= self._patience.start_silence_s * (1 if told.answers else _TO_BE_BORN):
                raise WorkerSilentError(f"its process does not answer any more while it starts ({told.at})")
            if rounds * ROUND_S >= limit_s:
                raise WorkerStuckError(f"its start has taken {limit_s:.0f} s ({told.at}), as many as are allowed")


class _Told:
    """How far a start is; called as `LoadProgress` is, from any thread."""

    def __init__(self, progress: Callable[[str, StartProgress], None]) -> None:
        self._progress = progress
        self.times = 0
        self.began_at: float | None = None
        self.answers = False
        self.at = "nothing is loaded yet"

    def __call__(self, name: str, progress: StartProgress) -> None:
        self.began_at = time.monotonic() if self.began_at is None else self.began_at
        self.times += 1
        share = 100 * progress.done / progress.total if progress.total else math.nan
        if progress.stage == "process":
            self.answers = progress.done == progress.total
            return
        self.at = f"{progress.stage}: {share:.0f} %"
        self._progress(name, progress)
