"""The connector of production: NIXL between processes, over whatever UCX finds best."""

from __future__ import annotations

from kv_transfer.lease import Lease, lease_guard
from kv_transfer.process import ProcessId
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.nixl import NixlTransport


class NixlConnector(PushConnector):
    """Pushes KV cache with NIXL WRITEs, from a thread that owns the agents.

    Args:
        drain_s: see `PushConnector`.
        lease: asked before every use of NIXL; None: nobody else decides about this worker's memory.
        process: see `NixlTransport`.
    """

    def __init__(
        self,
        *,
        drain_s: float = 1.0,
        lease: Lease | None = None,
        process: ProcessId | None = None,
    ) -> None:
        guard = lease_guard(lease) if lease is not None else _nothing
        super().__init__(NixlTransport(guard=guard, process=process), drain_s=drain_s)


def _nothing() -> None:
    """Without a lease nothing is asked."""
