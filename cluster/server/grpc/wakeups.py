"""The event loop is woken once for all that gRPC has finished, and not once for each message.

A thread of gRPC's puts what is finished into a queue and writes a byte to a socket pair for each. The event loop reads
one byte in a pass and empties the whole queue, so that the other bytes wake it again and again for nothing: with 256
streams these passes were a fifth of the gateway's processor time. Here all bytes are read before the queue is emptied.
None is lost: a byte is written when what it stands for is in the queue already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from typing import Any

_ALL = 65_536
"""More bytes than a socket pair holds."""


@contextlib.contextmanager
def gathered_wakeups(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """What gRPC binds to this loop inside the block wakes it once for all that is finished.

    That is so for what is bound to the loop first. A loop whose methods cannot be replaced is left as it is.
    """
    add_reader = loop.add_reader

    def add(sock: Any, callback: Callable[..., Any], *args: Any) -> Any:
        if isinstance(sock, socket.socket) and isinstance(callback, functools.partial) and callback.args == (loop,):
            callback = functools.partial(read_all, sock, callback)
        return add_reader(sock, callback, *args)

    try:
        loop.add_reader = add  # type: ignore[method-assign, assignment]
    except AttributeError:
        yield
        return
    try:
        yield
    finally:
        del loop.add_reader


def read_all(sock: socket.socket, callback: Callable[[], Any]) -> None:
    """Read what there is, and call back once."""
    with contextlib.suppress(BlockingIOError):  # another loop's thread was quicker
        sock.recv(_ALL)
    callback()
