"""Ranks give each other what each was sent its share of: by real collectives, in several forms of cache."""

from __future__ import annotations

import pytest
import torch

from exchange_work import DTYPES, complete_caches, whole_caches
from ranks import run_ranks

BLOCKS = [3, 0, 7, 8, 5]


@pytest.mark.parametrize(("size", "copies"), [(2, (2, 1)), (4, (4, 2))])
def test_every_rank_has_every_layer_of_these_blocks_and_no_other(size: int, copies: tuple[int, int]) -> None:
    for rank, caches in enumerate(run_ranks(size, complete_caches, copies, BLOCKS)):
        for group, (count, found) in enumerate(zip(copies, caches, strict=True)):
            for dtype, cache in zip(DTYPES, found, strict=True):
                whole = whole_caches(group, rank // count)[DTYPES.index(dtype)]
                own = range(rank % count, len(whole), count)
                for layer in range(len(whole)):
                    others = [block for block in range(whole.shape[1]) if block not in BLOCKS]
                    assert torch.equal(cache[layer][BLOCKS], whole[layer][BLOCKS]), (dtype, layer)
                    kept = whole[layer] if layer in own else torch.zeros_like(whole[layer])
                    assert torch.equal(cache[layer][others], kept[others]), (dtype, layer)
