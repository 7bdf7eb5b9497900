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

    Args:
        max_waiting: requests that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: OrderedDict[asyncio.Future[T], Callable[[], T | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    async def admit(self, attempt: Callable[[], T | None]) -> T:
        """Wait until `attempt` succeeds.

        Args:
            attempt: takes what it needs and returns it, or None when there is no room now; what it raises ends the
                wait. Called once per change of circumstances, in the order of arrival.

        Raises:
            QueueFullError: there is no room and every place in the queue is taken.
        """
        if not self._waiting and (result := attempt()) is not None:
            return result
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"the service is at capacity and {self._max_waiting} requests are waiting already")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting[future] = attempt
        try:
            return await future
        finally:
            if self._waiting.pop(future, None) is not None:
                self.retry()  # the head of the queue may have been what held the others up

    def retry(self) -> None:
        """Circumstances have changed: let those at the head of the queue try again."""
        while self._waiting:
            future, attempt = next(iter(self._waiting.items()))
            if not future.done():
                try:
                    result = attempt()
                except Exception as error:
                    future.set_exception(error)
                else:
                    if result is None:
                        return
                    future.set_result(result)
            self._waiting.pop(future, None)
