"""Prompts in chunks: in order, under the budget, each token and each block exactly once."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_groups import whole_cache
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.manager import KVCacheManager
from workers.scheduling.prefill_scheduler import Chunk, PrefillScheduler, PromptProgress

BLOCK_SIZE = 4


def spans(chunks) -> list[tuple[str, int, int]]:
    return [(chunk.prompt.attempt_id, chunk.start, chunk.end) for chunk in chunks]


def make(num_blocks: int = 16, budget: int = 8, max_num_seqs: int = 4) -> tuple[PrefillScheduler, KVCacheManager]:
    cache = whole_cache(num_blocks, BLOCK_SIZE)
    return PrefillScheduler(cache, budget, max_num_seqs), cache


def complete(chunk: Chunk, cache: KVCacheManager) -> range:
    return cache.groups[0].handed_over(chunk.start, chunk.end, chunk.prompt.num_tokens)


def test_a_long_prompt_is_computed_in_chunks_and_the_rest_of_the_budget_goes_to_the_next():
    scheduler, _ = make()
    for name, length in (("a", 11), ("b", 4), ("c", 3)):
        scheduler.add(PromptProgress(name, length))
    seen = []
    while chunks := scheduler.schedule():
        seen.append(spans(chunks))
        for chunk in chunks:
            scheduler.advance(chunk)
    assert seen == [[("a", 0, 8)], [("a", 8, 11), ("b", 0, 4), ("c", 0, 1)], [("c", 1, 3)]]


def test_blocks_become_pushable_when_they_are_full_and_at_the_end():
    scheduler, cache = make(budget=6)
    scheduler.add(PromptProgress("a", 14))
    pushed = []
    while chunks := scheduler.schedule():
        pushed.append(list(complete(chunks[0], cache)))
        scheduler.advance(chunks[0])
    assert pushed == [[0], [1, 2], [3]]


def test_the_head_of_the_queue_is_not_overtaken():
    scheduler, cache = make(num_blocks=4)
    held, _ = cache.admit((), 8, 8)
    scheduler.add(PromptProgress("large", 12))
    scheduler.add(PromptProgress("small", 1))
    assert scheduler.schedule() == []
    assert not scheduler.can_schedule, "asking again without a free block would only burn the CPU"
    cache.release(held)
    assert scheduler.can_schedule
    assert spans(scheduler.schedule()) == [("large", 0, 8)]


def test_no_more_prompts_at_once_than_allowed():
    scheduler, _ = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(PromptProgress(name, 1))
    assert [span[0] for span in spans(scheduler.schedule())] == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 1, 3)


def test_a_removed_prompt_is_forgotten_wherever_it_is():
    scheduler, _ = make(budget=2)
    running, waiting, unknown = PromptProgress("r", 4), PromptProgress("w", 4), PromptProgress("u", 4)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    for prompt in (running, waiting, unknown):
        scheduler.remove(prompt)
    assert not scheduler.can_schedule
    assert scheduler.num_waiting_tokens == 0


class PrefillSchedulerMachine(RuleBasedStateMachine):
    """Prompts arrive, are computed and removed at random. Removed and computed ones keep their blocks for a while, as
    those of a handoff do."""

    @initialize(num_blocks=st.integers(4, 16), budget=st.integers(1, 20), max_num_seqs=st.integers(1, 4))
    def start(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        self.cache = whole_cache(num_blocks, BLOCK_SIZE)
        self.scheduler = PrefillScheduler(self.cache, budget, max_num_seqs)
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.alive: list[PromptProgress] = []
        self.holding: list[PromptProgress] = []
        self.pushed: dict[str, list[int]] = {}
        self.count = 0

    @rule(length=st.integers(1, 40))
    def add(self, length: int) -> None:
        prompt = PromptProgress(f"p{self.count}", min(length, self.cache.num_blocks * BLOCK_SIZE))
        self.count += 1
        self.pushed[prompt.attempt_id] = []
        self.alive.append(prompt)
        self.scheduler.add(prompt)

    @rule()
    def step(self) -> None:
        could = self.scheduler.can_schedule
        chunks = self.scheduler.schedule()
        assert bool(chunks) == could
        assert sum(chunk.end - chunk.start for chunk in chunks) <= self.budget
        assert len(chunks) <= self.max_num_seqs
        order = [self.alive.index(chunk.prompt) for chunk in chunks]
        assert order == list(range(len(order))), "first come, first served"
        for chunk in chunks:
            prompt = chunk.prompt
            assert chunk.start == prompt.num_computed_tokens < chunk.end <= prompt.num_tokens
            assert self.cache.num_held(prompt.tables) == blocks_for(prompt.num_tokens, BLOCK_SIZE)
            self.pushed[prompt.attempt_id] += complete(chunk, self.cache)
            self.scheduler.advance(chunk)
            assert len(self.pushed[prompt.attempt_id]) * BLOCK_SIZE >= prompt.num_computed_tokens - BLOCK_SIZE + 1
            if prompt.done:
                places = range(self.cache.num_held(prompt.tables))
                assert self.pushed[prompt.attempt_id] == list(places), "each block once, in order"
                self.alive.remove(prompt)
                self.holding.append(prompt)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        prompt = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.scheduler.remove(prompt)
        self.holding.append(prompt)

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.cache.release(self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1))).tables)

    @invariant()
    def blocks_have_one_owner(self) -> None:
        if hasattr(self, "alive"):
            owned = [block for prompt in (*self.alive, *self.holding) for block in self.cache.held(prompt.tables)]
            assert len(owned) == len(set(owned)) == self.cache.num_blocks - self.cache.num_free
            missing = sum(p.num_tokens - p.num_computed_tokens for p in self.alive)
            assert self.scheduler.num_waiting_tokens == missing

    def teardown(self) -> None:
        """Whatever happened before, everything left is computed once blocks come back."""
        if not hasattr(self, "alive"):
            return
        for _ in range(10_000):
            if not self.alive:
                break
            while self.holding:
                self.cache.release(self.holding.pop().tables)
            self.step()
        assert not self.alive


TestPrefillSchedulerMachine = PrefillSchedulerMachine.TestCase
TestPrefillSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
