"""Which calls may come in, and how those under way come to an end when the server stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from cluster.errors import ShuttingDownError


class CallGate:
    """Every call that is new work passes it. Open at first; it closes, and then ends what is left.

    Calls that only ask how the service is do not pass it, and are answered until it stops.
    """

    def __init__(self) -> None:
        self._calls: set[asyncio.Timeout] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._ended: set[asyncio.Timeout] = set()
        self._closed = False

    @property
    def num_calls(self) -> int:
        """Calls of new work that are under way."""
        return len(self._calls)

    @contextlib.contextmanager
    def passage(self, deadline: asyncio.Timeout) -> Iterator[None]:
        """A call, from its beginning to its end, inside the timeout context `deadline`.

        Raises:
            ShuttingDownError: the gate is closed.
        """
        if self._closed:
            raise ShuttingDownError("the service is shutting down: send the request elsewhere")
        self._calls.add(deadline)
        self._none_left.clear()
        try:
            yield
        finally:
            self._calls.discard(deadline)
            if not self._calls:
                self._none_left.set()

    def close(self) -> None:
        """Let no new work in."""
        self._closed = True

    async def empty(self, timeout_s: float) -> bool:
        """Wait for the calls under way; whether all have come to their end in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        return not self._calls

    def end_calls(self) -> None:
        """End the calls under way by their deadlines; each finds in `was_ended` that it is not its own."""
        now = asyncio.get_running_loop().time()
        for deadline in self._calls:
            if not deadline.expired():
                self._ended.add(deadline)
                deadline.reschedule(now)

    def was_ended(self, deadline: asyncio.Timeout) -> bool:
        """Whether the deadline passed because the server stops."""
        return deadline in self._ended
