"""What requests hold of memory from their first byte to the end of their answers: bounded, and fair between hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from cluster.errors import QueueFullError

MAX_HELD_BYTES = 512 * 2**20
"""Of all requests at one door, as they came over the wire; half of it of one host."""


class HeldRequest:
    """One request. Used by one event loop.

    Attributes:
        host: where it comes from.
        size: bytes of it that have come.
    """

    __slots__ = ("_coming", "_held", "ended", "host", "size")

    def __init__(self, held: HeldBytes, host: str) -> None:
        self._held = held
        self._coming: asyncio.Timeout | None = None
        self.host, self.size, self.ended = host, 0, False

    def add(self, count: int) -> None:
        """So many bytes more have come.

        Raises:
            QueueFullError: requests hold too many.
        """
        self._held.take(self, count)

    @contextlib.asynccontextmanager
    async def coming(self) -> AsyncIterator[None]:
        """While more of it is waited for; may be ended in favour of others.

        Raises:
            QueueFullError: it was.
        """
        try:
            async with asyncio.timeout(None) as self._coming:
                yield
        except TimeoutError:
            if self.ended:
                raise QueueFullError(f"requests of {self.host} hold more than its share") from None
            raise
        finally:
            self._coming = None

    @property
    def may_end(self) -> bool:
        """Whether more of it is waited for."""
        return self._coming is not None and not self.ended

    def end(self) -> None:
        """Wait no more."""
        if self._coming is not None:
            self.ended = True
            self._coming.reschedule(asyncio.get_running_loop().time())


class HeldBytes:
    """All requests at one door.

    Where too much is held, a host with less than its share gets room from the one with most: of what still comes there
    the largest request is given up.

    Args:
        most: bytes in all; half of them of one host.
    """

    def __init__(self, most: int = MAX_HELD_BYTES) -> None:
        self.most = most
        self._of_host: Counter[str] = Counter()
        self._requests: dict[str, dict[HeldRequest, None]] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return self._size

    @contextlib.contextmanager
    def request(self, host: str) -> Iterator[HeldRequest]:
        """A request, from its first byte to the end of its answer."""
        request = HeldRequest(self, host)
        own = self._requests.setdefault(host, {})
        own[request] = None
        try:
            yield request
        finally:
            self._drop(request)

    def take(self, request: HeldRequest, count: int) -> None:
        """See `HeldRequest.add`."""
        if request.ended:
            raise QueueFullError(f"requests of {request.host} hold more than its share")
        held = self._of_host[request.host] + count
        if held > self.most // 2:
            raise QueueFullError(_too_much(request.host, held, self.most // 2))
        while self._size + count > self.most:
            share = self.most // len({*self._of_host, request.host})
            if held > share:
                raise QueueFullError(_too_much(request.host, held, share))
            if not self._make_room(share):
                raise QueueFullError(f"requests hold {self._size} bytes, and at most {self.most} may be held")
        request.size += count
        self._of_host[request.host] = held
        self._size += count

    def _make_room(self, share: int) -> bool:
        for host, held in self._of_host.most_common():
            if held <= share:
                return False
            ends = [request for request in self._requests[host] if request.may_end]
            if ends:
                largest = max(ends, key=lambda request: request.size)
                largest.end()
                self._drop(largest)
                return True
        return False

    def _drop(self, request: HeldRequest) -> None:
        own = self._requests.get(request.host, {})
        if request not in own:
            return
        del own[request]
        if not own:
            del self._requests[request.host]
        self._size -= request.size
        self._of_host[request.host] -= request.size
        if self._of_host[request.host] <= 0:
            del self._of_host[request.host]


def _too_much(host: str, held: int, most: int) -> str:
    return f"requests of {host} hold {held} bytes, at most {most} of one host may be held now"
