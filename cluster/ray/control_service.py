"""Whether what the service has of Ray is still there: the control service (GCS), and the node that it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

import ray

INTERVAL_S = 1.0
_PATIENCE = 5
"""Looks in a row that must find the same. Without the GCS Ray itself ends this process after 60 s, without a word."""
_CONNECT_TIMEOUT_S = 2.0


async def until_lost(look: Callable[[], str]) -> str:
    """Look again and again, and return when something has been missing for a while.

    Args:
        look: what is missing at this moment, "" for nothing; called in a thread.

    Returns:
        A sentence for the operator.
    """
    missing, times = "", 0
    while times < _PATIENCE:
        await asyncio.sleep(INTERVAL_S)
        found = await asyncio.to_thread(look)
        times = times + 1 if found and found == missing else int(bool(found))
        missing = found
    return f"{missing}: no worker can be replaced, so the service ends"


def missing_of_ray() -> str:
    """What is missing of the Ray that this process has joined."""
    context = ray.get_runtime_context()
    if not listens(context.gcs_address):
        return f"Ray's control service (GCS) at {context.gcs_address} is out of reach"
    own = context.get_node_id()
    if any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes()):
        return "Ray's node on this machine (raylet) is gone"
    return ""


def listens(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S):
        return True
    return False
