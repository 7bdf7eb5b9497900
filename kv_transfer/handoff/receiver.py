"""The decode side of handoffs: counts parts, and knows when nobody can write to a block any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.connector import DecodeEvent, HandoffFailed, HandoffReceived, HandoffReleased
from kv_transfer.errors import PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Part, encode
from kv_transfer.handoff.part_counter import PartCounter, Wanted
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.transports.base import Transport


@dataclass
class _Incoming:
    key: HandoffKey
    peer: str
    ledger: PartCounter
    cancelled: bool = False
    drained_at: float | None = None


class HandoffReceiver:
    """Every handoff that this worker expects. Used by the connector's owner thread only.

    Args:
        transport: what carries the messages.
        layout: of the cache.
        drain_s: how long after a peer's end its last bytes may still arrive (they may sit in a socket).
        emit: takes the events for the worker.
    """

    def __init__(
        self, transport: Transport, layout: KVLayout, drain_s: float, emit: Callable[[DecodeEvent], None]
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._drain_s = drain_s
        self._emit = emit
        self._open: dict[HandoffKey, _Incoming] = {}

    @property
    def active(self) -> bool:
        """Whether anything is open."""
        return bool(self._open)

    def expect(self, key: HandoffKey, peer: str, blocks: Sequence[GroupBlocks]) -> None:
        """Grant the blocks of each cache group to the prefill worker."""
        wanted = [
            Wanted(group.num_layers, range(granted.first_block, granted.end))
            for group, granted in zip(self._layout.groups, blocks, strict=True)
        ]
        handoff = _Incoming(key, peer, PartCounter(wanted))
        self._open[key] = handoff
        try:
            self._transport.send(peer, encode(Grant(key, tuple(blocks))))
        except PeerError as error:
            self._fail(handoff, str(error))
            self._release(handoff)  # who was never granted the blocks cannot write to them

    def cancel(self, key: HandoffKey) -> None:
        """Ask the prefill worker to stop; released when it confirms."""
        handoff = self._open.get(key)
        if handoff is None or handoff.cancelled:
            return
        handoff.cancelled = True
        try:
            self._transport.send(handoff.peer, encode(Cancel(key)))
        except PeerError:
            return  # unconfirmed: the blocks stay quarantined until the peer is reported gone

    def on_part(self, sender: str, part: Part) -> None:
        """A part has landed. One of an older generation, or from someone else, counts for nothing."""
        handoff = self._open.get(part.key)
        if handoff is not None and handoff.peer == sender:
            handoff.ledger.count(part)
            self._complete(handoff)

    def on_final(self, sender: str, final: Final) -> None:
        """The last message, which may well arrive before the last part."""
        handoff = self._open.get(final.key)
        if handoff is not None and handoff.peer == sender:
            handoff.ledger.close(final)
            self._complete(handoff)

    def on_closed(self, sender: str, closed: Closed) -> None:
        """The prefill worker will write nothing more."""
        handoff = self._open.get(closed.key)
        if handoff is not None and handoff.peer == sender:
            self._fail(handoff, closed.reason)
            self._release(handoff)

    def peer_lost(self, engine_id: str, may_write_s: float) -> None:
        """A prefill worker is lost: its handoffs fail now, their blocks are released when it cannot write any more."""
        for handoff in self._open.values():
            if handoff.peer == engine_id and handoff.drained_at is None:
                self._fail(handoff, f"prefill worker {engine_id} is gone")
                handoff.drained_at = time.monotonic() + may_write_s + self._drain_s

    def progress(self) -> None:
        """Release what has drained."""
        now = time.monotonic()
        for handoff in [h for h in self._open.values() if h.drained_at is not None and h.drained_at <= now]:
            self._release(handoff)

    def _complete(self, handoff: _Incoming) -> None:
        first_token = handoff.ledger.first_token
        if first_token is None:
            return
        if handoff.cancelled:
            self._release(handoff)
        else:
            del self._open[handoff.key]
            self._emit(HandoffReceived(handoff.key, first_token))

    def _fail(self, handoff: _Incoming, reason: str) -> None:
        if not handoff.cancelled:
            handoff.cancelled = True
            self._emit(HandoffFailed(handoff.key, reason))

    def _release(self, handoff: _Incoming) -> None:
        del self._open[handoff.key]
        self._emit(HandoffReleased(handoff.key))
