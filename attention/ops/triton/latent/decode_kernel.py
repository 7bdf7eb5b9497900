"""The decode kernel of latent attention: split-KV attention in the latents' space, of one query token per sequence.

A cached token is its latent and its rotary key, one behind the other. All heads score it by both and sum up the latent:
what is loaded as a key is the value, too.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.decode_kernel import split_range, store_split
from attention.ops.triton.tiles import LOG2_E, load_tile, look_up_blocks, paged_rows, softmax_step


@triton.jit
def _load_queries(
    q_ptr: tl.tensor,
    rows: tl.tensor,
    pe_ptr: tl.tensor,
    pe_rows: tl.tensor,
    valid: tl.tensor,
    scale: tl.tensor,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Both parts of a tile of queries, and what products must be scaled with; as `tiles.load_queries`."""
    if (q_ptr.dtype.element_ty == tl.bfloat16) and (DOT_DTYPE == tl.float16):  # noqa: SIM300
        q = load_tile(q_ptr, rows, valid, R, R_PAD, tl.float32, True)
        pe = load_tile(pe_ptr, pe_rows, valid, P, P_PAD, tl.float32, True)
        largest = tl.maximum(tl.max(tl.max(tl.abs(q), 1), 0), tl.max(tl.max(tl.abs(pe), 1), 0))
        largest = tl.maximum(largest, 1e-30)
        q = (q * (32768.0 / largest)).to(tl.float16)
        pe = (pe * (32768.0 / largest)).to(tl.float16)
        scale = scale * (largest / 32768.0)
    else:
        q = load_tile(q_ptr, rows, valid, R, R_PAD, DOT_DTYPE, True)
        pe = load_tile(pe_ptr, pe_rows, valid, P, P_PAD, DOT_DTYPE, True)
    return q, pe, scale


@triton.jit(do_not_specialize=["stride_table", "num_splits", "wanted_splits", "most_tiles"])
def latent_decode_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    partial_ptr: tl.tensor | None,
    partial_lse_ptr: tl.tensor | None,
    q_ptr: tl.tensor,
    pe_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    scale: tl.tensor,
    cache_scale: tl.tensor,
    num_splits: tl.tensor,
    wanted_splits: tl.tensor,
    most_tiles: tl.tensor,
    stride_qt: tl.tensor,
    stride_qh: tl.tensor,
    stride_pt: tl.tensor,
    stride_ph: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_lt: tl.tensor,
    stride_lh: tl.tensor,
    stride_table: tl.tensor,
    stride_block: tl.tensor,
    stride_slot: tl.tensor,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one split of a sequence's tokens, for `BLOCK_M` of the heads. Grid (tiles of heads, splits, B).

    With `partial_ptr` (B, Hq, splits, R) fp32 and `partial_lse_ptr` (B, Hq, splits) fp32, base 2, the result is left to
    `decode_kernel.reduce_kernel`; else there is one split and the output is written.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    begin, end, _ = split_range(seq_len, None, split, num_splits, wanted_splits, most_tiles, BLOCK_N, MIN_TILES)
    if (begin >= end) & (split > 0):
        return
    table_ptr += seq * stride_table
    head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = head < NUM_HEADS
    q, pe, scale = _load_queries(
        q_ptr, seq * stride_qt + head * stride_qh, pe_ptr, seq * stride_pt + head * stride_ph, valid, scale,
        R, R_PAD, P, P_PAD, DOT_DTYPE,
    )  # fmt: skip
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, R_PAD], tl.float32)
    blocks = look_up_blocks(begin, end, table_ptr, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        in_bounds = start + tl.arange(0, BLOCK_N) < end
        rows = paged_rows(start, blocks, stride_block, stride_slot, BLOCK_SIZE, BLOCK_N)
        latent = load_tile(cache_ptr, rows, in_bounds, R, R_PAD, DOT_DTYPE, True)
        rotary = load_tile(cache_ptr + R, rows, in_bounds, P, P_PAD, DOT_DTYPE, True)
        products = tl.dot(q, tl.trans(latent), input_precision="ieee")
        products = tl.dot(pe, tl.trans(rotary), products, input_precision="ieee")
        values = tl.where(in_bounds[None, :], products, float("-inf"))
        weights, largest, total, acc = softmax_step(values, scale * LOG2_E, largest, total, acc, True)
        blocks = look_up_blocks(start + BLOCK_N, end, table_ptr, BLOCK_SIZE, BLOCK_N)
        acc = tl.dot(weights.to(DOT_DTYPE), latent, acc, input_precision="ieee")

    store_split(
        out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, acc, largest, total, cache_scale, seq, head, valid, split,
        num_splits, stride_ot, stride_oh, stride_lt, stride_lh, NUM_HEADS, R,
    )  # fmt: skip
