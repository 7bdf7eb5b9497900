"""One worker as the gateway knows it: what it is, and what it has to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cluster.routing.output_lengths import HORIZONS, likely_peak
from workers.kv_cache.block_pool import blocks_for
from workers.runner.step_times import StepTimes

_EXPECTED_AT = 1
"""Of the outlook the span that begins after 16 steps and ends after 32: the middle of the router's look-ahead."""


@dataclass(frozen=True)
class WorkerTraits:
    """What does not change while a worker lives.

    Attributes:
        engine_id: its name.
        max_model_len: context window, tokens.
        block_size: tokens in a KV block.
        total_blocks: of its cache.
        max_num_seqs: sequences that it takes at once.
        step_times: measured costs.
        kv_token_bytes: of the KV cache of a token, in all layers and ranks.
        num_layers: that have a cache.
        chunk_tokens: of prompts, that it computes in one step.
        blocks_per_sequence: the most blocks that a sequence holds at once, where what lies behind a window is given
            back; None: it holds those of all its tokens.
        kind: workers of one kind should measure alike.
    """

    engine_id: str
    max_model_len: int
    block_size: int
    total_blocks: int
    max_num_seqs: int
    step_times: StepTimes = field(default_factory=StepTimes)
    kv_token_bytes: float = 0.0
    num_layers: int = 1
    chunk_tokens: int = 2048
    blocks_per_sequence: int | None = None
    kind: str = ""

    @property
    def tokens_per_sequence(self) -> float:
        """The most tokens whose blocks a sequence holds at once."""
        return math.inf if self.blocks_per_sequence is None else self.blocks_per_sequence * self.block_size


class WorkerState:
    """What changes with every request; plain numbers.

    Attributes:
        traits: of the worker.
        ready: whether it takes requests.
        usable_blocks: those in quarantine left out.
        free_blocks: of its cache.
        running: requests.
        queued_s: predicted seconds of the prompts that it has to compute first.
        short_step_s: predicted seconds of a decode step with one sequence more, all of them short.
        future: (2, spans): mean and variance of the tokens that its requests will hold, see `output_lengths`.
        peak_tokens: the most that they are likely to hold at once.
    """

    __slots__ = (
        "free_blocks",
        "future",
        "peak_tokens",
        "queued_s",
        "ready",
        "running",
        "short_step_s",
        "traits",
        "usable_blocks",
    )

    def __init__(self, traits: WorkerTraits, ready: bool) -> None:
        self.traits, self.ready = traits, ready
        self.usable_blocks = self.free_blocks = traits.total_blocks
        self.running, self.queued_s = 0, 0.0
        self.short_step_s = traits.step_times.decode_seconds(1)
        self.future: npt.NDArray[np.float64] = np.zeros((2, len(HORIZONS)))
        self.peak_tokens = 0.0

    @property
    def free_slots(self) -> int:
        """Sequences that it takes besides."""
        return self.traits.max_num_seqs - self.running

    @property
    def capacity_tokens(self) -> int:
        """That its cache holds now."""
        return self.usable_blocks * self.traits.block_size

    @property
    def most_tokens(self) -> int:
        """The longest prompt with its first token that it could take if it were idle and ready."""
        return self._tokens_in(self.traits.total_blocks)

    @property
    def room_tokens(self) -> int:
        """The longest prompt with its first token for which there is room in its cache and its batch now."""
        if not self.ready or self.free_slots < 1:
            return 0
        return self._tokens_in(self.free_blocks)

    @property
    def growth_tokens(self) -> float:
        """What a newcomer may hold at its peak. If there is nothing to do, anything: waiting would not make it less.

        Unless blocks are in quarantine: then it would have to go elsewhere in the end, or wait here for these. Where
        there is room for the most that any sequence holds at once, anything, too.
        """
        whole = not self.running and self.usable_blocks == self.traits.total_blocks
        room = math.inf if whole else self.capacity_tokens - self.peak_tokens
        return room if room < self.traits.tokens_per_sequence else math.inf

    @property
    def step_s(self) -> float:
        """Predicted seconds of a decode step with one sequence more, which has no tokens in the cache.

        By the number of sequences and by the tokens in the cache that the step reads: those that the worker's requests
        are expected to hold in the middle of the look-ahead, with those that will have ended by then left out.
        """
        return self.short_step_s + self.traits.step_times.kv_token_s * float(self.future[0, _EXPECTED_AT])

    def blocks(self, num_tokens: int, num_samples: int = 1, shared_tokens: int = 0) -> int:
        """KV blocks that sequences of so many tokens and the next one hold.

        Args:
            num_tokens: of each.
            num_samples: sequences.
            shared_tokens: of their prompt, whose full blocks they share.
        """
        blocks, most = blocks_for(num_tokens + 1, self.traits.block_size), self.traits.blocks_per_sequence
        if most is not None:
            return min(blocks, most) * num_samples  # by and by no two of them hold the same
        shared = shared_tokens // self.traits.block_size
        return shared + (blocks - shared) * num_samples

    def blocks_to_begin(self, num_tokens: int, num_samples: int = 1) -> int:
        """KV blocks that it takes to begin with so many samples of a prompt: each has one of its own."""
        return self.blocks(num_tokens) + num_samples - 1

    def could_run(self, num_tokens: int, num_samples: int) -> bool:
        """Whether it could run so many samples of a prompt if it were idle and ready."""
        return (
            num_samples <= self.traits.max_num_seqs
            and num_tokens < self.most_tokens
            and self.blocks_to_begin(num_tokens, num_samples) <= self.traits.total_blocks
        )

    def has_room(self, num_tokens: int, num_samples: int) -> bool:
        """Whether it could begin with so many samples of a prompt now."""
        return (
            num_samples <= self.free_slots
            and num_tokens < self.room_tokens
            and self.blocks_to_begin(num_tokens, num_samples) <= self.free_blocks
        )

    def _tokens_in(self, blocks: int) -> int:
        """The longest sequence that so many blocks suffice for."""
        most, longest = self.traits.blocks_per_sequence, self.traits.max_model_len
        return longest if most is not None and blocks >= most else min(longest, blocks * self.traits.block_size)

    def measure(self, step_times: StepTimes) -> None:
        """Its steps take so long from now on."""
        self.traits = replace(self.traits, step_times=step_times)
        self.short_step_s = step_times.decode_seconds(self.running + 1)

    def take(self, blocks: int, requests: int, queued_s: float, future: npt.NDArray[np.float64] | None) -> None:
        """It has so much more to do; with negative figures, less."""
        self.free_blocks -= blocks
        if queued_s:
            self.queued_s = max(0.0, self.queued_s + queued_s)
        if requests:
            self.running += requests
            self.short_step_s = self.traits.step_times.decode_seconds(self.running + 1)
        if future is not None:
            self.future += future
            self.peak_tokens = likely_peak(self.future)

    def quarantine(self, blocks: int) -> None:
        """So many blocks more cannot be used at present; with a negative figure, fewer."""
        self.usable_blocks -= blocks
        self.free_blocks -= blocks
