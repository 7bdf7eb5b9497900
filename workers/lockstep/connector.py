"""A rank's connector, behind which the worker sees the handoffs of all ranks as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from kv_transfer.connector import (
    ConnectorEvent,
    HandoffAborted,
    HandoffFailed,
    HandoffSent,
    KVConnector,
    ReadyEvent,
)
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.lockstep.agreement import Abandon, GroupEvent

_GROUP = 0  # stands for the incarnation in the keys that the worker sees: the ranks' own differ


class AgreedConnector(KVConnector):
    """Calls go to the rank's own connector, and there to the same rank of the peer; events come when all ranks agree.

    What the rank's own connector says is not shown to the worker: `take_own` has it, for the lead to gather from all
    ranks, and what they agreed on comes back through `deliver`. A group goes by its lead's engine id. The keys that
    `expect` returns are equal on all ranks, because the ranks make the same calls in the same order.

    Args:
        own: the rank's connector, new, with a thread of its own.
        rank: this one.
    """

    def __init__(self, own: KVConnector, rank: int) -> None:
        self._own = own
        self._rank = rank
        self._incarnation = 0
        self._peers: dict[str, tuple[EngineInfo, EngineInfo]] = {}  # this rank's and its lead, by the lead's engine id
        self._due: list[ConnectorEvent] = []

    def take_own(self) -> list[ConnectorEvent]:
        """What has happened to this rank's shares since the last call, under the group's keys."""
        return [
            event
            if isinstance(event, HandoffSent | HandoffAborted)
            else replace(event, key=replace(event.key, incarnation=_GROUP))
            for event in self._own.poll()
        ]

    def deliver(self, events: Iterable[GroupEvent]) -> None:
        """Take what all ranks agreed on, for the next `poll`. What failed on one rank is ended on this one, too."""
        for event in events:
            if isinstance(event, Abandon):
                self._own.abort(event.handoff_id, event.reason)
                continue
            if isinstance(event, HandoffFailed):
                self.cancel(event.key)
            self._due.append(event)

    def handshake(self, peers: Sequence[EngineInfo], timeout_s: float) -> None:
        """Meet the same rank of a peer, whose ranks are all given, its lead first; see `KVConnector.connect`.

        Raises:
            LayoutMismatchError: the peer has another number of ranks, or its layout differs.
            PeerError: it cannot be added.
        """
        peer = peers[self._rank % len(peers)]  # with another number of ranks the layouts differ, which says so
        self._own.connect(peer, timeout_s)
        self._peers[peers[0].engine_id] = peer, peers[0]

    def register_kv_caches(self, name: str, kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> EngineInfo:
        """See `KVConnector.register_kv_caches`; ranks after the lead have their number in their name."""
        info = self._own.register_kv_caches(f"{name}-rank{self._rank}" if self._rank else name, kv_caches, layout)
        self._incarnation = info.incarnation
        return info

    def new_endpoint_for(self, peers: Sequence[EngineInfo], timeout_s: float) -> EngineInfo:
        """Begin to meet the same rank of a peer, whose ranks are all given; see `KVConnector.new_endpoint`."""
        return self._own.new_endpoint(peers[self._rank % len(peers)], timeout_s)

    def new_endpoint(self, peer: EngineInfo, timeout_s: float) -> EngineInfo:
        """Begin to meet a peer of one rank; see `new_endpoint_for`."""
        return self.new_endpoint_for([peer], timeout_s)

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """See `KVConnector.broken_peers`: those of this rank, as if the connections of their leads were broken.

        All ranks of two workers meet together, so the lead's endpoint stands for that meeting. What broke at an
        endpoint of an earlier one is of no matter any more.
        """
        broken = self._own.broken_peers
        return {
            lead.engine_id: lead.endpoint
            for own, lead in list(self._peers.values())
            if broken.get(own.engine_id) == own.endpoint
        }

    def connect(self, peer: EngineInfo, timeout_s: float) -> None:
        """Meet a peer of one rank; see `handshake`."""
        self.handshake([peer], timeout_s)

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """See `KVConnector.probe`: the same rank of the peer."""
        return self._own.probe(self._peer(engine_id), timeout_s)

    def link_to(self, engine_id: str) -> LinkCost | None:
        """See `KVConnector.link_to`: to the same rank of the peer."""
        return self._own.link_to(self._peer(engine_id))

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """See `KVConnector.disconnect`; may be called again when the peer's end is confirmed."""
        self._own.disconnect(self._peer(engine_id), confirmed_dead)

    def expect(
        self, handoff_id: bytes, prefill_engine: str, blocks: Sequence[GroupBlocks], ready: ReadyEvent | None = None
    ) -> HandoffKey:
        """See `KVConnector.expect`."""
        key = self._own.expect(handoff_id, self._peer(prefill_engine), blocks, ready)
        return replace(key, incarnation=_GROUP)

    def cancel(self, key: HandoffKey) -> None:
        """See `KVConnector.cancel`."""
        self._own.cancel(replace(key, incarnation=self._incarnation))

    def begin(self, handoff_id: bytes, decode_engine: str) -> None:
        """See `KVConnector.begin`."""
        self._own.begin(handoff_id, self._peer(decode_engine))

    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """See `KVConnector.push`."""
        self._own.push(handoff_id, group, layers, first_block, src_blocks, ready)

    def layers_per_write(
        self,
        peer: str,
        group: int,
        layer_bytes: int,
        layer_s: float = 0.0,
        slack_s: float = 0.0,
        tail_s: float = 0.0,
    ) -> int:
        """See `KVConnector.layers_per_write`; each rank has its own path, and may group otherwise than the others."""
        return self._own.layers_per_write(self._peer(peer), group, layer_bytes, layer_s, slack_s, tail_s)

    def finish(self, handoff_id: bytes, first_token: int, other_tokens: tuple[int, ...] = ()) -> None:
        """See `KVConnector.finish`."""
        self._own.finish(handoff_id, first_token, other_tokens)

    def abort(self, handoff_id: bytes, reason: str) -> None:
        """See `KVConnector.abort`."""
        self._own.abort(handoff_id, reason)

    def poll(self) -> list[ConnectorEvent]:
        """What all ranks agreed on, as far as it was delivered."""
        due, self._due = self._due, []
        return due

    def set_listener(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever `take_own` has something new."""
        self._own.set_listener(wake)

    def close(self) -> None:
        """See `KVConnector.close`."""
        self._own.close()

    def _peer(self, engine_id: str) -> str:
        met = self._peers.get(engine_id)
        return engine_id if met is None else met[0].engine_id
