"""What the prefill side knows of a handoff while it is open."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kv_transfer.connector import ReadyEvent
from kv_transfer.handoff.messages import Grant
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.transports.base import Transfer


@dataclass(frozen=True)
class SentPart:
    """A rectangle of a sequence's cache, as the worker pushed it.

    Attributes:
        group: the cache group.
        layers: places among those of the group that this rank hands over, see `KVLayout.share`.
        first_block: the place of its first block in the sequence.
        src_blocks: this worker's blocks.
        ready: happens before they may be read; None: they may.
    """

    group: int
    layers: range
    first_block: int
    src_blocks: tuple[int, ...]
    ready: ReadyEvent | None

    @property
    def end(self) -> int:
        """The place behind its last block in the sequence."""
        return self.first_block + len(self.src_blocks)

    def without(self, num_blocks: int) -> SentPart | None:
        """What is left of it without the sequence's first `num_blocks` blocks; None: nothing."""
        if num_blocks <= self.first_block:
            return self
        if num_blocks >= self.end:
            return None
        return SentPart(
            self.group, self.layers, num_blocks, self.src_blocks[num_blocks - self.first_block :], self.ready
        )

    def pieces(self, max_blocks: int) -> Iterator[SentPart]:
        """It as rectangles of at most so many blocks, all layers together, at least one: whole layers if they fit."""
        per_layer = len(self.src_blocks)
        num_layers = max(1, max_blocks // per_layer)
        num_blocks = per_layer if max_blocks >= per_layer else max(1, max_blocks)
        for layer in range(self.layers.start, self.layers.stop, num_layers):
            layers = range(layer, min(layer + num_layers, self.layers.stop))
            for at in range(0, per_layer, num_blocks):
                blocks = self.src_blocks[at : at + num_blocks]
                yield SentPart(self.group, layers, self.first_block + at, blocks, self.ready)


@dataclass
class SentHandoff:
    """An open handoff.

    Attributes:
        handoff_id: its name on both sides.
        peer: the decode engine.
        grant: what the peer has reserved; None: that is not known yet.
        waiting: parts that were pushed and not posted, in order.
        in_flight: WRITEs that have not ended.
        ends: by cache group, the place behind the last block that was pushed.
        posted_blocks: by cache group, blocks times layers in the WRITEs so far.
        posted: WRITEs so far.
        num_bytes: that they carried.
        first_token: once everything has been pushed.
        other_tokens: those of the prompt's other samples.
        final_sent: whether the last message is on its way.
        failure: why it will not become whole.
        tell_peer: whether the peer is told so.
        busy_since: when WRITEs began to be in flight, the last time.
        busy_s: seconds in which some were.
        finished_at: when the first token was known.
        last_landed_at: when nothing was in flight any more, the last time.
    """

    handoff_id: bytes
    peer: str
    grant: Grant | None = None
    waiting: deque[SentPart] = field(default_factory=deque)
    in_flight: list[Transfer] = field(default_factory=list)
    ends: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    posted_blocks: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    posted: int = 0
    num_bytes: int = 0
    first_token: int | None = None
    other_tokens: tuple[int, ...] = ()
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
