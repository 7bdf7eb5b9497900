"""Kernels that sort pairs of token and expert by expert, and that cut the sorted pairs into tiles of one expert each.

A counting sort with one program for each expert: it reads all ids and finds its own. That is a single launch where
`torch.sort` and what comes behind it take ten, and made for the few pairs of a decode step.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device

MAX_SORTED_PAIRS = 8192
"""Above this every program would read too long."""

_BLOCK, _NUM_WARPS = 1024, 4


@triton.jit(do_not_specialize=["num_pairs"])
def group_tokens_kernel(
    pairs_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: one expert's pairs, in the order of their numbers."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    smaller = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, num_pairs, BLOCK):
        ids = tl.load(ids_ptr + begin + lane, mask=begin + lane < num_pairs, other=NUM_EXPERTS)
        smaller += (ids < expert).to(tl.int32)
    first = tl.sum(smaller, axis=0)
    tl.store(offsets_ptr + expert, first)
    for begin in tl.range(0, num_pairs, BLOCK):
        ids = tl.load(ids_ptr + begin + lane, mask=begin + lane < num_pairs, other=NUM_EXPERTS)
        own = (ids == expert).to(tl.int32)
        place = first + tl.cumsum(own, axis=0) - own
        tl.store(pairs_ptr + place, begin + lane, mask=own == 1)
        first += tl.sum(own, axis=0)
    if expert == NUM_EXPERTS - 1:
        tl.store(offsets_ptr + NUM_EXPERTS, first)


@triton.jit
def tile_map_kernel(
    experts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    max_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: one expert's tiles, each its expert and its first row; the last program: the tiles that are none."""
    expert = tl.program_id(0)
    index = tl.arange(0, PADDED_EXPERTS)
    there = index < NUM_EXPERTS
    begins = tl.load(offsets_ptr + index, mask=there, other=0)
    ends = tl.load(offsets_ptr + index + 1, mask=there, other=0)
    tiles = (ends - begins + ROWS - 1) // ROWS
    before = tl.sum(tl.where(index < expert, tiles, 0), axis=0)
    own = tl.sum(tl.where(index == expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(index == expert, begins, 0), axis=0)
    if expert == NUM_EXPERTS:
        own = max_tiles - before
    for first in tl.range(0, own, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        mask = tile < own
        tl.store(experts_ptr + before + tile, tl.zeros([BLOCK], tl.int32) + expert, mask=mask)
        tl.store(rows_ptr + before + tile, begin + tile * ROWS, mask=mask)


def launch_group_tokens(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`pairs` and `offsets` of `workers.layers.moe.token_groups.TokenGroups` for (T, k) ids."""
    flat = ids.reshape(-1)
    pairs = torch.empty(flat.shape, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    with on_device(ids):
        group_tokens_kernel[(num_experts,)](
            pairs, offsets, flat, flat.shape[0], NUM_EXPERTS=num_experts, BLOCK=_BLOCK, num_warps=_NUM_WARPS
        )
    return pairs, offsets


def most_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """A bound of the tiles of `rows` rows that pairs form, known without counting any."""
    return num_pairs // rows + min(num_pairs, num_experts)


def launch_tile_map(offsets: torch.Tensor, num_pairs: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles that the groups of `num_pairs` sorted pairs form, each of at most `rows` rows of one expert.

    Args:
        offsets: (E + 1,) int32 of the groups.
        num_pairs: N.
        rows: of a tile.

    Returns:
        Two (`most_tiles`,) int32: each tile's expert (E: there is no such tile) and its first row.
    """
    num_experts = offsets.shape[0] - 1
    size = most_tiles(num_pairs, num_experts, rows)
    experts = torch.empty(size, dtype=torch.int32, device=offsets.device)
    first_rows = torch.empty(size, dtype=torch.int32, device=offsets.device)
    with on_device(offsets):
        tile_map_kernel[(num_experts + 1,)](
            experts,
            first_rows,
            offsets,
            size,
            NUM_EXPERTS=num_experts,
            PADDED_EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=rows,
            BLOCK=64,
            num_warps=1,
        )
    return experts, first_rows
