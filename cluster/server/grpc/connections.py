"""gRPC's connections by the hosts that they come from: its own bound knows none.

What it has accepted is looked at now and then among the process' files. Hosts with more than their share lose idle
connections; on those of their others that have calls, no more are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from cluster.errors import QueueFullError
from cluster.server.host_connections import fair_level

LOOK_S = 0.5
_ROOM = 8
"""A part of all connections is kept for hosts that have few: one in so many."""
_FILES = "/proc/self/fd"
Peer = tuple[str, int]
"""Address and port."""


@dataclass(frozen=True)
class _Accepted:
    peer: Peer
    file: int


class GrpcConnections:
    """Sees to it that no host has all.

    Args:
        most: in all, which gRPC itself keeps.
        most_of_one: of one host.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self.most = most
        self.most_of_one = most_of_one
        self._calls: Counter[Peer] = Counter()
        self._refused: dict[Peer, str] = {}
        self._seen: set[Peer] = set()

    @contextlib.contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """A call, from its beginning to its end.

        Raises:
            QueueFullError: its host has too many connections.
        """
        known = _parsed(peer)
        if known in self._refused:
            raise QueueFullError(self._refused[known])
        self._calls[known] += 1
        try:
            yield
        finally:
            self._calls[known] -= 1
            if not self._calls[known]:
                del self._calls[known]

    def look(self, port: int, accepted: Sequence[_Accepted]) -> None:
        """Close what is too much: of what was idle at the look before, too, since a call may be on its way."""
        hosts: dict[str, list[_Accepted]] = {}
        for each in accepted:
            hosts.setdefault(each.peer[0], []).append(each)
        held = {host: min(len(own), self.most_of_one) for host, own in hosts.items()}
        level = min(self.most_of_one, fair_level(held, max(1, self.most - self.most // _ROOM)))
        self._refused = {}
        for host, own in hosts.items():
            if (excess := len(own) - level) <= 0:
                continue
            own.sort(key=lambda each: each.peer in self._calls)  # idle ones first
            for each in own[:excess]:
                if each.peer in self._calls:
                    self._refused[each.peer] = (
                        f"{host} has {len(own)} connections, at most {level} of one host are taken now"
                    )
                elif each.peer in self._seen:
                    _end(each, port)
        self._seen = {each.peer for each in accepted} - self._calls.keys()

    async def run(self, port: int) -> None:
        """Look for ever."""
        while os.path.isdir(_FILES):  # noqa: ASYNC240
            await asyncio.sleep(LOOK_S)
            if len(os.listdir(_FILES)) > min(self.most_of_one, self.most - self.most // _ROOM):
                self.look(port, await asyncio.to_thread(accepted_at, port))


def accepted_at(port: int) -> list[_Accepted]:
    """The connections of this process to a port of its own."""
    found = []
    for name in os.listdir(_FILES):
        with contextlib.suppress(OSError):
            if os.readlink(f"{_FILES}/{name}").startswith("socket:") and (peer := _peer_of(int(name), port)):
                found.append(_Accepted(peer, int(name)))
    return found


def _end(connection: _Accepted, port: int) -> None:
    """Shut it down, if the file is still the same connection."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.file)) as own:
        if _peer(own, port) == connection.peer:
            own.shutdown(socket.SHUT_RDWR)


def _peer_of(file: int, port: int) -> Peer | None:
    with socket.socket(fileno=os.dup(file)) as own:
        return _peer(own, port)


def _peer(own: socket.socket, port: int) -> Peer | None:
    """Where a connection comes from; None: it is not one to this port."""
    if own.family not in (socket.AF_INET, socket.AF_INET6) or own.getsockname()[1] != port:
        return None
    address, number = own.getpeername()[:2]  # a socket that listens has none
    return address.removeprefix("::ffff:"), number


def _parsed(peer: str) -> Peer:
    """gRPC's name for it: `ipv4:10.0.0.7:41234`, `ipv6:%5B::1%5D:41234`."""
    _, _, rest = unquote(peer).partition(":")
    address, _, port = rest.rpartition(":")
    return address.strip("[]").removeprefix("::ffff:"), int(port) if port.isdecimal() else 0
