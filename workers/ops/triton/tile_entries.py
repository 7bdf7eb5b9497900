"""How kernels enter tiles of sorted pairs into a list of them."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_tiles(
    tiles_ptr: tl.tensor,
    before: tl.tensor,
    count: tl.tensor,
    expert: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    max_tiles: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Enter `count` tiles of an expert behind the `before` first: its number, their first rows, one past its last."""
    for first in tl.range(0, count, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        mask = tile < count
        places = tiles_ptr + before + tile
        tl.store(places, tl.zeros([BLOCK], tl.int32) + expert, mask=mask)
        tl.store(places + max_tiles, begin + tile * ROWS, mask=mask)
        tl.store(places + 2 * max_tiles, tl.zeros([BLOCK], tl.int32) + end, mask=mask)
