"""Ranks meet the same ranks of a peer, each at an endpoint of its own, and begin anew when one connection breaks."""

from __future__ import annotations

import torch

from kv_transfer.connector import HandoffFailed, HandoffReceived, HandoffReleased
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from workers.lockstep.connector import AgreedConnector

LAYOUT = KVLayout((GroupLayout("full", (0,), 1, 1, 1, "float32"),), tp_size=2)


class Ranks:
    def __init__(self, fabric: LocalFabric, name: str, fill: float) -> None:
        self.caches = [torch.full((1, 8, 2, 1, 1, 1), fill + rank) for rank in range(2)]
        self.ranks = [AgreedConnector(LocalConnector(fabric), rank) for rank in range(2)]
        pairs = zip(self.ranks, self.caches, strict=True)
        self.engines = [rank.register_kv_caches(name, [cache], LAYOUT) for rank, cache in pairs]
        self.lead = self.engines[0].engine_id
        self.lead_endpoint = ""

    def own_events(self, rounds: int = 10) -> list[list]:
        return [[event for _ in range(rounds) for event in rank.take_own()] for rank in self.ranks]


def meet(one: Ranks, other: Ranks) -> None:
    mine = [rank.new_endpoint_for(other.engines, 1.0) for rank in one.ranks]
    theirs = [rank.new_endpoint_for(one.engines, 1.0) for rank in other.ranks]
    one.lead_endpoint, other.lead_endpoint = mine[0].endpoint, theirs[0].endpoint
    for rank in one.ranks:
        rank.handshake(theirs, 1.0)
    for rank in other.ranks:
        rank.handshake(mine, 1.0)


def hand_over(p: Ranks, d: Ranks, handoff_id: bytes) -> list[list]:
    for rank in d.ranks:
        rank.expect(handoff_id, p.lead, [GroupBlocks(0, [5])])
    for rank in p.ranks:
        rank.begin(handoff_id, d.lead)
        rank.push(handoff_id, 0, range(1), 0, [1], None)
        rank.finish(handoff_id, 7)
    d.own_events()
    p.own_events()
    return d.own_events()


def received(events: list[list]) -> list[int]:
    """The first tokens of what every rank has received."""
    return [event.first_token for own in events for event in own if isinstance(event, HandoffReceived)]


def test_every_rank_begins_anew_when_the_connection_of_one_is_broken():
    fabric = LocalFabric()
    p, d = Ranks(fabric, "p", 1.0), Ranks(fabric, "d", 0.0)
    meet(p, d)
    assert received(hand_over(p, d, b"a" * 16)) == [7, 7]
    assert [cache[0, 5].unique().tolist() for cache in d.caches] == [[1.0], [2.0]], "each from its own rank"
    fabric.reset(p.engines[1].engine_id, d.engines[1].engine_id)
    keys = {rank.expect(b"b" * 16, p.lead, [GroupBlocks(0, [6])]) for rank in d.ranks}
    assert len(keys) == 1
    assert [[type(event) for event in events] for events in d.own_events(1)] == [[], [HandoffFailed]]
    assert [rank.broken_peers for rank in d.ranks] == [{}, {p.lead: p.lead_endpoint}], "at which all of them met"
    meet(p, d)
    assert [rank.broken_peers for rank in d.ranks] == [{}, {}]
    ends = [[], []]
    for _ in range(5):
        p.own_events(1)
        ends = [before + after for before, after in zip(ends, d.own_events(1), strict=True)]
    assert [{event.key for event in events if isinstance(event, HandoffReleased)} for events in ends] == [keys, keys]
    assert received(hand_over(p, d, b"c" * 16)) == [7, 7]
    for rank in d.ranks:
        rank.expect(b"d" * 16, p.lead, [GroupBlocks(0, [6])])
        rank.disconnect(p.lead)
    closed = [[type(event) for event in events] for events in d.own_events(3)]
    assert closed == [[HandoffFailed, HandoffReleased]] * 2, "each at an endpoint of its own"
