"""Kernels that sort pairs of token and expert by expert, and that cut the sorted pairs into tiles of one expert each.

Of few pairs, as in a decode step, a counting sort with one program for each expert: it counts all ids and finds its
own, and knows from the counts where its tiles are, too. That is a single launch where `torch.sort` and what comes
behind it take ten. Many pairs are sorted by `counting_sort` in two.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from workers.ops.triton.counting_sort import launch_counting_sort
from workers.ops.triton.tile_entries import store_tiles

MAX_READ_PAIRS = 2048
"""Above this every program would read too long, and `counting_sort` has the pairs shared out among programs."""

_BLOCK, _NUM_WARPS = 1024, 4
_TILE_BLOCK = 64
_FEWEST_BINS = 32


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def group_tokens_kernel(
    pairs_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    max_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one expert's pairs, in the order of their numbers, and its tiles; the last: those that are none."""
    expert = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for begin in tl.range(0, num_pairs, BLOCK):
        there = begin + lane < num_pairs
        ids = tl.load(ids_ptr + begin + lane, mask=there, other=0).to(tl.int32)
        counts += tl.histogram(ids, BINS, mask=there)
    first = tl.sum(tl.where(bins < expert, counts, 0), axis=0)
    own_pairs = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    before = tl.sum(tl.where(bins < expert, (counts + ROWS - 1) // ROWS, 0), axis=0)
    tl.store(offsets_ptr + expert, first)
    if expert == NUM_EXPERTS:
        store_tiles(tiles_ptr, before, max_tiles - before, expert, 0, 0, max_tiles, ROWS, TILE_BLOCK)
    else:
        own_tiles = (own_pairs + ROWS - 1) // ROWS
        end = first + own_pairs
        store_tiles(tiles_ptr, before, own_tiles, expert, first, end, max_tiles, ROWS, TILE_BLOCK)
        if own_pairs > 0:
            for begin in tl.range(0, num_pairs, BLOCK):
                ids = tl.load(ids_ptr + begin + lane, mask=begin + lane < num_pairs, other=NUM_EXPERTS)
                own = (ids == expert).to(tl.int32)
                place = first + tl.cumsum(own, axis=0) - own
                tl.store(pairs_ptr + place, begin + lane, mask=own == 1)
                first += tl.sum(own, axis=0)


@triton.jit(do_not_specialize=["max_tiles"])
def tile_map_kernel(
    tiles_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    max_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one expert's tiles; the last program: the tiles that are none."""
    expert = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.arange(0, PADDED_EXPERTS)
    there = index < NUM_EXPERTS
    begins = tl.load(offsets_ptr + index, mask=there, other=0)
    ends = tl.load(offsets_ptr + index + 1, mask=there, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    before = tl.sum(tl.where(index < expert, tiles, 0), axis=0)
    own = tl.sum(tl.where(index == expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(index == expert, begins, 0), axis=0)
    end = tl.sum(tl.where(index == expert, ends, 0), axis=0)
    if expert == NUM_EXPERTS:
        own = max_tiles - before
    store_tiles(tiles_ptr, before, own, expert, begin, end, max_tiles, ROWS, BLOCK)


def most_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """A bound of the tiles of `rows` rows that pairs form, known without counting any."""
    return num_pairs // rows + min(num_pairs, num_experts)


def launch_group_tokens(
    ids: torch.Tensor, num_experts: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pairs` and `offsets` of `workers.layers.moe.token_groups.TokenGroups` for (T, k) ids, and its tiles of `rows`.

    The tiles are as of `launch_tile_map`.
    """
    flat = ids.reshape(-1)
    num_pairs = flat.shape[0]
    max_tiles = most_tiles(num_pairs, num_experts, rows)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(3, max_tiles, dtype=torch.int32, device=ids.device)
    if num_pairs > MAX_READ_PAIRS:
        launch_counting_sort(pairs, offsets, tiles, flat, rows)
        return pairs, offsets, tiles
    with on_device(ids):
        group_tokens_kernel[(num_experts + 1,)](
            pairs,
            offsets,
            tiles,
            flat,
            num_pairs,
            max_tiles,
            NUM_EXPERTS=num_experts,
            BINS=max(_FEWEST_BINS, triton.next_power_of_2(num_experts)),
            ROWS=rows,
            TILE_BLOCK=_TILE_BLOCK,
            BLOCK=min(_BLOCK, max(128, triton.next_power_of_2(num_pairs))),
            num_warps=_NUM_WARPS,
            **dependent_launch(ids.device, num_experts + 1),
        )
    return pairs, offsets, tiles


def launch_tile_map(offsets: torch.Tensor, num_pairs: int, rows: int) -> torch.Tensor:
    """The tiles that the groups of `num_pairs` sorted pairs form, each of at most `rows` rows of one expert.

    Args:
        offsets: (E + 1,) int32 of the groups.
        num_pairs: N.
        rows: of a tile.

    Returns:
        (3, `most_tiles`) int32: each tile's expert (E: there is no such tile), its first row, and where its expert's
        rows end.
    """
    num_experts = offsets.shape[0] - 1
    max_tiles = most_tiles(num_pairs, num_experts, rows)
    tiles = torch.empty(3, max_tiles, dtype=torch.int32, device=offsets.device)
    with on_device(offsets):
        tile_map_kernel[(num_experts + 1,)](
            tiles,
            offsets,
            max_tiles,
            NUM_EXPERTS=num_experts,
            PADDED_EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=rows,
            BLOCK=_TILE_BLOCK,
            num_warps=1,
            **dependent_launch(offsets.device, num_experts + 1),
        )
    return tiles
