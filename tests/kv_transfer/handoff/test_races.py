"""Whatever comes late, twice, from the wrong side or not at all: nobody writes to a block that is another's."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased, HandoffSent
from kv_transfer.errors import KVTransferError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Final, Grant, decode, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.local import Faults, LocalFabric, LocalTransport
from long_tails import slow_unless

LAYERS, NUM_BLOCKS = 2, 24
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
HANDOFF = b"h" * 16
PATIENCE_S = 20.0


class End:
    """A connector with a cache of one number per (layer, block)."""

    def __init__(
        self, fabric: LocalFabric, name: str, connector: PushConnector | None = None, *, threaded: bool = False
    ) -> None:
        self.cache = torch.zeros(LAYERS, NUM_BLOCKS, 2, 1, 1, 1)
        self.connector = connector or LocalConnector(fabric, threaded=threaded)
        self.info = self.connector.register_kv_caches(name, [self.cache], LAYOUT)
        self.id = self.info.engine_id

    def meet(self, *others: End) -> None:
        for other in others:
            self.connector.connect(other.info, PATIENCE_S)
            other.connector.connect(self.info, PATIENCE_S)


@pytest.fixture
def ends() -> tuple[LocalFabric, End, End]:
    fabric = LocalFabric()
    p, d = End(fabric, "p"), End(fabric, "d")
    p.meet(d)
    return fabric, p, d


def push_all(p: End, d: End, blocks=(0, 1)) -> None:
    p.connector.begin(HANDOFF, d.id)
    for layer in range(LAYERS):
        p.connector.push(HANDOFF, 0, range(layer, layer + 1), 0, blocks, None)
    p.connector.finish(HANDOFF, 7)


def poll(*both: End, rounds: int = 20) -> list:
    return [event for _ in range(rounds) for end in both for event in end.connector.poll()]


class LateFinal(LocalTransport):
    """Keeps the last message of a handoff back for as long as it is to be late."""

    def __init__(self, fabric: LocalFabric) -> None:
        super().__init__(fabric)
        self.late = True
        self.kept: list[tuple[str, bytes]] = []

    def receive(self) -> list[tuple[str, bytes]]:
        messages = [*self.kept, *super().receive()]
        self.kept = [message for message in messages if self.late and isinstance(decode(message[1]), Final)]
        return [message for message in messages if message not in self.kept]


def test_a_repeated_grant_does_not_end_a_handoff_that_went_well():
    """The repetition comes when prefill has done its part and the last message is still on its way to decode."""
    fabric = LocalFabric()
    transport = LateFinal(fabric)
    p, d = End(fabric, "p"), End(fabric, "d", PushConnector(transport, drain_s=0.0, threaded=False))
    p.meet(d)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    d.connector.poll()
    push_all(p, d)
    p.connector.poll()
    assert d.connector.poll() == []
    assert [type(event) for event in p.connector.poll()] == [HandoffSent]
    fabric.send(d.id, p.id, encode(Grant(key, (GroupBlocks(0, (4, 5)),))))
    assert poll(p, d) == []
    transport.late = False
    assert poll(d) == [HandoffReceived(key, 7)]


def test_a_second_reservation_is_closed_and_the_first_goes_on(ends):
    _, p, d = ends
    p.connector.begin(HANDOFF, d.id)
    first = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    second = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (6, 7))])
    events = poll(p, d)
    assert [type(event) for event in events] == [HandoffFailed, HandoffReleased]
    assert {event.key for event in events} == {second}
    p.cache[:, :2] = 3.0
    for layer in range(LAYERS):
        p.connector.push(HANDOFF, 0, range(layer, layer + 1), 0, (0, 1), None)
    p.connector.finish(HANDOFF, 7)
    assert HandoffReceived(first, 7) in poll(p, d)
    assert d.cache[:, (4, 5)].unique().tolist() == [3.0]
    assert d.cache[:, (6, 7)].unique().tolist() == [0.0]


def _met() -> tuple[End, End, End]:
    fabric = LocalFabric()
    p, d, e = (End(fabric, name) for name in "pde")
    p.meet(d, e)
    return p, d, e


@pytest.mark.parametrize("first", ["d", "e"])
def test_of_two_early_grants_the_one_counts_that_the_request_is_with(first):
    """Whichever came first; the other is closed."""
    p, d, e = _met()
    ends = [d, e] if first == "d" else [e, d]
    keys = {end: end.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))]) for end in ends}
    for end in ends:
        poll(end, p, rounds=1)
    push_all(p, d)
    events = poll(p, d, e)
    assert HandoffReceived(keys[d], 7) in events
    assert [type(event) for event in events if getattr(event, "key", None) == keys[e]] == [
        HandoffFailed,
        HandoffReleased,
    ]


def test_who_cancels_a_handoff_that_is_anothers_stops_nothing_before_it_begins():
    p, d, e = _met()
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    poll(d, p, rounds=2)
    e.connector.cancel(e.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))]))
    poll(e, p)
    push_all(p, d)
    assert HandoffReceived(key, 7) in poll(p, d)


@pytest.mark.parametrize("block", [NUM_BLOCKS, 2**32 - 1])
def test_a_granted_block_that_is_not_there_is_not_written_to(ends, block):
    """In memory it would be one of the next layer, and somebody else's."""
    fabric, p, d = ends
    p.cache.fill_(1.0)
    push_all(p, d)
    key = HandoffKey(HANDOFF, d.info.incarnation, 1)
    fabric.send(d.id, p.id, encode(Grant(key, (GroupBlocks(0, (4, block)),))))
    (aborted,) = poll(p, d)
    assert f"block {block} of {d.id} was asked for, it has {NUM_BLOCKS}" in aborted.reason
    assert not d.cache.any()


def test_a_cancel_of_another_reservation_stops_nothing(ends):
    fabric, p, d = ends
    p.connector.begin(HANDOFF, d.id)
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    poll(d, p)
    fabric.send(d.id, p.id, encode(Cancel(HandoffKey(HANDOFF, key.incarnation, key.generation + 1))))
    poll(p)
    for layer in range(LAYERS):
        p.connector.push(HANDOFF, 0, range(layer, layer + 1), 0, (0, 1), None)
    p.connector.finish(HANDOFF, 7)
    assert HandoffReceived(key, 7) in poll(p, d)


def test_what_a_lost_peer_said_while_it_lived_counts(ends):
    _, p, d = ends
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    d.connector.poll()
    push_all(p, d)
    p.connector.poll()
    p.connector.close()
    d.connector.disconnect(p.id)
    assert poll(d) == [HandoffReceived(key, 7)]


def test_nothing_of_a_lost_peer_lands_in_blocks_that_were_released():
    for seed in range(20):
        fabric = LocalFabric(Faults(seed=seed, max_delay=30))
        p, d = End(fabric, "p"), End(fabric, "d")
        p.meet(d)
        p.cache.fill_(1.0)
        key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
        push_all(p, d)
        while not fabric.source_blocks(p.id):
            poll(d, p, rounds=1)
        p.connector.close()
        d.connector.disconnect(p.id)
        events = poll(d, rounds=1)
        if events == [HandoffReceived(key, 7)]:
            continue
        while HandoffReleased(key) not in events:
            events += poll(d, rounds=1)
        d.cache.fill_(2.0)  # they belong to another sequence now
        poll(d, rounds=100)
        assert d.cache.unique().tolist() == [2.0]


class _Broken:
    def query(self) -> bool:
        raise RuntimeError("the device is gone")


def test_a_part_that_cannot_be_pushed_fails_its_handoff_alone(ends):
    _, p, d = ends
    keys = [d.connector.expect(bytes([i]) * 16, p.id, [GroupBlocks(0, (i,))]) for i in range(2)]
    poll(d, p)
    for i in range(2):
        p.connector.begin(bytes([i]) * 16, d.id)
        for layer in range(LAYERS):
            p.connector.push(bytes([i]) * 16, 0, range(layer, layer + 1), 0, (i,), _Broken() if i == 0 else None)
        p.connector.finish(bytes([i]) * 16, 7)
    events = poll(p, d)
    assert HandoffReceived(keys[1], 7) in events
    assert HandoffReleased(keys[0]) in events
    assert [event.reason for event in events if isinstance(event, HandoffAborted)] == [
        f"pushing to {d.id} failed: the device is gone"
    ]


def wait_for(connector: LocalConnector, count: int) -> list:
    events: list = []
    give_up = time.monotonic() + PATIENCE_S
    while len(events) < count and time.monotonic() < give_up:
        events += connector.poll()
        time.sleep(0.001)
    return events


def test_the_owner_thread_survives_what_it_does_not_expect():
    fabric = LocalFabric()
    p, d = End(fabric, "p", threaded=True), End(fabric, "d", threaded=True)
    p.meet(d)
    p.connector.begin([], d.id)  # what is not hashable is no name
    fabric.send(p.id, d.id, None)  # nor is this a message
    key = d.connector.expect(HANDOFF, p.id, [GroupBlocks(0, (4, 5))])
    push_all(p, d)
    assert wait_for(d.connector, 1) == [HandoffReceived(key, 7)]
    assert len(wait_for(p.connector, 1)) == 1
    for end in (p, d):
        end.connector.close()
        with pytest.raises(KVTransferError, match="not running"):
            end.connector.connect(d.info, PATIENCE_S)


@dataclass
class Sender:
    """A prefill worker that gives its blocks to the next handoff as soon as it may."""

    end: End
    free: set[int] = field(default_factory=lambda: set(range(NUM_BLOCKS)))
    held: dict[bytes, tuple[float, list[int]]] = field(default_factory=dict)


@pytest.mark.parametrize("seed", slow_unless((3).__gt__, range(6)))
def test_thousands_of_handoffs_never_touch_a_block_of_another(seed):
    """Each handoff writes its own number; a block given to a handoff holds nothing else until it is given back."""
    rng = random.Random(seed)
    fabric = LocalFabric(Faults(seed=seed, max_delay=seed * 4, duplicate=0.1, fail=0.02 * (seed % 2)))
    senders = [Sender(End(fabric, f"p{i}")) for i in range(2)]
    d = End(fabric, "d")
    d.meet(*(sender.end for sender in senders))
    free = set(range(NUM_BLOCKS))
    held: dict[HandoffKey, tuple[float, list[int]]] = {}
    alive: list[tuple[Sender, bytes, HandoffKey]] = []
    received = 0
    for number in range(1, 800):
        sender = rng.choice(senders)
        size = rng.randint(1, 4)
        if len(free) >= size <= len(sender.free):
            handoff_id = rng.randbytes(16)
            src = rng.sample(sorted(sender.free), size)
            dst = rng.sample(sorted(free), size)
            sender.free -= set(src)
            free -= set(dst)
            sender.held[handoff_id] = (float(number), src)
            sender.end.cache[:, src] = float(number)
            d.cache[:, dst] = -float(number)
            sides = [
                lambda s=sender, h=handoff_id, b=src: _push_randomly(rng, s.end, h, d.id, b),
                lambda s=sender, h=handoff_id, b=dst, n=number: held.__setitem__(
                    d.connector.expect(h, s.end.id, [GroupBlocks(0, b)]), (float(n), b)
                ),
            ]
            rng.shuffle(sides)
            for side in sides:
                side()
            alive.append((sender, handoff_id, next(reversed(held))))
        for _ in range(rng.randint(0, 6)):
            received += _round(rng, senders, d, free, held)
        if alive and rng.random() < 0.3:
            victim, handoff_id, key = alive.pop(rng.randrange(len(alive)))
            if rng.random() < 0.5:
                victim.end.connector.abort(handoff_id, "the client gave up")
            if key in held:
                d.connector.cancel(key)
    for _ in range(3000):
        received += _round(rng, senders, d, free, held)
        for sender in senders:  # those that neither side has given up wait for their counterpart
            for handoff_id in list(sender.held):
                sender.end.connector.abort(handoff_id, "the test is over")
        if not held and not any(sender.held for sender in senders):
            break
    assert len(free) == NUM_BLOCKS
    assert all(len(sender.free) == NUM_BLOCKS for sender in senders)
    assert received > 100
    for end in (d, *(sender.end for sender in senders)):
        assert end.connector.num_open == 0


def _push_randomly(rng: random.Random, p: End, handoff_id: bytes, peer: str, blocks: list[int]) -> None:
    p.connector.begin(handoff_id, peer)
    cut = rng.randint(0, len(blocks))
    for first, part in ((0, blocks[:cut]), (cut, blocks[cut:])):
        for layer in range(LAYERS):
            if part:
                p.connector.push(handoff_id, 0, range(layer, layer + 1), first, part, None)
    p.connector.finish(handoff_id, 7)


def _round(rng: random.Random, senders: list[Sender], d: End, free: set[int], held: dict) -> int:
    """One step of somebody; returns handoffs received whole. Blocks that come back are overwritten at once."""
    received = 0
    sender = rng.choice(senders)
    for event in sender.end.connector.poll():
        _, blocks = sender.held.pop(event.handoff_id)
        sender.end.cache[:, blocks] = 0.5
        sender.free |= set(blocks)
    for event in d.connector.poll():
        if isinstance(event, HandoffFailed):
            continue
        number, blocks = held.pop(event.key)
        if isinstance(event, HandoffReceived):
            received += 1
            assert d.cache[:, blocks].unique().tolist() == [number], "received means whole"
        d.cache[:, blocks] = 0.0
        free |= set(blocks)
    for number, blocks in held.values():
        assert set(d.cache[:, blocks].unique().tolist()) <= {number, -number}, "somebody else wrote here"
    if free:
        assert d.cache[:, sorted(free)].unique().tolist() == [0.0], "a free block was written to"
    return received
