"""The decode kernels: split-KV attention of one query token per sequence (Flash-Decoding, Dao et al., 2023)."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.tiles import (
    LN_2,
    LOG2_E,
    load_queries,
    load_tile,
    logits,
    look_up_blocks,
    paged_rows,
    softmax_step,
    visible,
)


@triton.jit
def split_range(
    seq_len: tl.tensor,
    window: tl.tensor | None,
    split: tl.tensor,
    num_splits: tl.tensor,
    wanted_splits: tl.tensor,
    most_tiles: tl.tensor,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The keys of one split of a sequence: (begin, end, splits that have any).

    Tiles are dealt out by the sequence's own length, as `tuning.Splits` says.
    """
    first = 0
    if window is not None:
        first = tl.maximum(seq_len - window, 0) // BLOCK_N
    tiles = tl.cdiv(seq_len, BLOCK_N) - first
    tiles_per_split = tl.minimum(tl.cdiv(tiles, wanted_splits), most_tiles)
    tiles_per_split = tl.maximum(tl.maximum(tiles_per_split, tl.cdiv(tiles, num_splits)), MIN_TILES)
    begin = (first + split * tiles_per_split) * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, seq_len)
    return begin, end, tl.cdiv(tiles, tiles_per_split)


@triton.jit
def store_split(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    partial_ptr: tl.tensor | None,
    partial_lse_ptr: tl.tensor | None,
    acc: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    seq: tl.tensor,
    head: tl.tensor,
    valid: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_lt: tl.tensor,
    stride_lh: tl.tensor,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Write what the online softmax has of one split: where there is no other the output, else partial results.

    `acc` is (M, D padded), of the heads `head` (M,) that are `valid`, and becomes `scale` times itself over `total`.
    """
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = largest + tl.log2(divisor)
    acc = acc * (scale / divisor)[:, None]
    columns = tl.arange(0, acc.shape[1])
    stored = valid[:, None] & (columns < D)[None, :]
    if partial_ptr is None:
        out_ptrs = out_ptr + (seq * stride_ot + head * stride_oh)[:, None] + columns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored)
        if lse_ptr is not None:
            tl.store(lse_ptr + seq * stride_lt + head * stride_lh, lse * LN_2, mask=valid)
    else:
        slot = (seq * NUM_HEADS + head) * num_splits + split
        tl.store(partial_ptr + slot[:, None] * D + columns[None, :], acc, mask=stored)
        tl.store(partial_lse_ptr + slot, lse, mask=valid)


@triton.jit(do_not_specialize=["window", "stride_table", "num_splits", "wanted_splits", "most_tiles"])
def decode_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    partial_ptr: tl.tensor | None,
    partial_lse_ptr: tl.tensor | None,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    slopes_ptr: tl.tensor | None,
    sinks_ptr: tl.tensor | None,
    scale: tl.tensor,
    v_scale: tl.tensor,
    soft_cap: tl.tensor | None,
    window: tl.tensor | None,
    num_splits: tl.tensor,
    wanted_splits: tl.tensor,
    most_tiles: tl.tensor,
    stride_qt: tl.tensor,
    stride_qh: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_lt: tl.tensor,
    stride_lh: tl.tensor,
    stride_table: tl.tensor,
    stride_block: tl.tensor,
    stride_kn: tl.tensor,
    stride_kh: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one split of a sequence's keys, for up to `BLOCK_M` of the query heads of one KV head.

    Grid (KV heads times tiles of their query heads, splits, B). With `partial_ptr` (B, Hq, splits, D) fp32 and
    `partial_lse_ptr` (B, Hq, splits) fp32, base 2, the result is left to `reduce_kernel`; else there is one split and
    the output is written.
    """
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = tl.program_id(0) // HEAD_TILES
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    begin, end, _ = split_range(seq_len, window, split, num_splits, wanted_splits, most_tiles, BLOCK_N, MIN_TILES)
    if (begin >= end) & (split > 0):
        return
    table_ptr += seq * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_kh

    group_head = tl.program_id(0) % HEAD_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = group_head < GROUP
    head = kv_head * GROUP + group_head
    q_pos = tl.zeros([BLOCK_M], tl.int32) + seq_len - 1
    q, scale = load_queries(q_ptr, seq * stride_qt + head * stride_qh, valid, scale, D, D_PAD, DOT_DTYPE)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # one more logit, with no value, in the first split
        sinks = tl.load(sinks_ptr + head, mask=valid & (split == 0), other=float("-inf"))
        largest = sinks * LOG2_E
        total = tl.where(sinks == float("-inf"), 0.0, 1.0)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0)

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    blocks = look_up_blocks(begin, end, table_ptr, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        key_pos = start + tl.arange(0, BLOCK_N)
        in_bounds = key_pos < end
        rows = paged_rows(start, blocks, stride_block, stride_kn, BLOCK_SIZE, BLOCK_N)
        k = load_tile(k_ptr, rows, in_bounds, D, D_PAD, DOT_DTYPE, True)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        values, factor = logits(products, scale, soft_cap, slope, q_pos, key_pos)
        values = tl.where(visible(q_pos, key_pos, end, window, True, False), values, float("-inf"))
        weights, largest, total, acc = softmax_step(values, factor, largest, total, acc, True)
        v = load_tile(v_ptr, rows, in_bounds, D, D_PAD, DOT_DTYPE, True)
        blocks = look_up_blocks(start + BLOCK_N, end, table_ptr, BLOCK_SIZE, BLOCK_N)
        acc = tl.dot(weights.to(DOT_DTYPE), v, acc, input_precision="ieee")

    store_split(
        out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, acc, largest, total, v_scale, seq, head, valid, split,
        num_splits, stride_ot, stride_oh, stride_lt, stride_lh, NUM_HEADS, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "num_splits", "wanted_splits", "most_tiles"])
def reduce_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    window: tl.tensor | None,
    num_splits: tl.tensor,
    wanted_splits: tl.tensor,
    most_tiles: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_lt: tl.tensor,
    stride_lh: tl.tensor,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: merge the splits of one query head of one sequence by their log-sum-exp. Grid (Hq, B)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    _, _, used = split_range(
        tl.load(seq_lens_ptr + seq), window, 0, num_splits, wanted_splits, most_tiles, BLOCK_N, MIN_TILES
    )
    splits = tl.arange(0, SPLITS_PAD)
    present = splits < tl.maximum(used, 1)  # the first split always writes
    columns = tl.arange(0, D_PAD)
    slots = (seq * NUM_HEADS + head) * num_splits + splits
    lses = tl.load(partial_lse_ptr + slots, mask=present, other=float("-inf"))
    largest = tl.max(lses, 0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(lses - reference)
    total = tl.sum(weights, 0)
    partials = tl.load(
        partial_ptr + slots[:, None] * D + columns[None, :],
        mask=present[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    divisor = tl.where(total == 0.0, 1.0, total)
    merged = tl.sum(partials * weights[:, None], 0) / divisor
    out_ptrs = out_ptr + seq * stride_ot + head * stride_oh + columns
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=columns < D)
    if lse_ptr is not None:
        tl.store(lse_ptr + seq * stride_lt + head * stride_lh, (largest + tl.log2(divisor)) * LN_2)
