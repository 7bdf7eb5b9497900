"""Streams that nobody reads: ended after a while, with what is held for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

UNREAD_LIMIT_S = 60.0
"""As long as a part of an answer may be on its way to its client."""


class Writing:
    """One stream.

    Attributes:
        since: when the part was begun that is being sent; 0: none is.
        sent: done when that part is sent; None: who sends it puts `since` back to 0.
    """

    __slots__ = ("deadline", "late", "sent", "since")

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self.deadline = deadline
        self.since = 0.0
        self.sent: asyncio.Future[None] | None = None
        self.late = False


class UnreadStreams:
    """Looks at all streams now and then, so that a part costs two assignments and no timer.

    Args:
        limit_s: for sending one part.
    """

    def __init__(self, limit_s: float = UNREAD_LIMIT_S) -> None:
        self.limit_s = limit_s
        self._writing: set[Writing] = set()

    @contextlib.contextmanager
    def stream(self, deadline: asyncio.Timeout) -> Iterator[Writing]:
        """A stream, from its beginning to its end, inside the timeout context `deadline`, which ends it."""
        writing = Writing(deadline)
        self._writing.add(writing)
        try:
            yield writing
        finally:
            self._writing.discard(writing)

    def look(self) -> None:
        """End those whose part has been on its way for too long."""
        now = asyncio.get_running_loop().time()
        for writing in self._writing:
            if writing.sent is not None and writing.sent.done():
                continue
            if writing.since and now - writing.since > self.limit_s and not writing.deadline.expired():
                writing.late = True
                writing.deadline.reschedule(now)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(self.limit_s / 8)
            self.look()
