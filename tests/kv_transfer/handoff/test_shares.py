"""Ranks that keep the same: each hands over its share of the layers to its own peer, and nothing crosses twice."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffReceived, HandoffSent
from kv_transfer.errors import LayoutMismatchError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults, LocalFabric

BLOCK, NUM_BLOCKS = 2, 24
HANDOFF = b"h" * 16
SRC, DST = [4, 5, 6, 20, 1], [11, 10, 3, 0, 9]


def layout(size: int, rank: int, copies: tuple[int, ...], layers: tuple[int, ...] = (5, 2)) -> KVLayout:
    """A group of latents and one of heads, of so many layers."""
    latents, heads = range(layers[0]), range(layers[0], sum(layers))
    groups = (
        GroupLayout("mla", tuple(latents), BLOCK, 1, 3, "float32", copies=copies[0]),
        GroupLayout("full", tuple(heads), BLOCK, 1, 2, "float32", copies=copies[1]),
    )
    return KVLayout(groups, size, tp_rank=rank)


class Rank:
    """A rank's connector and caches: prefill's hold a number for each (layer, block), decode's -1."""

    def __init__(self, fabric: LocalFabric, name: str, own: KVLayout, fill: bool) -> None:
        self.layout = own
        self.caches = []
        for group in own.groups:
            numbers = torch.arange(group.num_layers)[:, None] * 1000.0 + torch.arange(NUM_BLOCKS)
            numbers = numbers if fill else torch.full_like(numbers, -1.0)
            whole = (group.num_layers, NUM_BLOCKS, *group.block_shape)
            self.caches.append(numbers.view(*whole[:2], *[1] * len(group.block_shape)).expand(whole).contiguous())
        self.connector = LocalConnector(fabric)
        self.info = self.connector.register_kv_caches(name, self.caches, own)


class Pair:
    """Two workers of `size` ranks, joined rank by rank."""

    def __init__(self, size: int, copies: tuple[int, ...], faults: Faults | None = None, **form) -> None:
        self.fabric = LocalFabric(faults)
        self.sides = [
            [
                Rank(self.fabric, f"{name}{rank}", layout(size, rank, copies, **form), name == "p")
                for rank in range(size)
            ]
            for name in "pd"
        ]
        for p, d in zip(*self.sides, strict=True):
            p.connector.connect(d.info, 1.0)
            d.connector.connect(p.info, 1.0)

    def poll(self, rounds: int = 40) -> list[list]:
        """What each rank says, prefill's first."""
        ranks = [rank for side in self.sides for rank in side]
        said: list[list] = [[] for _ in ranks]
        for _ in range(rounds):
            for rank, events in zip(ranks, said, strict=True):
                events += rank.connector.poll()
        return said

    def grant(self, first_block: int = 0, **more) -> list:
        blocks = [GroupBlocks(first_block, DST[first_block:])] * 2
        prefill, decode = self.sides
        return [
            d.connector.expect(HANDOFF, p.info.engine_id, blocks, **more) for p, d in zip(prefill, decode, strict=True)
        ]

    def push(self, together: int, cut: int) -> None:
        """As a worker does on all ranks alike: in two chunks, so many layers at once."""
        for p, d in zip(*self.sides, strict=True):
            p.connector.begin(HANDOFF, d.info.engine_id)
            for start, end in ((0, cut), (cut, len(SRC))):
                for group, form in enumerate(p.layout.groups):
                    for layer in range(0, form.num_layers, together):
                        layers = range(layer, min(layer + together, form.num_layers))
                        p.connector.push(HANDOFF, group, layers, start, SRC[start:end], None)
            p.connector.finish(HANDOFF, 7)


@pytest.mark.parametrize("together", [1, 2, 3, 9])
@pytest.mark.parametrize(("size", "copies"), [(2, (2, 1)), (3, (3, 1)), (4, (4, 2)), (8, (8, 8)), (2, (1, 1))], ids=str)
def test_each_layer_of_what_is_the_same_crosses_once(size, copies, together):
    """Bytes are counted; with `copies` of 1, as it was before, each rank sends all that it keeps."""
    pair = Pair(size, copies, Faults(seed=together, max_delay=5, duplicate=0.3))
    pair.grant()
    pair.push(together, cut=2)
    said = pair.poll()
    sent = [event for events in said[:size] for event in events]
    assert [type(event) for event in sent] == [HandoffSent] * size
    assert [[type(e) for e in events] for events in said[size:]] == [[HandoffReceived]] * size
    once = [group.num_layers * len(SRC) * group.block_bytes for group in pair.sides[0][0].layout.groups]
    assert sum(event.num_bytes for event in sent) == sum(
        size // count * of_one for count, of_one in zip(copies, once, strict=True)
    )
    for group, count in enumerate(copies):
        for rank, decode in enumerate(pair.sides[1]):
            source = pair.sides[0][rank].caches[group]
            share = decode.layout.share(group)
            for layer in range(decode.layout.groups[group].num_layers):
                landed = decode.caches[group][layer]
                if layer in share:
                    assert torch.equal(landed[DST], source[layer, SRC])
                else:
                    assert bool((landed == -1).all())
        neighbours = [pair.sides[1][rank].layout.share(group) for rank in range(count)]
        assert sorted(layer for share in neighbours for layer in share) == list(range(len(source)))


@pytest.mark.parametrize("first_block", [0, 3, len(SRC)])
def test_a_share_of_a_tail_is_whole_when_it_has_come(first_block):
    pair = Pair(2, (2, 1))
    pair.grant(first_block)
    pair.push(together=2, cut=1)
    said = pair.poll()
    assert all(isinstance(events[0], HandoffSent | HandoffReceived) and len(events) == 1 for events in said)
    for p, d in zip(*pair.sides, strict=True):
        written = {int(i) for i in (d.caches[0] != -1).flatten(2).all(2).any(0).nonzero()}
        assert written == set(DST[first_block:])
        share = d.layout.share(0)
        assert torch.equal(d.caches[0][share, :][:, DST[first_block:]], p.caches[0][share, :][:, SRC[first_block:]])


def test_a_share_that_lacks_a_layer_is_never_whole():
    pair = Pair(2, (2, 1))
    pair.grant()
    for p, d in zip(*pair.sides, strict=True):
        p.connector.begin(HANDOFF, d.info.engine_id)
        p.connector.push(HANDOFF, 0, range(4), 0, SRC, None)  # of five: the fifth is rank 0's
        p.connector.push(HANDOFF, 1, range(2), 0, SRC, None)
        p.connector.finish(HANDOFF, 7)
    said = pair.poll()
    assert isinstance(said[0][0], HandoffAborted)
    assert "cache group 0: 10 of 15 granted blocks of all layers came" in said[0][0].reason
    assert [type(event) for event in said[1]] == [HandoffSent]
    assert HandoffReceived not in map(type, said[2])
    assert [type(event) for event in said[3]] == [HandoffReceived]


def test_a_grant_waits_until_its_blocks_may_be_written():
    pair, event = Pair(2, (2, 1)), SimpleNamespace(happened=False)
    event.query = lambda: event.happened
    pair.grant(ready=event)
    pair.push(together=9, cut=2)
    assert not any(pair.poll())
    assert all(bool((cache == -1).all()) for d in pair.sides[1] for cache in d.caches)
    event.happened = True
    assert [[type(e) for e in events] for events in pair.poll()] == [[HandoffSent]] * 2 + [[HandoffReceived]] * 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_grant_that_is_given_up_while_it_waits_is_never_sent(lost):
    pair, event = Pair(1, (1, 1)), SimpleNamespace(query=lambda: event.happened, happened=False)
    (key,) = pair.grant(ready=event)
    (prefill,), (decode,) = pair.sides
    if lost:
        pair.fabric.detach(prefill.info.engine_id)
        decode.connector.disconnect(prefill.info.engine_id, confirmed_dead=True)
    else:
        decode.connector.cancel(key)
    pair.poll()
    event.happened = True
    if not lost:
        pair.push(together=9, cut=2)
    said = pair.poll()
    assert HandoffSent not in map(type, said[0])
    assert bool((decode.caches[0] == -1).all())
    assert decode.connector.num_open == 0


def test_every_rank_meets_its_own():
    fabric = LocalFabric()
    one = Rank(fabric, "a", layout(2, 0, (2, 1)), True)
    for other, text in (
        (layout(2, 1, (2, 1)), "tp_rank is 0 here and 1 there"),
        (layout(1, 0, (1, 1)), "tp_size is 2 here and 1 there"),
        (layout(2, 0, (1, 1)), "copies is 2 here and 1 there"),
    ):
        with pytest.raises(LayoutMismatchError, match=text):
            one.connector.connect(Rank(fabric, f"b{random.random()}", other, False).info, 1.0)


@pytest.mark.parametrize(
    ("size", "rank", "copies", "text"),
    [(2, 2, (2, 1), "rank 2 of 2"), (4, 0, (3, 1), "3 ranks .* do not divide 4"), (2, 0, (0, 1), "must be positive")],
)
def test_what_is_no_rank_and_no_share_is_refused(size, rank, copies, text):
    with pytest.raises(ValueError, match=text):
        layout(size, rank, copies)


def test_a_token_is_counted_once_for_all_ranks():
    alone, ranks = layout(1, 0, (1, 1)), layout(4, 0, (4, 4))
    assert 4 * ranks.bytes_per_token == alone.bytes_per_token
