"""A connector whose handoffs are complete as soon as they are expected: decode is measured without a prefill side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kv_transfer.connector import ConnectorEvent, HandoffReceived, KVConnector, ReadyEvent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.transports.base import EngineInfo

_FIRST_TOKEN = 5


class InstantConnector(KVConnector):
    """What is in the blocks already counts as the prompt's cache. It has no peers, and moves nothing."""

    def __init__(self) -> None:
        self._events: list[ConnectorEvent] = []
        self._generation = 0

    def expect(
        self, handoff_id: bytes, prefill_engine: str, blocks: Sequence[GroupBlocks], ready: ReadyEvent | None = None
    ) -> HandoffKey:
        """See `KVConnector.expect`; the handoff is received at the next `poll`."""
        self._generation += 1
        key = HandoffKey(handoff_id, 0, self._generation)
        self._events.append(HandoffReceived(key, _FIRST_TOKEN))
        return key

    def poll(self) -> list[ConnectorEvent]:
        """See `KVConnector.poll`."""
        events, self._events = self._events, []
        return events

    def register_kv_caches(self, name: str, kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> EngineInfo:
        """Refused: nobody could write to it."""
        raise RuntimeError("a connector without peers registers no cache")

    def connect(self, peer: EngineInfo, timeout_s: float) -> None:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def new_endpoint(self, peer: EngineInfo, timeout_s: float) -> EngineInfo:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """Nothing to do."""

    def cancel(self, key: HandoffKey) -> None:
        """Nothing to do: a handoff is over before it can be cancelled."""

    def begin(self, handoff_id: bytes, decode_engine: str) -> None:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def finish(self, handoff_id: bytes, first_token: int, other_tokens: tuple[int, ...] = ()) -> None:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def abort(self, handoff_id: bytes, reason: str) -> None:
        """Refused: it has no peers."""
        raise RuntimeError("this connector has no peers")

    def set_listener(self, wake: Callable[[], None]) -> None:
        """Nothing to do: its caller polls."""

    def close(self) -> None:
        """Nothing to do."""
