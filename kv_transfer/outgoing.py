"""The prefill side of handoffs: pushes parts, and knows when nothing of a handoff is in flight."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_transfer.connector import HandoffAborted, HandoffSent, PrefillEvent, ReadyEvent
from kv_transfer.errors import PeerError
from kv_transfer.messages import Cancel, Closed, Final, Grant, HandoffKey, Part, encode
from kv_transfer.transport import Transfer, TransferState, Transport

logger = logging.getLogger(__name__)

_REMEMBERED = 65_536
_GRANT_PATIENCE_S = 300.0


@dataclass
class _Part:
    layers: range
    first_block: int
    src_blocks: tuple[int, ...]
    ready: ReadyEvent | None


@dataclass
class _Outgoing:
    handoff_id: bytes
    peer: str
    grant: Grant | None = None
    waiting: deque[_Part] = field(default_factory=deque)
    in_flight: list[Transfer] = field(default_factory=list)
    posted: int = 0
    num_bytes: int = 0
    first_token: int | None = None
    final_sent: bool = False
    failure: str | None = None
    tell_peer: bool = True
    busy_since: float = 0.0
    busy_s: float = 0.0
    finished_at: float = 0.0
    last_landed_at: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether the network or the peer has something to do for it; a prompt still being computed has not."""
        return bool(self.in_flight or self.waiting) or self.final_sent or self.failure is not None

    def may_be_told(self, sender: str, key: HandoffKey) -> bool:
        """Whether a message about this reservation is about this handoff."""
        return self.peer == sender and (self.grant is None or self.grant.key == key)


class OutgoingHandoffs:
    """Every handoff that this worker pushes. Used by the connector's owner thread only.

    Args:
        transport: what moves the bytes.
        block_bytes: bytes of one block in one layer.
        emit: takes the events for the worker.
    """

    def __init__(self, transport: Transport, block_bytes: int, emit: Callable[[PrefillEvent], None]) -> None:
        self._transport = transport
        self._block_bytes = block_bytes
        self._emit = emit
        self._open: dict[bytes, _Outgoing] = {}
        self._early_grants: OrderedDict[bytes, tuple[str, Grant, float]] = OrderedDict()
        self._ended: OrderedDict[bytes, HandoffKey | None] = OrderedDict()  # with the key of one that was sent whole

    @property
    def active(self) -> bool:
        """Whether the network must be looked at often."""
        return any(handoff.busy for handoff in self._open.values())

    def begin(self, handoff_id: bytes, peer: str) -> None:
        """Open a handoff; a grant may have come before, and so may its cancellation."""
        handoff = _Outgoing(handoff_id, peer)
        self._open[handoff_id] = handoff
        if handoff_id in self._ended:
            self._fail(handoff, "cancelled by the decode worker", tell_peer=False)
        elif early := self._early_grants.pop(handoff_id, None):
            self.on_grant(early[0], early[1])

    def push(
        self, handoff_id: bytes, layers: range, first_block: int, src_blocks: Sequence[int], ready: ReadyEvent | None
    ) -> None:
        """Post a WRITE, or keep it until the grant is here and it is ready. Ignored for a handoff that has failed."""
        handoff = self._open.get(handoff_id)
        if handoff is None or handoff.failure is not None:
            return
        handoff.waiting.append(_Part(layers, first_block, tuple(src_blocks), ready))
        self._flush(handoff)

    def finish(self, handoff_id: bytes, first_token: int, finished_at: float) -> None:
        """No more parts; the first token, sampled at `finished_at` (monotonic), goes with the last message."""
        handoff = self._open.get(handoff_id)
        if handoff is not None and handoff.failure is None:
            handoff.first_token = first_token
            handoff.finished_at = finished_at
            self._flush(handoff)

    def abort(self, handoff_id: bytes, reason: str) -> None:
        """Stop; nothing more is posted."""
        if handoff := self._open.get(handoff_id):
            self._fail(handoff, reason)

    def on_grant(self, sender: str, grant: Grant) -> None:
        """The decode worker has reserved blocks."""
        handoff = self._open.get(grant.key.handoff_id)
        if handoff is None:
            self._keep_early(sender, grant)
        elif not handoff.may_be_told(sender, grant.key):
            self._close(sender, grant.key, f"handoff {grant.key} belongs to another reservation")
        elif handoff.grant is None:
            handoff.grant = grant  # of a failed handoff too, so that its key is confirmed as closed
            if handoff.failure is None:
                self._flush(handoff)

    def on_cancel(self, sender: str, cancel: Cancel) -> None:
        """The decode worker wants its blocks back; it is answered once nothing is in flight."""
        handoff = self._open.get(cancel.key.handoff_id)
        if handoff is None:
            self._early_grants.pop(cancel.key.handoff_id, None)
            self._remember(cancel.key.handoff_id)
            self._close(sender, cancel.key, "cancelled")
        elif not handoff.may_be_told(sender, cancel.key):
            self._close(sender, cancel.key, "cancelled")  # nothing was ever written for that reservation
        else:
            handoff.grant = handoff.grant or Grant(cancel.key, ())
            self._fail(handoff, "cancelled by the decode worker")

    def peer_lost(self, engine_id: str) -> None:
        """A decode worker is gone; its handoffs end when their WRITEs have."""
        for handoff in list(self._open.values()):
            if handoff.peer == engine_id:
                self._fail(handoff, f"decode worker {engine_id} is gone", tell_peer=False)
        for handoff_id, (sender, _, _) in list(self._early_grants.items()):
            if sender == engine_id:
                del self._early_grants[handoff_id]

    def progress(self) -> None:
        """Look after everything in flight, and end what has ended."""
        for handoff in [handoff for handoff in self._open.values() if handoff.busy]:
            self._reap(handoff)
            if handoff.waiting:
                self._flush(handoff)
            self._settle(handoff)
        now = time.monotonic()
        while self._early_grants and now - next(iter(self._early_grants.values()))[2] > _GRANT_PATIENCE_S:
            handoff_id, (sender, grant, _) = self._early_grants.popitem(last=False)
            self._remember(handoff_id)
            self._close(sender, grant.key, "the request never reached the prefill worker")

    def _flush(self, handoff: _Outgoing) -> None:
        """Post what waits and is ready; must not be called for a failed handoff.

        Events are asked, never waited for: a thread that waits for the GPU would not look after anything else.
        """
        if handoff.grant is None:
            return
        try:
            while handoff.waiting and handoff.failure is None:
                ready = handoff.waiting[0].ready
                if ready is not None and not ready.query():
                    return
                self._post(handoff, handoff.grant, handoff.waiting.popleft())
            if handoff.first_token is not None and not handoff.final_sent and handoff.failure is None:
                final = Final(handoff.grant.key, handoff.first_token, handoff.posted)
                self._transport.send(handoff.peer, encode(final))
                handoff.final_sent = True
        except PeerError as error:
            self._fail(handoff, str(error))
        except Exception as error:
            logger.exception("pushing to %s failed", handoff.peer)
            self._fail(handoff, f"pushing to {handoff.peer} failed: {error}")

    def _post(self, handoff: _Outgoing, grant: Grant, part: _Part) -> None:
        count = len(part.src_blocks)
        dst_blocks = grant.block_ids[part.first_block : part.first_block + count]
        if len(dst_blocks) < count:
            needed = part.first_block + count
            self._fail(handoff, f"the decode worker granted {len(grant.block_ids)} blocks, {needed} are needed")
            return
        part_message = Part(
            grant.key, handoff.posted, part.layers.start, len(part.layers), part.first_block, len(part.src_blocks)
        )
        if not handoff.in_flight:
            handoff.busy_since = time.monotonic()
        transfer = self._transport.write(handoff.peer, part.layers, part.src_blocks, dst_blocks, encode(part_message))
        handoff.in_flight.append(transfer)
        handoff.posted += 1
        handoff.num_bytes += count * len(part.layers) * self._block_bytes
        self._reap(handoff)

    def _reap(self, handoff: _Outgoing) -> None:
        """Forget the transfers that have ended; one that failed fails the handoff."""
        if not handoff.in_flight:
            return
        states = [transfer.state() for transfer in handoff.in_flight]
        pairs = zip(handoff.in_flight, states, strict=True)
        handoff.in_flight = [transfer for transfer, state in pairs if state is TransferState.IN_FLIGHT]
        if not handoff.in_flight:
            handoff.last_landed_at = time.monotonic()
            handoff.busy_s += handoff.last_landed_at - handoff.busy_since
        if TransferState.FAILED in states:
            self._fail(handoff, f"a transfer to {handoff.peer} failed")

    def _settle(self, handoff: _Outgoing) -> None:
        """End the handoff if nothing of it is in flight and nothing is to come."""
        if handoff.in_flight:
            return
        if handoff.failure is not None:
            if handoff.grant is not None and handoff.tell_peer:
                self._close(handoff.peer, handoff.grant.key, handoff.failure)
            self._forget(handoff, HandoffAborted(handoff.handoff_id, handoff.failure))
        elif handoff.final_sent:
            exposed_s = max(0.0, handoff.last_landed_at - handoff.finished_at)
            sent = HandoffSent(handoff.handoff_id, handoff.num_bytes, handoff.posted, handoff.busy_s, exposed_s)
            self._forget(handoff, sent, handoff.grant.key if handoff.grant is not None else None)

    def _fail(self, handoff: _Outgoing, reason: str, *, tell_peer: bool = True) -> None:
        if handoff.failure is None:
            handoff.failure = reason
            handoff.waiting.clear()
        handoff.tell_peer = handoff.tell_peer and tell_peer

    def _forget(self, handoff: _Outgoing, event: PrefillEvent, served: HandoffKey | None = None) -> None:
        del self._open[handoff.handoff_id]
        self._remember(handoff.handoff_id, served)
        self._emit(event)

    def _remember(self, handoff_id: bytes, served: HandoffKey | None = None) -> None:
        """Keep the ids of ended handoffs, so that a late grant or cancel is answered rightly."""
        self._ended[handoff_id] = served
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def _keep_early(self, sender: str, grant: Grant) -> None:
        if grant.key.handoff_id in self._ended:
            if self._ended[grant.key.handoff_id] != grant.key:  # the same: only a repetition of what has been served
                self._close(sender, grant.key, "the prefill worker has given up this request")
            return
        first = self._early_grants.setdefault(grant.key.handoff_id, (sender, grant, time.monotonic()))
        if first[1].key != grant.key:
            self._close(sender, grant.key, f"handoff {grant.key} belongs to another reservation")

    def _close(self, peer: str, key: HandoffKey, reason: str) -> None:
        try:
            self._transport.send(peer, encode(Closed(key, reason)))
        except PeerError:
            return  # a peer that is gone needs no confirmation
