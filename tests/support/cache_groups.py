"""KV caches for a model's cache groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attention.kv_cache import KVCacheSpec
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sizing import allocate_groups
from workers.kv_cache.tables import BlockTable, SequenceTables
from workers.models.causal_lm import CausalLM


def group_caches(
    model: CausalLM, num_blocks: int | Sequence[int], device: torch.device | str | None = None
) -> list[torch.Tensor]:
    """A zeroed cache for each group: of so many blocks, and one more where a group has a window, for its null block."""
    return allocate_groups(model.kv_cache_groups, num_blocks, device or model.device)


def unwritten_caches(model: CausalLM, num_blocks: int | Sequence[int], value: float = math.nan) -> list[torch.Tensor]:
    """The same of NaN: a block that was never written must never matter. A null block is zero, as in all caches."""
    caches = group_caches(model, num_blocks)
    for cache, spec in zip(caches, model.kv_cache_groups, strict=True):
        cache[:, int(spec.window is not None) :].fill_(value)
    return caches


class ListedTables:
    """The tables of a sequence over a list of blocks that a test keeps and lets grow, the same in every cache group."""

    def __init__(self) -> None:
        self._tables = SequenceTables()

    def over(self, blocks: list[int], block_size: int, num_groups: int = 1) -> SequenceTables:
        """The same tables as long as it is the very same list."""
        if not self._tables.groups or self._tables.groups[0].blocks is not blocks:
            self._tables = SequenceTables([BlockTable(blocks) for _ in range(num_groups)])
        self._tables.num_slots = len(blocks) * block_size
        return self._tables


def whole_cache(num_blocks: int, block_size: int) -> KVCacheManager:
    """A cache of one group that keeps all tokens."""
    return KVCacheManager([KVCacheSpec((0,), 1, 1, block_size, torch.float32)], [num_blocks])
