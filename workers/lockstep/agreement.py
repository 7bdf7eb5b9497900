"""When the ranks of a worker agree that a handoff has ended, and how. Plain data; knows neither threads nor networks.

Every rank hands over its own share of the cache and sees the share's own events, in its own order. The worker sees one
event for all of them: of an end, when every rank has come to it, and then the worst. Decode's share ends in
`HandoffReceived` or `HandoffReleased`, prefill's in `HandoffSent` or `HandoffAborted`. No block is given away before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kv_transfer.connector import (
    ConnectorEvent,
    HandoffAborted,
    HandoffFailed,
    HandoffReceived,
    HandoffReleased,
    HandoffSent,
)
from kv_transfer.handoff_key import HandoffKey
from workers.parallel.errors import TensorParallelError


@dataclass(frozen=True)
class Abandon:
    """Prefill: a rank's share has failed; the other ranks are to give theirs up. The worker is not told."""

    handoff_id: bytes
    reason: str


GroupEvent = ConnectorEvent | Abandon
_End = HandoffReceived | HandoffReleased | HandoffSent | HandoffAborted


@dataclass
class _Handoff:
    """What the ranks have said of a handoff; of a failure, only the first one counts."""

    ends: dict[int, _End] = field(default_factory=dict)
    failure: str | None = None


class Agreement:
    """Every handoff of which some rank has reported something and not all have reported its end.

    Args:
        size: ranks of the worker.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._handoffs: dict[HandoffKey | bytes, _Handoff] = {}

    @property
    def num_open(self) -> int:
        """Handoffs that some rank has spoken of and the group has not ended."""
        return len(self._handoffs)

    def report(self, rank: int, events: Iterable[ConnectorEvent]) -> list[GroupEvent]:
        """Take what a rank has seen, in the order in which it saw it. Returns what is now true of all, in order.

        Raises:
            TensorParallelError: a rank reports a second end of the same handoff.
        """
        agreed: list[GroupEvent] = []
        for event in events:
            agreed += self._take(rank, event)
        return agreed

    def _take(self, rank: int, event: ConnectorEvent) -> list[GroupEvent]:
        name = event.handoff_id if isinstance(event, HandoffSent | HandoffAborted) else event.key
        handoff = self._handoffs.setdefault(name, _Handoff())
        agreed: list[GroupEvent] = []
        if isinstance(event, HandoffFailed | HandoffAborted) and handoff.failure is None:
            handoff.failure = event.reason
            if isinstance(event, HandoffFailed):
                agreed.append(event)
            elif len(handoff.ends) + 1 < self._size:
                agreed.append(Abandon(event.handoff_id, event.reason))
        if isinstance(event, HandoffFailed):
            return agreed
        if rank in handoff.ends:
            raise TensorParallelError(f"rank {rank} reports a second end of a handoff: {event}")
        handoff.ends[rank] = event
        if len(handoff.ends) == self._size:
            del self._handoffs[name]
            agreed += _ended(name, list(handoff.ends.values()), handoff.failure)
        return agreed


def _ended(name: HandoffKey | bytes, ends: list[_End], failure: str | None) -> list[GroupEvent]:
    """The event of the whole handoff."""
    if isinstance(name, bytes):
        sent = [end for end in ends if isinstance(end, HandoffSent)]
        if len(sent) < len(ends):
            return [HandoffAborted(name, failure or "a rank gave its share up")]
        return [
            HandoffSent(
                name,
                sum(end.num_bytes for end in sent),
                sum(end.num_parts for end in sent),
                max(end.transfer_s for end in sent),
                max(end.exposed_s for end in sent),
            )
        ]
    received = [end for end in ends if isinstance(end, HandoffReceived)]
    if failure is not None or len(received) < len(ends):
        return [HandoffReleased(name)]
    if len({(end.first_token, end.other_tokens) for end in received}) > 1:
        tokens = ", ".join(" ".join(map(str, (end.first_token, *end.other_tokens))) for end in received)
        return [HandoffFailed(name, f"the ranks received different first tokens: {tokens}"), HandoffReleased(name)]
    return [received[0]]
