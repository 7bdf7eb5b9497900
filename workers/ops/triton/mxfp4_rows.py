"""The kernel of a grouped product whose weights stay in MXFP4: four bits and a quarter of each are read.

As in `grouped_few_rows`, the rows of the weight are those of the matrix instruction and the rows of x its columns:
numbers that were unpacked in registers are then an operand as they are. A word has a number of each quarter of a block.
They are put in the order of the inputs, which moves no number to another thread: a step is one product then, of whose
matrix instructions the compiler lets several run while it unpacks what the next ones multiply.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.ops.triton.gated_activation import gated_activation
from workers.ops.triton.mxfp4_numbers import mxfp4_factors, mxfp4_in_order
from workers.ops.triton.pair_tiles import pair_rows, tile_and_output
from workers.ops.triton.prefetch_rows import prefetch


@triton.jit
def _prefetch(
    words_ptr: tl.tensor,
    first: tl.tensor,
    M: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Ask for the first `BLOCKS` blocks of the program's rows in the L2 cache: each is in one piece."""
    thread = tl.arange(0, THREADS)
    block = tl.minimum(thread // PARTS, BLOCKS - 1)
    row = block * WEIGHT_ROWS + thread % PARTS * M + first
    prefetch(words_ptr + row.to(tl.int64) * 8, OUTPUTS * 16, THREADS)


@triton.jit
def _load(
    ptrs: tl.tensor, inside: tl.tensor, within: tl.tensor, ROWS_MASKED: tl.constexpr, INPUTS_MASKED: tl.constexpr
) -> tl.tensor:
    """A tile of words or scales, (rows, inputs), zero where there are none."""
    if ROWS_MASKED and INPUTS_MASKED:
        found = tl.load(ptrs, mask=inside[:, None] & within[None, :], other=0)
    elif ROWS_MASKED:
        found = tl.load(ptrs, mask=inside[:, None], other=0)
    elif INPUTS_MASKED:
        found = tl.load(ptrs, mask=within[None, :], other=0)
    else:
        found = tl.load(ptrs)
    return found


@triton.jit(do_not_specialize=["num_tiles"])
def mxfp4_rows_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    pairs_ptr: tl.tensor | None,
    tiles_ptr: tl.tensor,
    num_tiles: tl.tensor,
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
    THREADS: tl.constexpr,
    ROUTED_BEFORE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` of the `M` columns of one tile's result.

    `ALONE`: `tiles_ptr` has the pairs' experts, and every pair is a tile. `ROUTED_BEFORE`: the tiles were made before
    the kernel ahead waited for its own predecessor, so that they can be read while it runs.
    """
    GATED: tl.constexpr = KIND is not None
    PARTS: tl.constexpr = 2 if GATED else 1
    WEIGHT_ROWS: tl.constexpr = PARTS * M
    COLUMNS: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    BLOCKS: tl.constexpr = INPUTS // 32
    FOURS: tl.constexpr = BLOCKS // 4
    ALL_FOURS: tl.constexpr = (K // 32 + 3) // 4
    WORDS: tl.constexpr = INPUTS // 4
    ROWS_MASKED: tl.constexpr = M % OUTPUTS != 0
    INPUTS_MASKED: tl.constexpr = K % INPUTS != 0
    FOURS_MASKED: tl.constexpr = ALL_FOURS % FOURS != 0
    tile, first = tile_and_output(tl.program_id(0), num_tiles, COLUMNS, OUTPUTS, BUNDLE)
    if PDL:
        if ROUTED_BEFORE and PREFETCHED > 0:
            likely = tl.load(tiles_ptr + tile, cache_modifier=".cg").to(tl.int32)
            if likely < NUM_EXPERTS and likely >= 0 and first + OUTPUTS <= M:
                own_ptr = words_ptr + likely.to(tl.int64) * (WEIGHT_ROWS * (K // 4))
                _prefetch(own_ptr, first, M, WEIGHT_ROWS, OUTPUTS, PARTS, PREFETCHED, THREADS)
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(tiles_ptr + tile).to(tl.int32)
    if expert >= NUM_EXPERTS:
        return
    source, destination, there = pair_rows(tile, num_tiles, tiles_ptr, pairs_ptr, ROWS, PAIRS_PER_ROW, SPREAD, ALONE)
    feature = first + tl.arange(0, OUTPUTS)
    inside = feature < M
    word = tl.arange(0, WORDS)
    four = tl.arange(0, FOURS)
    column = tl.arange(0, INPUTS)
    x_ptrs = x_ptr + source[None, :].to(tl.int64) * stride_x + column[:, None]
    own = expert.to(tl.int64)
    words_ptrs = words_ptr + own * (WEIGHT_ROWS * (K // 4)) + feature[:, None] * 8
    words_ptrs += (word // 8 * (WEIGHT_ROWS * 8) + word % 8)[None, :]
    exponents_ptrs = exponents_ptr + own * (WEIGHT_ROWS * ALL_FOURS) + feature[:, None] + four[None, :] * WEIGHT_ROWS
    result = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for begin in tl.range(0, K, INPUTS, num_stages=STAGES):
        x_mask = there[None, :]
        if INPUTS_MASKED:
            x_mask = x_mask & (begin + column // 32 * 32 < K)[:, None]
        within_words = begin + word // 8 * 32 < K
        within_fours = begin + four * 128 < K
        at = begin // 32 * (WEIGHT_ROWS * 8)
        at_four = begin // 128 * WEIGHT_ROWS
        x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0).to(DOT_DTYPE)
        words = _load(words_ptrs + at, inside, within_words, ROWS_MASKED, INPUTS_MASKED)
        exponents = _load(exponents_ptrs + at_four, inside, within_fours, ROWS_MASKED, FOURS_MASKED)
        factors = mxfp4_factors(exponents, OUTPUTS, BLOCKS, DOT_DTYPE)
        weight = mxfp4_in_order(words, factors, OUTPUTS, BLOCKS, DOT_DTYPE)
        result = tl.dot(weight, x, result, input_precision="ieee")
        if GATED:
            words = _load(words_ptrs + at + M * 8, inside, within_words, ROWS_MASKED, INPUTS_MASKED)
            exponents = _load(exponents_ptrs + at_four + M, inside, within_fours, ROWS_MASKED, FOURS_MASKED)
            factors = mxfp4_factors(exponents, OUTPUTS, BLOCKS, DOT_DTYPE)
            weight = mxfp4_in_order(words, factors, OUTPUTS, BLOCKS, DOT_DTYPE)
            up = tl.dot(weight, x, up, input_precision="ieee")
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * WEIGHT_ROWS + feature
        result += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias_ptrs + M, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        result = gated_activation(result, up, KIND, ALPHA, LIMIT)
    out_ptrs = out_ptr + destination[None, :].to(tl.int64) * M + feature[:, None]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[None, :] & inside[:, None])
