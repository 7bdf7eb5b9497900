"""The connector of production: NIXL between processes, over whatever UCX finds best."""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.nixl import NixlTransport


class NixlConnector(PushConnector):
    """Pushes KV cache with NIXL WRITEs, from a thread that owns the agent.

    Args:
        drain_s: see `PushConnector`.
        may_write: see `NixlTransport`.
    """

    def __init__(self, *, drain_s: float = 1.0, may_write: Callable[[], bool] = lambda: True) -> None:
        super().__init__(NixlTransport(may_write=may_write), drain_s=drain_s)
