"""The connector of production: NIXL between processes, over whatever UCX finds best."""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.lease import Lease, end_process, lease_guard
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.nixl import NixlTransport


class NixlConnector(PushConnector):
    """Pushes KV cache with NIXL WRITEs, from a thread that owns the agents.

    Args:
        drain_s: see `PushConnector`.
        lease: asked before every use of NIXL; None: nobody else decides about this worker's memory.
        on_lapse: called when it is over; must not return.
    """

    def __init__(
        self, *, drain_s: float = 1.0, lease: Lease | None = None, on_lapse: Callable[[], None] = end_process
    ) -> None:
        guard = lease_guard(lease, on_lapse) if lease is not None else _nothing
        super().__init__(NixlTransport(guard=guard), drain_s=drain_s)


def _nothing() -> None:
    """Without a lease nothing is asked."""
