"""Prefill attention: many query tokens per sequence, over a paged cache or over packed keys.

The algorithm is FlashAttention-2 (Dao, 2023) with the query heads of a KV head packed into one tile.
"""

from __future__ import annotations

import torch
import triton

from attention.errors import AttentionInputError
from attention.ops.triton.launch import (
    MAX_OFFSET,
    check_cache,
    check_heads,
    check_indices,
    check_logits,
    check_span,
    device_traits,
    dot_dtype,
    kernel_view,
    on_device,
)
from attention.ops.triton.prefill_kernel import prefill_kernel
from attention.ops.triton.tuning import prefill_tile

_MAX_MASK_CELLS = MAX_OFFSET  # the kernel finds them by 32-bit offsets


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
    output: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    lse: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_offsets: torch.Tensor | None = None,
) -> None:
    """Attend over the paged cache, in which the batch's own keys and values lie already.

    Query r of a sequence has position `seq_len - query_len + r`: the queries are the sequence's last tokens. A query
    that sees no key gives zeros. Nothing here waits for the device.

    Args:
        query: (T, Hq, D) fp16, bf16 or fp32.
        kv_cache: (num_blocks, 2, block_size, Hkv, D), of the query's dtype or float8_e4m3fn.
        cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
        seq_lens: (B,) int32, keys of each sequence, those of the queries included.
        block_tables: (B, max_blocks) int32.
        max_query_len: of the longest sequence of queries; a larger one costs empty programs.
        output: (T, Hq, D), written.
        scale: multiplies q·k, positive.
        causal: whether a query sees only keys at or before its position; else every key.
        sliding_window: a query sees keys nearer than this: `i - j < window` if causal, else `|i - j| < window`.
        soft_cap: logits become `cap * tanh(logit / cap)`.
        alibi_slopes: (Hq,) fp32; `-slope * |i - j|` is added to a logit.
        sinks: (Hq,) fp32, one more logit of each head, without a value.
        k_scale: what stored keys are multiplied with.
        v_scale: what stored values are multiplied with.
        lse: (T, Hq) fp32, written: the natural logarithm of each softmax's denominator, -inf where no key is seen.
        mask: flat bool, True where a query sees a key, instead of the causal rule; sequence i's part is row-major
            (query_len, seq_len).
        mask_offsets: (B,) int64, where each sequence's part of `mask` begins.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    check_cache(kv_cache)
    check_indices(cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_tables=block_tables)
    if (mask is None) != (mask_offsets is None):
        raise AttentionInputError("mask and mask_offsets come together")
    if mask is not None:
        cells = min(mask.numel(), max_query_len * block_tables.shape[1] * kv_cache.shape[2])
        if cells > _MAX_MASK_CELLS:
            raise AttentionInputError(f"one sequence's mask may hold {cells} elements: at most {_MAX_MASK_CELLS}")
    _launch(
        query, kv_cache[:, 0], kv_cache[:, 1], cu_seqlens_q, None, seq_lens, block_tables, max_query_len, output,
        scale * k_scale, v_scale, causal, sliding_window, soft_cap, alibi_slopes, sinks, lse, mask, mask_offsets,
    )  # fmt: skip


def varlen_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_query_len: int,
    output: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Attend over packed keys and values: a prompt's first chunk, an encoder, cross attention.

    Args:
        query: (T, Hq, D) fp16, bf16 or fp32.
        key: (Tk, Hkv, D) of the query's dtype; may be a view of a fused projection.
        value: (Tk, Hkv, D) likewise.
        cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
        cu_seqlens_k: (B + 1,) int32, where each sequence's keys begin in Tk.
        max_query_len: of the longest sequence of queries; a larger one costs empty programs.
        output: (T, Hq, D), written.
        scale: see `paged_prefill`, as for all that follows.
        causal: whether a query sees only keys at or before its position; queries are the last tokens of the keys.
        sliding_window: a query sees keys nearer than this.
        soft_cap: logits become `cap * tanh(logit / cap)`.
        alibi_slopes: (Hq,) fp32.
        sinks: (Hq,) fp32.
        lse: (T, Hq) fp32, written.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    if key.shape != value.shape or key.ndim != 3 or key.stride(2) != 1 or value.stride(2) != 1:
        raise AttentionInputError(
            f"keys of shape {tuple(key.shape)} and values of {tuple(value.shape)}: needs (tokens, heads, head size), "
            "alike, the elements of a head contiguous"
        )
    check_indices(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_span("a token's keys", key, 2)
    check_span("a token's values", value, 2)
    _launch(
        query, key, value, cu_seqlens_q, cu_seqlens_k, None, None, max_query_len, output,
        scale, 1.0, causal, sliding_window, soft_cap, alibi_slopes, sinks, lse, None, None,
    )  # fmt: skip


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    block_tables: torch.Tensor | None,
    max_query_len: int,
    output: torch.Tensor,
    scale: float,
    v_scale: float,
    causal: bool,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
    mask: torch.Tensor | None,
    mask_offsets: torch.Tensor | None,
) -> None:
    """`key` and `value` are (..., keys, Hkv, D): packed, or one half of a paged cache each."""
    num_kv_heads, head_size = key.shape[-2:]
    check_heads(query, output, num_kv_heads, head_size)
    check_logits(scale, soft_cap, sliding_window)
    batch = cu_seqlens_q.shape[0] - 1
    if query.shape[0] == 0 or batch == 0 or max_query_len == 0:
        return
    group = query.shape[1] // num_kv_heads
    head_size_padded = max(16, triton.next_power_of_2(head_size))
    operands = dot_dtype(query.dtype, key.dtype)
    key, value = kernel_view(key), kernel_view(value)
    tile = prefill_tile(
        group * max_query_len,
        batch * num_kv_heads,
        head_size_padded,
        query.element_size(),
        key.element_size(),
        mask is not None,
        device_traits(query.device),
    )
    heads = min(group, tile.rows)
    grid = (-(-max_query_len // (tile.rows // heads)), num_kv_heads * -(-group // heads), batch)
    with on_device(query):
        prefill_kernel[grid](
            output, lse, query, key, value,
            cu_seqlens_q, cu_seqlens_k, seq_lens, block_tables,
            None if mask is None else mask.view(torch.uint8), mask_offsets, alibi_slopes, sinks,
            scale, v_scale, soft_cap, sliding_window,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1),
            0 if lse is None else lse.stride(0), 0 if lse is None else lse.stride(1),
            0 if block_tables is None else block_tables.stride(0), 0 if block_tables is None else key.stride(0),
            key.stride(-3), key.stride(-2), value.stride(-3), value.stride(-2),
            GROUP=group, HEADS=heads, D=head_size, D_PAD=head_size_padded,
            BLOCK_SIZE=1 if block_tables is None else key.shape[1], BLOCK_M=tile.rows, BLOCK_N=tile.keys,
            DOT_DTYPE=operands, CAUSAL=causal,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
