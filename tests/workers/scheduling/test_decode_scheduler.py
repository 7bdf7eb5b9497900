"""The decode batch grows and makes room: the oldest go on, nobody's cache is lost or mixed up."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_groups import whole_cache
from made_requests import worker_request
from workers.kv_cache.block_pool import blocks_for
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.scheduling.decode_scheduler import DecodeBatch
from workers.scheduling.sequence import Sequence

BLOCK_SIZE = 4


class MemoryStore:
    """Blocks of one number for each slot; -1 where nothing was written since the block was given away."""

    def __init__(self, num_blocks: int) -> None:
        self.slots = torch.full((1, num_blocks, BLOCK_SIZE), -1)

    def read_blocks(self, blocks: list[int], group: int = 0) -> torch.Tensor:
        return self.slots[:, blocks].clone()

    def write_blocks(self, blocks: list[int], data: torch.Tensor, group: int = 0) -> None:
        self.slots[:, blocks] = data

    def put(self, blocks: list[int], position: int, value: int) -> None:
        self.slots[0, blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = value

    def get(self, blocks: list[int], length: int) -> list[int]:
        return self.slots[0, blocks].flatten()[:length].tolist()


class Write(NamedTuple):
    """What a step will put into the cache."""

    sequence: Sequence
    blocks: list[int]
    place: int
    value: int


def blocks_of(sequence: Sequence) -> list[int]:
    return sequence.tables.groups[0].blocks if sequence.tables.groups else []


class Harness:
    """A batch whose sequences write their own numbers into the cache, and check that they read them back.

    A step writes when it lands, as late as it can: into a block that was given away meanwhile, it would write over
    somebody else's numbers. Up to `ahead` steps are in flight when the next is launched.
    """

    def __init__(self, num_blocks: int, max_num_seqs: int = 8, ahead: int = 0) -> None:
        self.cache = whole_cache(num_blocks, BLOCK_SIZE)
        self.store = MemoryStore(num_blocks)
        self.batch = DecodeBatch(self.cache, self.store, max_num_seqs)
        self.alive: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self._ahead = ahead
        self._flying: deque[list[Write]] = deque()
        self._clock = count(1)

    def join(self, prompt_len: int) -> Sequence:
        """A sequence whose prompt is in the cache and whose first token was sampled."""
        number = next(self._clock)
        sampling = SamplingParams(seed=0, max_tokens=1000)
        request = worker_request(f"s{number}", (0,) * prompt_len, sampling, "prefill")
        sequence = Sequence(request, SamplingState(sampling, request.prompt_token_ids, frozenset(), 1000), 0.0)
        sequence.received = float(number)
        sequence.tables, _ = self.cache.admit((), prompt_len, prompt_len)
        for position in range(prompt_len):
            self.store.put(blocks_of(sequence), position, number * 1000 + position)
        sequence.state.output_token_ids.append(0)
        self.alive.append(sequence)
        self.batch.add(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """One decode step: everyone who is scheduled will write one more number and get one more token."""
        self.batch.resume_preempted()
        if self._flying and self.batch.lacks_blocks:
            self.land(0)
        ready = self.batch.schedule()
        writes = []
        for sequence in ready:
            number, place, landed = int(sequence.received), sequence.num_scheduled - 1, sequence.num_tokens - 1
            assert len(blocks_of(sequence)) * BLOCK_SIZE > place
            expected = [number * 1000 + position for position in range(landed)]
            assert self.store.get(blocks_of(sequence), landed) == expected
            writes.append(Write(sequence, list(blocks_of(sequence)), place, number * 1000 + place))
        if ready:
            self.batch.launched(ready)
            self._flying.append(writes)
        self.land(self._ahead if ready else 0)
        return ready

    def land(self, ahead: int) -> None:
        while len(self._flying) > ahead:
            for write in self._flying.popleft():
                self.store.put(write.blocks, write.place, write.value)
                if self.batch.landed(write.sequence):
                    write.sequence.state.output_token_ids.append(0)
                elif write.sequence.in_flight == 0:
                    self.leaving.remove(write.sequence)

    def end(self, sequence: Sequence) -> None:
        self.alive.remove(sequence)
        if sequence.in_flight:
            self.leaving.append(sequence)
        self.batch.remove(sequence)


def test_sequences_grow_by_a_block_when_they_need_one():
    harness = Harness(8)
    sequence = harness.join(3)
    lengths = []
    for _ in range(6):
        harness.step()
        lengths.append(len(blocks_of(sequence)))
    assert lengths == [1, 2, 2, 2, 2, 3]
    harness.end(sequence)
    assert harness.cache.num_free == 8


def test_the_newest_makes_room_and_comes_back():
    harness = Harness(4)
    old, new = harness.join(7), harness.join(7)
    assert harness.step() == [old, new]
    assert harness.step() == [old], "the newest gives its blocks to the oldest"
    assert (harness.batch.size, harness.batch.num_preempted) == (1, 1)
    assert blocks_of(new) == []
    assert not harness.batch.can_resume
    for _ in range(3):
        assert harness.step() == [old]
    harness.end(old)
    assert harness.batch.can_resume
    assert harness.step() == [new]
    assert new.host_copy is None


def test_of_several_the_newest_makes_room():
    harness = Harness(6)
    a, b, c = (harness.join(7) for _ in range(3))
    assert harness.step() == [a, b, c]
    assert harness.step() == [a, b]
    assert c.host_copy is not None


def test_one_that_comes_back_takes_its_old_place():
    """A sequence whose blocks were reserved before can join while an older one is put aside."""
    harness = Harness(6)
    a, b = harness.join(7), harness.join(11)
    assert harness.step() == [a, b]
    assert harness.step() == [a], "five blocks for both, one more for each"
    c = harness.join(3)
    assert harness.step() == [a, c]
    harness.end(a)
    assert harness.step() == [b, c]


def test_the_oldest_comes_back_first_and_keeps_its_place():
    harness = Harness(7)
    a, b, c = (harness.join(7) for _ in range(3))
    assert harness.step() == [a, b, c]
    assert harness.step() == [a, b]
    for _ in range(4):
        ready = harness.step()
    assert ready == [a], "there is a fourth block for one of them only"
    harness.end(a)
    assert harness.step() == [b, c]


def test_a_preempted_sequence_may_end():
    harness = Harness(4)
    old, new = harness.join(7), harness.join(7)
    harness.step()
    harness.step()
    harness.end(new)
    assert harness.batch.num_preempted == 0
    harness.end(old)
    assert harness.cache.num_free == 4


def test_blocks_of_a_sequence_in_flight_come_back_when_it_has_landed():
    harness = Harness(4, ahead=1)
    old, new = harness.join(7), harness.join(3)
    harness.step()
    harness.end(old)
    assert harness.cache.num_free == 1
    assert harness.step() == [new]
    assert harness.cache.num_free == 2, "one block more for the new one, two of the old one's are back"


def test_a_block_is_there_for_the_token_behind_the_one_in_flight():
    harness = Harness(4, ahead=1)
    sequence = harness.join(3)
    assert harness.step() == [sequence]
    assert len(blocks_of(sequence)) == 1
    assert harness.step() == [sequence]
    assert (sequence.num_tokens, len(blocks_of(sequence))) == (5, 2)


def test_what_ends_in_flight_for_certain_is_not_scheduled_again():
    harness = Harness(4, ahead=1)
    sequence = harness.join(3)
    sequence.max_output = 2
    assert harness.step() == [sequence]
    assert harness.step() == []
    assert len(sequence.state.output_token_ids) == 2


def test_nobody_makes_room_while_a_step_is_in_flight():
    harness = Harness(4, ahead=1)
    old, new = harness.join(7), harness.join(7)
    harness.step()
    assert harness.batch.lacks_blocks
    with pytest.raises(RuntimeError, match="make room while a step is in flight"):
        harness.batch.schedule()
    harness.land(0)
    assert harness.batch.schedule() == [old]
    assert new.host_copy is not None


def test_a_sequence_that_is_not_there_cannot_be_removed():
    harness = Harness(4)
    sequence = harness.join(3)
    harness.end(sequence)
    with pytest.raises(ValueError, match="not in list"):
        harness.batch.remove(sequence)


class DecodeBatchMachine(RuleBasedStateMachine):
    """Sequences join, decode and end at random in a cache that is too small for them all."""

    @initialize(num_blocks=st.integers(4, 20), max_num_seqs=st.integers(1, 6), ahead=st.integers(0, 2))
    def start(self, num_blocks: int, max_num_seqs: int, ahead: int) -> None:
        self.harness = Harness(num_blocks, max_num_seqs, ahead)

    @rule(prompt_len=st.integers(1, 16))
    def join(self, prompt_len: int) -> None:
        harness = self.harness
        # Also while others are put aside: its blocks may have been reserved before.
        room = blocks_for(prompt_len + 1, BLOCK_SIZE) <= harness.cache.num_free
        if room and len(harness.alive) < harness.batch.max_num_seqs:
            harness.join(prompt_len)

    @rule()
    def step(self) -> None:
        harness = self.harness
        ready = harness.step()
        running = [s for s in harness.alive if s.host_copy is None]
        assert ready == running, "whoever was not put aside decodes, oldest first"
        assert len(ready) <= harness.batch.max_num_seqs
        for sequence in ready:  # none may grow past the whole cache: a worker's context window rules that out
            if blocks_for(sequence.num_scheduled, BLOCK_SIZE) > harness.cache.num_blocks:
                harness.end(sequence)

    @precondition(lambda self: self.harness.alive)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.harness.end(data.draw(st.sampled_from(self.harness.alive)))

    @invariant()
    def blocks_have_one_owner(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        owned = [block for sequence in (*harness.alive, *harness.leaving) for block in blocks_of(sequence)]
        assert len(owned) == len(set(owned)) == harness.cache.num_blocks - harness.cache.num_free
        for sequence in harness.alive:
            assert bool(blocks_of(sequence)) != (sequence.host_copy is not None), "in the cache or in host memory"
        assert harness.batch.size + harness.batch.num_preempted == len(harness.alive)

    def teardown(self) -> None:
        """Somebody always goes on, so that everybody ends."""
        if hasattr(self, "harness"):
            while self.harness.alive:
                # What the steps in flight hold back is there for the step after them.
                ready = self.harness.step() or self.harness.step()
                assert ready
                self.harness.end(ready[0])
            self.harness.land(0)
            assert self.harness.cache.num_free == self.harness.cache.num_blocks


TestDecodeBatchMachine = DecodeBatchMachine.TestCase
TestDecodeBatchMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
