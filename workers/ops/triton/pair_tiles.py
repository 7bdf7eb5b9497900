"""Which tile of sorted pairs a program of a grouped product has, and which rows it reads and writes."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_and_output(
    index: tl.tensor, num_tiles: tl.tensor, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, BUNDLE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The tile and the first output of the n-th block of a result that is `COLUMNS` blocks wide.

    `BUNDLE` tiles share their blocks of outputs in time, so that the weights of an expert with several tiles are read
    from the L2 cache.
    """
    bundle = index // (BUNDLE * COLUMNS)
    in_bundle = index % (BUNDLE * COLUMNS)
    size = tl.minimum(num_tiles - bundle * BUNDLE, BUNDLE)
    return bundle * BUNDLE + in_bundle % size, in_bundle // size * OUTPUTS


@triton.jit
def pair_rows(
    tile: tl.tensor,
    num_tiles: tl.tensor,
    tiles_ptr: tl.tensor,
    pairs_ptr: tl.tensor | None,
    ROWS: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SPREAD: tl.constexpr,
    ALONE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each row of a tile, (ROWS,): where it is read, where its result goes, and whether there is such a pair.

    `ALONE`: every pair is a tile, and none is sorted. Else `tiles_ptr` is as `tile_entries.store_tiles` fills it.
    """
    if ALONE:
        row = tile + tl.arange(0, ROWS)
        there = tl.arange(0, ROWS) < 1
    else:
        row = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, ROWS)
        there = row < tl.load(tiles_ptr + 2 * num_tiles + tile)
    source = row
    destination = row
    if ALONE:
        source = row // PAIRS_PER_ROW
    else:
        if PAIRS_PER_ROW > 0:
            source = tl.load(pairs_ptr + row, mask=there, other=0) // PAIRS_PER_ROW
        if SPREAD:
            destination = tl.load(pairs_ptr + row, mask=there, other=0)
    return source, destination, there
