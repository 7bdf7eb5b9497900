"""What peers have said of handoffs that are not open here: not begun yet, or over."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator

from kv_transfer.handoff.messages import Grant
from kv_transfer.handoff_key import HandoffKey

MAX_EARLY_GRANTS = 65_536
_REMEMBERED = 65_536
_GRANT_PATIENCE_S = 300.0


class NotOpen:
    """Grants that came before their request, and handoffs that have ended.

    Each is of one peer alone: what somebody else says of a handoff's id, knowing it or by chance, changes nothing for
    the peer that the handoff is with.
    """

    def __init__(self) -> None:
        self._grants: dict[bytes, dict[str, Grant]] = {}
        self._came_at: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._ended: OrderedDict[tuple[bytes, str], HandoffKey | None] = OrderedDict()

    @property
    def num_grants(self) -> int:
        """Grants whose request has not come."""
        return len(self._came_at)

    def keep(self, sender: str, grant: Grant) -> str | None:
        """Keep a grant until its request comes. Returns why not: the sender is told that nothing will be written."""
        handoff_id = grant.key.handoff_id
        if (handoff_id, sender) in self._ended:
            served = self._ended[handoff_id, sender]  # the same: only a repetition of what has been served
            return None if served == grant.key else "the prefill worker has given up this request"
        if (first := self._grants.get(handoff_id, {}).get(sender)) is not None:
            return None if first.key == grant.key else f"handoff {grant.key} belongs to another reservation"
        if len(self._came_at) >= MAX_EARLY_GRANTS:
            return f"{len(self._came_at)} grants wait for their requests, at most {MAX_EARLY_GRANTS} may"
        self._grants.setdefault(handoff_id, {})[sender] = grant
        self._came_at[handoff_id, sender] = time.monotonic()
        return None

    def take(self, handoff_id: bytes) -> dict[str, Grant]:
        """The request has come: what was granted for it, by who has sent it."""
        grants = self._grants.pop(handoff_id, {})
        for sender in grants:
            del self._came_at[handoff_id, sender]
        return grants

    def cancel(self, sender: str, handoff_id: bytes) -> None:
        """A peer wants nothing of this handoff any more."""
        self._drop(handoff_id, sender)
        self.end(sender, handoff_id)

    def end(self, peer: str, handoff_id: bytes, served: HandoffKey | None = None) -> None:
        """A handoff with this peer is over; of one that was sent whole, with its key."""
        self._ended[handoff_id, peer] = served
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def has_ended(self, peer: str, handoff_id: bytes) -> bool:
        """Whether a handoff with this peer is over, as far as one remembers."""
        return (handoff_id, peer) in self._ended

    def forget(self, engine_id: str) -> None:
        """A peer is gone, with what it has granted."""
        for handoff_id, sender in list(self._came_at):
            if sender == engine_id:
                self._drop(handoff_id, sender)

    def overdue(self) -> Iterator[tuple[str, HandoffKey]]:
        """Those whose request will not come, each with who has sent it; they are over."""
        now = time.monotonic()
        while self._came_at:
            (handoff_id, sender), came_at = next(iter(self._came_at.items()))
            if now - came_at <= _GRANT_PATIENCE_S:
                return
            key = self._grants[handoff_id][sender].key
            self.cancel(sender, handoff_id)
            yield sender, key

    def _drop(self, handoff_id: bytes, sender: str) -> None:
        if self._came_at.pop((handoff_id, sender), None) is None:
            return
        grants = self._grants[handoff_id]
        del grants[sender]
        if not grants:
            del self._grants[handoff_id]
