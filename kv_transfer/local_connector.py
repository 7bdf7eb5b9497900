"""The connector within one process, for tests and in-process workers."""

from __future__ import annotations

from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.local import LocalFabric, LocalTransport


class LocalConnector(PushConnector):
    """Hands KV cache over within one process, through a fabric shared with its peers."""

    def __init__(self, fabric: LocalFabric, *, drain_s: float = 0.0, threaded: bool = False) -> None:
        super().__init__(LocalTransport(fabric), drain_s=drain_s, threaded=threaded)
