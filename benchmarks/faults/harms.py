"""What is done to processes: ended, held up, cut off."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PIDFD_GETFD = 438
"""Its number on every architecture (Linux 5.6)."""
_SOCKADDR_BYTES = 16
_LIBC = ctypes.CDLL(None, use_errno=True)


def send(number: signal.Signals, pids: Iterable[int]) -> list[int]:
    """Send processes a signal; those that were there to get it."""
    reached = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.append(pid)
    return reached


def runs(pid: int) -> bool:
    """Whether a process is there, and not a zombie."""
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False


def reset_connections(pid: int, peers: Iterable[int] | None = None) -> int:
    """Reset TCP connections of a process, as a firewall that forgets them does; how many there were.

    Its sockets are fetched from it (`pidfd_getfd(2)`) and disconnected (`connect(2)` to AF_UNSPEC): both ends find a
    connection that was reset. Sockets that listen stay.

    Args:
        pid: the process.
        peers: only those whose other end one of these processes has; None: all of them.

    Raises:
        PermissionError: this process may not.
    """
    others = None if peers is None else {ends[::-1] for peer in peers for ends in _connections(peer)}
    unspecified = (ctypes.c_char * _SOCKADDR_BYTES)()
    count = 0
    for connection in _connected_sockets(pid):
        if others is None or _ends(connection) in others:
            count += _LIBC.connect(connection.fileno(), unspecified, _SOCKADDR_BYTES) == 0
    return count


def _connections(pid: int) -> set[tuple[Any, Any]]:
    return {_ends(connection) for connection in _connected_sockets(pid)}


def _ends(connection: socket.socket) -> tuple[Any, Any]:
    """Own address and port, then the peer's."""
    return connection.getsockname()[:2], connection.getpeername()[:2]


def _connected_sockets(pid: int) -> Iterator[socket.socket]:
    """A process's TCP sockets that are connected, as ones of this process, each until the next."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            descriptor = _LIBC.syscall(_PIDFD_GETFD, handle, int(name), 0)
            if descriptor < 0:
                if ctypes.get_errno() in (errno.EPERM, errno.EACCES):
                    raise PermissionError(f"the sockets of process {pid} cannot be fetched")
                continue  # it was closed meanwhile
            try:
                fetched = socket.socket(fileno=descriptor)
            except OSError:  # no socket
                os.close(descriptor)
                continue
            with fetched:
                if fetched.family in (socket.AF_INET, socket.AF_INET6) and fetched.type == socket.SOCK_STREAM:
                    try:
                        fetched.getpeername()
                    except OSError:  # it listens, or is not connected any more
                        continue
                    yield fetched
    finally:
        os.close(handle)
