"""The running batch of a decode worker: who decodes in a step, who grows, who makes room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.prefix_cache import PrefixCache
from workers.scheduling.sequence import Sequence


class BlockStore(Protocol):
    """Reads and writes the contents of blocks."""

    block_size: int

    def read_blocks(self, blocks: list[int]) -> torch.Tensor:
        """Copy blocks to host memory."""
        ...

    def write_blocks(self, blocks: list[int], data: torch.Tensor) -> None:
        """Copy them back, into other blocks."""
        ...


class DecodeBatch:
    """The sequences that decode together, oldest first.

    A step is launched, and lands later; steps may be launched in between. What a step in flight may still write to
    stays where it is: blocks of a sequence that ends meanwhile are free when its last step has landed, and nobody is
    preempted while any step is in flight.

    Args:
        blocks: of the worker's cache.
        store: moves blocks to and from host memory.
        max_num_seqs: sequences that may run at once.
    """

    def __init__(self, blocks: PrefixCache, store: BlockStore, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._blocks = blocks
        self._store = store
        self._running: list[Sequence] = []
        self._preempted: list[Sequence] = []
        self._leaving: set[Sequence] = set()

    @property
    def size(self) -> int:
        """Sequences running."""
        return len(self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that run, oldest first."""
        return tuple(self._running)

    @property
    def num_preempted(self) -> int:
        """Sequences in host memory."""
        return len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        """A sequence whose cache is complete joins."""
        self._running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends; its blocks are free at once, or when its steps in flight have landed."""
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.in_flight:
                self._leaving.add(sequence)
            else:
                self._blocks.release(sequence.blocks)
        else:
            self._preempted.remove(sequence)
            sequence.host_copy = None

    @property
    def lacks_blocks(self) -> bool:
        """Whether `schedule` would have to preempt somebody."""
        missing = sum(self._missing(sequence) for sequence in self._running if not sequence.ends_in_flight)
        return missing > self._blocks.num_free

    def schedule(self) -> list[Sequence]:
        """Everybody who runs this step, each with a block for its next token; the newest make room if they must.

        Raises:
            RuntimeError: somebody has to make room, and steps are in flight.
        """
        ready: list[Sequence] = []
        pending = [sequence for sequence in self._running if not sequence.ends_in_flight]
        while pending:
            sequence = pending.pop(0)
            missing = self._missing(sequence)
            while missing > self._blocks.num_free and pending:
                self._preempt(pending.pop())
            if missing > self._blocks.num_free:
                self._preempt(sequence)
            else:
                sequence.blocks += self._blocks.allocate((), missing)[0]
                ready.append(sequence)
        return ready

    def launched(self, batch: Iterable[Sequence]) -> None:
        """A step is under way for these."""
        for sequence in batch:
            sequence.in_flight += 1

    def landed(self, sequence: Sequence) -> bool:
        """A step is done for this one; whether its token is still wanted."""
        sequence.in_flight -= 1
        if sequence not in self._leaving:
            return True
        if sequence.in_flight == 0:
            self._leaving.remove(sequence)
            self._blocks.release(sequence.blocks)
        return False

    @property
    def can_resume(self) -> bool:
        """Whether there is room for the oldest preempted sequence and its next token."""
        if not self._preempted or len(self._running) >= self.max_num_seqs:
            return False
        oldest = self._preempted[0]
        return self._blocks.fits(oldest.hashes, blocks_for(oldest.num_tokens, self._store.block_size))

    def resume_preempted(self) -> None:
        """Bring sequences back, oldest first, while there is room: from host memory what is not here any more."""
        while self.can_resume:
            sequence = self._preempted.pop(0)
            data, sequence.host_copy = sequence.host_copy, None
            if data is None:
                raise RuntimeError(f"{sequence.request.log_name} was preempted without a copy of its cache")
            count = blocks_for(sequence.num_tokens, self._store.block_size)
            sequence.blocks, num_found = self._blocks.allocate(sequence.hashes, count)
            if num_found < data.shape[1]:
                self._store.write_blocks(sequence.blocks[num_found : data.shape[1]], data[:, num_found:])
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.received)

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that it lacks for its next token."""
        return blocks_for(sequence.num_scheduled, self._store.block_size) - len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.in_flight or self._leaving:
            raise RuntimeError(f"{sequence.request.log_name} has to make room while a step is in flight")
        sequence.host_copy = self._store.read_blocks(sequence.blocks)
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        self._running.remove(sequence)
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.received)
