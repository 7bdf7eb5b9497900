"""Messages that nobody would send, in any order, from anybody: no cache is taken for whole that is not, nothing stays.

Two worlds live through the same: in one of them strangers say whatever they like besides. What happens must be equal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuzzing import fuzzed
from handoff_messages import CHANGES, KEY, MESSAGES, NOISE, changed, small
from handoff_world import STRANGERS, World
from kv_transfer.connector import ConnectorEvent, HandoffAborted, HandoffFailed, HandoffSent
from kv_transfer.errors import ProtocolError
from kv_transfer.handoff.messages import Final, Part, decode, encode
from kv_transfer.handoff.part_counter import PartCounter, Wanted
from kv_transfer.handoff_key import HandoffKey

pytestmark = pytest.mark.fuzz

u64 = st.integers(0, 2**64 - 1)


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
        possible = [(what, handoff.number) for what, may in steps.items() for handoff in handoffs if may(handoff)]
        return [*possible, *(step for step in possible if step[0] not in ("cancel", "abort"))]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.new(2, 0)
        self.go_on(data, 3)

    @rule(size=st.integers(1, 3), first=st.integers(0, 1))
    def new(self, size: int, first: int) -> None:
        num_open = len(self.worlds[0].open)
        for world in self.worlds:
            if num_open < 3 and len(world.p.free) >= size and len(world.d.free) >= size:
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

    @precondition(lambda self: self.worlds[0].open)
    @rule(
        data=st.data(),
        sender=st.sampled_from(STRANGERS),
        to=st.sampled_from("pd"),
        beside=st.sampled_from(((0, 0), (0, 0), (0, 0), (1, 0), (2**63, 0), (0, 1))),
    )
    def a_stranger_speaks(self, data: st.DataObject, sender: str, to: str, beside: tuple[int, int]) -> None:
        """It knows the key of a handoff that is not over, or nearly."""
        world = self.worlds[0]
        key = world.key(data.draw(st.sampled_from(world.open)).number, *beside)
        for _ in range(data.draw(st.integers(1, 2))):
            world.say(sender, to, encode(replace(data.draw(MESSAGES), key=key)))
        self.poll(to, 1)

    @rule(data=st.data(), sender=st.sampled_from(STRANGERS), to=st.sampled_from("pd"))
    def a_stranger_babbles(self, data: st.DataObject, sender: str, to: str) -> None:
        self.worlds[0].say(sender, to, data.draw(NOISE))
        if recorded := self.worlds[1].fabric.sent[-8:]:
            _, _, message = data.draw(st.sampled_from(recorded))
            self.worlds[0].say(sender, to, changed(message, data.draw(CHANGES)))

    @invariant()
    def nothing_is_written_to_what_is_free(self) -> None:
        for world in self.worlds:
            assert not world.d.cache[:, world.d.free].any()

    def teardown(self) -> None:
        for world in self.worlds:
            world.settle()


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = fuzzed(25, stateful_step_count=40)


@fuzzed(40)
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
        said = encode(replace(data.draw(MESSAGES), key=world.key(data.draw(small), 0, 0)))
        recorded = [message for _, _, message in world.fabric.sent[-8:]]
        if recorded and data.draw(st.booleans()):
            said = changed(data.draw(st.sampled_from(recorded)), data.draw(CHANGES))
        world.say(sender, target, said)
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


@fuzzed(150)
@given(MESSAGES, u64, u64, CHANGES)
def test_what_is_decoded_is_a_message_or_a_protocol_error(message, incarnation, generation, changes) -> None:
    message = replace(message, key=HandoffKey(b"k" * 16, incarnation, generation))
    assert decode(encode(message)) == message
    try:
        again = decode(changed(encode(message), changes))
    except ProtocolError:
        return
    assert decode(encode(again)) == again


PARTS = st.builds(Part, st.just(KEY), st.integers(0, 7), st.just(0), *[st.integers(0, 1), st.integers(1, 2)] * 2)
OTHER_PARTS = st.builds(Part, st.just(KEY), *[small] * 6)
FINALS = st.lists(st.builds(Final, st.just(KEY), st.integers(7, 8), st.integers(0, 2)), min_size=1, max_size=2)


@fuzzed(300)
@given(st.lists(st.one_of(PARTS, PARTS, PARTS, OTHER_PARTS), max_size=9), FINALS, st.integers(0, 9))
def test_a_cache_is_whole_when_each_of_its_blocks_was_named_and_the_end_was_told_once(parts, finals, place) -> None:
    wanted = (Wanted(2, range(2)), Wanted(1, range(3, 3)))
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
    told = len(set(finals)) == 1 and len(numbers) >= finals[0].num_parts
    assert (counter.first_token is not None) == (told and len(named) == 4)
