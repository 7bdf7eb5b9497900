"""The kernel of a grouped product where experts have many rows: bound by multiplying.

Rows are gathered as they are loaded and spread as they are stored.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from workers.ops.triton.gated_activation import gated_activation
from workers.ops.triton.pair_tiles import pair_rows, tile_and_output


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_many_rows_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    max_tiles: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SPREAD: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BUNDLE: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` of the `M` columns of one tile's result.

    `BUNDLE` tiles share their blocks of outputs in time, so that the weights of an expert with several tiles are read
    from the L2 cache.
    """
    GATED: tl.constexpr = KIND is not None
    WEIGHT_ROWS: tl.constexpr = 2 * M if GATED else M
    COLUMNS: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    tile, first_output = tile_and_output(tl.program_id(0), max_tiles, COLUMNS, OUTPUTS, BUNDLE)
    expert = tl.load(tiles_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    source, destination, there = pair_rows(tile, max_tiles, tiles_ptr, pairs_ptr, ROWS, PAIRS_PER_ROW, SPREAD, False)
    feature = first_output + tl.arange(0, OUTPUTS)
    inside = feature < M
    column = tl.arange(0, INPUTS)
    x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_x + column[None, :]
    first = expert.to(tl.int64) * (WEIGHT_ROWS * K)
    weight_ptrs = weight_ptr + first + feature[None, :].to(tl.int64) * K + column[:, None]
    result = tl.zeros([ROWS, OUTPUTS], tl.float32)
    up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for begin in tl.range(0, K, INPUTS, num_stages=STAGES):
        x_mask = there[:, None]
        weight_mask = inside[None, :]
        if K % INPUTS != 0:
            x_mask = x_mask & (begin + column < K)[None, :]
            weight_mask = weight_mask & (begin + column < K)[:, None]
        x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0).to(DOT_DTYPE)
        weight = tl.load(weight_ptrs + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
        result = tl.dot(x, weight, result, input_precision="ieee")
        if GATED:
            up_weight = tl.load(weight_ptrs + M * K + begin, mask=weight_mask, other=0.0).to(DOT_DTYPE)
            up = tl.dot(x, up_weight, up, input_precision="ieee")
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * WEIGHT_ROWS + feature
        result += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + M, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        result = gated_activation(result, up, KIND, ALPHA, LIMIT)
    out_ptrs = out_ptr + destination[:, None].to(tl.int64) * M + feature[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])
