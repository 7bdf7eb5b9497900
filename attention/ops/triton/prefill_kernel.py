"""The prefill kernel: FlashAttention-2's forward pass over packed queries, keys paged or packed."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from attention.ops.triton.tiles import (
    LN_2,
    LOG2_E,
    load_queries,
    load_tile,
    logits,
    look_up_blocks,
    packed_rows,
    paged_rows,
    softmax_step,
    visible,
)


@triton.jit
def _attend(
    begin: tl.tensor,
    end: tl.tensor,
    q: tl.tensor,
    q_pos: tl.tensor,
    mask_rows: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    slope: tl.tensor | None,
    scale: tl.tensor,
    soft_cap: tl.tensor | None,
    window: tl.tensor | None,
    stride_block: tl.tensor,
    stride_kn: tl.tensor,
    stride_vn: tl.tensor,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the keys from `begin`, a multiple of `BLOCK_N`, to `end`.

    Unmasked, `end` is a multiple too and every query sees every key; masked, no query sees a key beyond `end`.
    """
    D_PAD: tl.constexpr = q.shape[1]
    blocks = 0
    if table_ptr is not None:
        blocks = look_up_blocks(begin, end, table_ptr, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        key_pos = start + tl.arange(0, BLOCK_N)
        in_bounds = key_pos < end
        if table_ptr is not None:
            k_rows = paged_rows(start, blocks, stride_block, stride_kn, BLOCK_SIZE, BLOCK_N)
            v_rows = k_rows
        else:
            k_rows = packed_rows(start, stride_kn, BLOCK_N)
            v_rows = packed_rows(start, stride_vn, BLOCK_N)
        k = load_tile(k_ptr, k_rows, in_bounds, D, D_PAD, DOT_DTYPE, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        values, factor = logits(products, scale, soft_cap, slope, q_pos, key_pos)
        if MASKED:
            seen = visible(q_pos, key_pos, end, window, CAUSAL, mask_ptr is not None)
            if mask_ptr is not None:
                cells = mask_ptr + (mask_rows[:, None] + key_pos[None, :])
                allowed = tl.load(cells, mask=in_bounds[None, :], other=0)
                seen = seen & (allowed != 0)
            values = tl.where(seen, values, float("-inf"))
        weights, largest, total, acc = softmax_step(values, factor, largest, total, acc, MASKED)
        v = load_tile(v_ptr, v_rows, in_bounds, D, D_PAD, DOT_DTYPE, MASKED)
        if table_ptr is not None:
            blocks = look_up_blocks(start + BLOCK_N, end, table_ptr, BLOCK_SIZE, BLOCK_N)
        acc = tl.dot(weights.to(DOT_DTYPE), v, acc, input_precision="ieee")
    return largest, total, acc


@triton.jit
def _key_ranges(
    first_pos: tl.tensor,
    last_pos: tl.tensor,
    seq_len: tl.tensor,
    window: tl.tensor | None,
    CAUSAL: tl.constexpr,
    CUSTOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Keys that queries of positions `first_pos` to `last_pos` see, cut at multiples of `BLOCK_N`.

    Returns:
        (begin, full, masked, end): from `full` to `masked` every query sees every key; on the sides only some do.
    """
    begin = 0
    full = 0
    end = seq_len
    masked = seq_len
    if CAUSAL and not CUSTOM:
        end = tl.minimum(seq_len, tl.maximum(last_pos + 1, 0))
        masked = tl.minimum(seq_len, tl.maximum(first_pos + 1, 0))
    if window is not None:
        begin = tl.minimum(tl.maximum(first_pos - window + 1, 0), end) // BLOCK_N * BLOCK_N
        full = tl.maximum(last_pos - window + BLOCK_N, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            end = tl.minimum(end, tl.maximum(last_pos + window, 0))
            masked = tl.minimum(masked, tl.maximum(first_pos + window, 0))
    masked = masked // BLOCK_N * BLOCK_N
    if CUSTOM:
        masked = tl.minimum(masked, 0)
    masked = tl.maximum(masked, begin)
    return begin, tl.minimum(tl.maximum(full, begin), masked), masked, end


@triton.jit(do_not_specialize=["window", "stride_table"])
def prefill_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor | None,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    cu_seqlens_k_ptr: tl.tensor | None,
    seq_lens_ptr: tl.tensor | None,
    table_ptr: tl.tensor | None,
    mask_ptr: tl.tensor | None,
    mask_offsets_ptr: tl.tensor | None,
    slopes_ptr: tl.tensor | None,
    sinks_ptr: tl.tensor | None,
    scale: tl.tensor,
    v_scale: tl.tensor,
    soft_cap: tl.tensor | None,
    window: tl.tensor | None,
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
    stride_vn: tl.tensor,
    stride_vh: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """One program: `BLOCK_M // HEADS` queries of one sequence, in `HEADS` of the `GROUP` heads of one KV head.

    Grid (tiles of queries, KV heads times tiles of their query heads, B). A tile's rows are its queries, each with
    its heads side by side, so that every tile of keys that is loaded serves all of them.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.program_id(0)
    if CAUSAL:  # the longest first
        tile = tl.num_programs(0) - 1 - tile
    kv_head = tl.program_id(1) // HEAD_TILES
    seq = tl.program_id(2)
    q_begin = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_begin
    if tile * BLOCK_Q >= q_len:
        return
    if table_ptr is None:
        k_begin = tl.load(cu_seqlens_k_ptr + seq)
        seq_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_begin
        k_ptr += k_begin.to(tl.int64) * stride_kn
        v_ptr += k_begin.to(tl.int64) * stride_vn
    else:
        seq_len = tl.load(seq_lens_ptr + seq)
        table_ptr += seq.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh

    rows = tl.arange(0, BLOCK_M)
    query = tile * BLOCK_Q + rows // HEADS
    group_head = tl.program_id(1) % HEAD_TILES * HEADS + rows % HEADS
    head = kv_head * GROUP + group_head
    valid = (query < q_len) & (rows < BLOCK_Q * HEADS) & (group_head < GROUP)
    token = (q_begin + query).to(tl.int64)
    q_pos = seq_len - q_len + query
    q, scale = load_queries(q_ptr, token * stride_qt + head * stride_qh, valid, scale, D, D_PAD, DOT_DTYPE)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # one more logit, with no value
        largest = tl.load(sinks_ptr + head, mask=valid, other=0.0) * LOG2_E
        total += 1.0
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0)
    mask_rows = None
    if mask_ptr is not None:
        mask_ptr += tl.load(mask_offsets_ptr + seq)
        mask_rows = tl.minimum(query, q_len - 1) * seq_len

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    first_pos = seq_len - q_len + tile * BLOCK_Q
    last_pos = tl.minimum(first_pos + BLOCK_Q, seq_len) - 1
    bounds = _key_ranges(first_pos, last_pos, seq_len, window, CAUSAL, mask_ptr is not None, BLOCK_N)
    for part in tl.static_range(3):  # keys that only some queries see, that all see, that only some see
        if ((part == 0) and (window is not None)) or (((part == 1) and (mask_ptr is None)) or (part == 2)):
            largest, total, acc = _attend(
                bounds[part], bounds[part + 1], q, q_pos, mask_rows, largest, total, acc, k_ptr, v_ptr, table_ptr,
                mask_ptr, slope, scale, soft_cap, window, stride_block, stride_kn, stride_vn, D, BLOCK_SIZE, BLOCK_N,
                DOT_DTYPE, CAUSAL, part != 1,
            )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    if lse_ptr is not None:
        lse = (largest + tl.log2(divisor)) * LN_2
        tl.store(lse_ptr + token * stride_lt + head * stride_lh, lse, mask=valid)
    acc = acc * (v_scale / divisor)[:, None]
    columns = tl.arange(0, D_PAD)
    out_ptrs = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (columns < D)[None, :])
