"""Decode over several cache groups, on plain numbers: sequences come whole or are sent a window, grow, make room, end.

The tables that a step works with are those of the device, from `DecodeRows`.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch

from long_tails import slow_unless
from made_requests import worker_request
from plain_cache import PlainCache, PlainRow, numbers_of, spec, texts
from workers.kv_cache.manager import KVCacheManager
from workers.runner.decode_batch_state import DecodeRows
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.scheduling.decode_scheduler import DecodeBatch
from workers.scheduling.sequence import Sequence
from workers.scheduling.sequence_blocks import SequenceBlocks

GROUPS = {
    "full": [spec(4)],
    "window": [spec(4, 9)],
    "window of one": [spec(4, 1)],
    "mixed": [spec(4), spec(4, 10, layer=1)],
    "two windows": [spec(4, 6), spec(4, 17, layer=1)],
    "larger blocks": [spec(4, 7), spec(8, layer=1), spec(16, 20, layer=2)],
}
MAX_MODEL_LEN = 96


@dataclass
class Side:
    """What a decode worker does with its blocks, without a model: steps land as late as they can."""

    groups: str
    num_tokens: int
    max_num_seqs: int
    ahead: int
    seed: int
    longest: int = 50
    flying: deque = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        specs = GROUPS[self.groups]
        counts = [-(-self.num_tokens // s.block_size) + (s.window is not None) for s in specs]
        self.cache = KVCacheManager(specs, counts, decode_tokens_in_flight=self.ahead + 1)
        self.memory = PlainCache(specs, counts)
        self.kept = SequenceBlocks(self.cache, enabled=True)
        self.batch = DecodeBatch(self.cache, self.memory, self.max_num_seqs)
        self.rows = DecodeRows[Sequence](self.max_num_seqs, MAX_MODEL_LEN, specs, torch.device("cpu"))
        self.waiting: list[Sequence] = []
        self.expected: list[Sequence] = []
        self.alive: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self.count = self.ended = self.preempted = self.sent = self.needed = 0

    def submit(self) -> None:
        token_ids = texts(self.rng, self.longest)
        sampling = SamplingParams(seed=0, max_tokens=self.rng.randint(1, 40))
        if self.cache.too_small(len(token_ids) + 1 + sampling.max_tokens, computed=False) is not None:
            return
        request = worker_request(f"s{self.count}", tuple(token_ids), sampling, "prefill")
        state = SamplingState(sampling, request.prompt_token_ids, frozenset(), MAX_MODEL_LEN)
        sequence = Sequence(request, state, 0.0)
        self.count += 1
        self.kept.begin(sequence)
        self.waiting.append(sequence)

    def admit(self) -> None:
        while self.waiting and not self.batch.num_preempted:
            taken = self.batch.size + len(self.expected)
            if taken >= self.max_num_seqs or not self.kept.fits(self.waiting[0]):
                return
            sequence = self.waiting.pop(0)
            self.kept.take(sequence)
            self.expected.append(sequence)

    def receive(self) -> None:
        """A prefill worker writes what it was granted, at any time."""
        if not self.expected:
            return
        sequence = self.expected.pop(self.rng.randrange(len(self.expected)))
        numbers = numbers_of(sequence.request.prompt_token_ids.tolist())
        firsts = self.kept.granted_from(sequence)
        for i, (group, table, first) in enumerate(zip(self.cache.groups, sequence.tables.groups, firsts, strict=True)):
            self.memory.put(i, table.blocks, numbers, first * group.block_size, len(numbers))
            self.memory.check(i, table.blocks, numbers, table.start)
            self.sent += max(0, len(table.blocks) - first)
            self.needed += len(table.blocks)
        self.kept.received(sequence)
        sequence.received = float(self.count * 1000 + self.rng.random())
        sequence.state.output_token_ids.append(self.rng.randrange(10**6))
        self.alive.append(sequence)
        self.batch.add(sequence)

    def step(self) -> None:
        self.batch.resume_preempted()
        self.admit()
        if self.flying and self.batch.lacks_blocks:
            self.land(0)
        ready = self.batch.schedule()
        if ready:
            order = self.rows.arrange(ready)
            tables = [group.tolist() for group in self.rows.block_tables]
            starts = [sequence.num_scheduled - 1 for sequence in order]
            rows = [[table[place] for table in tables] for place in range(len(order))]
            self.flying.append(list(zip(order, starts, rows, strict=True)))
            self.batch.launched(ready)
            self.rows.inputs(len(order))
        self.preempted += self.batch.num_preempted
        self.land(self.ahead if ready else 0)
        self.check()
        self.memory.scribble([group.pool for group in self.cache.groups])

    def land(self, ahead: int) -> None:
        while len(self.flying) > ahead:
            for sequence, start, tables in self.flying.popleft():
                known = sequence.token_ids(0, start + 1).tolist()
                if len(known) <= start:  # it runs once too often, on a token that nobody has seen
                    known += [0] * (start + 1 - len(known))
                self.memory.run(PlainRow(numbers_of(known), start, tables), start + 1)
                if not self.batch.landed(sequence):
                    if sequence.in_flight == 0:
                        self.leaving.remove(sequence)
                    continue
                sequence.state.output_token_ids.append(self.rng.randrange(10**6))
                self.kept.grown(sequence)
                if len(sequence.state.output_token_ids) >= sequence.max_output or self.rng.random() < 0.02:
                    self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.alive.remove(sequence)
        if sequence.in_flight:
            self.leaving.append(sequence)
        self.batch.remove(sequence)
        self.ended += 1

    def cancel(self) -> None:
        """Nobody wants a handoff: what was here goes back at once, and what was granted when it is safe."""
        if self.expected:
            sequence = self.expected.pop()
            self.kept.give_back_cached(sequence)
            self.check(sequence)
            self.cache.release(sequence.tables)

    def check(self, *others: Sequence) -> None:
        everybody = [*self.alive, *self.leaving, *self.expected, *others]
        for i, group in enumerate(self.cache.groups):
            tables = [sequence.tables.groups[i] for sequence in everybody if sequence.tables.groups]
            held = {block for table in tables for block in table.held}
            assert len(held) == group.pool.num_blocks - group.pool.num_free
            most = group.most_blocks(MAX_MODEL_LEN, self.ahead + 1)
            assert all(table.num_held <= most for table in tables)
        for sequence in self.alive:
            assert bool(sequence.tables.groups) != (sequence.host_copy is not None)
            for group, table in zip(self.cache.groups, sequence.tables.groups, strict=False):
                assert table.start >= group.first_needed(sequence.num_tokens - 1), "behind the window, and held"


@pytest.mark.parametrize("seed", slow_unless((0).__eq__, range(3)))
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_random_sequences_lose_nothing_and_all_of_them_end(groups, ahead, seed):
    rng = random.Random(seed)
    side = Side(groups, rng.choice((48, 100, 160)), rng.randint(2, 6), ahead, seed)
    for _ in range(250):
        action = rng.random()
        if action < 0.4 and len(side.waiting) < 4:
            side.submit()
        if rng.random() < 0.3:
            side.receive()
        if action > 0.97:
            side.cancel()
        elif action > 0.95 and side.alive:
            side.end(rng.choice(side.alive))
        side.step()
    for _ in range(3000):
        if not (side.waiting or side.expected or side.alive or side.flying):
            break
        side.receive()
        side.step()
    assert [*side.waiting, *side.expected, *side.alive] == [], "somebody has not ended"
    assert side.ended > 5
    for group in side.cache.groups:
        assert group.pool.num_free == group.pool.num_blocks


def test_sequences_make_room_and_come_back_in_every_mix():
    """The random runs above do preempt, and are sent less than whole prompts where there are windows."""
    for groups in ("full", "window", "mixed", "larger blocks"):
        preempted = sent = needed = 0
        for longest in (6, 50):
            side = Side(groups, 48, 6, 1, 0, longest)
            for _ in range(150):
                if len(side.waiting) < 4:
                    side.submit()
                side.receive()
                side.step()
            preempted, sent, needed = preempted + side.preempted, sent + side.sent, needed + side.needed
        assert preempted > 0, groups
        assert sent < needed, groups
