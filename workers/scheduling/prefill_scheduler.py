"""Which prompt tokens a prefill step computes. Plain integers; knows neither tensors nor the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.tables import SequenceTables
from workers.scheduling.lost_room import Need

W = TypeVar("W")


@dataclass(eq=False)
class PromptProgress:
    """How far a prompt has come.

    Attributes:
        attempt_id: whose prompt it is.
        num_tokens: its length.
        hashes: of its full blocks, see `workers.block_hashes`; empty where nothing is cached.
        num_samples: sequences that go on from its end.
        all_computed: nothing of it is taken from the cache: somebody wants to know more of its tokens than their keys.
        tables: its block tables; none until it is admitted.
        num_computed_tokens: tokens that are in the cache, or will be when the steps in flight have landed.
        num_cached_tokens: of the computed ones, those that were in the cache when it was admitted.
        num_chunks: steps that it took so far.
        owner: whose the blocks are that it takes.
    """

    attempt_id: str
    num_tokens: int
    hashes: Sequence[bytes] = ()
    num_samples: int = 1
    all_computed: bool = False
    tables: SequenceTables = field(default_factory=SequenceTables)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_chunks: int = 0
    owner: str = ""

    @property
    def done(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.num_computed_tokens == self.num_tokens


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a prompt, computed in one step."""

    prompt: PromptProgress
    start: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.end == self.prompt.num_tokens


class PrefillScheduler:
    """First come, first served, in chunks under a token budget.

    A prompt is admitted when the blocks that it needs until its end are free, so that one under way always ends: where
    a model keeps all of its tokens, these are blocks for all of it; of a sliding window, the most that it will hold at
    once, which are promised to it and taken chunk by chunk. Prompts under way go
    before new ones. Of a prompt that begins like one that is cached, only what is missing is computed, and its last
    token in any case: the first output token is chosen from that token's logits.

    Args:
        cache: the worker's.
        max_num_batched_tokens: token budget of a step.
        max_num_seqs: prompts in a step.
    """

    def __init__(self, cache: KVCacheManager, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._cache = cache
        self._budget = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[PromptProgress] = deque()
        self._running: list[PromptProgress] = []

    @property
    def waiting(self) -> Sequence[PromptProgress]:
        """Prompts not admitted yet, in order."""
        return self._waiting

    @property
    def num_waiting(self) -> int:
        """How many these are."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Prompts under way."""
        return len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens still to compute, of prompts waiting and under way."""
        return sum(p.num_tokens - p.num_computed_tokens for p in (*self._waiting, *self._running))

    @property
    def can_schedule(self) -> bool:
        """Whether `schedule` would return a chunk now."""
        return bool(self._running) or (bool(self._waiting) and self.fits(self._waiting[0]))

    def add(self, prompt: PromptProgress) -> None:
        """Queue a prompt of at least one token."""
        self._waiting.append(prompt)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, with blocks for them; empty when there is nothing to do or no block to do it in."""
        budget = self._budget
        chunks: list[Chunk] = []
        for prompt in self._running[: self._max_num_seqs]:
            budget -= self._take(prompt, budget, chunks)
        while budget > 0 and self._waiting and len(self._running) < self._max_num_seqs and self.fits(self._waiting[0]):
            prompt = self._waiting.popleft()
            self.admit(prompt)
            budget -= self._take(prompt, budget, chunks)
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """A chunk is launched."""
        prompt = chunk.prompt
        prompt.num_computed_tokens = chunk.end
        prompt.num_chunks += 1
        if chunk.last:
            self._running.remove(prompt)

    def remove(self, prompt: PromptProgress) -> None:
        """Forget a prompt that is waiting or under way; its blocks stay the caller's to free."""
        if prompt in self._running:
            self._running.remove(prompt)
        elif prompt in self._waiting:
            self._waiting.remove(prompt)

    def fits(self, prompt: PromptProgress, more_tokens: int = 0) -> bool:
        """Whether there are blocks for all of a prompt, and for so many tokens behind it, of each sample."""
        samples = prompt.num_samples if more_tokens else 1
        return self._cache.fits_prompt(self._reusable(prompt), prompt.num_tokens + more_tokens, samples)

    def need(self, prompt: PromptProgress, whose: W, more_tokens: int = 0) -> Need[W]:
        """What `fits` asks for, for somebody."""
        samples = prompt.num_samples if more_tokens else 1
        return Need(whose, self._cache.prompt_blocks(prompt.num_tokens + more_tokens, samples), self._reusable(prompt))

    def admit(self, prompt: PromptProgress) -> None:
        """Take the blocks of a prompt that `fits` and is not queued here (any more); it is under way from now on."""
        prompt.tables, num_cached = self._cache.admit_prompt(self._reusable(prompt), prompt.num_tokens, prompt.owner)
        prompt.num_computed_tokens = prompt.num_cached_tokens = num_cached
        self._running.append(prompt)

    def _reusable(self, prompt: PromptProgress) -> Sequence[bytes]:
        """Hashes of the blocks that need not be computed: not of the one with the last token."""
        if prompt.all_computed:
            return ()
        return prompt.hashes[: (prompt.num_tokens - 1) // self._cache.block_size]

    def _take(self, prompt: PromptProgress, budget: int, chunks: list[Chunk]) -> int:
        length = min(budget, prompt.num_tokens - prompt.num_computed_tokens)
        if length > 0:
            chunk = Chunk(prompt, prompt.num_computed_tokens, prompt.num_computed_tokens + length)
            if chunk.end > prompt.tables.num_slots:
                self._cache.extend(prompt.tables, chunk.end)
            chunks.append(chunk)
        return length
