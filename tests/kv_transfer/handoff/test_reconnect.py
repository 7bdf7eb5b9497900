"""A connection breaks between two living workers: what was under way ends, blocks come back, the next goes well."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased
from kv_transfer.errors import LayoutMismatchError, PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff import receiver
from kv_transfer.handoff.messages import Cancel, Closed, Grant, decode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.local import Faults, LocalFabric, LocalTransport

LAYERS, NUM_BLOCKS = 2, 16
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
HANDOFF = b"h" * 16


@pytest.fixture(autouse=True)
def _cancels_at_every_look(monkeypatch):
    monkeypatch.setattr(receiver, "CANCEL_AGAIN_S", 0.0)


class Pair:
    def __init__(self, faults: Faults | None = None) -> None:
        self.fabric = LocalFabric(faults)
        self.caches = {name: torch.zeros(LAYERS, NUM_BLOCKS, 2, 1, 1, 1) for name in "pd"}
        self.transport = LocalTransport(self.fabric)
        self.p, self.d = PushConnector(self.transport, drain_s=0.0, threaded=False), LocalConnector(self.fabric)
        self.p_info = self.p.register_kv_caches("p", [self.caches["p"]], LAYOUT)
        self.d_info = self.d.register_kv_caches("d", [self.caches["d"]], LAYOUT)
        self.caches["p"].fill_(1.0)
        self.meet()

    def meet(self) -> None:
        """As the gateway has two workers meet, for the first time or once more."""
        mine, theirs = self.p.new_endpoint(self.d_info, 1.0), self.d.new_endpoint(self.p_info, 1.0)
        self.p.connect(theirs, 1.0)
        self.d.connect(mine, 1.0)

    def break_(self) -> None:
        self.fabric.reset(self.p_info.engine_id, self.d_info.engine_id)

    def expect(self, blocks: list[int], handoff_id: bytes = HANDOFF) -> HandoffKey:
        return self.d.expect(handoff_id, self.p_info.engine_id, [GroupBlocks(0, blocks)])

    def push(self, blocks: list[int], handoff_id: bytes = HANDOFF) -> None:
        self.p.begin(handoff_id, self.d_info.engine_id)
        for layer in range(LAYERS):
            self.p.push(handoff_id, 0, range(layer, layer + 1), 0, blocks, None)
        self.p.finish(handoff_id, 7)

    def poll(self, rounds: int = 20) -> list:
        return [event for _ in range(rounds) for end in (self.p, self.d) for event in end.poll()]

    def lose(self, kind: type) -> int:
        """Take every message of a kind off its way; returns how many."""
        return self.fabric.lose(lambda message: isinstance(decode(message), kind))


def test_a_handoff_over_a_broken_connection_ends_when_the_two_meet_again():
    pair = Pair()
    key = pair.expect([4, 5])
    pair.p.begin(HANDOFF, pair.d_info.engine_id)
    pair.poll()
    pair.break_()
    for layer in range(LAYERS):
        pair.p.push(HANDOFF, 0, range(layer, layer + 1), 0, [1, 2], None)
    (aborted,) = pair.poll()
    assert isinstance(aborted, HandoffAborted)
    pair.d.cancel(key)
    assert pair.poll(200) == [], "nobody can confirm anything"
    assert set(pair.p.broken_peers) == {pair.d_info.engine_id}
    assert set(pair.d.broken_peers) == {pair.p_info.engine_id}
    pair.meet()
    assert pair.poll() == [HandoffReleased(key)]
    assert pair.p.broken_peers == pair.d.broken_peers == {}
    again = pair.expect([4, 5], b"i" * 16)
    pair.push([1, 2], b"i" * 16)
    assert HandoffReceived(again, 7) in pair.poll()
    assert pair.caches["d"][:, [4, 5]].unique().tolist() == [1.0]


def test_who_is_reached_again_is_asked_at_once(monkeypatch):
    pair = Pair()
    key = pair.expect([4, 5])
    pair.poll()
    pair.break_()
    monkeypatch.setattr(receiver, "CANCEL_AGAIN_S", 3600.0)
    pair.d.cancel(key)
    assert pair.poll() == []
    pair.meet()
    assert pair.poll() == [HandoffReleased(key)]


def test_meeting_again_fails_what_is_under_way_although_nothing_broke():
    pair = Pair()
    key = pair.expect([4, 5])
    pair.p.begin(HANDOFF, pair.d_info.engine_id)
    pair.poll()
    pair.meet()
    events = pair.poll()
    assert {type(event) for event in events} == {HandoffAborted, HandoffFailed, HandoffReleased}
    assert HandoffReleased(key) in events


def test_a_prompt_whose_grant_was_lost_ends_with_its_decode_side():
    pair = Pair()
    pair.p.begin(HANDOFF, pair.d_info.engine_id)
    key = pair.expect([4, 5])
    pair.d.poll()
    assert pair.lose(Grant) == 1
    pair.meet()
    assert {type(event) for event in pair.poll()} == {HandoffAborted, HandoffFailed, HandoffReleased}
    assert HandoffReleased(key) not in pair.poll()
    assert pair.d.num_open == pair.p.num_open == 0


def test_a_prompt_that_waits_for_its_grant_gets_it_over_the_new_connection():
    pair = Pair()
    pair.push([1, 2])
    pair.poll()
    pair.break_()
    pair.meet()
    key = pair.expect([4, 5])
    assert HandoffReceived(key, 7) in pair.poll()


@pytest.mark.parametrize("lost", [Cancel, Closed])
def test_a_cancel_is_repeated_until_it_is_confirmed(lost):
    pair = Pair()
    key = pair.expect([4, 5])
    pair.poll()
    pair.d.cancel(key)
    for _ in range(6):
        for end in (pair.d, pair.p) if lost is Cancel else (pair.p, pair.d):
            end.poll()
            pair.lose(lost)
    assert HandoffReleased(key) in pair.poll()


def test_a_handoff_that_failed_is_cancelled_without_being_asked():
    """Prefill's word that it has ended is lost; decode asks for it."""
    pair = Pair()
    key = pair.expect([4, 5])
    pair.poll()
    pair.break_()
    failed = pair.expect([6], b"f" * 16)
    assert [type(event) for event in pair.poll(1)] == [HandoffFailed], "its grant may have arrived"
    pair.meet()
    events = pair.poll()
    assert {event.key for event in events if isinstance(event, HandoffReleased)} == {key, failed}


def test_over_a_connection_that_is_known_to_be_broken_no_blocks_go_out():
    """Only the first grant that failed may have arrived."""
    pair = Pair()
    pair.break_()
    kept = pair.expect([6], b"f" * 16)
    assert [type(event) for event in pair.poll(1)] == [HandoffFailed]
    key = pair.expect([7])
    failed, released = pair.poll()
    assert isinstance(failed, HandoffFailed)
    assert "is broken" in failed.reason
    assert released == HandoffReleased(key)
    pair.meet()
    assert pair.poll() == [HandoffReleased(kept)]


def test_an_endpoint_at_one_side_alone_is_not_enough():
    pair = Pair()
    pair.break_()
    pair.p.new_endpoint(pair.d_info, 1.0)
    with pytest.raises(PeerError, match="is not connected"):
        pair.p.probe(pair.d_info.engine_id, 0.1)
    pair.meet()
    key = pair.expect([4])
    pair.push([1])
    assert HandoffReceived(key, 7) in pair.poll()


def test_a_prefill_worker_that_begins_anew_waits_for_nobody():
    pair = Pair()
    pair.expect([4, 5])
    pair.p.begin(HANDOFF, pair.d_info.engine_id)
    pair.poll()
    pair.p.new_endpoint(pair.d_info, 1.0)
    (aborted,) = pair.p.poll()
    assert isinstance(aborted, HandoffAborted)
    assert "is made anew" in aborted.reason


def test_what_was_said_over_the_old_connection_still_counts():
    pair = Pair()
    key = pair.expect([4, 5])
    pair.poll()
    pair.push([1, 2])
    pair.p.poll()
    pair.d.new_endpoint(pair.p_info, 1.0)
    assert pair.d.poll() == [HandoffReceived(key, 7)]


def test_a_new_endpoint_at_the_other_side_is_a_new_connection():
    pair = Pair()
    pair.break_()
    pair.expect([4])
    pair.poll(1)
    pair.p.begin(HANDOFF, pair.d_info.engine_id)
    pair.d.new_endpoint(pair.p_info, 1.0)
    with pytest.raises(PeerError):
        pair.transport.send(pair.d_info.engine_id, b"")
    assert set(pair.p.broken_peers) == {pair.d_info.engine_id}
    pair.p.connect(pair.d.new_endpoint(pair.p_info, 1.0), 1.0)
    assert pair.p.broken_peers == {}


def test_unlike_layouts_make_no_endpoint():
    pair = Pair()
    other = LocalConnector(pair.fabric)
    layout = KVLayout((GroupLayout("full", (0,), 1, 1, 1, "float32"),))
    info = other.register_kv_caches("o", [torch.zeros(1, 4, 2, 1, 1, 1)], layout)
    with pytest.raises(LayoutMismatchError, match="layers is 0-1 here and 0 there"):
        pair.p.new_endpoint(info, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_handoffs_while_connections_break_and_are_made_anew(seed):
    rng = random.Random(seed)
    pair = Pair(Faults(seed=seed, max_delay=seed * 4, duplicate=0.1))
    free = {name: set(range(NUM_BLOCKS)) for name in "pd"}
    sources: dict[bytes, list[int]] = {}
    targets: dict[HandoffKey, tuple[int, list[int]]] = {}
    pair.caches["p"].zero_()
    received = breaks = 0

    def settle(rounds: int) -> None:
        nonlocal received
        for _ in range(rounds):
            for event in pair.p.poll():
                blocks = sources.pop(event.handoff_id)
                pair.caches["p"][:, blocks] = 0.0
                free["p"] |= set(blocks)
            for event in pair.d.poll():
                if isinstance(event, HandoffFailed):
                    continue
                number, blocks = targets.pop(event.key)
                if isinstance(event, HandoffReceived):
                    received += 1
                    assert pair.caches["d"][:, blocks].unique().tolist() == [float(number)], "received means whole"
                pair.caches["d"][:, blocks] = 0.0
                free["d"] |= set(blocks)
            assert pair.caches["d"][:, sorted(free["d"])].abs().sum() == 0, "a free block was written to"

    for number in range(1, 400):
        size = rng.randint(1, 3)
        if min(map(len, free.values())) >= size:
            handoff_id = rng.randbytes(16)
            src, dst = (rng.sample(sorted(free[name]), size) for name in "pd")
            free["p"] -= set(src)
            free["d"] -= set(dst)
            pair.caches["p"][:, src] = float(number)
            sources[handoff_id] = src
            sides = [lambda h=handoff_id, b=src: pair.push(b, h)]
            sides.append(lambda h=handoff_id, b=dst, n=number: targets.update({pair.expect(b, h): (n, b)}))
            rng.shuffle(sides)
            for side in sides:
                side()
                settle(rng.randint(0, 2))
        settle(rng.randint(0, 4))
        if rng.random() < 0.05:
            pair.break_()
            breaks += 1
            settle(rng.randint(0, 6))
            for key in rng.sample(sorted(targets, key=str), len(targets) // 2):
                pair.d.cancel(key)
            settle(rng.randint(0, 6))
            pair.meet()
    for _ in range(2000):
        settle(1)
        for handoff_id in list(sources):
            pair.p.abort(handoff_id, "the test is over")
        if not sources and not targets:
            break
    assert [len(blocks) for blocks in free.values()] == [NUM_BLOCKS, NUM_BLOCKS]
    assert breaks > 5
    assert received > 60
