"""The decode side of handoffs: counts parts, and knows when nobody can write to a block any more."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.connector import DecodeEvent, HandoffFailed, HandoffReceived, HandoffReleased, ReadyEvent
from kv_transfer.errors import NotConnectedError, PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Part, encode
from kv_transfer.handoff.part_counter import PartCounter, Wanted
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.transports.base import Transport

CANCEL_AGAIN_S = 1.0
"""From one `Cancel` that is not answered to the next; doubled a few times."""

_MAX_DOUBLINGS = 4
_LOOK_AGAIN_S = 0.02
_EAGER_CANCELS = 5


@dataclass
class _Incoming:
    key: HandoffKey
    peer: str
    ledger: PartCounter
    waiting: tuple[Grant, ReadyEvent] | None = None
    cancelled: bool = False
    num_cancels: int = 0
    cancel_at: float = math.inf
    reconnected: bool = False
    drained_at: float | None = None


class HandoffReceiver:
    """Every handoff that this worker expects. Used by the connector's owner thread only.

    Blocks that were granted come back in one of four ways: everything granted has landed; the peer says that it writes
    nothing more, which it is asked for until it does; the peer is lost, and nothing of it can land any more, by its
    process' end or by the end of the way here; or the grant was never sent. No clock decides, here or there.

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
        self._lost: dict[str, bool] = {}
        self._look_at = 0.0

    @property
    def num_open(self) -> int:
        """Handoffs whose blocks somebody may still write to."""
        return len(self._open)

    @property
    def active(self) -> bool:
        """Whether the network must be looked at often; for what stays out long it need not."""
        return any(h.peer not in self._lost and h.num_cancels <= _EAGER_CANCELS for h in self._open.values())

    def expect(
        self, key: HandoffKey, peer: str, blocks: Sequence[GroupBlocks], ready: ReadyEvent | None = None
    ) -> None:
        """Grant the blocks of each cache group to the prefill worker, once `ready`."""
        wanted = [
            Wanted(len(self._layout.share(group)), range(granted.first_block, granted.end))
            for group, granted in enumerate(blocks)
        ]
        handoff = _Incoming(key, peer, PartCounter(wanted))
        self._open[key] = handoff
        grant = Grant(key, tuple(blocks))
        if ready is None or ready.query():
            self._grant(handoff, grant)
        else:
            handoff.waiting = grant, ready

    def _grant(self, handoff: _Incoming, grant: Grant) -> None:
        peer = handoff.peer
        try:
            if peer in self._transport.broken_peers:  # or each request to it would cost blocks until it is met anew
                raise NotConnectedError(f"the connection to {peer} is broken")
            self._transport.send(peer, encode(grant))
        except NotConnectedError as error:
            self._fail(handoff, str(error))
            self._release(handoff)  # who was never granted the blocks cannot write to them
        except PeerError as error:  # it may have been sent
            self._fail(handoff, str(error))

    def cancel(self, key: HandoffKey) -> None:
        """Ask the prefill worker to stop, until it confirms; released then."""
        handoff = self._open.get(key)
        if handoff is not None and not handoff.cancelled:
            handoff.cancelled, handoff.waiting = True, None
            self._ask_to_stop(handoff)

    def _ask_to_stop(self, handoff: _Incoming) -> None:
        patience_s = CANCEL_AGAIN_S * 2 ** min(handoff.num_cancels, _MAX_DOUBLINGS)
        handoff.num_cancels += 1
        handoff.cancel_at = time.monotonic() + patience_s
        with contextlib.suppress(PeerError):  # asked again, over another connection perhaps
            self._transport.send(handoff.peer, encode(Cancel(handoff.key)))

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
            if handoff.ledger.contradicted:
                self._fail(handoff, f"prefill worker {sender} has ended the handoff twice, and not alike")
            self._complete(handoff)

    def on_closed(self, sender: str, closed: Closed) -> None:
        """The prefill worker will write nothing more; what it wrote over a broken connection may sit in a socket."""
        handoff = self._open.get(closed.key)
        if handoff is None or handoff.peer != sender:
            return
        self._fail(handoff, closed.reason)
        if handoff.reconnected:
            self._drain(handoff)
        else:
            self._release(handoff)

    def reconnect(self, engine_id: str) -> None:
        """A peer is to be met anew: what was under way is lost, and its blocks come back when the peer says so."""
        for handoff in self._of(engine_id):
            self._fail(handoff, f"the connection to prefill worker {engine_id} is made anew")
            handoff.reconnected = True

    def connected(self, engine_id: str) -> None:
        """A peer can be reached, perhaps once more: it is asked at once for what it has not confirmed."""
        for handoff in self._of(engine_id):
            if handoff.cancelled and handoff.drained_at is None:
                handoff.num_cancels, handoff.cancel_at = 0, 0.0

    def peer_lost(self, engine_id: str, confirmed_dead: bool) -> None:
        """A prefill worker is lost: its handoffs fail now, their blocks are released when nothing of it can land."""
        for handoff in self._of(engine_id):
            self._fail(handoff, f"prefill worker {engine_id} is gone")
            self._lost[engine_id] = confirmed_dead or self._lost.get(engine_id, False)
        self._look_at = 0.0

    def progress(self) -> None:
        """Release what is safe, and ask again for what is not confirmed."""
        now = time.monotonic()
        for handoff in list(self._open.values()):
            if handoff.waiting is not None and handoff.waiting[1].query():
                grant, handoff.waiting = handoff.waiting[0], None
                self._grant(handoff, grant)
            elif handoff.drained_at is not None and handoff.drained_at <= now:
                self._release(handoff)
            elif handoff.cancelled and handoff.peer not in self._lost and handoff.cancel_at <= now:
                self._ask_to_stop(handoff)
        if self._lost and now >= self._look_at:
            self._look_at = now + _LOOK_AGAIN_S
            self._look_after_lost()

    def _look_after_lost(self) -> None:
        for engine_id, confirmed_dead in list(self._lost.items()):
            if self._transport.may_land(engine_id, confirmed_dead):
                continue
            del self._lost[engine_id]
            for handoff in self._of(engine_id):
                self._drain(handoff)

    def _of(self, engine_id: str) -> list[_Incoming]:
        return [handoff for handoff in self._open.values() if handoff.peer == engine_id]

    def _drain(self, handoff: _Incoming) -> None:
        handoff.cancel_at = math.inf
        if handoff.drained_at is None:
            handoff.drained_at = time.monotonic() + self._drain_s

    def _complete(self, handoff: _Incoming) -> None:
        first_token = handoff.ledger.first_token
        if first_token is None:
            return
        if handoff.cancelled:
            self._release(handoff)
        else:
            del self._open[handoff.key]
            self._emit(HandoffReceived(handoff.key, first_token, handoff.ledger.other_tokens))

    def _fail(self, handoff: _Incoming, reason: str) -> None:
        handoff.waiting = None
        if not handoff.cancelled:
            handoff.cancelled = True
            handoff.cancel_at = time.monotonic() + CANCEL_AGAIN_S
            self._emit(HandoffFailed(handoff.key, reason))

    def _release(self, handoff: _Incoming) -> None:
        del self._open[handoff.key]
        self._emit(HandoffReleased(handoff.key))
