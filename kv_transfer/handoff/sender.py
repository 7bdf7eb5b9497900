"""The prefill side of handoffs: pushes parts, and knows when nothing of a handoff is in flight."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from kv_transfer.connector import HandoffAborted, HandoffSent, PrefillEvent, ReadyEvent
from kv_transfer.errors import PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Part, encode
from kv_transfer.handoff.not_open import NotOpen
from kv_transfer.handoff.sender_state import SentHandoff, SentPart
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.link_cost import LinkCost, most_bytes_at_once
from kv_transfer.transports.base import TransferState, Transport

logger = logging.getLogger(__name__)


class HandoffSender:
    """Every handoff that this worker pushes. Used by the connector's owner thread only.

    Args:
        transport: what moves the bytes.
        layout: of the cache.
        emit: takes the events for the worker.
        cost: what the way to a peer costs; None: it was not measured.
    """

    def __init__(
        self,
        transport: Transport,
        layout: KVLayout,
        emit: Callable[[PrefillEvent], None],
        cost: Callable[[str], LinkCost | None] = lambda peer: None,
    ) -> None:
        self._transport = transport
        self._layout = layout
        self._emit = emit
        self._cost = cost
        self._open: dict[bytes, SentHandoff] = {}
        self._not_open = NotOpen()

    @property
    def num_open(self) -> int:
        """Handoffs that are not over, and grants whose request has not come."""
        return len(self._open) + self._not_open.num_grants

    @property
    def active(self) -> bool:
        """Whether the network must be looked at often."""
        return any(handoff.busy for handoff in self._open.values())

    def begin(self, handoff_id: bytes, peer: str) -> None:
        """Open a handoff; a grant may have come before, and so may its cancellation."""
        handoff = SentHandoff(handoff_id, peer)
        self._open[handoff_id] = handoff
        early = self._not_open.take(handoff_id)
        if self._not_open.has_ended(peer, handoff_id):
            self._fail(handoff, "cancelled by the decode worker", tell_peer=False)
        for sender, grant in early.items():
            self.on_grant(sender, grant)

    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """Post a WRITE, or keep it until the grant is here and it is ready. Ignored for a handoff that has failed.

        Of these layers, which are places within the group, others may be other ranks' to hand over.
        """
        handoff = self._open.get(handoff_id)
        if handoff is None or handoff.failure is not None:
            return
        part = SentPart(group, _places(layers, self._layout.share(group)), first_block, tuple(src_blocks), ready)
        handoff.ends[group] = max(handoff.ends[group], part.end)
        if part.layers:
            handoff.waiting.append(part)
            self._flush(handoff)

    def finish(
        self, handoff_id: bytes, first_token: int, finished_at: float, other_tokens: tuple[int, ...] = ()
    ) -> None:
        """No more parts; the first tokens, sampled at `finished_at` (monotonic), go with the last message."""
        handoff = self._open.get(handoff_id)
        if handoff is not None and handoff.failure is None:
            handoff.first_token, handoff.other_tokens = first_token, other_tokens
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
            if (reason := self._not_open.keep(sender, grant)) is not None:
                self._close(sender, grant.key, reason)
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
            self._not_open.cancel(sender, cancel.key.handoff_id)
            self._close(sender, cancel.key, "cancelled")
        elif not handoff.may_be_told(sender, cancel.key):
            self._close(sender, cancel.key, "cancelled")  # nothing was ever written for that reservation
        else:
            handoff.grant = handoff.grant or Grant(cancel.key, ())
            self._fail(handoff, "cancelled by the decode worker")

    def reconnect(self, engine_id: str) -> None:
        """A decode worker is to be met anew: what was under way is lost; it hears so when it asks."""
        for handoff in list(self._open.values()):
            if handoff.peer == engine_id and handoff.grant is not None:
                self._fail(handoff, f"the connection to decode worker {engine_id} is made anew")

    def peer_lost(self, engine_id: str) -> None:
        """A decode worker is gone; its handoffs end when their WRITEs have."""
        for handoff in list(self._open.values()):
            if handoff.peer == engine_id:
                self._fail(handoff, f"decode worker {engine_id} is gone", tell_peer=False)
        self._not_open.forget(engine_id)

    def progress(self) -> None:
        """Look after everything in flight, and end what has ended."""
        for handoff in [handoff for handoff in self._open.values() if handoff.busy]:
            self._reap(handoff)
            if handoff.waiting:
                self._flush(handoff)
            self._settle(handoff)
        for sender, key in self._not_open.overdue():
            self._close(sender, key, "the request never reached the prefill worker")

    def _flush(self, handoff: SentHandoff) -> None:
        """Post what waits and is ready; must not be called for a failed handoff.

        Events are asked, never waited for: a thread that waits for the GPU would not look after anything else.
        """
        if handoff.grant is None:
            return
        if len(handoff.grant.groups) != len(self._layout.groups):
            kept = len(self._layout.groups)
            self._fail(handoff, f"the decode worker granted {len(handoff.grant.groups)} cache groups, {kept} are kept")
            return
        try:
            while handoff.waiting and handoff.failure is None:
                part = handoff.waiting[0].without(handoff.grant.groups[handoff.waiting[0].group].first_block)
                if part is not None and part.ready is not None and not part.ready.query():
                    return
                handoff.waiting.popleft()
                if part is not None:
                    self._post(handoff, handoff.grant, part)
            if handoff.first_token is not None and not handoff.final_sent and handoff.failure is None:
                self._end(handoff, handoff.grant, handoff.first_token)
        except PeerError as error:
            self._fail(handoff, str(error))
        except Exception as error:
            logger.exception("handoff %s: pushing to %s failed", handoff.handoff_id.hex(), handoff.peer)
            self._fail(handoff, f"pushing to {handoff.peer} failed: {error}")

    def _post(self, handoff: SentHandoff, grant: Grant, part: SentPart) -> None:
        count, granted = len(part.src_blocks), grant.groups[part.group]
        offset = part.first_block - granted.first_block
        dst_blocks = granted.block_ids[offset : offset + count]
        if len(dst_blocks) < count:
            self._fail(handoff, _wrong_grant(granted, part.end))
            return
        limit = most_bytes_at_once(self._cost(handoff.peer)) // self._layout.groups[part.group].block_bytes
        for piece in part.pieces(limit):
            start = piece.first_block - part.first_block
            self._write(handoff, grant.key, piece, dst_blocks[start : start + len(piece.src_blocks)])
            if handoff.failure is not None:
                return

    def _write(self, handoff: SentHandoff, key: HandoffKey, part: SentPart, dst_blocks: Sequence[int]) -> None:
        count = len(part.src_blocks)
        message = Part(key, handoff.posted, part.group, part.layers.start, len(part.layers), part.first_block, count)
        if not handoff.in_flight:
            handoff.busy_since = time.monotonic()
        layers = self._layout.share(part.group)[part.layers.start : part.layers.stop]
        handoff.in_flight.append(
            self._transport.write(handoff.peer, part.group, layers, part.src_blocks, dst_blocks, encode(message))
        )
        handoff.posted += 1
        handoff.posted_blocks[part.group] += count * len(part.layers)
        handoff.num_bytes += count * len(part.layers) * self._layout.groups[part.group].block_bytes
        self._reap(handoff)

    def _end(self, handoff: SentHandoff, grant: Grant, first_token: int) -> None:
        """Send the last message, if what was pushed is what was granted: else decode would wait for the rest."""
        for index, granted in enumerate(grant.groups):
            if handoff.ends[index] != granted.end:
                self._fail(handoff, _wrong_grant(granted, handoff.ends[index]))
                return
            wanted, posted = len(self._layout.share(index)) * len(granted.block_ids), handoff.posted_blocks[index]
            if posted != wanted:
                self._fail(handoff, f"cache group {index}: {posted} of {wanted} granted blocks of all layers came")
                return
        self._transport.send(handoff.peer, encode(Final(grant.key, first_token, handoff.posted, handoff.other_tokens)))
        handoff.final_sent = True

    def _reap(self, handoff: SentHandoff) -> None:
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

    def _settle(self, handoff: SentHandoff) -> None:
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

    def _fail(self, handoff: SentHandoff, reason: str, *, tell_peer: bool = True) -> None:
        if handoff.failure is None:
            handoff.failure = reason
            handoff.waiting.clear()
        handoff.tell_peer = handoff.tell_peer and tell_peer

    def _forget(self, handoff: SentHandoff, event: PrefillEvent, served: HandoffKey | None = None) -> None:
        del self._open[handoff.handoff_id]
        self._not_open.end(handoff.peer, handoff.handoff_id, served)
        self._emit(event)

    def _close(self, peer: str, key: HandoffKey, reason: str) -> None:
        try:
            self._transport.send(peer, encode(Closed(key, reason)))
        except PeerError:
            return  # a peer that is gone needs no confirmation


def _places(layers: range, share: range) -> range:
    """Which of a share's layers are among these neighbours, as places within the share."""
    first, last = (-(-(end - share.start) // share.step) for end in (layers.start, layers.stop))
    return range(max(0, first), min(max(0, last), len(share)))


def _wrong_grant(granted: GroupBlocks, num_blocks: int) -> str:
    held = f" behind {granted.first_block} that it has" if granted.first_block else ""
    return f"the decode worker granted {len(granted.block_ids)} blocks{held}, {num_blocks} are needed"
