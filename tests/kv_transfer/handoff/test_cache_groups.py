"""Cache groups of unlike form: each has blocks of its own, and a handoff is whole when all of them are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased, HandoffSent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Grant, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults, LocalFabric

FULL = GroupLayout("full", (0, 2, 5), 4, 2, 3, "float32")
WINDOW = GroupLayout("sliding", (1, 3), 4, 1, 8, "bfloat16", window=9)
LATENT = GroupLayout("mla", (4,), 2, 1, 5, "float16")
TWO, THREE = KVLayout((FULL, WINDOW)), KVLayout((WINDOW, LATENT, FULL))
NUM_BLOCKS = {FULL: 40, WINDOW: 14, LATENT: 70}
HANDOFF = b"h" * 16


class End:
    """A connector with a cache a group, all zeros."""

    def __init__(self, fabric: LocalFabric, name: str, layout: KVLayout) -> None:
        self.layout = layout
        self.caches = [
            torch.zeros(g.num_layers, NUM_BLOCKS[g], *g.block_shape, dtype=getattr(torch, g.dtype))
            for g in layout.groups
        ]
        self.connector = LocalConnector(fabric)
        self.info = self.connector.register_kv_caches(name, self.caches, layout)
        self.id = self.info.engine_id

    def fill(self, blocks: Sequence[Sequence[int]], number: float) -> None:
        for cache, ids in zip(self.caches, blocks, strict=True):
            cache[:, list(ids)] = number

    def numbers(self, blocks: Sequence[Sequence[int]]) -> set[float]:
        """The different numbers in these blocks of all groups."""
        return {
            float(number)
            for cache, ids in zip(self.caches, blocks, strict=True)
            for number in cache[:, list(ids)].unique()
        }


def pair(layout: KVLayout, faults: Faults | None = None) -> tuple[LocalFabric, End, End]:
    fabric = LocalFabric(faults)
    p, d = End(fabric, "p", layout), End(fabric, "d", layout)
    p.connector.connect(d.info, 1.0)
    d.connector.connect(p.info, 1.0)
    return fabric, p, d


def poll(*both: End, rounds: int = 30) -> list:
    return [event for _ in range(rounds) for end in both for event in end.connector.poll()]


def spans(layout: KVLayout, num_tokens: int) -> list[range]:
    """Places in the sequence of the blocks that a prompt's decoding needs, by group."""
    found = []
    for group in layout.groups:
        first = 0 if group.window is None else max(0, num_tokens - group.window + 1) // group.block_size
        found.append(range(first, -(-num_tokens // group.block_size)))
    return found


def push_all(p: End, num_tokens: int, src: Sequence[Sequence[int]]) -> None:
    for index, (group, span, ids) in enumerate(zip(p.layout.groups, spans(p.layout, num_tokens), src, strict=True)):
        for layer in range(group.num_layers):
            p.connector.push(HANDOFF, index, range(layer, layer + 1), span.start, ids, None)
    p.connector.finish(HANDOFF, 7)


@pytest.mark.parametrize("layout", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("grant_first", [True, False])
def test_every_group_arrives_byte_for_byte(layout, grant_first):
    _, p, d = pair(layout)
    for cache in p.caches:
        cache.copy_(torch.rand(cache.shape))
    num_tokens = 21
    needed = spans(layout, num_tokens)
    src = [[3 + 2 * i for i in range(len(span))] for span in needed]
    held = [0 if group.window is not None else 1 for group in layout.groups]
    granted = [
        GroupBlocks(span.start + skip, [9 - i for i in range(len(span) - skip)])
        for span, skip in zip(needed, held, strict=True)
    ]
    if grant_first:
        key = d.connector.expect(HANDOFF, p.id, granted)
        poll(d, p)
    p.connector.begin(HANDOFF, d.id)
    push_all(p, num_tokens, src)
    if not grant_first:
        key = d.connector.expect(HANDOFF, p.id, granted)
    events = poll(p, d)
    assert HandoffReceived(key, 7) in events
    (sent,) = [event for event in events if isinstance(event, HandoffSent)]
    expected = [torch.zeros_like(cache) for cache in d.caches]
    for before, source, ids, blocks, skip in zip(expected, p.caches, src, granted, held, strict=True):
        before[:, list(blocks.block_ids)] = source[:, ids[skip:]]
    assert all(torch.equal(cache, before) for cache, before in zip(d.caches, expected, strict=True))
    assert sent.num_bytes == sum(
        group.num_layers * group.block_bytes * len(blocks.block_ids)
        for group, blocks in zip(layout.groups, granted, strict=True)
    )


@pytest.mark.parametrize("missing", range(3))
def test_a_group_that_is_not_pushed_fails_both_sides_at_once(missing):
    _, p, d = pair(THREE)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, [1]), GroupBlocks(0, [1, 2]), GroupBlocks(0, [1])])
    p.connector.begin(HANDOFF, d.id)
    for index, (group, ids) in enumerate(zip(THREE.groups, ([1], [1, 2], [1]), strict=True)):
        if index != missing:
            p.connector.push(HANDOFF, index, range(group.num_layers), 0, ids, None)
    p.connector.finish(HANDOFF, 7)
    events = poll(p, d)
    assert [type(event) for event in events if not isinstance(event, HandoffAborted)] == [
        HandoffFailed,
        HandoffReleased,
    ]
    assert key in [event.key for event in events if isinstance(event, HandoffReleased)]


@pytest.mark.parametrize(
    ("layers", "first_block", "reason"),
    [
        (range(2), 3, "cache group 1: 4 of 6 granted blocks of all layers came"),  # begins behind the grant
        (range(1), 2, "cache group 1: 3 of 6 granted blocks of all layers came"),  # a layer is missing
    ],
)
def test_what_was_pushed_must_be_what_was_granted_in_each_group(layers, first_block, reason):
    """Or decode would wait until its deadline."""
    _, p, d = pair(TWO)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, range(5)), GroupBlocks(2, [4, 5, 6])])
    p.connector.begin(HANDOFF, d.id)
    p.connector.push(HANDOFF, 0, range(3), 0, range(5), None)
    p.connector.push(HANDOFF, 1, layers, first_block, range(5 - first_block), None)
    p.connector.finish(HANDOFF, 7)
    events = poll(p, d)
    assert HandoffFailed(key, reason) in events
    assert HandoffReleased(key) in events
    assert HandoffAborted(HANDOFF, reason) in events


def test_a_grant_of_fewer_groups_fails_the_handoff():
    fabric, p, d = pair(TWO)
    p.connector.begin(HANDOFF, d.id)
    fabric.send(d.id, p.id, encode(Grant(HandoffKey(HANDOFF, 1, 1), (GroupBlocks(0, [1]),))))
    assert poll(p) == [HandoffAborted(HANDOFF, "the decode worker granted 1 cache groups, 2 are kept")]


def test_blocks_of_too_few_groups_are_not_expected():
    _, p, d = pair(TWO)
    with pytest.raises(ValueError, match="blocks of 1 cache groups, the cache has 2"):
        d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, [1])])


@dataclass
class Handoff:
    number: float
    src: list[list[int]]
    dst: list[list[int]]
    key: HandoffKey | None = None


class Storm:
    """Two workers with as many handoffs under way as there are blocks for; what is free holds zeros on both sides."""

    def __init__(self, layout: KVLayout, seed: int) -> None:
        self.layout = layout
        self.rng = random.Random(seed)
        faults = Faults(seed=seed, max_delay=seed * 3, duplicate=0.1, fail=0.02 * (seed % 2))
        _, self.p, self.d = pair(layout, faults)
        self.free = {end: [set(range(NUM_BLOCKS[group])) for group in layout.groups] for end in (self.p, self.d)}
        self.sent: dict[bytes, Handoff] = {}
        self.expected: dict[HandoffKey, Handoff] = {}
        self.received = 0

    def begin(self, number: int) -> None:
        """A prompt of random length, of which decode holds a random part of each group; neither side goes first."""
        rng = self.rng
        needed = spans(self.layout, rng.randint(1, 24))
        firsts = [rng.choice([span.start, rng.randint(span.start, span.stop)]) for span in needed]
        counts = [span.stop - first for span, first in zip(needed, firsts, strict=True)]
        src = self._take(self.p, [len(span) for span in needed])
        dst = self._take(self.d, counts) if src is not None else None
        if src is None or dst is None:
            if src is not None:
                self._give(self.p, src)
            return
        handoff, handoff_id = Handoff(float(number % 250 + 1), src, dst), rng.randbytes(16)
        self.p.fill(src, handoff.number)
        self.sent[handoff_id] = handoff
        for side in rng.sample([0, 1], 2):
            if side:
                granted = [GroupBlocks(first, ids) for first, ids in zip(firsts, dst, strict=True)]
                handoff.key = self.d.connector.expect(handoff_id, self.p.id, granted)
                self.expected[handoff.key] = handoff
            else:
                self._push(handoff_id, needed, src)
            self.settle(rng.randint(0, 2))
        if rng.random() < 0.1:
            self.d.connector.cancel(handoff.key)
        if rng.random() < 0.1:
            self.p.connector.abort(handoff_id, "the client gave up")

    def _take(self, end: End, counts: list[int]) -> list[list[int]] | None:
        if any(len(free) < count for free, count in zip(self.free[end], counts, strict=True)):
            return None
        taken = [self.rng.sample(sorted(free), count) for free, count in zip(self.free[end], counts, strict=True)]
        for free, ids in zip(self.free[end], taken, strict=True):
            free -= set(ids)
        return taken

    def _give(self, end: End, blocks: list[list[int]]) -> None:
        end.fill(blocks, 0.0)
        for free, ids in zip(self.free[end], blocks, strict=True):
            free |= set(ids)

    def _push(self, handoff_id: bytes, needed: list[range], src: list[list[int]]) -> None:
        """Random rectangles of each group, the groups in turns."""
        self.p.connector.begin(handoff_id, self.d.id)
        parts = []
        for index, (group, span, ids) in enumerate(zip(self.layout.groups, needed, src, strict=True)):
            cut = self.rng.randint(span.start, span.stop)
            for start, end in ((span.start, cut), (cut, span.stop)):
                middle = self.rng.randint(0, group.num_layers)
                for layers in (range(middle), range(middle, group.num_layers)):
                    if layers and end > start:
                        parts.append((index, layers, start, ids[start - span.start : end - span.start], None))
        self.rng.shuffle(parts)
        for part in parts:
            self.p.connector.push(handoff_id, *part)
        self.p.connector.finish(handoff_id, 7)

    def settle(self, rounds: int) -> None:
        for _ in range(rounds):
            for event in self.p.connector.poll():
                self._give(self.p, self.sent.pop(event.handoff_id).src)
            for event in self.d.connector.poll():
                if isinstance(event, HandoffFailed):
                    continue
                handoff = self.expected.pop(event.key)
                if isinstance(event, HandoffReceived):
                    self.received += 1
                    assert self.d.numbers(handoff.dst) <= {handoff.number}, "received means whole, in every group"
                else:
                    assert self.d.numbers(handoff.dst) <= {handoff.number, 0.0}
                self._give(self.d, handoff.dst)
            assert self.d.numbers([sorted(free) for free in self.free[self.d]]) <= {0.0}, "a free block was written to"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("layout", [TWO, THREE], ids=["two", "three"])
def test_hundreds_of_handoffs_of_unlike_groups(layout, seed):
    storm = Storm(layout, seed)
    for number in range(200):
        storm.begin(number)
        storm.settle(storm.rng.randint(0, 3))
    for _ in range(1000):
        storm.settle(1)
        if not storm.sent and not storm.expected:
            break
    assert not storm.sent
    assert not storm.expected
    assert storm.received > 50
