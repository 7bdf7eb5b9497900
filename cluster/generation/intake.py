"""What is done with requests before they are requests: reading, checking, writing conversations out, tokenising."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from cluster.caller import current_caller
from cluster.generation.turns import Turns
from workers.errors import DeadlineExceededError

AT_ONCE_BYTES = 4096
"""Work on so much is done in less time than another thread takes to hear of it."""
LARGE_BYTES = 64 * 1024
WORK_LIMIT_S = 30.0
"""For the work on one request, once it has begun."""
_SMALL_THREADS = 2
_LARGE_THREADS = max(2, min(4, os.cpu_count() or 1))

_T = TypeVar("_T")


class Intake:
    """Does it off the event loop: bounded in number and in time, and by turns of clients.

    Small work has threads of its own, which large work never takes. Of the places for large work one client leaves one
    to others. Work that has begun cannot be stopped: its place is held until it ends, whether somebody waits for it or
    not, so that who gives up and comes again does not get more.

    Args:
        small_threads: for work on up to `LARGE_BYTES`.
        large_threads: for all other.
        limit_s: for one piece of work.
    """

    def __init__(
        self,
        small_threads: int = _SMALL_THREADS,
        large_threads: int = _LARGE_THREADS,
        limit_s: float = WORK_LIMIT_S,
    ) -> None:
        self._limit_s = limit_s
        self._small = _Lane(small_threads, "small")
        self._large = _Lane(large_threads, "large")

    async def run(self, num_bytes: int, work: Callable[[], _T]) -> _T:
        """Do a piece of work, at once if it is a small one.

        Args:
            num_bytes: that it works on.
            work: may be called by another thread.

        Raises:
            QueueFullError: too much waits, or it would wait too long.
            DeadlineExceededError: it takes longer than is allowed.
            Exception: what it raises.
        """
        if num_bytes <= AT_ONCE_BYTES:
            return work()
        lane = self._small if num_bytes <= LARGE_BYTES else self._large
        client = current_caller().client
        await lane.turns.take(client, num_bytes)
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(lane.executor, work)
        done.add_done_callback(lambda _: lane.turns.give_back(client))
        done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # perhaps nobody waits any more
        finished, _ = await asyncio.wait({done}, timeout=self._limit_s)
        if not finished:
            raise DeadlineExceededError(f"reading and checking the request took longer than {self._limit_s:g} s")
        return done.result()

    async def call(self, num_bytes: int, work: Callable[..., _T], *args: object, **kwargs: object) -> _T:
        """The same of a function and its arguments."""
        return await self.run(num_bytes, partial(work, *args, **kwargs))


class _Lane:
    """Threads, and whose turn it is on them."""

    def __init__(self, threads: int, name: str) -> None:
        self.turns = Turns(threads, f"to be read, as {name} ones")
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix=f"intake-{name}")
