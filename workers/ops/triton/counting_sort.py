"""Kernels of a stable counting sort of pairs by expert, for more of them than one program reads.

The pairs are cut into runs, one for each program. The first kernel counts each run's pairs by expert; the second knows
from all counts where a run's pairs of an expert begin, sorts the run block by block and writes them there. Nothing is
added atomically: the result is the same every time, and of one expert in the order of the pairs' numbers.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from workers.ops.triton.tile_entries import store_tiles

_BLOCK, _MOST_RUNS, _ROWS_OF_COUNTS = 1024, 256, 32
_TILE_BLOCK = 64
_FEWEST_BINS = 32


@triton.jit(do_not_specialize=["num_pairs", "blocks_per_run"])
def count_runs_kernel(
    counts_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    blocks_per_run: tl.tensor,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: how many pairs of its run each expert has."""
    run = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for step in tl.range(0, blocks_per_run):
        pair = (run * blocks_per_run + step) * BLOCK + lane
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=0).to(tl.int32)
        counts += tl.histogram(ids, BINS, mask=pair < num_pairs)
    tl.store(counts_ptr + run * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_pairs", "num_runs", "blocks_per_run", "max_tiles"])
def place_runs_kernel(
    pairs_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    num_runs: tl.tensor,
    blocks_per_run: tl.tensor,
    max_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: a run's pairs; behind the runs: an expert's offset and tiles; the last: tiles that are none."""
    run = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bins = tl.arange(0, BINS)
    totals = tl.zeros([BINS], tl.int32)
    earlier = tl.zeros([BINS], tl.int32)
    for begin in tl.range(0, num_runs, COUNT_ROWS):
        row = begin + tl.arange(0, COUNT_ROWS)
        counts = tl.load(counts_ptr + row[:, None] * BINS + bins[None, :], mask=(row < num_runs)[:, None], other=0)
        totals += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where((row < run)[:, None], counts, 0), axis=0)
    if run < num_runs:
        lane = tl.arange(0, BLOCK)
        base = tl.cumsum(totals, axis=0) - totals + earlier
        for step in tl.range(0, blocks_per_run):
            first = (run * blocks_per_run + step) * BLOCK
            there = first + lane < num_pairs
            ids = tl.load(ids_ptr + first + lane, mask=there, other=NUM_EXPERTS).to(tl.int32)
            own = tl.histogram(ids, BINS, mask=there)
            # No two keys are the same, so that any sort of them is a stable one of the experts.
            keys = tl.sort(ids * BLOCK + lane)
            shift = base - (tl.cumsum(own, axis=0) - own)
            place = lane + tl.gather(shift, tl.minimum(keys // BLOCK, BINS - 1), 0)
            tl.store(pairs_ptr + place, first + keys % BLOCK, mask=there)
            base += own
    else:
        expert = run - num_runs
        offset = tl.sum(tl.where(bins < expert, totals, 0), axis=0)
        before = tl.sum(tl.where(bins < expert, (totals + ROWS - 1) // ROWS, 0), axis=0)
        tl.store(offsets_ptr + expert, offset)
        if expert == NUM_EXPERTS:
            store_tiles(tiles_ptr, before, max_tiles - before, expert, 0, 0, max_tiles, ROWS, TILE_BLOCK)
        else:
            pairs = tl.sum(tl.where(bins == expert, totals, 0), axis=0)
            tiles = (pairs + ROWS - 1) // ROWS
            store_tiles(tiles_ptr, before, tiles, expert, offset, offset + pairs, max_tiles, ROWS, TILE_BLOCK)


def launch_counting_sort(
    pairs: torch.Tensor,
    offsets: torch.Tensor,
    tiles: torch.Tensor,
    ids: torch.Tensor,
    rows: int,
    block: int = _BLOCK,
    most_runs: int = _MOST_RUNS,
) -> None:
    """Sort into `pairs`, `offsets` and `tiles`, as of `launch_group_tokens`.

    Args:
        pairs: (N,) int32.
        offsets: (E + 1,) int32.
        tiles: (3, `most_tiles`) int32.
        ids: (N,) of an integer dtype, contiguous.
        rows: of a tile.
        block: pairs that a program sorts at a time, a power of two.
        most_runs: programs that the pairs are shared out among, at most.
    """
    num_pairs, num_experts = ids.shape[0], offsets.shape[0] - 1
    blocks_per_run = max(1, triton.cdiv(num_pairs, block * most_runs))
    num_runs = triton.cdiv(num_pairs, block * blocks_per_run)
    bins = max(_FEWEST_BINS, triton.next_power_of_2(num_experts))
    counts = torch.empty(num_runs, bins, dtype=torch.int32, device=ids.device)
    with on_device(ids):
        count_runs_kernel[(num_runs,)](
            counts,
            ids,
            num_pairs,
            blocks_per_run,
            BINS=bins,
            BLOCK=block,
            num_warps=4,
            **dependent_launch(ids.device, num_runs),
        )
        num_programs = num_runs + num_experts + 1
        place_runs_kernel[(num_programs,)](
            pairs,
            offsets,
            tiles,
            counts,
            ids,
            num_pairs,
            num_runs,
            blocks_per_run,
            tiles.shape[1],
            NUM_EXPERTS=num_experts,
            BINS=bins,
            BLOCK=block,
            COUNT_ROWS=_ROWS_OF_COUNTS,
            ROWS=rows,
            TILE_BLOCK=_TILE_BLOCK,
            num_warps=8,
            **dependent_launch(ids.device, num_programs),
        )
