"""Messages that nobody would send, in any order, from anybody: no cache is taken for whole that is not, nothing stays.

Two worlds live through the same: in one of them strangers say whatever they like besides. What happens must be equal.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fuzzing import fuzzed
from kv_transfer.connector import ConnectorEvent, HandoffAborted, HandoffFailed, HandoffReceived, HandoffSent
from kv_transfer.errors import ProtocolError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Hello, Message, Part, decode, encode
from kv_transfer.handoff.part_counter import PartCounter, Wanted
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local_fabric import LocalFabric, LocalTransfer

pytestmark = pytest.mark.fuzz

LAYERS, NUM_BLOCKS = 2, 24
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32"),))
STRANGERS = ("q", "e", "x")
"""A prefill worker that the decode worker knows, a decode worker that the prefill worker knows, and nobody's peer."""

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
small = st.integers(0, 3)


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
            assert torch.equal(here, wanted.reshape(-1, 1, 1, 1).expand_as(here)), "it is not whole"
            assert event.first_token == 100 + handoff.number
        handoff.decode_owes = False
        self.d.give_back(handoff.dst)
        return said

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


def messages(key: HandoffKey) -> st.SearchStrategy[Message]:
    """Anything that can be said of a handoff, likely and unlikely."""
    numbers = st.one_of(small, small, u32)
    blocks = st.builds(GroupBlocks, small, st.lists(numbers, min_size=1, max_size=3).map(tuple))
    likely_part = st.builds(Part, st.just(key), small, st.just(0), st.just(0), st.just(LAYERS), small, small)
    return st.one_of(
        st.just(Cancel(key)),
        st.builds(Closed, st.just(key), st.text(max_size=5)),
        st.builds(Grant, st.just(key), st.lists(blocks, min_size=1, max_size=1).map(tuple)),
        st.builds(Final, st.just(key), small, small),
        likely_part,
        st.builds(Hello, st.just(key), st.booleans()),
        st.builds(Grant, st.just(key), st.lists(blocks, max_size=3).map(tuple)),
        st.builds(Final, st.just(key), u32, numbers, st.lists(u32, max_size=2).map(tuple)),
        st.builds(Part, st.just(key), numbers, u16, u16, u16, numbers, numbers),
    )


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """A message as a broken network or a broken program would send it."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        what, place = draw(st.sampled_from(("flip", "cut", "grow"))), draw(st.integers(0, max(0, len(changed) - 1)))
        if what == "flip" and changed:
            changed[place] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del changed[place : place + draw(st.integers(1, 8))]
        else:
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(changed)


def noise(recorded: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that are no message, or nearly one."""
    known = st.sampled_from(recorded).flatmap(mutated) if recorded else st.nothing()
    return st.one_of(st.binary(max_size=60), known)


class HandoffMachine(RuleBasedStateMachine):
    """Handoffs between two workers, in two worlds; strangers talk in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds = (World(), World())

    def possible(self) -> list[tuple[str, int]]:
        """What could happen next: what, and to which handoff."""
        steps = {
            "expect": lambda h: h.key is None,
            "begin": lambda h: not h.begun,
            "push": lambda h: h.begun and h.to_push,
            "finish": lambda h: h.begun and not h.to_push and not h.finished,
            "cancel": lambda h: h.decode_owes,
            "abort": lambda h: h.prefill_owes,
        }
        handoffs = self.worlds[0].handoffs
        return [(what, handoff.number) for what, may in steps.items() for handoff in handoffs if may(handoff)]

    @rule(size=st.integers(1, 3), first=st.integers(0, 1))
    def new(self, size: int, first: int) -> None:
        open_ones = sum(handoff.prefill_owes or handoff.decode_owes for handoff in self.worlds[0].handoffs)
        for world in self.worlds:
            if open_ones < 3 and len(world.p.free) >= size and len(world.d.free) >= size:
                world.new(size, first)

    @precondition(lambda self: self.possible())
    @rule(data=st.data(), times=st.integers(1, 4))
    def go_on(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            if possible := self.possible():
                self.act(*data.draw(st.sampled_from(possible)))

    def act(self, what: str, number: int) -> None:
        for world in self.worlds:
            handoff = world.handoffs[number]
            match what:
                case "expect":
                    world.expect(handoff)
                case "begin":
                    world.begin(handoff)
                case "push":
                    world.push(handoff)
                case "finish":
                    world.p.connector.finish(handoff.id, 100 + number)
                    handoff.finished = True
                case "cancel":
                    world.d.connector.cancel(handoff.key)
                case "abort":
                    world.p.connector.abort(handoff.id, "not wanted")

    @rule(name=st.sampled_from("pd"), rounds=st.integers(1, 3))
    def poll(self, name: str, rounds: int) -> None:
        for _ in range(rounds):
            with_strangers, alone = (world.poll(name) for world in self.worlds)
            assert with_strangers == alone

    @precondition(lambda self: self.worlds[1].fabric.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Something that the two have said comes once more, however late."""
        place = data.draw(st.integers(0, len(self.worlds[1].fabric.sent) - 1))
        for world in self.worlds:
            own = [each for each in world.fabric.sent if {each[0], each[1]} == {world.p.id, world.d.id}]
            if place < len(own):
                world.fabric.send(*own[place])

    @precondition(lambda self: self.worlds[0].handoffs)
    @rule(
        data=st.data(),
        sender=st.sampled_from(STRANGERS),
        to=st.sampled_from("pd"),
        back=small,
        beside=st.sampled_from(((0, 0), (0, 0), (0, 0), (1, 0), (2**63, 0), (0, 1))),
    )
    def a_stranger_speaks(self, data: st.DataObject, sender: str, to: str, back: int, beside: tuple[int, int]) -> None:
        world = self.worlds[0]
        key = world.key(len(world.handoffs) - 1 - back, *beside)
        for _ in range(data.draw(st.integers(1, 3))):
            world.say(sender, to, encode(data.draw(messages(key))))
        self.poll(to, 1)

    @rule(data=st.data(), sender=st.sampled_from(STRANGERS), to=st.sampled_from("pd"))
    def a_stranger_babbles(self, data: st.DataObject, sender: str, to: str) -> None:
        world = self.worlds[0]
        recorded = [message for _, _, message in self.worlds[1].fabric.sent[-8:]]
        world.say(sender, to, data.draw(noise(recorded)))

    @invariant()
    def nothing_is_written_to_what_is_free(self) -> None:
        for world in self.worlds:
            assert not world.d.cache[:, world.d.free].any()

    def teardown(self) -> None:
        for world in self.worlds:
            world.settle()


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = fuzzed(25, stateful_step_count=30)


@fuzzed(25)
@given(st.data())
def test_whatever_the_two_say_to_each_other_ends_and_every_block_comes_back(data: st.DataObject) -> None:
    """Also what is not so: who lies of its own cache can only harm that, and nothing gets stuck."""
    world = World()
    for number in range(3):
        world.new(2, number % 2)
        world.begin(world.handoffs[-1])
        world.push(world.handoffs[-1])
        if number:
            world.expect(world.handoffs[-1])
    for _ in range(12):
        sender, target = data.draw(st.sampled_from((("p", "d"), ("d", "p"))))
        recorded = [message for _, _, message in world.fabric.sent[-8:]]
        said = messages(world.key(data.draw(small), 0, 0)).map(encode)
        world.say(sender, target, data.draw(st.one_of(said, noise(recorded))))
        for name in data.draw(st.lists(st.sampled_from("pd"), max_size=3)):
            for event in world.ends[name].connector.poll():
                _note_end(world, event)
    for handoff in world.handoffs:
        world.p.connector.abort(handoff.id, "the end")
        if handoff.key is not None:
            world.d.connector.cancel(handoff.key)
    for _ in range(20):
        for end in (world.p, world.d):
            for event in end.connector.poll():
                _note_end(world, event)
    assert not any(handoff.decode_owes or handoff.prefill_owes for handoff in world.handoffs)


def _note_end(world: World, event: ConnectorEvent) -> None:
    if isinstance(event, HandoffFailed):
        return
    of_prefill = isinstance(event, HandoffSent | HandoffAborted)
    handoff_id = event.handoff_id if of_prefill else event.key.handoff_id
    handoff = world.handoffs[int.from_bytes(handoff_id, "big")]
    name = "prefill_owes" if of_prefill else "decode_owes"
    assert getattr(handoff, name), "it ends once"
    setattr(handoff, name, False)


@fuzzed(120)
@given(st.data())
def test_what_is_decoded_is_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    key = HandoffKey(b"k" * 16, data.draw(u64), data.draw(u64))
    message = data.draw(messages(key))
    assert decode(encode(message)) == message
    changed = data.draw(mutated(encode(message)))
    try:
        again = decode(changed)
    except ProtocolError:
        return
    assert decode(encode(again)) == again


ONE = HandoffKey(b"k" * 16, 1, 1)
PARTS = st.builds(Part, st.just(ONE), st.integers(0, 7), st.just(0), small, st.integers(1, 2), small, st.integers(1, 2))
OTHER_PARTS = st.builds(Part, st.just(ONE), *[small] * 6)
FINALS = st.lists(st.builds(Final, st.just(ONE), st.integers(7, 8), small), max_size=2)


@fuzzed(200)
@given(st.lists(st.one_of(PARTS, PARTS, PARTS, OTHER_PARTS), max_size=12), FINALS, st.integers(0, 12))
def test_a_cache_is_whole_when_each_of_its_blocks_was_named_and_the_end_was_told_once(parts, finals, place) -> None:
    wanted = (Wanted(2, range(1, 3)), Wanted(1, range(0)))
    counter = PartCounter(wanted)
    named: set[tuple[int, int]] = set()
    numbers: set[int] = set()
    for said in [*parts[:place], *finals, *parts[place:]]:
        if isinstance(said, Final):
            counter.close(said)
            continue
        counter.count(said)
        if said.group < 2 and wanted[said.group].contains(said) and said.index not in numbers:
            numbers.add(said.index)
            layers = range(said.first_layer, said.first_layer + said.num_layers)
            blocks = range(said.first_block, said.first_block + said.num_blocks)
            named |= {(layer, block) for layer in layers for block in blocks}
    told = bool(finals) and len(set(finals)) == 1 and len(numbers) >= finals[0].num_parts
    assert (counter.first_token is not None) == (told and len(named) == 4)
