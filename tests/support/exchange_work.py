"""What tests have ranks do that complete each other's caches: in a module that other processes can import."""

from __future__ import annotations

import torch

from workers.handoff.share_exchange import ShareExchange
from workers.parallel.group import TensorParallelGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
_LAYERS, _NUM_BLOCKS = (5, 3), 9


def whole_caches(group: int, neighbourhood: int) -> list[torch.Tensor]:
    """What neighbouring ranks keep alike, in each dtype, as bytes of numbers: (layers, blocks, heads, slots, size).

    Heads before slots in their indices, and the other way round in memory, as some backends have it.
    """
    shape = (_LAYERS[group], _NUM_BLOCKS, 4, 2, 6)
    numbers = torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(10 * group + neighbourhood))
    return [_as_bytes(numbers.float().to(dtype).transpose(2, 3)) for dtype in DTYPES]


def complete_caches(group: TensorParallelGroup, copies: tuple[int, ...], blocks: list[int]) -> list[list[torch.Tensor]]:
    """By cache group and dtype: a cache that had the rank's share alone, zero besides, after `complete`."""
    done: list[list[torch.Tensor]] = [[], []]
    for i, dtype in enumerate(DTYPES):
        caches = []
        for index, count in enumerate(copies):
            whole = whole_caches(index, group.rank // count)[i]
            stored = torch.zeros(whole.transpose(2, 3).shape, dtype=whole.dtype).transpose(2, 3)
            share = slice(group.rank % count, None, count)
            stored[share] = whole[share]
            caches.append(stored.view(dtype) if dtype.itemsize == 1 else stored)
        exchange = ShareExchange(caches, copies, group, workspace_bytes=1500)  # of few blocks at once
        for index in range(len(copies)):
            exchange.complete(index, [])
            exchange.complete(index, blocks)
        assert exchange.written is None
        for index, cache in enumerate(caches):
            done[index].append(_as_bytes(cache))
    return done


def _as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes, which can be compared and indexed; anything else as it is."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
