"""Whether Ray's control service, the GCS, can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

INTERVAL_S = 1.0
_PATIENCE = 5
"""Looks in a row that must be in vain. Ray ends this process by itself, without a word, 60 s after it has lost it."""
_CONNECT_TIMEOUT_S = 2.0


async def until_unreachable(address: str, reachable: Callable[[str], bool] | None = None) -> str:
    """Look again and again, and return when it has been out of reach for a while.

    Args:
        address: host:port.
        reachable: whether it is at this moment; asked in a thread.

    Returns:
        A sentence for the operator.
    """
    look, in_vain = reachable or listens, 0
    while in_vain < _PATIENCE:
        await asyncio.sleep(INTERVAL_S)
        in_vain = 0 if await asyncio.to_thread(look, address) else in_vain + 1
    return f"Ray's control service (GCS) at {address} is out of reach: no worker can be replaced, so the service ends"


def listens(address: str) -> bool:
    """Whether somebody listens there."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S):
        return True
    return False
