"""Who gets workers now, who waits, who is turned away."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.errors import QueueFullError

T = TypeVar("T")


class AdmissionQueue(Generic[T]):
    """A bounded first-come-first-served queue in front of something that may or may not have room.

    What is taken is taken by the one who waited for it, in one go with its return: nobody can be cancelled between
    getting room and knowing of it, so that no room is lost.

    Args:
        max_waiting: requests that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: OrderedDict[asyncio.Event, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    async def admit(self, attempt: Callable[[], T | None]) -> T:
        """Wait until `attempt` succeeds.

        Args:
            attempt: takes what it needs and returns it, or None when there is no room now; what it raises ends the
                wait. Called after each change of circumstances, for whoever is at the head of the queue.

        Raises:
            QueueFullError: there is no room and every place in the queue is taken.
        """
        if not self._waiting and (result := attempt()) is not None:
            return result
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"the service is at capacity and {self._max_waiting} requests are waiting already")
        turn = asyncio.Event()
        self._waiting[turn] = None
        try:
            while True:
                await turn.wait()
                turn.clear()
                if (result := attempt()) is not None:
                    return result
        finally:
            del self._waiting[turn]
            self.retry()  # there may be room for the next one too

    def retry(self) -> None:
        """Circumstances have changed: let whoever is at the head of the queue try again."""
        if self._waiting:
            next(iter(self._waiting)).set()
