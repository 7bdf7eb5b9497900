"""The handoff protocol, message by message, over a fabric that a test steps by hand."""

from __future__ import annotations

import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased, HandoffSent
from kv_transfer.errors import LayoutMismatchError, PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Part, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import Faults, LocalFabric

LAYOUT = KVLayout((GroupLayout("full", tuple(range(3)), 4, 1, 8, "float32"),))
HANDOFF = b"h" * 16


class Pair:
    """A prefill and a decode connector that know each other; `names` adds further prefill ones."""

    def __init__(self, faults: Faults | None = None, names: tuple[str, ...] = ("p",), drain_s: float = 0.0) -> None:
        self.fabric = LocalFabric(faults)
        self.caches, self.ends, self.infos = {}, {}, {}
        for name in (*names, "d"):
            self.caches[name] = torch.rand(3, 16, 2, 4, 1, 8) if name != "d" else torch.zeros(3, 16, 2, 4, 1, 8)
            self.ends[name] = LocalConnector(self.fabric, drain_s=drain_s)
            self.infos[name] = self.ends[name].register_kv_caches(name, [self.caches[name]], LAYOUT)
        for name in names:
            self.ends[name].connect(self.infos["d"], 1.0)
            self.ends["d"].connect(self.infos[name], 1.0)

    @property
    def p(self) -> LocalConnector:
        return self.ends["p"]

    @property
    def d(self) -> LocalConnector:
        return self.ends["d"]

    def id(self, name: str) -> str:
        return self.infos[name].engine_id

    def pump(self, rounds: int = 60) -> dict[str, list]:
        events = {name: [] for name in self.ends}
        for _ in range(rounds):
            for name, end in self.ends.items():
                events[name] += end.poll()
        return events

    def push_all(self, blocks=(1, 2), token: int = 9) -> None:
        for layer in range(3):
            self.p.push(HANDOFF, 0, range(layer, layer + 1), 0, blocks, None)
        self.p.finish(HANDOFF, token)


def test_a_whole_handoff():
    pair = Pair()
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.push_all()
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (5, 3))])
    events = pair.pump()
    assert events["d"] == [HandoffReceived(key, 9)]
    (sent,) = events["p"]
    assert isinstance(sent, HandoffSent)
    assert (sent.num_parts, sent.num_bytes) == (3, 3 * 2 * LAYOUT.primary.block_bytes)
    assert torch.equal(pair.caches["d"][:, [5, 3]], pair.caches["p"][:, [1, 2]])
    assert pair.caches["d"][:, [i for i in range(16) if i not in (3, 5)]].abs().sum() == 0


def test_the_grant_may_come_before_the_request():
    pair = Pair()
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    pair.pump(3)
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.push_all()
    assert pair.pump()["d"] == [HandoffReceived(key, 9)]


def test_a_cancel_before_the_request_stops_it():
    pair = Pair()
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    pair.d.cancel(key)
    assert pair.pump()["d"] == [HandoffReleased(key)]
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.push_all()
    events = pair.pump()
    assert [type(event) for event in events["p"]] == [HandoffAborted]
    assert events["d"] == []
    assert pair.caches["d"].abs().sum() == 0, "nothing is written to blocks that were given back"


def test_an_abort_before_the_grant_fails_the_other_side_too():
    pair = Pair()
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.p.abort(HANDOFF, "the client gave up")
    pair.pump(3)
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    failed, released = pair.pump()["d"]
    assert isinstance(failed, HandoffFailed)
    assert released == HandoffReleased(key)


def test_release_waits_for_what_is_in_flight():
    pair = Pair(Faults(seed=1, max_delay=40))
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.p.push(HANDOFF, 0, range(3), 0, (1, 2), None)
    pair.p.poll()
    for _ in range(100):
        pair.p.poll()
        if pair.fabric.source_blocks(pair.id("p")):
            break
        pair.d.poll()
    else:
        pytest.fail("never written")
    pair.d.cancel(key)
    for _ in range(200):
        in_flight = bool(pair.fabric.source_blocks(pair.id("p")))
        pair.p.poll()
        events = pair.d.poll()
        if events:
            assert events == [HandoffReleased(key)]
            assert not in_flight
            break
    else:
        pytest.fail("never released")


def test_stale_and_foreign_messages_count_for_nothing():
    pair = Pair(names=("p", "q"))
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    old = HandoffKey(HANDOFF, key.incarnation, key.generation - 1)
    other_life = HandoffKey(HANDOFF, key.incarnation ^ 1, key.generation)
    for sender, wrong in (("p", old), ("p", other_life), ("q", key)):
        for layer in range(3):
            pair.fabric.send(pair.id(sender), pair.id("d"), encode(Part(wrong, layer, 0, layer, 1, 0, 2)))
        pair.fabric.send(pair.id(sender), pair.id("d"), encode(Final(wrong, 1, 3)))
        pair.fabric.send(pair.id(sender), pair.id("d"), encode(Closed(wrong, "nonsense")))
    pair.fabric.send(pair.id("p"), pair.id("d"), b"\x00garbage")
    assert pair.pump()["d"] == []


def test_a_foreign_cancel_stops_nothing():
    pair = Pair(names=("p", "q"))
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.fabric.send(pair.id("q"), pair.id("p"), encode(Cancel(HandoffKey(HANDOFF, 1, 1))))
    pair.pump(3)
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    pair.push_all()
    assert pair.pump()["d"] == [HandoffReceived(key, 9)]


def test_too_few_granted_blocks_end_the_handoff():
    pair = Pair()
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0,))])
    pair.p.begin(HANDOFF, pair.id("d"))
    pair.push_all()
    events = pair.pump()
    failed, released = events["d"]
    assert "granted 1 blocks, 2 are needed" in failed.reason
    assert released == HandoffReleased(key)


def test_a_lost_peer_releases_after_the_drain():
    pair = Pair(drain_s=0.05)
    key = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (0, 1))])
    pair.pump(2)
    pair.d.disconnect(pair.id("p"), confirmed_dead=True)
    events = pair.d.poll()
    assert [type(event) for event in events] == [HandoffFailed], "the blocks are not safe yet"
    while not (events := pair.d.poll()):
        pass
    assert events == [HandoffReleased(key)]
    gone = pair.d.expect(HANDOFF, pair.id("p"), [GroupBlocks(0, (4, 5))])
    failed, released = pair.d.poll()
    assert "not connected" in failed.reason
    assert released == HandoffReleased(gone)


def test_unlike_layouts_refuse_each_other():
    fabric = LocalFabric()
    ends = []
    for block_size in (16, 32):
        end = LocalConnector(fabric)
        layout = KVLayout((GroupLayout("full", (0,), block_size, 1, 8, "float32"),))
        ends.append((end, end.register_kv_caches("w", [torch.zeros(1, 4, 2, block_size, 1, 8)], layout)))
    with pytest.raises(LayoutMismatchError, match="block_size is 16 here and 32 there"):
        ends[0][0].connect(ends[1][1], 1.0)


def test_probe():
    pair = Pair()
    with pytest.raises(PeerError, match="was not met"):
        pair.p.probe(pair.id("d"), 0.01)  # nobody steps the other side
    threaded = LocalFabric()
    ends = [LocalConnector(threaded, threaded=True) for _ in range(2)]
    infos = [
        end.register_kv_caches(name, [torch.zeros(3, 4, 2, 4, 1, 8)], LAYOUT)
        for end, name in zip(ends, "ab", strict=True)
    ]
    ends[0].connect(infos[1], 1.0)
    ends[1].connect(infos[0], 1.0)
    assert ends[0].probe(infos[1].engine_id, 5.0) < 5.0
    for end in ends:
        end.close()
