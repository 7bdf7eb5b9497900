"""Blocks that an unreachable peer was granted stay out until nothing of it can land, whatever any clock says."""

from __future__ import annotations

import random

import pytest
import torch

from kv_transfer.connector import HandoffFailed, HandoffReleased
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults, LocalFabric

LAYERS, NUM_BLOCKS = 2, 16
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
HANDOFF = b"h" * 16


class End:
    def __init__(self, fabric: LocalFabric, name: str) -> None:
        self.fabric = fabric
        self.cache = torch.zeros(LAYERS, NUM_BLOCKS, 2, 1, 1, 1)
        self.connector = LocalConnector(fabric)
        self.info = self.connector.register_kv_caches(name, [self.cache], LAYOUT)
        self.id = self.info.engine_id

    def expect(self, peer: End, blocks: list[int]) -> HandoffKey:
        return self.connector.expect(HANDOFF, peer.id, [GroupBlocks(0, blocks)])

    def push(self, blocks: list[int]) -> None:
        self.connector.push(HANDOFF, 0, range(LAYERS), 0, blocks, None)


def meet(p: End, d: End, *, private: bool = False) -> None:
    mine, theirs = p.info, d.info
    if private:
        mine, theirs = p.connector.new_endpoint(d.info, 1.0), d.connector.new_endpoint(p.info, 1.0)
    p.connector.connect(theirs, 1.0)
    d.connector.connect(mine, 1.0)


def granted(
    *, direct: bool = False, private: bool = False, faults: Faults | None = None
) -> tuple[End, End, HandoffKey]:
    """A prefill worker that has been granted the blocks 4 and 5, and has ones to write to them."""
    fabric = LocalFabric(faults, direct=direct)
    p, d = End(fabric, "p"), End(fabric, "d")
    meet(p, d, private=private)
    p.cache.fill_(1.0)
    p.connector.begin(HANDOFF, d.id)
    key = d.expect(p, [4, 5])
    poll(d, p, rounds=30)
    return p, d, key


def poll(*ends: End, rounds: int = 60) -> list:
    return [event for _ in range(rounds) for end in ends for event in end.connector.poll()]


def wait_for_release(d: End, key: HandoffKey) -> None:
    """The lost are looked after every few milliseconds."""
    while HandoffReleased(key) not in poll(d, rounds=1):
        pass


def test_a_living_peer_that_was_given_up_still_writes_and_its_blocks_stay_out():
    p, d, key = granted()
    d.connector.disconnect(p.id)
    assert [type(event) for event in poll(d)] == [HandoffFailed], "its request need not wait"
    p.push([1, 2])  # it knows of nothing
    assert poll(p, d) == []
    assert d.cache[:, [4, 5]].unique().tolist() == [1.0], "nothing stops it"
    p.connector.close()
    wait_for_release(d, key)


def test_its_end_may_be_confirmed_later():
    p, d, key = granted()
    d.connector.disconnect(p.id)
    assert HandoffReleased(key) not in poll(d)
    d.connector.disconnect(p.id, confirmed_dead=True)
    wait_for_release(d, key)


def test_what_is_confirmed_first_is_not_taken_back():
    p, d, key = granted()
    d.connector.disconnect(p.id, confirmed_dead=True)
    d.connector.disconnect(p.id)
    wait_for_release(d, key)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_posted_before_a_peers_end_lands_before_its_blocks_come_back(seed):
    p, d, key = granted(faults=Faults(seed=seed, max_delay=25))
    p.push([1, 2])
    while not p.fabric.source_blocks(p.id):
        poll(p, d, rounds=1)
    p.connector.close()
    d.connector.disconnect(p.id, confirmed_dead=True)
    wait_for_release(d, key)
    d.cache.fill_(2.0)  # they belong to another sequence now
    poll(d, rounds=100)
    assert d.cache.unique().tolist() == [2.0]


def test_an_endpoint_of_a_peers_own_is_closed_with_it_and_nothing_lands_any_more():
    p, d, key = granted(private=True)
    d.connector.disconnect(p.id)
    wait_for_release(d, key)
    d.cache.fill_(2.0)
    p.push([1, 2])
    poll(p, d)
    assert d.cache.unique().tolist() == [2.0]
    assert set(p.connector.broken_peers) == {d.id}


def test_within_a_machine_a_closed_endpoint_stops_no_write():
    p, d, key = granted(private=True, direct=True, faults=Faults(seed=3, max_delay=30))
    p.push([1, 2])
    while not p.fabric.source_blocks(p.id):
        poll(p, d, rounds=1)
    d.connector.disconnect(p.id)
    assert HandoffReleased(key) not in poll(d)
    assert d.cache[:, [4, 5]].unique().tolist() == [1.0]
    p.connector.close()
    wait_for_release(d, key)


def test_who_was_once_met_at_the_shared_endpoint_can_still_write_there():
    p, d, _ = granted()
    mine = d.connector.new_endpoint(p.info, 1.0)
    p.connector.connect(mine, 1.0)
    d.connector.connect(p.info, 1.0)
    other = d.connector.expect(b"o" * 16, p.id, [GroupBlocks(0, [7])])
    d.connector.disconnect(p.id)
    assert HandoffReleased(other) not in poll(d)


@pytest.mark.parametrize("seed", range(3))
def test_no_released_block_is_written_to_whoever_is_given_up_and_when(seed):
    """Peers are given up at random, dead or alive, and go on as if nothing had happened while they live."""
    rng = random.Random(seed)
    fabric = LocalFabric(Faults(seed=seed, max_delay=12), direct=bool(seed % 2))
    d = End(fabric, "d")
    free = set(range(NUM_BLOCKS))
    held: dict[HandoffKey, list[int]] = {}
    peers: list[End] = []
    gone: list[End] = []
    number = given_up = 0

    def settle(rounds: int) -> None:
        for _ in range(rounds):
            for end in (*peers, *gone):
                end.connector.poll()
            for event in d.connector.poll():
                if isinstance(event, HandoffFailed):
                    continue
                blocks = held.pop(event.key)
                d.cache[:, blocks] = 0.0
                free.update(blocks)
            assert d.cache[:, sorted(free)].abs().sum() == 0, "a free block was written to"

    for _ in range(200):
        if len(peers) < 2:
            number += 1
            peers.append(End(fabric, f"p{number}"))
            peers[-1].cache.fill_(float(number))
            meet(peers[-1], d, private=rng.random() < 0.5)
        peer, handoff_id = rng.choice(peers), rng.randbytes(16)
        size = rng.randint(1, 3)
        if len(free) >= size:
            blocks = rng.sample(sorted(free), size)
            free -= set(blocks)
            peer.connector.begin(handoff_id, d.id)
            held[d.connector.expect(handoff_id, peer.id, [GroupBlocks(0, blocks)])] = blocks
            for layer in range(LAYERS):
                peer.connector.push(handoff_id, 0, range(layer, layer + 1), 0, range(size), None)
            peer.connector.finish(handoff_id, 7)
        settle(rng.randint(0, 6))
        if rng.random() < 0.2:
            given_up += 1
            lost = peers.pop(rng.randrange(len(peers)))
            dead = rng.random() < 0.5
            if dead:
                lost.connector.close()
            d.connector.disconnect(lost.id, confirmed_dead=dead and rng.random() < 0.5)
            gone.append(lost)
        if gone and rng.random() < 0.3:
            gone.pop(0).connector.close()
    for end in (*peers, *gone):
        end.connector.close()
        d.connector.disconnect(end.id)
    while held:
        settle(1)
    assert len(free) == NUM_BLOCKS
    assert given_up > 10
