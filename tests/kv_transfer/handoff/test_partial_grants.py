"""Decode grants the tail of a sequence: only that is written, whatever was pushed, and however it travels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased, HandoffSent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Grant, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults, LocalFabric
from long_tails import slow_unless

LAYERS, NUM_BLOCKS = 3, 32
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
HANDOFF = b"h" * 16


class End:
    """A connector with a cache of one number per (layer, block): layer × 1000 + block, and -1 on decode."""

    def __init__(self, fabric: LocalFabric, name: str) -> None:
        self.cache = torch.full((LAYERS, NUM_BLOCKS, 2, 1, 1, 1), -1.0)
        self.connector = LocalConnector(fabric)
        self.info = self.connector.register_kv_caches(name, [self.cache], LAYOUT)
        self.id = self.info.engine_id

    def meet(self, *others: End) -> None:
        for other in others:
            self.connector.connect(other.info, 1.0)
            other.connector.connect(self.info, 1.0)


@pytest.fixture
def ends() -> tuple[LocalFabric, End, End]:
    fabric = LocalFabric()
    p, d = End(fabric, "p"), End(fabric, "d")
    p.meet(d)
    p.cache[:] = (torch.arange(LAYERS)[:, None] * 1000 + torch.arange(NUM_BLOCKS)).view(LAYERS, NUM_BLOCKS, 1, 1, 1, 1)
    return fabric, p, d


def poll(*both: End, rounds: int = 30) -> list:
    return [event for _ in range(rounds) for end in both for event in end.connector.poll()]


def push(p: End, src: list[int], cuts: tuple[int, ...] = (), groups: tuple[range, ...] = (range(LAYERS),)) -> None:
    """Push a sequence's blocks in chunks that begin at `cuts`, each by groups of layers."""
    bounds = (0, *cuts, len(src))
    for start, end in pairwise(bounds):
        for layers in groups:
            p.connector.push(HANDOFF, 0, layers, start, src[start:end], None)


SRC = [4, 5, 6, 20, 21, 2, 1]


@pytest.mark.parametrize("order", ["grant first", "grant last", "grant between"])
@pytest.mark.parametrize("first_block", range(len(SRC) + 1))
@pytest.mark.parametrize("cuts", [(), (3,), (1, 3, 6)])
def test_the_granted_tail_arrives_and_nothing_else(order, first_block, cuts, ends):
    _, p, d = ends
    dst = [11, 10, 30, 31, 0, 9, 8][: len(SRC) - first_block]
    if order == "grant first":
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(first_block, dst)])
        poll(d, p)
    p.connector.begin(HANDOFF, d.id)
    if order == "grant between":
        p.connector.poll()
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(first_block, dst)])
    push(p, SRC, cuts, (range(1), range(1, LAYERS)))
    p.connector.finish(HANDOFF, 7)
    if order == "grant last":
        p.connector.poll()
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(first_block, dst)])
    events = poll(p, d)
    assert HandoffReceived(key, 7) in events
    (sent,) = [event for event in events if isinstance(event, HandoffSent)]
    chunks = sum(end > first_block for end in (*cuts, len(SRC)))
    assert (sent.num_parts, sent.num_bytes) == (2 * chunks, LAYERS * len(dst) * LAYOUT.primary.block_bytes)
    assert len(events) == 2
    expected = torch.full_like(d.cache, -1.0)
    expected[:, dst] = p.cache[:, SRC[first_block:]]
    assert torch.equal(d.cache, expected)


class Never:
    def query(self) -> bool:
        return False


def test_what_is_not_wanted_is_not_waited_for(ends):
    _, p, d = ends
    p.connector.begin(HANDOFF, d.id)
    p.connector.push(HANDOFF, 0, range(LAYERS), 0, [1, 2], Never())
    p.connector.push(HANDOFF, 0, range(LAYERS), 2, [3], None)
    p.connector.finish(HANDOFF, 7)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(2, [9])])
    assert HandoffReceived(key, 7) in poll(p, d)


@pytest.mark.parametrize(
    ("blocks", "first_block", "reason"),
    [
        (3, 1, "granted 3 blocks behind 1 that it has, 3 are needed"),  # one too many
        (1, 1, "granted 1 blocks behind 1 that it has, 3 are needed"),
        (0, 4, "granted 0 blocks behind 4 that it has, 3 are needed"),
        (2, 4_000_000_000, "granted 2 blocks behind 4000000000 that it has, 3 are needed"),
        (4, 0, "granted 4 blocks, 3 are needed"),
        (0, 2, "granted 0 blocks behind 2 that it has, 3 are needed"),
    ],
)
@pytest.mark.parametrize("grant_first", [True, False])
def test_a_grant_that_does_not_end_where_the_sequence_ends_fails_on_both_sides(
    blocks, first_block, reason, grant_first, ends
):
    """At once, and not by a deadline."""
    _, p, d = ends
    if grant_first:
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(first_block, list(range(blocks)))])
    p.connector.begin(HANDOFF, d.id)
    push(p, [1, 2, 3])
    p.connector.finish(HANDOFF, 7)
    if not grant_first:
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(first_block, list(range(blocks)))])
    events = poll(p, d)
    assert [event.reason for event in events if isinstance(event, HandoffAborted)] == [f"the decode worker {reason}"]
    assert [event for event in events if isinstance(event, HandoffFailed)] == [
        HandoffFailed(key, f"the decode worker {reason}")
    ]
    assert HandoffReleased(key) in events


def test_a_negative_first_block_is_refused(ends):
    _, p, d = ends
    with pytest.raises(ValueError, match="first_block is -1"):
        d.connector.expect(HANDOFF, p.id, [GroupBlocks(-1, [1])])


def test_a_repeated_grant_with_another_first_block_changes_nothing(ends):
    """The first one counts: a reservation is granted once."""
    fabric, p, d = ends
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(1, [9, 8])])
    poll(d, p)
    p.connector.begin(HANDOFF, d.id)
    push(p, [1, 2, 3], (2,))
    p.connector.poll()
    fabric.send(d.id, p.id, encode(Grant(key, (GroupBlocks(0, (20, 21, 22)),))))
    p.connector.finish(HANDOFF, 7)
    assert HandoffReceived(key, 7) in poll(p, d)
    assert torch.equal(d.cache[:, [9, 8]], p.cache[:, [2, 3]])
    assert d.cache[:, 20:].unique().tolist() == [-1.0]


def test_a_second_reservation_with_more_of_it_is_closed_and_the_first_goes_on(ends):
    _, p, d = ends
    p.connector.begin(HANDOFF, d.id)
    first = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, [4, 5, 6])])
    second = d.connector.expect(HANDOFF, p.id, [GroupBlocks(2, [7])])
    events = poll(p, d)
    assert {event.key for event in events} == {second}
    push(p, [1, 2, 3])
    p.connector.finish(HANDOFF, 7)
    assert HandoffReceived(first, 7) in poll(p, d)
    assert d.cache[:, 7].unique().tolist() == [-1.0]


def test_a_cancelled_grant_of_nothing_is_released(ends):
    _, p, d = ends
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(3, [])])
    d.connector.cancel(key)
    assert poll(d, p) == [HandoffReleased(key)]
    p.connector.begin(HANDOFF, d.id)
    push(p, [1, 2, 3])
    p.connector.finish(HANDOFF, 7)
    assert [type(event) for event in poll(p, d)] == [HandoffAborted]


def test_a_part_that_is_lost_is_missed_behind_a_held_beginning():
    """Without it the handoff is not whole, however much of the sequence was here before."""
    fabric = LocalFabric(Faults(seed=1, drop=1.0))
    p, d = End(fabric, "p"), End(fabric, "d")
    p.meet(d)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(2, [4])])
    p.connector.begin(HANDOFF, d.id)
    push(p, [1, 2, 3])
    p.connector.finish(HANDOFF, 7)
    assert HandoffReceived(key, 7) not in poll(p, d)


@dataclass
class Handoff:
    """One on its way: its number is in all blocks that it writes, from `src` to `dst`."""

    number: int
    src: list[int]
    dst: list[int]
    first_block: int
    key: HandoffKey | None = None


@pytest.mark.parametrize("seed", slow_unless((3).__gt__, range(6)))
def test_thousands_of_partial_handoffs(seed):
    """Random tails, rectangles, delays, repetitions and failures; what was not granted never changes."""
    rng = random.Random(seed)
    fabric = LocalFabric(Faults(seed=seed, max_delay=seed * 3, duplicate=0.1, fail=0.02 * (seed % 2)))
    p, d = End(fabric, "p"), End(fabric, "d")
    p.meet(d)
    free = {id(p): set(range(NUM_BLOCKS)), id(d): set(range(NUM_BLOCKS))}
    d.cache[:] = 0.0
    open_by_id: dict[bytes, Handoff] = {}
    open_by_key: dict[HandoffKey, Handoff] = {}
    counts = {"received": 0, "nothing missing": 0}

    def settle() -> None:
        for event in p.connector.poll():
            handoff = open_by_id.pop(event.handoff_id)
            p.cache[:, handoff.src] = 0.5
            free[id(p)] |= set(handoff.src)
            if isinstance(event, HandoffSent):
                assert event.num_bytes == LAYERS * len(handoff.dst) * LAYOUT.primary.block_bytes
                assert bool(event.num_parts) == bool(handoff.dst)
        for event in d.connector.poll():
            if isinstance(event, HandoffFailed):
                continue
            handoff = open_by_key.pop(event.key)
            if isinstance(event, HandoffReceived):
                counts["received"] += 1
                counts["nothing missing"] += not handoff.dst
                assert set(d.cache[:, handoff.dst].unique().tolist()) <= {float(handoff.number)}, "received means whole"
            d.cache[:, handoff.dst] = 0.0
            free[id(d)] |= set(handoff.dst)
        for handoff in open_by_key.values():
            assert set(d.cache[:, handoff.dst].unique().tolist()) <= {float(handoff.number), 0.0}
        assert set(d.cache[:, sorted(free[id(d)])].unique().tolist()) <= {0.0}, "a block of nobody was written to"

    for number in range(1, 500):
        size = rng.randint(1, 6)
        first_block = rng.choice([0, rng.randint(0, size), size])
        if len(free[id(p)]) >= size and len(free[id(d)]) >= size - first_block:
            src = rng.sample(sorted(free[id(p)]), size)
            dst = rng.sample(sorted(free[id(d)]), size - first_block)
            free[id(p)] -= set(src)
            free[id(d)] -= set(dst)
            p.cache[:, src] = float(number)
            handoff, handoff_id = Handoff(number, src, dst, first_block), rng.randbytes(16)
            open_by_id[handoff_id] = handoff
            for side in rng.sample([0, 1], 2):
                if side:
                    handoff.key = d.connector.expect(handoff_id, p.id, [GroupBlocks(first_block, dst)])
                    open_by_key[handoff.key] = handoff
                else:
                    push_rectangles(rng, p, d, handoff_id, src)
                for _ in range(rng.randint(0, 3)):
                    settle()
            if rng.random() < 0.15:
                d.connector.cancel(handoff.key)
            if rng.random() < 0.1:
                p.connector.abort(handoff_id, "the client gave up")
        for _ in range(rng.randint(0, 4)):
            settle()
    for _ in range(2000):
        settle()
        if not open_by_id and not open_by_key:
            break
    assert [len(blocks) for blocks in free.values()] == [NUM_BLOCKS, NUM_BLOCKS]
    assert counts["received"] > 100
    assert counts["nothing missing"] > 20


def push_rectangles(rng: random.Random, p: End, d: End, handoff_id: bytes, src: list[int]) -> None:
    """All of a sequence as random rectangles: chunks, each by its own groups of layers."""
    p.connector.begin(handoff_id, d.id)
    start = 0
    while start < len(src):
        end = rng.randint(start + 1, len(src))
        layer = 0
        while layer < LAYERS:
            last = rng.randint(layer + 1, LAYERS)
            p.connector.push(handoff_id, 0, range(layer, last), start, src[start:end], None)
            layer = last
        start = end
    p.connector.finish(handoff_id, 7)
