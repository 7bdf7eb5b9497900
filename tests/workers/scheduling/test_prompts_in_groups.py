"""Prompts over several cache groups, on plain numbers: nothing is lost, nothing kept too long, and all of them end."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from long_tails import slow_unless
from plain_cache import PlainCache, PlainRow, numbers_of, spec, texts
from workers.block_hashes import block_hashes
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.tables import SequenceTables
from workers.scheduling import prefill_step
from workers.scheduling.prefill_scheduler import Chunk, PrefillScheduler, PromptProgress

GROUPS = {
    "full": [spec(4)],
    "window": [spec(4, 9)],
    "window of one": [spec(4, 1)],
    "window of a block": [spec(4, 4)],
    "mixed": [spec(4), spec(4, 10, layer=1)],
    "two windows": [spec(4, 6), spec(4, 17, layer=1)],
    "larger blocks": [spec(4, 7), spec(8, layer=1), spec(16, 20, layer=2)],
}


@dataclass(eq=False)
class Prompt:
    token_ids: list[int]
    progress: PromptProgress
    numbers: list[int]
    in_flight: int = 0
    cancelled: bool = False
    states: None = None
    scores: None = None
    landed: int = 0
    pushed: dict[int, list[int]] = field(default_factory=dict)


@dataclass
class Side:
    """What a prefill worker does with its blocks, without a model: steps land as late as they can."""

    groups: str
    num_tokens: int
    budget: int
    max_num_seqs: int
    ahead: int
    seed: int
    longest: int = 60
    flying: deque = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        specs = GROUPS[self.groups]
        counts = [-(-self.num_tokens // s.block_size) + (s.window is not None) for s in specs]
        self.in_flight_tokens = (self.ahead + 1) * self.budget
        self.cache = KVCacheManager(specs, counts, prompt_tokens_in_flight=self.in_flight_tokens)
        self.memory = PlainCache(specs, counts)
        self.scheduler = PrefillScheduler(self.cache, self.budget, self.max_num_seqs)
        self.prompts: dict[str, Prompt] = {}
        self.handing_over: list[Prompt] = []
        self.count = self.cached = self.ended = 0
        self.runner = SimpleNamespace(forward=self._forward, ready_event=lambda: None)

    def add(self) -> None:
        token_ids = texts(self.rng, self.longest)
        name, self.count = f"p{self.count}", self.count + 1
        hashes = block_hashes(token_ids, self.cache.block_size) if self.rng.random() < 0.6 else ()
        prompt = Prompt(token_ids, PromptProgress(name, len(token_ids), hashes), numbers_of(token_ids))
        if self.cache.too_small(len(token_ids), computed=True) is None:
            self.prompts[name] = prompt
            self.scheduler.add(prompt.progress)

    def step(self) -> None:
        if chunks := self.scheduler.schedule():
            prompts = [self.prompts[chunk.prompt.attempt_id] for chunk in chunks]
            for prompt, chunk in zip(prompts, chunks, strict=True):
                self.push(prompt, chunk)
            self.cached += sum(chunk.start for chunk in chunks if chunk.prompt.num_chunks == 0)
            launch = prefill_step.launch_chunks(self.runner, self.cache, self.scheduler, chunks, prompts)
            self.flying.append((launch, self.rows))
        self.land(self.ahead if chunks and self.scheduler.can_schedule else 0)
        self.check()
        self.memory.scribble([group.pool for group in self.cache.groups])

    def push(self, prompt: Prompt, chunk: Chunk) -> None:
        """What is handed over with a chunk, and with the first one what was found."""
        spans = [(chunk.start, chunk.end)]
        if chunk.prompt.num_chunks == 0:
            spans.insert(0, (0, chunk.start))
        for i, (group, table) in enumerate(zip(self.cache.groups, chunk.prompt.tables.groups, strict=True)):
            for start, end in spans:
                places = group.handed_over(start, end, chunk.prompt.num_tokens)
                assert all(place >= table.start for place in places)
                prompt.pushed.setdefault(i, []).extend(places)

    def land(self, ahead: int) -> None:
        while len(self.flying) > ahead:
            launch, rows = self.flying.popleft()
            for prompt, chunk, (start, tables) in zip(launch.prompts, launch.chunks, rows, strict=True):
                self.memory.run(PlainRow(prompt.numbers, start, tables), chunk.end)
                prompt.landed = chunk.end
            launch.wait(self.cache)
            for prompt, chunk in zip(launch.prompts, launch.chunks, strict=True):
                if prompt.cancelled:
                    self.give_back(prompt)
                elif chunk.last:
                    del self.prompts[prompt.progress.attempt_id]
                    self.handing_over.append(prompt)

    def abort(self) -> None:
        if self.prompts:
            prompt = self.prompts.pop(self.rng.choice(list(self.prompts)))
            self.scheduler.remove(prompt.progress)
            prompt.cancelled = True
            self.give_back(prompt)

    def end_handoff(self) -> None:
        """What decode needs was kept until now, and nothing else was."""
        if not self.handing_over:
            return
        prompt = self.handing_over.pop(self.rng.randrange(len(self.handing_over)))
        size = prompt.progress.num_tokens
        for i, (group, table) in enumerate(zip(self.cache.groups, prompt.progress.tables.groups, strict=True)):
            assert table.start == group.first_needed(size)
            assert prompt.pushed[i] == list(range(table.start, len(table.blocks))), "each block once, in order"
            self.memory.check(i, table.blocks, prompt.numbers, table.start)
        self.give_back(prompt)
        self.ended += 1

    def give_back(self, prompt: Prompt) -> None:
        if prompt.in_flight == 0:
            self.cache.release(prompt.progress.tables)

    def tables(self) -> list[SequenceTables]:
        flying = [prompt for launch, _ in self.flying for prompt in launch.prompts]
        return [p.progress.tables for p in {*flying, *self.prompts.values(), *self.handing_over}]

    def check(self) -> None:
        """Blocks are held by somebody or free, and nobody holds more of a window than it was promised."""
        for i, group in enumerate(self.cache.groups):
            tables = [tables.groups[i] for tables in self.tables() if tables.groups]
            held = {block for table in tables for block in table.held}
            pool = group.pool
            assert len(held) == len(pool.used_blocks)
            assert all(block == 0 for table in tables for block in table.blocks[: table.start])
            if self.memory.specs[i].window is not None:
                assert 0 not in held
            promised = sum(table.promised for table in tables)
            assert promised <= pool.num_blocks
            assert pool.num_free >= 0
        for prompt in self.prompts.values():
            for group, table in zip(self.cache.groups, prompt.progress.tables.groups, strict=False):
                most = group.most_blocks(prompt.progress.num_tokens, self.in_flight_tokens)
                assert table.num_held <= most
                assert table.start >= group.first_needed(prompt.landed), "a block lies behind the window and is held"

    def _forward(self, rows, on_layer):
        self.rows = [(row.start, [list(table) for table in row.block_tables]) for row in rows]
        return


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch):
    monkeypatch.setattr(prefill_step, "FirstTokens", lambda logits, states, event: SimpleNamespace(wait=lambda: states))


@pytest.mark.parametrize("seed", slow_unless((2).__gt__, range(4)))
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("groups", list(GROUPS))
def test_random_prompts_share_blocks_and_all_of_them_end(groups, ahead, seed):
    rng = random.Random(seed)
    side = Side(groups, rng.choice((64, 90, 200)), rng.choice((1, 5, 12, 40)), rng.randint(1, 4), ahead, seed)
    for _ in range(150):
        action = rng.random()
        if action < 0.3 and len(side.prompts) < 6:
            side.add()
        elif action < 0.35:
            side.abort()
        elif action < 0.55:
            side.end_handoff()
        side.step()
    for _ in range(3000):
        if not side.prompts and not side.flying:
            break
        side.end_handoff()
        side.step()
    assert not side.prompts, "a prompt under way has not ended"
    while side.handing_over:
        side.end_handoff()
    assert side.ended > 5
    assert side.cached > 0 or side.ended < 30
    for group in side.cache.groups:
        assert group.pool.num_free == group.pool.num_blocks


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_long_prompt_takes_the_memory_of_its_window(ahead):
    """Ten times longer than all blocks of the group hold; the group with all tokens has room."""
    side = Side("window", 40, 8, 2, ahead, 0)
    prompt = Prompt(list(range(400)), PromptProgress("long", 400), numbers_of(range(400)))
    assert side.cache.too_small(400, computed=True) is None
    side.prompts["long"] = prompt
    side.scheduler.add(prompt.progress)
    most = 0
    while side.prompts:
        side.step()
        most = max(most, side.cache.num_held(prompt.progress.tables))
    assert most <= -(-(9 - 1 + (1 + ahead) * 8 + 4 - 1) // 4)
    side.end_handoff()
    assert side.cache.num_free == side.cache.num_blocks
