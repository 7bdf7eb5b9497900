"""A prefill and a decode worker's connectors, stepped by hand, with strangers who know one or none of them."""

from __future__ import annotations

import torch

from kv_transfer.connector import ConnectorEvent, HandoffAborted, HandoffFailed, HandoffReceived, HandoffSent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local_fabric import LocalFabric, LocalTransfer

LAYERS, NUM_BLOCKS = 2, 24
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
STRANGERS = ("q", "e", "x")
"""A prefill worker that the decode worker knows, a decode worker that the prefill worker knows, and nobody's peer."""


class RecordingFabric(LocalFabric):
    """Keeps every message that went from one engine to another."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, bytes]] = []

    def send(self, sender: str, peer: str, message: bytes) -> None:
        self.sent.append((sender, peer, message))
        super().send(sender, peer, message)

    def write(self, sender: str, peer: str, *what) -> LocalTransfer:
        self.sent.append((sender, peer, what[-1]))
        return super().write(sender, peer, *what)


class End:
    """An engine with a cache of one number for each (layer, block)."""

    def __init__(self, fabric: LocalFabric, name: str) -> None:
        self.cache = torch.zeros(LAYERS, NUM_BLOCKS, 2, 1, 1, 1)
        self.connector = LocalConnector(fabric)
        self.info = self.connector.register_kv_caches(name, [self.cache], LAYOUT)
        self.id = self.info.engine_id
        self.free = list(range(NUM_BLOCKS))

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self.cache[:, blocks] = 0.0
        self.free += blocks


class Handoff:
    """What one was begun with, on both sides, and what is still owed by each."""

    def __init__(self, number: int, src: list[int], first: int, dst: list[int]) -> None:
        self.id = number.to_bytes(16, "big")
        self.number, self.src, self.first, self.dst = number, src, first, dst
        self.to_push = list(range(LAYERS))
        self.key: HandoffKey | None = None
        self.begun = self.finished = False
        self.prefill_owes = self.decode_owes = False


class World:
    """A prefill and a decode worker, and strangers; all is stepped by hand."""

    def __init__(self) -> None:
        self.fabric = RecordingFabric()
        self.ends = {name: End(self.fabric, name) for name in ("p", "d", *STRANGERS)}
        self.p, self.d = self.ends["p"], self.ends["d"]
        for one, other in (("p", "d"), ("q", "d"), ("p", "e")):
            self.ends[one].connector.connect(self.ends[other].info, 1.0)
            self.ends[other].connector.connect(self.ends[one].info, 1.0)
        self.handoffs: list[Handoff] = []

    def new(self, size: int, first: int) -> None:
        """A request of so many blocks, of which decode has the first ones."""
        src, dst = self.p.take(size), self.d.take(size - first)
        self.handoffs.append(Handoff(len(self.handoffs), src, first, dst))
        self.p.cache[:, src] = torch.arange(1.0, size + 1).reshape(-1, 1, 1, 1, 1) + 10 * len(self.handoffs)

    def expect(self, handoff: Handoff) -> None:
        handoff.key = self.d.connector.expect(handoff.id, self.p.id, [GroupBlocks(handoff.first, handoff.dst)])
        handoff.decode_owes = True

    def begin(self, handoff: Handoff) -> None:
        self.p.connector.begin(handoff.id, self.d.id)
        handoff.begun = handoff.prefill_owes = True

    def push(self, handoff: Handoff) -> None:
        layer = handoff.to_push.pop()
        self.p.connector.push(handoff.id, 0, range(layer, layer + 1), 0, handoff.src, None)

    def poll(self, name: str) -> list[tuple]:
        """What an end says, in words that are the same in every world."""
        return [self.take_note(event) for event in self.ends[name].connector.poll()]

    def take_note(self, event: ConnectorEvent) -> tuple:
        of_prefill = isinstance(event, HandoffSent | HandoffAborted)
        handoff_id = event.handoff_id if of_prefill else event.key.handoff_id
        handoff = self.handoffs[int.from_bytes(handoff_id, "big")]
        said = (type(event).__name__, handoff.number)
        if of_prefill:
            assert handoff.prefill_owes
            handoff.prefill_owes = False
            self.p.give_back(handoff.src)
            return said
        assert event.key == handoff.key
        assert handoff.decode_owes
        if isinstance(event, HandoffFailed):
            return said
        if isinstance(event, HandoffReceived):
            here, there = self.d.cache[:, handoff.dst], [10 * (handoff.number + 1) + i for i in range(1, 4)]
            wanted = torch.tensor(there[handoff.first : handoff.first + len(handoff.dst)], dtype=torch.float32)
            assert torch.equal(here, wanted.reshape(len(wanted), 1, 1, 1, 1).expand_as(here)), "it is not whole"
            assert event.first_token == 100 + handoff.number
        handoff.decode_owes = False
        self.d.give_back(handoff.dst)
        return said

    @property
    def open(self) -> list[Handoff]:
        """Those that are not over on one of the sides."""
        return [handoff for handoff in self.handoffs if handoff.prefill_owes or handoff.decode_owes]

    def key(self, number: int, generations: int, lives: int) -> HandoffKey:
        """The key of a handoff, or one beside it."""
        handoff = self.handoffs[number % len(self.handoffs)] if self.handoffs else None
        if handoff is None or handoff.key is None:
            known = b"?" * 16 if handoff is None else handoff.id
            return HandoffKey(known, (self.d.info.incarnation + lives) % 2**64, 1 + generations)
        key = handoff.key
        return HandoffKey(key.handoff_id, (key.incarnation + lives) % 2**64, key.generation + generations)

    def say(self, sender: str, target: str, data: bytes) -> None:
        self.fabric.send(self.ends[sender].id, self.ends[target].id, data)

    def settle(self) -> None:
        """Everybody gives up; then nothing is left, of strangers neither."""
        for handoff in self.handoffs:
            if handoff.decode_owes:
                self.d.connector.cancel(handoff.key)
            if handoff.prefill_owes:
                self.p.connector.abort(handoff.id, "the end")
        for end in (self.p, self.d):
            for name in STRANGERS:
                end.connector.disconnect(self.ends[name].id)
        for _ in range(20):
            self.poll("p"), self.poll("d")
        for handoff in self.handoffs:
            assert not handoff.decode_owes, handoff.number
            assert not handoff.prefill_owes, handoff.number
        assert self.d.connector.num_open == 0
        held = sum(len(handoff.dst) for handoff in self.handoffs if handoff.key is None)
        assert len(self.d.free) + held == NUM_BLOCKS
