"""Block tables for batches that are only there to be timed, over whatever blocks there are."""

from __future__ import annotations

from collections.abc import Sequence

from attention.kv_cache import KVCacheSpec
from workers.kv_cache.block_pool import blocks_for


def most_measured_tokens(groups: Sequence[KVCacheSpec], num_blocks: Sequence[int]) -> int | None:
    """The most tokens that sequences of a batch can have together in blocks that no two share; None: any number.

    Where a window is all that is kept, blocks repeat behind it.
    """
    whole = [count * spec.block_size for spec, count in zip(groups, num_blocks, strict=True) if spec.window is None]
    return min(whole, default=None)


def measured_tables(
    groups: Sequence[KVCacheSpec], num_blocks: Sequence[int], num_tokens: int, index: int = 0
) -> list[list[int]]:
    """For each cache group the table of a sequence of so many tokens, the batch's number `index`.

    Args:
        groups: of the cache.
        num_blocks: of each group's tensor. Block 0 of a sliding group is left alone: it is to stay zero.
        num_tokens: of each sequence of the batch.
        index: of the sequence, which says where its blocks begin.
    """
    tables = []
    for spec, count in zip(groups, num_blocks, strict=True):
        length, first = blocks_for(num_tokens, spec.block_size), int(spec.window is not None)
        usable = max(1, count - first)
        tables.append([first + (index * length + i) % usable for i in range(length)])
    return tables
