"""Places that clients take by turns, so that nobody's many or long jobs hold up another's."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import QueueFullError

MAX_WAITING = 4096
MAX_WAITING_BYTES = 256 * 2**20
"""Of what those have sent that wait."""
MAX_WAIT_S = 30.0


class Turns:
    """A bounded number of places, and whoever waits for one. Used by one event loop.

    A free place goes to the client that had one longest ago. While others wait or may come, one client holds no more
    places than leave one for somebody else.

    Args:
        places: that are held at once.
        what: is waited for, in words.
        max_waiting: jobs that may wait.
        max_waiting_bytes: that they may hold together.
        max_wait_s: the longest that one may wait.
    """

    def __init__(
        self,
        places: int,
        what: str,
        *,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._free = places
        self._share = max(1, places - 1)
        self._what = what
        self._max_waiting, self._max_waiting_bytes, self._max_wait_s = max_waiting, max_waiting_bytes, max_wait_s
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._num_waiting = self._bytes_waiting = 0

    @asynccontextmanager
    async def turn(self, client: str, num_bytes: int = 0) -> AsyncIterator[None]:
        """Hold a place, after waiting for it.

        Args:
            client: whose turn it is.
            num_bytes: that are held while it waits.

        Raises:
            QueueFullError: too many wait, or the wait was too long.
        """
        await self.take(client, num_bytes)
        try:
            yield
        finally:
            self.give_back(client)

    async def take(self, client: str, num_bytes: int = 0) -> None:
        """Wait for a place, and hold it until `give_back`. See `turn`."""
        if self._free and self._held[client] < self._share and client not in self._waiting:
            self._hold(client)
            return
        if self._num_waiting >= self._max_waiting or self._bytes_waiting + num_bytes > self._max_waiting_bytes:
            raise QueueFullError(
                f"{self._num_waiting} requests of {self._bytes_waiting >> 20} MiB wait {self._what}, at most "
                f"{self._max_waiting} of {self._max_waiting_bytes >> 20} MiB may"
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        self._num_waiting, self._bytes_waiting = self._num_waiting + 1, self._bytes_waiting + num_bytes
        try:
            async with asyncio.timeout(self._max_wait_s) as limit:
                await place
        except BaseException as error:
            self._leave(client, place)
            if isinstance(error, TimeoutError) and limit.expired():
                raise QueueFullError(f"the request waited {self._max_wait_s:g} s {self._what}") from error
            raise
        finally:
            self._num_waiting, self._bytes_waiting = self._num_waiting - 1, self._bytes_waiting - num_bytes

    def give_back(self, client: str) -> None:
        """A place is free."""
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._next()

    def _hold(self, client: str) -> None:
        self._free -= 1
        self._held[client] += 1

    def _leave(self, client: str, place: asyncio.Future[None]) -> None:
        """Somebody waits no more; a place that came at the same moment goes on to the next."""
        if place.done() and not place.cancelled():
            self.give_back(client)
        elif (line := self._waiting.get(client)) is not None and place in line:
            line.remove(place)
            if not line:
                del self._waiting[client]

    def _next(self) -> None:
        """Give free places to those who wait: each client has one job's turn, then goes to the end of the line."""
        while self._free:
            client = next((each for each in self._waiting if self._held[each] < self._share), None)
            if client is None:
                return
            line = self._waiting.pop(client)
            place = line.popleft()
            if line:
                self._waiting[client] = line
            if not place.done():
                self._hold(client)
                place.set_result(None)
