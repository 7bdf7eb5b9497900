"""The decode kernel of latent attention for Hopper: warpgroups of their own for loads, for scores and for the output.

A program has 64 heads of one sequence. Its tiles of 64 latents are loaded by the Tensor Memory Accelerator into two
places in turn. One warpgroup multiplies queries and keys, takes the softmax's step and has the left half of the output,
another has the right half: 64 heads of 512 numbers are more than the registers of one. While they work on one place,
the other is loaded. This is the division of work of FlashMLA's first kernel (Li and Liu, 2025), written in Gluon.

What a tile's place holds is read as keys and as values; the weights of a tile lie where its rotary keys were, which
nobody reads any more.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton import decode_kernel
from attention.ops.triton.gluon_tiles import LN_2, LOG2_E, LOWEST

HEADS = gl.constexpr(64)
TILE = gl.constexpr(64)

split_range = gluon.jit(decode_kernel.split_range.fn)


@gluon.jit
def _load_tiles(
    halves: tma.tensor_descriptor,
    rotary: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    begin: gl.tensor,
    num_tiles: gl.tensor,
    last_block: gl.tensor,
    left: gl.shared_memory_descriptor,
    right: gl.shared_memory_descriptor,
    rope: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    R: gl.constexpr,
    P: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """Load every tile as soon as both groups have done with what lies in its place.

    `empty` has a barrier for each half of each place; the second half's also says that the weights have been read.
    """
    for tile in range(num_tiles):
        place = tile & 1
        phase = (tile >> 1) & 1 ^ 1
        start = begin + tile * TILE
        block = gl.load(table_ptr + gl.minimum(start // BLOCK_SIZE, last_block))
        row = block * BLOCK_SIZE + start % BLOCK_SIZE
        loaded = full.index(place)
        mbarrier.wait(empty.index(2 * place), phase)
        mbarrier.expect(loaded, TILE * (R + P) * 2)
        tma.async_copy_global_to_shared(halves, [row, 0], loaded, left.index(place))
        mbarrier.wait(empty.index(2 * place + 1), phase)
        tma.async_copy_global_to_shared(halves, [row, R // 2], loaded, right.index(place))
        tma.async_copy_global_to_shared(rotary, [row, R], loaded, rope.index(place))


@gluon.jit
def _copy_queries(ptr: gl.tensor, stride: gl.tensor, place: gl.shared_memory_descriptor, NUM: gl.constexpr) -> None:
    """Rows of `NUM` numbers of all heads into shared memory."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // NUM, NUM // 8], [4, 1], [1, 0])
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, ROWS))
    columns = gl.arange(0, NUM, gl.SliceLayout(0, ROWS))
    place.store(gl.load(ptr + (heads * stride)[:, None] + columns[None, :]))


@gluon.jit
def _clear_rows(values: gl.shared_memory_descriptor, num_valid: gl.tensor, NUM: gl.constexpr) -> None:
    """Zeros behind the last token.

    What lies there is another sequence's and may be no number, which a weight of zero does not undo.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, ROWS))
    for column in gl.static_range(0, NUM, 64):
        part = values.slice(column, 64, 1)
        part.store(gl.where((rows < num_valid)[:, None], part.load(ROWS), 0.0))
    fence_async_shared()


@gluon.jit
def _scores(
    place: gl.tensor,
    phase: gl.tensor,
    q_left: gl.shared_memory_descriptor,
    q_right: gl.shared_memory_descriptor,
    q_rope: gl.shared_memory_descriptor,
    left: gl.shared_memory_descriptor,
    right: gl.shared_memory_descriptor,
    rope: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    SCORES: gl.constexpr,
) -> gl.tensor:
    """Products of all heads with the tile's keys, when it is there."""
    products = gl.zeros([HEADS, TILE], gl.float32, SCORES)
    mbarrier.wait(full.index(place), phase)
    keys = left.index(place).permute((1, 0))
    products = warpgroup_mma(q_left, keys, products, use_acc=False, is_async=True)
    products = warpgroup_mma(q_rope, rope.index(place).permute((1, 0)), products, is_async=True)
    products = warpgroup_mma(q_right, right.index(place).permute((1, 0)), products, is_async=True)
    return warpgroup_mma_wait(0, deps=[products])


@gluon.jit
def _softmax_step(
    products: gl.tensor,
    scale: gl.tensor,
    largest: gl.tensor,
    place: gl.tensor,
    rope: gl.shared_memory_descriptor,
    factors: gl.shared_memory_descriptor,
    weighed: gl.shared_memory_descriptor,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Weights of a tile, left for both groups with the factors that the output is to be multiplied with before.

    Returns:
        Weights as they are summed up, and as they are multiplied with, the largest scores, the factors.
    """
    now = gl.maximum(largest, gl.max(products, 1) * scale)
    factor = gl.exp2(largest - now)
    factors.index(place).store(factor)
    weights = gl.exp2(gl.fma(products, gl.zeros_like(products) + scale, gl.zeros_like(products) - now[:, None]))
    rounded = weights.to(rope.dtype)
    rope.index(place).store(rounded)
    fence_async_shared()
    mbarrier.arrive(weighed.index(place))
    return weights, rounded, now, factor


@gluon.jit
def _write(
    values: gl.tensor,
    ptr: gl.tensor,
    stride: gl.tensor,
    staging: gl.shared_memory_descriptor,
    NUM: gl.constexpr,
    PARTIAL: gl.constexpr,
) -> None:
    """Half of the output of all heads: by way of shared memory, so that rows are written in one piece."""
    if PARTIAL:
        LAYOUT: gl.constexpr = values.type.layout
        heads = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, NUM, gl.SliceLayout(0, LAYOUT))
        gl.store(ptr + (heads * stride)[:, None] + columns[None, :], values)
    else:
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        staging.store(values.to(staging.dtype))
        heads = gl.arange(0, HEADS, gl.SliceLayout(1, ROWS))
        columns = gl.arange(0, NUM, gl.SliceLayout(0, ROWS))
        gl.store(ptr + (heads * stride)[:, None] + columns[None, :], staging.load(ROWS))


@gluon.jit
def _score_and_weigh_left(
    q_ptr: gl.tensor,
    pe_ptr: gl.tensor,
    stride_qh: gl.tensor,
    stride_ph: gl.tensor,
    q_left: gl.shared_memory_descriptor,
    q_right: gl.shared_memory_descriptor,
    q_rope: gl.shared_memory_descriptor,
    left: gl.shared_memory_descriptor,
    right: gl.shared_memory_descriptor,
    rope: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    factors: gl.shared_memory_descriptor,
    totals: gl.shared_memory_descriptor,
    weighed: gl.shared_memory_descriptor,
    summed: gl.shared_memory_descriptor,
    begin: gl.tensor,
    end: gl.tensor,
    num_tiles: gl.tensor,
    scale: gl.tensor,
    out_scale: gl.tensor,
    out_ptr: gl.tensor,
    stride_o: gl.tensor,
    lse_ptr: gl.tensor,
    stride_l: gl.tensor,
    R: gl.constexpr,
    P: gl.constexpr,
    PARTIAL: gl.constexpr,
) -> None:
    """The group that has the scores, the softmax and the output's left half."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R // 2, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    _copy_queries(q_ptr, stride_qh, q_left, R // 2)
    _copy_queries(q_ptr + R // 2, stride_qh, q_right, R // 2)
    _copy_queries(pe_ptr, stride_ph, q_rope, P)
    fence_async_shared()
    largest = gl.full([HEADS], LOWEST, gl.float32, ROW)
    total = gl.zeros([HEADS], gl.float32, ROW)
    acc = gl.zeros([HEADS, R // 2], gl.float32, OUTPUT)
    for tile in range(num_tiles - 1):
        place = tile & 1
        products = _scores(place, (tile >> 1) & 1, q_left, q_right, q_rope, left, right, rope, full, SCORES)
        weights, rounded, largest, factor = _softmax_step(products, scale, largest, place, rope, factors, weighed)
        acc = acc * gl.convert_layout(factor, OUTPUT_ROW)[:, None]
        acc = warpgroup_mma(gl.convert_layout(rounded, WEIGHTS), left.index(place), acc, is_async=True)
        total = total * factor + gl.sum(weights, 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(2 * place))
    # The last tile: only here are there tokens that do not count.
    tile = num_tiles - 1
    place = tile & 1
    start = begin + tile * TILE
    products = _scores(place, (tile >> 1) & 1, q_left, q_right, q_rope, left, right, rope, full, SCORES)
    tokens = start + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    products = gl.where((tokens < end)[None, :], products, float("-inf"))
    weights, rounded, largest, factor = _softmax_step(products, scale, largest, place, rope, factors, weighed)
    total = total * factor + gl.sum(weights, 1)
    totals.store(total)
    mbarrier.arrive(summed)
    acc = acc * gl.convert_layout(factor, OUTPUT_ROW)[:, None]
    if start + TILE > end:
        _clear_rows(left.index(place), end - start, R // 2)
    acc = warpgroup_mma(gl.convert_layout(rounded, WEIGHTS), left.index(place), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), OUTPUT_ROW)
    _write(acc * (out_scale / divisor)[:, None], out_ptr, stride_o, left.index(place), R // 2, PARTIAL)
    if lse_ptr is not None:
        lse = gl.where(total == 0.0, float("-inf"), largest + gl.log2(total))
        if not PARTIAL:
            lse = lse * LN_2
        gl.store(lse_ptr + gl.arange(0, HEADS, ROW) * stride_l, lse)


@gluon.jit
def _weigh_right(
    right: gl.shared_memory_descriptor,
    rope: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    factors: gl.shared_memory_descriptor,
    totals: gl.shared_memory_descriptor,
    weighed: gl.shared_memory_descriptor,
    summed: gl.shared_memory_descriptor,
    begin: gl.tensor,
    end: gl.tensor,
    num_tiles: gl.tensor,
    out_scale: gl.tensor,
    out_ptr: gl.tensor,
    stride_o: gl.tensor,
    R: gl.constexpr,
    PARTIAL: gl.constexpr,
) -> None:
    """The group that has the output's right half."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R // 2, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    acc = gl.zeros([HEADS, R // 2], gl.float32, OUTPUT)
    for tile in range(num_tiles):
        place = tile & 1
        start = begin + tile * TILE
        mbarrier.wait(weighed.index(place), (tile >> 1) & 1)
        acc = acc * factors.index(place).load(OUTPUT_ROW)[:, None]
        if start + TILE > end:
            _clear_rows(right.index(place), end - start, R // 2)
        acc = warpgroup_mma(rope.index(place).load(WEIGHTS), right.index(place), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(2 * place + 1))
    mbarrier.wait(summed, 0)
    total = totals.load(OUTPUT_ROW)
    divisor = gl.where(total == 0.0, 1.0, total)
    staging = right.index((num_tiles - 1) & 1)
    _write(acc * (out_scale / divisor)[:, None], out_ptr + R // 2, stride_o, staging, R // 2, PARTIAL)


@gluon.jit(do_not_specialize=["stride_table", "num_splits", "wanted_splits", "most_tiles"])
def hopper_latent_decode_kernel(
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    partial_lse_ptr: gl.tensor,
    q_ptr: gl.tensor,
    pe_ptr: gl.tensor,
    halves: tma.tensor_descriptor,
    rotary: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    seq_lens_ptr: gl.tensor,
    scale: gl.tensor,
    cache_scale: gl.tensor,
    num_splits: gl.tensor,
    wanted_splits: gl.tensor,
    most_tiles: gl.tensor,
    stride_qt: gl.tensor,
    stride_qh: gl.tensor,
    stride_pt: gl.tensor,
    stride_ph: gl.tensor,
    stride_ot: gl.tensor,
    stride_oh: gl.tensor,
    stride_lt: gl.tensor,
    stride_lh: gl.tensor,
    stride_table: gl.tensor,
    NUM_HEADS: gl.constexpr,
    R: gl.constexpr,
    P: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    MIN_TILES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """One program: one split of a sequence's tokens, for 64 of the heads. Grid (tiles of heads, splits, B).

    `halves` and `rotary` are descriptors of the cache as rows of R + P numbers, of tiles of 64 rows and R / 2 or P
    numbers. What else is given is as of `decode_kernel.latent_decode_kernel`.
    """
    head = gl.program_id(0) * HEADS
    split = gl.program_id(1)
    seq = gl.program_id(2).to(gl.int64)
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, R // 2], DTYPE)
    ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, P], DTYPE)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq_len = gl.load(seq_lens_ptr + seq)
    begin, end, _ = split_range(seq_len, None, split, num_splits, wanted_splits, most_tiles, TILE, MIN_TILES)
    if (begin >= end) & (split > 0):
        return
    left = gl.allocate_shared_memory(DTYPE, [2, TILE, R // 2], HALF)
    right = gl.allocate_shared_memory(DTYPE, [2, TILE, R // 2], HALF)
    rope = gl.allocate_shared_memory(DTYPE, [2, TILE, P], ROPE)
    q_left = gl.allocate_shared_memory(DTYPE, [HEADS, R // 2], HALF)
    q_right = gl.allocate_shared_memory(DTYPE, [HEADS, R // 2], HALF)
    q_rope = gl.allocate_shared_memory(DTYPE, [HEADS, P], ROPE)
    factors = gl.allocate_shared_memory(gl.float32, [2, HEADS], NUMBERS)
    totals = gl.allocate_shared_memory(gl.float32, [HEADS], NUMBERS)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    summed = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(weighed.index(i), count=1)
        mbarrier.init(empty.index(2 * i), count=1)
        mbarrier.init(empty.index(2 * i + 1), count=1)
    mbarrier.init(summed, count=1)
    fence_async_shared()

    # A sequence without tokens has a tile in which none counts; what its table says is not read beyond the cache.
    num_tiles = gl.maximum(gl.cdiv(end - begin, TILE), 1)
    last_block = gl.maximum(end - 1, 0) // BLOCK_SIZE
    table_ptr += seq * stride_table
    q_ptr += seq * stride_qt + head * stride_qh
    pe_ptr += seq * stride_pt + head * stride_ph
    PARTIAL: gl.constexpr = partial_ptr is not None
    if not PARTIAL:
        out_ptr += seq * stride_ot + head * stride_oh
        stride_o = stride_oh
        stride_l = stride_lh
        if lse_ptr is not None:
            lse_ptr += seq * stride_lt + head * stride_lh
    else:
        slot = (seq * NUM_HEADS + head) * num_splits + split
        out_ptr = partial_ptr + slot * R
        lse_ptr = partial_lse_ptr + slot
        stride_o = num_splits * R
        stride_l = num_splits
    gl.warp_specialize(
        [
            (
                _load_tiles,
                (
                    halves, rotary, table_ptr, begin, num_tiles, last_block, left, right, rope, full, empty, R, P,
                    BLOCK_SIZE,
                ),
            ),
            (
                _score_and_weigh_left,
                (
                    q_ptr, pe_ptr, stride_qh, stride_ph, q_left, q_right, q_rope, left, right, rope, full, empty,
                    factors, totals, weighed, summed, begin, end, num_tiles, scale * LOG2_E, cache_scale, out_ptr,
                    stride_o, lse_ptr, stride_l, R, P, PARTIAL,
                ),
            ),
            (
                _weigh_right,
                (
                    right, rope, empty, factors, totals, weighed, summed, begin, end, num_tiles, cache_scale, out_ptr,
                    stride_o, R, PARTIAL,
                ),
            ),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
