"""The prefill kernel of latent attention: FlashAttention-2's forward pass over keys of two parts.

Of a key one part belongs to its head, expanded from the latent, and the other, which is rotated, to all heads: the two
are read where they are, and never put together in memory.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from attention.ops.triton.tiles import LN_2, LOG2_E, load_tile, packed_rows, softmax_step


@triton.jit
def _attend(
    begin: tl.tensor,
    end: tl.tensor,
    q: tl.tensor,
    pe: tl.tensor,
    q_pos: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    key_ptr: tl.tensor,
    rotary_ptr: tl.tensor,
    value_ptr: tl.tensor,
    factor: tl.tensor,
    stride_kt: tl.tensor,
    stride_rt: tl.tensor,
    stride_vt: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the keys from `begin`, a multiple of `BLOCK_N`, to `end`: unmasked a multiple, and seen by all."""
    for start in tl.range(begin, end, BLOCK_N):
        key_pos = start + tl.arange(0, BLOCK_N)
        there = key_pos < end
        key_rows, rotary_rows = packed_rows(start, stride_kt, BLOCK_N), packed_rows(start, stride_rt, BLOCK_N)
        key = load_tile(key_ptr, key_rows, there, D, q.shape[1], DOT_DTYPE, MASKED)
        rotary = load_tile(rotary_ptr, rotary_rows, there, P, pe.shape[1], DOT_DTYPE, MASKED)
        products = tl.dot(q, tl.trans(key), input_precision="ieee")
        products = tl.dot(pe, tl.trans(rotary), products, input_precision="ieee")
        if MASKED:
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (key_pos[None, :] <= q_pos[:, None])
            products = tl.where(seen, products, float("-inf"))
        weights, largest, total, acc = softmax_step(products, factor, largest, total, acc, MASKED)
        value = load_tile(value_ptr, packed_rows(start, stride_vt, BLOCK_N), there, V, acc.shape[1], DOT_DTYPE, MASKED)
        acc = tl.dot(weights.to(DOT_DTYPE), value, acc, input_precision="ieee")
    return largest, total, acc


@triton.jit
def latent_prefill_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    rotary_ptr: tl.tensor,
    value_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    cu_seqlens_k_ptr: tl.tensor,
    scale: tl.tensor,
    stride_qt: tl.tensor,
    stride_qh: tl.tensor,
    stride_kt: tl.tensor,
    stride_kh: tl.tensor,
    stride_rt: tl.tensor,
    stride_vt: tl.tensor,
    stride_vh: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_lt: tl.tensor,
    stride_lh: tl.tensor,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """One program: `BLOCK_M` queries of one sequence in one head. Grid (tiles of queries, Hq, B)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first, where attention is causal
    head = tl.program_id(1).to(tl.int64)
    seq = tl.program_id(2)
    q_begin = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_begin
    if tile * BLOCK_M >= q_len:
        return
    k_begin = tl.load(cu_seqlens_k_ptr + seq)
    k_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_begin
    key_ptr += k_begin.to(tl.int64) * stride_kt + head * stride_kh
    rotary_ptr += k_begin.to(tl.int64) * stride_rt
    value_ptr += k_begin.to(tl.int64) * stride_vt + head * stride_vh

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < q_len
    token = (q_begin + query).to(tl.int64)
    q_pos = k_len - q_len + query
    q_rows = token * stride_qt + head * stride_qh
    q = load_tile(q_ptr, q_rows, valid, D, D_PAD, DOT_DTYPE, True)
    pe = load_tile(q_ptr + D, q_rows, valid, P, P_PAD, DOT_DTYPE, True)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    end = k_len
    full = k_len
    if CAUSAL:
        first_pos = k_len - q_len + tile * BLOCK_M
        end = tl.minimum(k_len, tl.maximum(first_pos + BLOCK_M, 0))
        full = tl.minimum(k_len, tl.maximum(first_pos + 1, 0))
    full = full // BLOCK_N * BLOCK_N
    largest, total, acc = _attend(
        0, full, q, pe, q_pos, largest, total, acc, key_ptr, rotary_ptr, value_ptr, scale * LOG2_E,
        stride_kt, stride_rt, stride_vt, D, P, V, BLOCK_N, DOT_DTYPE, CAUSAL, False,
    )  # fmt: skip
    largest, total, acc = _attend(
        full, end, q, pe, q_pos, largest, total, acc, key_ptr, rotary_ptr, value_ptr, scale * LOG2_E,
        stride_kt, stride_rt, stride_vt, D, P, V, BLOCK_N, DOT_DTYPE, CAUSAL, True,
    )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    if lse_ptr is not None:
        tl.store(lse_ptr + token * stride_lt + head * stride_lh, (largest + tl.log2(divisor)) * LN_2, mask=valid)
    acc = acc / divisor[:, None]
    columns = tl.arange(0, V_PAD)
    out_ptrs = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (columns < V)[None, :])
