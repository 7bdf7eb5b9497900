"""Connections by the hosts that they come from: bounded in all and of each, and fair where all are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cluster.errors import QueueFullError

_LOOKED_AT = 256


class HostConnection(Protocol):
    """One of them."""

    @property
    def idle(self) -> bool:
        """Whether it may be closed: no call waits for its answer."""
        ...

    def end(self) -> None:
        """Close it."""
        ...


class HostConnections:
    """Those that are open. Used by one event loop.

    Where all are taken, somebody new gets the place of one that is idle and comes from the host with most, as long as
    that leaves this host as many as the new one's has.

    Args:
        most: in all.
        most_of_one: of one host.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self.most = most
        self.most_of_one = most_of_one
        self._open: dict[str, dict[HostConnection, None]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, host: str, connection: HostConnection) -> None:
        """One more.

        Raises:
            QueueFullError: there is no place for it; names how many there are, and the bound.
        """
        own = len(self._open.get(host, ()))
        if own >= self.most_of_one:
            raise QueueFullError(f"{host} has {own} connections, at most {self.most_of_one} of one host are taken")
        if self._size >= self.most and not self._make_room(own):
            raise QueueFullError(
                f"{self._size} connections are open, at most {self.most} are; {host} has {own} of them"
            )
        self._open.setdefault(host, {})[connection] = None
        self._size += 1

    def remove(self, host: str, connection: HostConnection) -> None:
        """One less, if it is there."""
        own = self._open.get(host, {})
        if connection in own:
            del own[connection]
            self._size -= 1
            if not own:
                del self._open[host]

    def _make_room(self, own: int) -> bool:
        host = max(self._open, key=lambda host: len(self._open[host]))
        theirs = self._open[host]
        if len(theirs) <= own + 1:
            return False
        for _, connection in zip(range(_LOOKED_AT), theirs, strict=False):
            if connection.idle:
                self.remove(host, connection)
                connection.end()
                return True
        return False


def fair_level(held: Mapping[str, int], most: int) -> int:
    """How many each host may have at most for all to have no more than `most` (max-min fairness).

    Who has less keeps what it has; the others have equally many.
    """
    sizes = sorted(held.values())
    left = most
    for place, size in enumerate(sizes):
        share = left // (len(sizes) - place)
        if size > share:
            return max(1, share)
        left -= size
    return max(1, sizes[-1] if sizes else most)
