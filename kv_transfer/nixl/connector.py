"""The connector of production: NIXL between processes, over whatever UCX finds best."""

from __future__ import annotations

from kv_transfer.nixl.agent import NixlTransport
from kv_transfer.push import PushConnector


class NixlConnector(PushConnector):
    """Pushes KV cache with NIXL WRITEs, from a thread that owns the agent."""

    def __init__(self, *, drain_s: float = 1.0) -> None:
        super().__init__(NixlTransport(), drain_s=drain_s)
