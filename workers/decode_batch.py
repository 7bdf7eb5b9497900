"""The running batch of a decode worker: who decodes in a step, who grows, who makes room."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from kv_transfer.messages import HandoffKey
from workers.block_manager import BlockManager, blocks_for
from workers.messages import DecodeRequest
from workers.sampling.state import SamplingState


class BlockStore(Protocol):
    """Reads and writes the contents of blocks."""

    block_size: int

    def read_blocks(self, blocks: list[int]) -> torch.Tensor:
        """Copy blocks to host memory."""
        ...

    def write_blocks(self, blocks: list[int], data: torch.Tensor) -> None:
        """Copy them back, into other blocks."""
        ...


@dataclass(eq=False)
class Sequence:
    """One request on a decode worker.

    Attributes:
        request: what was asked.
        state: its tokens, as the sampler sees them.
        deadline: monotonic time.
        key: of its handoff, once blocks are reserved.
        blocks: its block table; empty while preempted.
        received: when its KV cache was complete, monotonic time.
        host_copy: its cache while preempted.
    """

    request: DecodeRequest
    state: SamplingState
    deadline: float
    key: HandoffKey | None = None
    blocks: list[int] = field(default_factory=list)
    received: float = 0.0
    host_copy: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens; all but the last are in the cache."""
        return len(self.request.prompt_token_ids) + len(self.state.output_token_ids)


class DecodeBatch:
    """The sequences that decode together, oldest first.

    Args:
        blocks: of the worker's cache.
        store: moves blocks to and from host memory.
        max_num_seqs: sequences that may run at once.
    """

    def __init__(self, blocks: BlockManager, store: BlockStore, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._blocks = blocks
        self._store = store
        self._running: list[Sequence] = []
        self._preempted: list[Sequence] = []

    @property
    def size(self) -> int:
        """Sequences running."""
        return len(self._running)

    @property
    def num_preempted(self) -> int:
        """Sequences in host memory."""
        return len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        """A sequence whose cache is complete joins."""
        self._running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends; its blocks are free at once."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._blocks.free(sequence.blocks)
        else:
            self._preempted.remove(sequence)
            sequence.host_copy = None

    def schedule(self) -> list[Sequence]:
        """Everybody who runs this step, each with a block for its next token; the newest make room if they must."""
        ready: list[Sequence] = []
        pending = list(self._running)
        while pending:
            sequence = pending.pop(0)
            missing = blocks_for(sequence.num_tokens, self._store.block_size) - len(sequence.blocks)
            while missing > self._blocks.num_free and pending:
                self._preempt(pending.pop())
            if missing > self._blocks.num_free:
                self._preempt(sequence)
            else:
                sequence.blocks += self._blocks.allocate(missing)
                ready.append(sequence)
        return ready

    @property
    def can_resume(self) -> bool:
        """Whether there is room for the oldest preempted sequence and its next token."""
        if not self._preempted or len(self._running) >= self.max_num_seqs:
            return False
        return blocks_for(self._preempted[0].num_tokens, self._store.block_size) <= self._blocks.num_free

    def resume_preempted(self) -> None:
        """Bring sequences back from host memory, oldest first, while there is room."""
        while self.can_resume:
            sequence = self._preempted.pop(0)
            data, sequence.host_copy = sequence.host_copy, None
            if data is None:
                raise RuntimeError(f"{sequence.request.request_id} was preempted without a copy of its cache")
            sequence.blocks = self._blocks.allocate(blocks_for(sequence.num_tokens, self._store.block_size))
            self._store.write_blocks(sequence.blocks[: data.shape[1]], data)
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.received)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.host_copy = self._store.read_blocks(sequence.blocks)
        self._blocks.free(sequence.blocks)
        sequence.blocks = []
        self._running.remove(sequence)
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.received)
