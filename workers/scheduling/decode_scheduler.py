"""The running batch of a decode worker: who decodes in a step, who grows, who makes room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.tables import SequenceTables
from workers.scheduling.lost_room import Need
from workers.scheduling.sequence import Sequence


class BlockStore(Protocol):
    """Reads and writes the contents of blocks."""

    def read_blocks(self, blocks: list[int], group: int = 0) -> torch.Tensor:
        """Copy blocks of a cache group to host memory: (layers, len(blocks), ...)."""
        ...

    def write_blocks(self, blocks: list[int], data: torch.Tensor, group: int = 0) -> None:
        """Copy them back, into other blocks."""
        ...

    def copy_blocks(self, sources: list[int], targets: list[int], group: int = 0) -> None:
        """Copy blocks of a cache group into others."""
        ...


class DecodeBatch:
    """The sequences that decode together, oldest first.

    A step is launched, and lands later; steps may be launched in between. What a step in flight may still write to
    stays where it is: blocks of a sequence that ends meanwhile are free when its last step has landed, and nobody is
    preempted while any step is in flight.

    Args:
        cache: the worker's.
        store: moves blocks to and from host memory.
        max_num_seqs: sequences that may run at once.
    """

    def __init__(self, cache: KVCacheManager, store: BlockStore, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self._cache = cache
        self._store = store
        self._running: list[Sequence] = []
        self._preempted: list[Sequence] = []
        self._newly_preempted: list[Sequence] = []
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

    def take_preempted(self) -> list[Sequence]:
        """The sequences that have made room since the last call."""
        preempted, self._newly_preempted = self._newly_preempted, []
        return preempted

    def add(self, sequence: Sequence) -> None:
        """A sequence whose cache is complete joins."""
        self._running.append(sequence)

    def add_waiting(self, sequence: Sequence) -> None:
        """One for whose blocks there is no room joins with its cache in host memory, as if it had made room."""
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.received)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends; its blocks are free at once, or when its steps in flight have landed."""
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.in_flight:
                self._leaving.add(sequence)
            else:
                self._cache.release(sequence.tables)
        else:
            self._preempted.remove(sequence)
            sequence.host_copy = None

    @property
    def lacks_blocks(self) -> bool:
        """Whether `schedule` would have to preempt somebody."""
        growing = [
            (sequence.tables, sequence.num_scheduled)
            for sequence in self._running
            if sequence.num_scheduled > sequence.tables.num_slots and not sequence.ends_in_flight
        ]
        return bool(growing) and not self._cache.can_extend(growing)

    def schedule(self) -> list[Sequence]:
        """Everybody who runs this step, each with a block for its next token; the newest make room if they must.

        Raises:
            RuntimeError: somebody has to make room, and steps are in flight.
        """
        ready: list[Sequence] = []
        pending = [sequence for sequence in self._running if not sequence.ends_in_flight]
        while pending:
            sequence = pending.pop(0)
            if sequence.num_scheduled > sequence.tables.num_slots:
                wanted = [(sequence.tables, sequence.num_scheduled)]
                while not (room := self._cache.can_extend(wanted)) and pending:
                    self._preempt(pending.pop())
                if not room:
                    self._preempt(sequence)
                    continue
                self._cache.extend(sequence.tables, sequence.num_scheduled)
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
            self._cache.release(sequence.tables)
        return False

    @property
    def can_resume(self) -> bool:
        """Whether there is room for the oldest preempted sequence and its next token."""
        if not self._preempted or len(self._running) >= self.max_num_seqs:
            return False
        oldest = self._preempted[0]
        return self._cache.fits(oldest.hashes, oldest.num_tokens - 1, oldest.num_tokens)

    def needs(self) -> Iterator[Need[Sequence]]:
        """What those wait for who have made room, oldest first."""
        for sequence in self._preempted:
            num_tokens = sequence.num_tokens
            yield Need(sequence, self._cache.blocks_behind(num_tokens - 1, num_tokens), sequence.hashes)

    def resume_preempted(self) -> None:
        """Bring sequences back, oldest first, while there is room: from host memory what is not here any more."""
        while self.can_resume:
            sequence = self._preempted.pop(0)
            copies, sequence.host_copy = sequence.host_copy, None
            if copies is None:
                raise RuntimeError(f"{sequence.request.log_name} was preempted without a copy of its cache")
            num_tokens = sequence.num_tokens
            owner = sequence.request.cache_owner
            sequence.tables, found = self._cache.admit(sequence.hashes, num_tokens - 1, num_tokens, owner)
            for group, (table, data, here) in enumerate(zip(sequence.tables.groups, copies, found, strict=True)):
                if here < data.shape[1]:
                    self._store.write_blocks(table.held[here : data.shape[1]], data[:, here:], group)
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.received)

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.in_flight or self._leaving:
            raise RuntimeError(f"{sequence.request.log_name} has to make room while a step is in flight")
        tables = sequence.tables
        self._cache.land(tables, sequence.num_tokens - 1)
        sequence.host_copy = [self._store.read_blocks(table.held, i) for i, table in enumerate(tables.groups)]
        self._cache.release(tables)
        sequence.tables = SequenceTables()
        self._running.remove(sequence)
        self._newly_preempted.append(sequence)
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.received)
