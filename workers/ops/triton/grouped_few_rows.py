"""The kernel of a grouped product where experts have few rows: bound by how fast their weights can be read.

As in `skinny_linear`, the rows of the weight are those of the matrix instruction and the rows of x its columns. A
program reads a contiguous part of one expert's weights, and enough of them are in flight to fill the memory's queue.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.ops.triton.gated_activation import gated_activation
from workers.ops.triton.pair_tiles import pair_rows, tile_and_output
from workers.ops.triton.prefetch_rows import prefetch_rows


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def grouped_few_rows_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    pairs_ptr: tl.tensor | None,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SPREAD: tl.constexpr,
    ALONE: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BUNDLE: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    SHARED_PREFETCHED: tl.constexpr,
    THREADS: tl.constexpr,
    ROUTED_BEFORE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` of the `M` columns of one tile's result.

    `ALONE`: `tiles_ptr` has the pairs' experts, and every pair is a tile. `ROUTED_BEFORE`: the tiles were made before
    the kernel ahead waited for its own predecessor, so that they can be read while it runs. The first `NUM_SHARED`
    experts have all tokens: which tiles are theirs is known without any kernel. Until the wait only the L2 cache is
    asked for weights, and what is read there is read again behind it.
    """
    GATED: tl.constexpr = KIND is not None
    WEIGHT_ROWS: tl.constexpr = 2 * M if GATED else M
    COLUMNS: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    tile, first = tile_and_output(tl.program_id(0), num_tiles, COLUMNS, OUTPUTS, BUNDLE)
    if PDL:
        if SHARED_PREFETCHED > 0:
            each = (num_tokens + ROWS - 1) // ROWS
            if tile < NUM_SHARED * each and tile % each == 0 and first + OUTPUTS <= M:
                own_ptr = weight_ptr + (tile // each).to(tl.int64) * (WEIGHT_ROWS * K)
                prefetch_rows(own_ptr, first, M, K, OUTPUTS, 2 if GATED else 1, SHARED_PREFETCHED, THREADS)
        if ROUTED_BEFORE and PREFETCHED > 0:
            likely = tl.load(tiles_ptr + tile, cache_modifier=".cg").to(tl.int32)
            if likely < NUM_EXPERTS and likely >= 0 and first + OUTPUTS <= M:
                own_ptr = weight_ptr + likely.to(tl.int64) * (WEIGHT_ROWS * K)
                prefetch_rows(own_ptr, first, M, K, OUTPUTS, 2 if GATED else 1, PREFETCHED, THREADS)
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(tiles_ptr + tile).to(tl.int32)
    if expert >= NUM_EXPERTS:
        return
    source, destination, there = pair_rows(tile, num_tiles, tiles_ptr, pairs_ptr, ROWS, PAIRS_PER_ROW, SPREAD, ALONE)
    feature = first + tl.arange(0, OUTPUTS)
    inside = (feature < M)[:, None]
    column = tl.arange(0, INPUTS)
    x_ptrs = x_ptr + source[None, :].to(tl.int64) * stride_x + column[:, None]
    weight_ptrs = weight_ptr + expert.to(tl.int64) * (WEIGHT_ROWS * K) + feature[:, None].to(tl.int64) * K
    weight_ptrs += column[None, :]
    result = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for begin in tl.range(0, K, INPUTS, num_stages=STAGES):
        x_mask = there[None, :]
        weight_mask = inside
        if K % INPUTS != 0:
            x_mask = x_mask & (begin + column < K)[:, None]
            weight_mask = weight_mask & (begin + column < K)[None, :]
        x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0).to(DOT_DTYPE)
        if K % INPUTS == 0 and M % OUTPUTS == 0:
            weight = tl.load(weight_ptrs + begin).to(DOT_DTYPE)
        else:
            weight = tl.load(weight_ptrs + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
        result = tl.dot(weight, x, result, input_precision="ieee")
        if GATED:
            if K % INPUTS == 0 and M % OUTPUTS == 0:
                up_weight = tl.load(weight_ptrs + M * K + begin).to(DOT_DTYPE)
            else:
                up_weight = tl.load(weight_ptrs + M * K + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
            up = tl.dot(up_weight, x, up, input_precision="ieee")
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * WEIGHT_ROWS + feature
        result += tl.load(bias_ptrs, mask=feature < M, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias_ptrs + M, mask=feature < M, other=0.0).to(tl.float32)[:, None]
    if GATED:
        result = gated_activation(result, up, KIND, ALPHA, LIMIT)
    out_ptrs = out_ptr + destination[None, :].to(tl.int64) * M + feature[:, None]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[None, :] & inside)
