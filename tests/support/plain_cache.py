"""A KV cache of plain numbers, into which steps write as late as they can: what is given away too early is overwritten.

The number of a token stands for all tokens up to it, as its keys and values do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.kv_cache import KVCacheSpec
from workers.kv_cache.prefix_cache import PrefixCache
from workers.kv_cache.tables import NULL_BLOCK

UNWRITTEN = -1


def spec(block_size: int, window: int | None = None, layer: int = 0) -> KVCacheSpec:
    """A cache group of one layer."""
    kind = "full" if window is None else "sliding"
    return KVCacheSpec((layer,), 1, 1, block_size, torch.float32, kind, window)


def numbers_of(token_ids: Sequence[int]) -> list[int]:
    """What each token leaves in the cache."""
    numbers, running = [], 0
    for token in token_ids:
        running = hash((running, token)) % (1 << 60)
        numbers.append(running)
    return numbers


@dataclass(frozen=True)
class PlainRow:
    """One sequence's share of a step that is in flight.

    Attributes:
        numbers: of the sequence, those that the step writes included.
        start: tokens that are in the cache when the step runs.
        tables: for each cache group the block table that the step was launched with.
    """

    numbers: list[int]
    start: int
    tables: list[list[int]]


class PlainCache:
    """One number a slot, for each cache group."""

    def __init__(self, specs: Sequence[KVCacheSpec], num_blocks: Sequence[int]) -> None:
        self.specs = list(specs)
        self.slots = [torch.full((1, n, s.block_size), UNWRITTEN) for s, n in zip(specs, num_blocks, strict=True)]

    def run(self, row: PlainRow, end: int) -> None:
        """A step lands: what it sees of the sequence must be there, and so must all that is in its tables."""
        for group, (spec, table) in enumerate(zip(self.specs, row.tables, strict=True)):
            size = spec.block_size
            for place in range(-(-row.start // size)):
                written = row.numbers[place * size : min((place + 1) * size, row.start)]
                if spec.window is not None and table[place] == NULL_BLOCK:
                    assert (place + 1) * size <= row.start - spec.window + 1, "a query sees a block that is not there"
                    continue
                found = self.slots[group][0, table[place], : len(written)].tolist()
                assert found == written, f"group {group}: block {table[place]} was given away"
            self.put(group, table, row.numbers, row.start, end)

    def put(self, group: int, table: Sequence[int], numbers: Sequence[int], start: int, end: int) -> None:
        """Write the numbers of some tokens."""
        size = self.specs[group].block_size
        for position in range(start, end):
            assert self.specs[group].window is None or table[position // size] != NULL_BLOCK
            self.slots[group][0, table[position // size], position % size] = numbers[position]

    def check(self, group: int, table: Sequence[int], numbers: Sequence[int], first_place: int) -> None:
        """The blocks from a place on hold the sequence's tokens."""
        size = self.specs[group].block_size
        for place in range(first_place, -(-len(numbers) // size)):
            written = list(numbers[place * size : (place + 1) * size])
            assert self.slots[group][0, table[place], : len(written)].tolist() == written

    def scribble(self, pools: Sequence[PrefixCache]) -> None:
        """Others write into all that is free, as a peer does as soon as it is granted to it."""
        for slots, pool in zip(self.slots, pools, strict=True):
            first = slots.shape[1] - pool.num_blocks
            known = pool.used_blocks.union(pool.stored_blocks.values())
            slots[:, [b for b in range(first, slots.shape[1]) if b not in known]] = UNWRITTEN

    def read_blocks(self, blocks: list[int], group: int = 0) -> torch.Tensor:
        return self.slots[group][:, blocks].clone()

    def write_blocks(self, blocks: list[int], data: torch.Tensor, group: int = 0) -> None:
        self.slots[group][:, blocks] = data


def texts(rng: random.Random, longest: int) -> list[int]:
    """Token ids that often begin like others'."""
    length = rng.randint(1, longest)
    family = rng.randrange(3)
    common = rng.choice((0, length // 2, length))
    return [family * 1000 + i for i in range(common)] + [rng.randrange(10**6) for _ in range(length - common)]
